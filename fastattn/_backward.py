"""Gradients of attention.

Like its forward pass, it validates in ``_validate.py`` and computes in C, behind ``_core``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _core, _validate
from fastattn._attention import attention
from fastattn._rounding import in_default_float_mode, round_once
from fastattn.reference import Gradients

Array = NDArray[Any]

# The core keeps whole rows of a key block's gradients in its workspace (FA_MAX_BACKWARD_DIM).
MAX_HEAD_DIM = 1024


class Kept(NamedTuple):
    """What a forward pass knew that its backward pass would have to compute again, in lse's dtype.

    `attention_and_kept` returns it for `attention_backward_of_kept`, and `fastattn.torch` keeps it
    between the two; csrc/fastattn.h says what the numbers are.
    """

    weighing: Array  #: of lse's shape and one more axis, shift and factor
    exact: Array | None  #: the result before residual and rounding; None: those left it as it was


def attention_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    causal: bool = False,
    window: _validate.Window | None = None,
    q_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    segment_ids: Sequence[ArrayLike] | None = None,
    sinks: ArrayLike | None = None,
    softmax_axis: Literal["keys", "queries"] = "keys",
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    residual: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    needs: Sequence[str] = Gradients._fields,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `attention`, in linear memory.

    The weights are computed again, block by block, from the scores and `lse`; where that one number
    does not tell them exactly enough, from the maximum and the sum of their row, which are computed
    again too.  The score matrix never exists.  The result has the same bits for any `num_threads`,
    and for strided views or their copies.

    Parameters
    ----------
    grad_out : array_like, (..., num_heads, seqlen_q, head_dim_v)
        Gradient of some loss by the result, of q's dtype.
    q, k, v : array_like
        The inputs of the forward call; see `attention`.  `head_dim` and `head_dim_v` are at most
        1024.
    out, lse : array_like
        What the forward call returned, with ``return_lse=True``; or, for a call over some of the
        keys, what `merge_attention` made of that and of the calls over the others.
    scale, softcap, bias, alibi_slopes, mask, causal, window, q_offset, kv_lengths, segment_ids, \
sinks, softmax_axis, dropout_p, dropout_seed : optional
        The options of the forward call; see `attention`, also for the axes of `mask` and `bias`, of
        which one of (batch, seqlen_k) is ``mask[:, None, None, :]``.
    residual : array_like, optional
        That of the forward call: `out` minus `residual` is what the gradients need.  The gradient
        by `residual` is `grad_out`.
    grad_lse : array_like of lse's shape and dtype, optional
        Gradient of the loss by `lse`, where it depends on that too.
    needs : sequence of str, optional
        Which gradients to compute, of "q", "k", "v", "bias" and "sinks".  Default: those of all
        arguments that are given.
    num_threads : int, optional
        The most threads to work with; see `attention`.

    Returns
    -------
    Gradients
        A named tuple of arrays `q`, `k`, `v`, `bias` and `sinks`, each with the shape and dtype of
        its argument (`sinks` in float64 if they are integers), and None where it is not needed or
        the argument is not given.  Where an argument was broadcast or a key head shared, the
        gradient is the sum.

    Raises
    ------
    TypeError
        An argument has the wrong dtype or kind; the message names it.
    ValueError
        An argument has the wrong shape or value; the message names it.
    MemoryError
        The result or the workspace cannot be allocated.

    See Also
    --------
    attention : The forward pass.
    attention_varlen_backward : Gradients of packed sequences.

    Notes
    -----
    Each gradient is accumulated in float32 (float64 for float64 inputs), over blocks in an order
    that depends on the shapes alone, and rounded once.  Keys that do not take part get gradient 0
    and change none, whatever they hold; so does a query without keys.

    Heads whose scores, sums or gradients leave the range of float32 are computed again in float64:
    a gradient is infinite only where its own dtype cannot hold it.  float64 inputs are computed
    again with `grad_out` divided by ``2**64``, so that their sums may pass the range on the way;
    scores, and products of `grad_out` and `v`, that float64 cannot hold give what they give in
    the reference.

    Memory, beyond inputs and results: up to 3 float32 arrays (one for each 1024 keys) of the size
    of q's heads that read `num_threads` + 1 key heads, five numbers per query and head (with
    `sinks`, else four), and a workspace per thread.  Heads that are computed again, twice as much
    more, and with `bias` 64 float64 numbers per query and thread.  A gradient whose argument was
    broadcast along leading dimensions is computed at the full shape and summed in float64.  The
    gradient by `bias` costs two more matrix products.

    References
    ----------
    T. Dao et al., "FlashAttention", 2022, https://arxiv.org/abs/2205.14135, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, grad_out = rng.standard_normal((4, 2, 16, 8))
    >>> out, lse = fa.attention(q, k, v, causal=True, return_lse=True)
    >>> grads = fa.attention_backward(grad_out, q, k, v, out, lse, causal=True)
    >>> grads.q.shape, grads.bias is None
    ((2, 16, 8), True)
    >>> expected = fa.reference.attention_backward(grad_out, q, k, v, causal=True)
    >>> bool(np.allclose(grads.k, expected.k))
    True
    """
    return _gradients(
        grad_out,
        q,
        k,
        v,
        (out, lse),
        None,
        grad_lse=grad_lse,
        needs=needs,
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        mask=mask,
        causal=causal,
        window=window,
        q_offset=q_offset,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        sinks=sinks,
        softmax_axis=softmax_axis,
        residual=residual,
        num_threads=num_threads,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )


