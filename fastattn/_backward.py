"""Gradients of attention.

A call becomes a problem as in the forward pass; `_core` computes its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _core, _results, _validate
from fastattn._core import Problem
from fastattn._options import (
    BY_NAME,
    NAMES,
    AttentionOptions,
    Window,
    given,
    refuse_unknown,
    set_named,
)
from fastattn._problem import of_arrays
from fastattn._results import place_results, read_results
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
    window: Window | None = None,
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
    options = given(locals())
    return _gradients(grad_out, q, k, v, (out, lse), None, grad_lse, needs, options)


def attention_and_kept(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, **options: Any
) -> tuple[Array, Array, Kept]:
    """`attention` with ``return_lse=True``, and what its backward pass can use besides."""
    refuse_unknown("attention_and_kept", options, AttentionOptions.__annotations__)
    problem = of_arrays(q, k, v)
    set_named(problem, options)
    out, lse = place_results(problem, options.get("out"), True)
    assert lse is not None
    exact = None
    has_exact_out = out.dtype == lse.dtype and problem.residual is None
    if not (has_exact_out or problem.softmax_over_queries):
        exact = _results.allocate(out.shape, lse.dtype)
    kept = Kept(_results.allocate((*lse.shape, 2), lse.dtype), exact)
    _give_kept(problem, kept)
    _core.attention(problem)
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
    refuse_unknown("attention_backward_of_kept", options, NAMES)
    return _gradients(grad_out, q, k, v, (out, lse), kept, grad_lse, needs, options)


def _give_kept(problem: Problem, kept: Kept) -> None:
    problem.weighing = problem.with_heads(kept.weighing)
    if kept.exact is not None:
        problem.exact = problem.with_heads(kept.exact)


def _gradients(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    made: tuple[ArrayLike, ArrayLike],
    kept: Kept | None,
    grad_lse: ArrayLike | None,
    needs: Sequence[str],
    options: dict[str, Any],
) -> Gradients:
    """The gradients of `attention_backward`, from the options of `attention`."""
    # Converted here, once: the gradients are of these very arrays' shapes and dtypes.
    operands = {name: _validate.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    options = as_arrays(options)
    problem = of_arrays(**operands)
    set_named(problem, options)
    read_results(problem, *made)
    if kept is not None:
        _give_kept(problem, kept)
    return compute_gradients(problem, operands, grad_out, grad_lse, needs, options)


def as_arrays(options: dict[str, Any]) -> dict[str, Any]:
    """Options whose gradients may be wanted, as the arrays whose shapes and dtypes these have."""
    return {
        name: _validate.as_array(name, x) if BY_NAME[name].gradient and x is not None else x
        for name, x in options.items()
    }


def _wanted(needs: Sequence[str], **optional: ArrayLike | None) -> frozenset[str]:
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
    problem: Problem,
    operands: dict[str, Array],
    grad_out: ArrayLike,
    grad_lse: ArrayLike | None,
    needs: Sequence[str],
    options: dict[str, Any],
) -> Gradients:
    """The gradients that are wanted of a problem that knows the results of its forward pass.

    `operands` are q, k and v as they were before they were broadcast, with the core's axes, and
    `options` those that were given, of `as_arrays`.
    """
    bias: Any = options.get("bias")
    sinks: Any = options.get("sinks")
    wanted = _wanted(needs, bias=bias, sinks=sinks)
    for name, width in (("q", problem.q_shape[-1]), ("v", problem.head_dim_v)):
        if width > MAX_HEAD_DIM:
            of = "head_dim" if name == "q" else "head_dim_v"
            raise ValueError(
                f"`{name}` must have {of} at most {MAX_HEAD_DIM} for gradients, got {width}"
            )
    lse_dtype = _validate.lse_dtype(problem.dtype)
    grad = _validate.exact_array("grad_out", grad_out, problem.out_shape, problem.dtype)
    to_core: dict[str, Array] = {"grad_out": problem.as_in_core(_validate.core_view(grad))}
    if grad_lse is not None:
        checked = _validate.exact_array("grad_lse", grad_lse, problem.lse_shape, lse_dtype)
        to_core["grad_lse"] = problem.with_heads(checked)
    grad_bias = None
    if "bias" in wanted:
        grad_bias = _zeros(bias.shape, np.promote_types(lse_dtype, bias.dtype))
        if problem.bias is not None:
            to_core["grad_bias"] = _as_broadcast(grad_bias, problem.bias.shape)
    if 0 in problem.q_shape[:-1] or not (
        "sinks" in wanted
        or "grad_bias" in to_core
        or any(operands[x].size for x in wanted & set(operands))
    ):
        grads = _no_gradients(wanted, operands, problem.sinks, sinks)
    else:
        if "sinks" in wanted:
            terms_shape = (*problem.q_shape[:-2], problem.seqlen_q)
            to_core["sink_terms"] = _results.allocate(terms_shape, np.dtype(np.float64))
        finish: dict[str, Callable[[], Array]] = {}
        full = {"q": problem.q, "k": problem.k, "v": problem.v}
        places = {name: _Place(x, full[name], lse_dtype) for name, x in operands.items()}
        # One dtype for all three, in the core: where one is summed, all are in the accumulator's.
        exact = all(place.is_whole for name, place in places.items() if name in wanted)
        for name, place in places.items():
            if name in wanted:
                to_core[f"grad_{name}"], finish[name] = place.allocate(exact)
        _core.attention_backward(problem, **to_core)
        grads = {name: done() for name, done in finish.items()}
        if "sinks" in wanted:
            grads["sinks"] = _sum_of_terms(to_core["sink_terms"], sinks.dtype)
    if grad_bias is not None:
        grads["bias"] = round_once(grad_bias, bias.dtype)
    return Gradients(**{name: grads.get(name) for name in Gradients._fields})


def _no_gradients(
    wanted: frozenset[str],
    operands: dict[str, Array],
    core_sinks: Array | None,
    sinks: Array | None,
) -> dict[str, Array]:
    """Zeros, of a call without rows or without an element that has a gradient: its other sizes may
    be anything."""
    zeros = {
        name: _results.empty_result(x, x.shape) for name, x in operands.items() if name in wanted
    }
    if "sinks" in wanted and core_sinks is not None and sinks is not None:
        zeros["sinks"] = _results.allocate(core_sinks.shape, _gradient_dtype(sinks.dtype))
    for gradient in zeros.values():
        gradient.fill(0)
    return zeros


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
            result = _results.empty_result(given, given.shape)
            missing = (np.newaxis,) * (len(self.shape) - given.ndim)
            return _validate.core_view(result)[missing], lambda: result
        whole = _results.allocate(self.shape, self.accumulator)

        @in_default_float_mode
        def summed() -> Array:
            total = whole.sum(axis=self.axes, dtype=np.float64) if self.axes else whole
            return round_once(total.reshape(given.shape), given.dtype)

        return whole, summed


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    array = _results.allocate(shape, dtype)
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