def attention_and_kept(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, **options: Any
) -> tuple[Array, Array, Kept]:
    """`attention` with ``return_lse=True``, and what its backward pass can use besides."""
    all_options: dict[str, Any] = {
        **(attention.__kwdefaults__ or {}),
        **options,
        "return_lse": True,
    }
    arguments, out, lse = _validate.core_arguments(q, k, v, **all_options)
    assert lse is not None
    call = dict(zip(_validate.CORE_ARGUMENTS, arguments, strict=True))
    kept = Kept(_validate.allocate((*lse.shape, 2), lse.dtype), None)
    has_exact_out = out.dtype == lse.dtype and call["residual"] is None
    if not (has_exact_out or call["softmax_over_queries"]):
        kept = kept._replace(exact=_validate.allocate(out.shape, lse.dtype))
    call |= _core_kept(call, kept)
    _core.attention(**call)
    return out, lse, kept


def attention_backward_of_kept(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    kept: Kept,
    *,
    grad_lse: ArrayLike | None = None,
    needs: Sequence[str] = Gradients._fields,
    **options: Any,
) -> Gradients:
    """`attention_backward` of what `attention_and_kept` returned for the same arguments."""
    all_options = {**(attention.__kwdefaults__ or {}), **options}
    del all_options["out"], all_options["return_lse"]
    made = (out, lse)
    return _gradients(grad_out, q, k, v, made, kept, grad_lse=grad_lse, needs=needs, **all_options)


def _core_kept(call: dict[str, Any], kept: Kept) -> dict[str, Array]:
    """The arrays of `kept` as arguments of the core."""
    arrays = {"weighing": _with_heads(call["lse"].ndim + 1, kept.weighing)}
    if kept.exact is not None:
        arrays["exact"] = _with_heads(call["out"].ndim, kept.exact)
    return arrays


def _gradients(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    made: tuple[ArrayLike, ArrayLike],
    kept: Kept | None,
    *,
    grad_lse: ArrayLike | None,
    needs: Sequence[str],
    bias: ArrayLike | None,
    sinks: ArrayLike | None,
    **options: Any,
) -> Gradients:
    """The gradients of `attention_backward`, from all options of `attention`."""
    wanted = wanted_gradients(needs, bias=bias, sinks=sinks)
    # Converted here, once: the gradients are of these very arrays' shapes and dtypes.
    given = {name: _validate.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    given_bias = None if bias is None else _validate.float_array("bias", bias)
    given_sinks = None if sinks is None else _validate.as_array("sinks", sinks)
    arguments, result, result_lse = _validate.core_arguments(
        given["q"],
        given["k"],
        given["v"],
        **options,
        bias=given_bias,
        sinks=given_sinks,
        return_lse=False,
        out=None,
        made=made,
    )
    call = dict(zip(_validate.CORE_ARGUMENTS, arguments, strict=True))
    if kept is not None:
        call |= _core_kept(call, kept)
    grad_bias = None
    if given_bias is not None and "bias" in wanted:
        grad_bias = _zeros(given_bias.shape, np.promote_types(call["lse"].dtype, given_bias.dtype))
        if call["bias"] is not None:
            call["grad_bias"] = _as_broadcast(grad_bias, call["bias"].shape)
    sinks_dtype = None if given_sinks is None else given_sinks.dtype
    grads = compute_gradients(
        call, wanted, given, (result, result_lse), grad_out, grad_lse, sinks_dtype
    )
    if grad_bias is not None and given_bias is not None:
        grads = grads._replace(bias=round_once(grad_bias, given_bias.dtype))
    return grads


def wanted_gradients(needs: Sequence[str], **optional: ArrayLike | None) -> frozenset[str]:
    """The names in `needs`, less those of arguments that are not given."""
    if isinstance(needs, str):
        raise TypeError(f"`needs` must be a sequence of names, got the str {needs!r}")
    names = frozenset(needs)
    unknown = sorted(str(name) for name in names.difference(Gradients._fields))
    if unknown:
        listed = ", ".join(f'"{name}"' for name in Gradients._fields)
        raise ValueError(f'`needs` must hold names out of {listed}, got "{unknown[0]}"')
    return names.difference(name for name, x in optional.items() if x is None)


def compute_gradients(
    call: dict[str, Any],
    wanted: frozenset[str],
    given: dict[str, Array],
    made: tuple[Array, Array | None],
    grad_out: ArrayLike,
    grad_lse: ArrayLike | None,
    sinks_dtype: np.dtype[Any] | None,
) -> Gradients:
    """Compute what is wanted but the gradient by `bias`, which `call` has a place for.

    `given` are q, k and v as the call's operands were before they were broadcast.
    """
    for name, width in (("q", call["q_shape"][-1]), ("v", call["head_dim_v"])):
        if width > MAX_HEAD_DIM:
            of = "head_dim" if name == "q" else "head_dim_v"
            raise ValueError(
                f"`{name}` must have {of} at most {MAX_HEAD_DIM} for gradients, got {width}"
            )
    out, lse = made
    grad = _validate.exact_array("grad_out", grad_out, out.shape, out.dtype)
    call["grad_out"] = _with_heads(call["out"].ndim, _validate.core_view(grad))
    if grad_lse is not None and lse is not None:
        checked = _validate.exact_array("grad_lse", grad_lse, lse.shape, lse.dtype)
        call["grad_lse"] = _with_heads(call["lse"].ndim, checked)
    if "sinks" not in wanted:
        sinks_dtype = None
    has_more = sinks_dtype is not None or "grad_bias" in call
    if 0 in call["q"].shape[:-1] or not (
        has_more or any(given[x].size for x in wanted & set(given))
    ):
        return _no_gradients(wanted, given, call["sinks"], sinks_dtype)
    if sinks_dtype is not None:
        call["sink_terms"] = _validate.allocate(call["lse"].shape, np.dtype(np.float64))

    finish: dict[str, Callable[[], Array]] = {}
    places = {name: _Place(given[name], call[name], call["lse"].dtype) for name in given}
    # One dtype for all three, in the core: where one is summed, all are in the accumulator's.
    exact = all(place.is_whole for name, place in places.items() if name in wanted)
    for name, place in places.items():
        if name in wanted:
            call[f"grad_{name}"], finish[name] = place.allocate(exact)
    _core.attention_backward(**call)
    grads = {name: done() for name, done in finish.items()}
    if sinks_dtype is not None:
        grads["sinks"] = _sum_of_terms(call["sink_terms"], sinks_dtype)
    return Gradients(**{name: grads.get(name) for name in Gradients._fields})


def _no_gradients(
    wanted: frozenset[str],
    given: dict[str, Array],
    sinks: Array | None,
    sinks_dtype: np.dtype[Any] | None,
) -> Gradients:
    """Zeros, of a call without rows or without an element that has a gradient: its other sizes may
    be anything."""
    zeros = {
        name: _validate.empty_result(x, x.shape) for name, x in given.items() if name in wanted
    }
    if sinks is not None and sinks_dtype is not None:
        zeros["sinks"] = _validate.allocate(sinks.shape, _gradient_dtype(sinks_dtype))
    for gradient in zeros.values():
        gradient.fill(0)
    return Gradients(**{name: zeros.get(name) for name in Gradients._fields})


class _Place:
    """Where the gradient by q, k or v goes: an array of the argument's shape, or, where that was
    broadcast, one of the full shape, to be summed."""

    def __init__(self, given: Array, full: Array, accumulator: np.dtype[Any]) -> None:
        self.given = given
        self.accumulator = accumulator
        self.shape = full.shape
        self.padded = (1,) * (full.ndim - given.ndim) + given.shape
        self.axes = tuple(i for i, n in enumerate(self.padded) if n == 1 and self.shape[i] != 1)
        self.is_whole = not self.axes

    def allocate(self, exact: bool) -> tuple[Array, Callable[[], Array]]:
        """What the core writes to, and what makes the gradient of it."""
        given = self.given
        if exact or (self.is_whole and given.dtype == self.accumulator):
            result = _validate.empty_result(given, given.shape)
            missing = (np.newaxis,) * (len(self.shape) - given.ndim)
            return _validate.core_view(result)[missing], lambda: result
        whole = _validate.allocate(self.shape, self.accumulator)

        @in_default_float_mode
        def summed() -> Array:
            total = whole.sum(axis=self.axes, dtype=np.float64) if self.axes else whole
            return round_once(total.reshape(given.shape), given.dtype)

        return whole, summed


def _with_heads(ndim: int, array: Array) -> Array:
    """`array` with the head axis that the core's array has and the caller's may not have."""
    return array[(np.newaxis,) * (ndim - array.ndim)]


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    array = _validate.allocate(shape, dtype)
    array.fill(0)
    return array


def _as_broadcast(array: Array, shape: tuple[int, ...]) -> Array:
    """A writeable view whose elements are added to where `array` is broadcast."""
    strides = np.broadcast_to(array, shape).strides
    return np.lib.stride_tricks.as_strided(array, shape, strides)


@in_default_float_mode
def _sum_of_terms(terms: Array, sinks_dtype: np.dtype[Any]) -> Array:
    """The gradient of each head's sink from what its rows add to it."""
    heads = range(terms.shape[-2])
    total = np.array([terms[..., head, :].sum(dtype=np.float64) for head in heads], np.float64)
    return round_once(total, _gradient_dtype(sinks_dtype))


def _gradient_dtype(sinks_dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Of the gradient by sinks of a dtype."""
    integers = sinks_dtype.kind in "iu" or np.can_cast(sinks_dtype, np.int64)  # of ml_dtypes, too
    return np.dtype(np.float64) if integers else sinks_dtype
