"""The functions that compute attention, with their documentation.

A call becomes a problem (``_problem.py``) with options (``_options.py``) and places for results
(``_results.py``), which `_core` hands to C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _core, _validate
from fastattn._options import (
    AttentionOptions,
    LayerOptions,
    Window,
    refuse_unknown,
    set_options,
)
from fastattn._problem import of_arrays
from fastattn._results import check_out, empty_result, place_results, refuse_overlap
from fastattn._rounding import round_once

Array = NDArray[Any]


@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Array: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Array, Array]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> Array | tuple[Array, Array]: ...
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
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
    return_lse: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array | tuple[Array, Array]:
    """Exact attention, ``softmax(scale * q @ k.T) @ v (+ residual)``, in linear memory.

    The scores are computed block by block and never stored; blocks that no query may look at are
    not computed.  The result has the same bits for any `num_threads`, any batch composition, and
    strided views or their copies.

    Parameters
    ----------
    q : array_like, (..., num_heads, seqlen_q, head_dim)
        Queries, float32, float64, float16 or bfloat16 (``ml_dtypes.bfloat16``).
    k : array_like, (..., num_kv_heads, seqlen_k, head_dim)
        Keys, of q's dtype.  ``num_kv_heads`` divides ``num_heads``: query head ``h`` reads key
        head ``h // (num_heads // num_kv_heads)`` (grouped-query attention, nothing is repeated).
    v : array_like, (..., num_kv_heads, seqlen_k, head_dim_v)
        Values, of q's dtype.
    scale : float, optional
        Factor of the products ``q @ k.T``, any finite number.  Default: ``1 / sqrt(head_dim)``.
    softcap : float, optional
        Bound on the scores, greater than 0: ``softcap * tanh(score / softcap)``.
    bias : array_like, broadcastable to (..., num_heads, seqlen_q, seqlen_k), optional
        Added to the scores, after `softcap`; of any of q's dtypes, whatever q's own is.  Where it
        is -inf, the key takes no part for that query, as with `mask`.  Its axes are as `mask`'s.
    alibi_slopes : array_like, (num_heads,) or broadcastable to (..., num_heads), optional
        Adds ``-slope * abs(i + q_offset - j)`` to the score of query ``i`` and key ``j``.
    mask : array_like of bool, broadcastable to (..., num_heads, seqlen_q, seqlen_k), optional
        True = this key takes part for this query.  Which axis is which: "Masks and biases" below;
        one of (batch, seqlen_k) is ``mask[:, None, None, :]``.
    causal : bool, optional
        Query ``i`` sees keys ``j <= i + q_offset`` only (drawn below).
    window : pair of int or None, optional
        ``(left, right)``: query ``i`` sees keys
        ``i + q_offset - left <= j <= i + q_offset + right`` only.  None is an open side.
    q_offset : int or array_like of int, broadcastable to the leading dimensions, optional
        Position of query 0 among the keys, any integer.  Default: the last query stands at the
        last valid key, ``seqlen_k - seqlen_q`` or ``kv_lengths - seqlen_q``.
    kv_lengths : int or array_like of int, broadcastable to the leading dimensions, optional
        Number of valid keys, 0 to seqlen_k; the keys after them do not take part.
    segment_ids : pair of array_like of int, optional
        ``(q_ids, k_ids)``, broadcastable to (..., seqlen_q) and (..., seqlen_k): a query sees the
        keys with its own id only.
    sinks : array_like, (num_heads,), optional
        One more score per head, which joins the sum of each softmax and has no value.  With
        ``softmax_axis="keys"`` only.
    softmax_axis : {"keys", "queries"}, optional
        The weights of each query sum to one over the keys, or the weights of each key sum to one
        over the queries.
    dropout_p : float, optional
        Share of the weights that are set to 0, 0 to 1; the others are divided by ``1 - dropout_p``.
        `lse` is that of the weights before.
    dropout_seed : int, optional
        0 to 2**64 - 1, required with `dropout_p`: with the same seed, the weight of a (batch entry,
        head, query, key) is dropped or kept whatever the rest of the call is.
    residual : array_like of q's dtype and the result's shape, optional
        Added to the result; may be the same array as `out`.
    return_lse : bool, optional
        Whether to return `lse` too.
    out : ndarray of q's dtype and the result's shape, optional
        Where to write the result, with any strides.  It may not overlap the inputs, unless it is
        the same array as `residual`.
    num_threads : int, optional
        The most threads to work with, at least 1.  Default: the environment's
        FASTATTN_NUM_THREADS or OMP_NUM_THREADS, else the CPUs that this process may use.  Fewer
        work where the work pays for fewer, where other Python threads call too, or where the
        system has no more.

    Returns
    -------
    out : ndarray, (..., num_heads, seqlen_q, head_dim_v)
        In q's dtype, its axes in memory in the order of q's; `out` itself if it was given.
    lse : ndarray, (..., num_heads, seqlen_q), or (..., num_heads, seqlen_k) over the queries
        Natural logarithm of the sum that the softmax divides by, with `return_lse`; float64 for
        float64 input, else float32.

    Raises
    ------
    TypeError
        An argument has the wrong dtype or kind; the message names it.
    ValueError
        An argument has the wrong shape or value; the message names it.
    MemoryError
        The result or the workspace cannot be allocated.
    RuntimeError
        In a forked child only: a signal handler called ``os.fork()`` during this call, and threads
        of the parent had a part of it.  The next call of the child is as any other.

    See Also
    --------
    self_attention : ``x + attention(x, x, x)``, fused.
    merge_attention : One result from several over parts of the keys.
    explain : What a call would run.

    Notes
    -----
    **Shapes.**  A 2-D array is one head.  Leading dimensions broadcast as in NumPy, without copies.

    ===========================  ==========================  ===========================
    q                            k (and v)                   result
    ===========================  ==========================  ===========================
    (seqlen_q, head_dim)         (seqlen_k, head_dim)        (seqlen_q, head_dim_v)
    (heads, seqlen_q, head_dim)  (seqlen_k, head_dim)        (heads, seqlen_q, ..)
    (batch, 8, seqlen_q, ..)     (batch, 8, seqlen_k, ..)    (batch, 8, seqlen_q, ..)
    (batch, 8, seqlen_q, ..)     (batch, 2, seqlen_k, ..)    (batch, 8, seqlen_q, ..)
    (batch, 8, seqlen_q, ..)     (8, seqlen_k, ..)           (batch, 8, seqlen_q, ..)
    ===========================  ==========================  ===========================

    A result without elements comes at once, however large the other sizes are.

    Any strides do, also zero and negative ones: ``x.reshape(batch, seqlen, heads, head_dim)
    .swapaxes(1, 2)`` is read in place, and gives a result that is laid out the same way.

    **Masks and biases.**  Axes are counted from the last one, as NumPy broadcasts, whatever else
    their lengths would fit.  With as many batch entries as queries, (batch, seqlen_k) has the shape
    of (seqlen_q, seqlen_k) and is read as that; with as many batch entries as heads, (batch,
    seqlen_q, seqlen_k) is read as (heads, seqlen_q, seqlen_k).  For q of (batch, heads, seqlen_q,
    head_dim), a mask or bias of each number of dimensions has one value for each

    ==========  =======================================  ========================================
    dimensions  shape                                    one value for each
    ==========  =======================================  ========================================
    0           ()                                       call
    1           (seqlen_k,)                              key
    2           (seqlen_q, seqlen_k)                     query and key
    3           (heads, seqlen_q, seqlen_k)              head, query and key
    4           (batch, heads, seqlen_q, seqlen_k)       batch entry, head, query and key
    ==========  =======================================  ========================================

    An axis of length 1 has one value for all.  What has other axes gets those it lacks:

    ===========================  =========================  ================================
    an array of                  is passed as               of shape
    ===========================  =========================  ================================
    (batch, seqlen_k)            ``x[:, None, None, :]``    (batch, 1, 1, seqlen_k)
    (batch, seqlen_q, seqlen_k)  ``x[:, None, :, :]``       (batch, 1, seqlen_q, seqlen_k)
    (batch, heads, seqlen_k)     ``x[:, :, None, :]``       (batch, heads, 1, seqlen_k)
    (heads, seqlen_k)            ``x[:, None, :]``          (heads, 1, seqlen_k)
    (seqlen_q,)                  ``x[:, None]``             (seqlen_q, 1)
    ===========================  =========================  ================================

    For q of (heads, seqlen_q, head_dim) the scores have no batch axis, for 2-D q, k and v no head
    axis either; more dimensions than the scores have are refused.

    **Order.**  The score of query i and key j is ``scale * q_i @ k_j``, then `softcap`, then plus
    `bias` and ALiBi.  Then `mask`, `causal`, `window`, `kv_lengths`, `segment_ids` and a `bias` of
    -inf take keys out of the softmax altogether: whatever those keys and values hold, NaN included,
    changes nothing.  A query (over the queries: a key) with no key left, or with every score -inf,
    gets 0 (plus `residual`) and lse -inf, or its sink as lse.  A score of NaN or +inf makes NaN of
    its own softmax alone.

    **16-bit types.**  Elements are widened block by block as they are read, everything is computed
    in float32, and each result is rounded once, to nearest, ties to even.

    **Causal.**  ``x`` marks what takes part.  By default the last query sees the last key
    ("bottom-right", what decoding needs); ``q_offset=0`` is "top-left"::

        seqlen_q 3, seqlen_k 5        seqlen_q 5, seqlen_k 3

        default     q_offset=0        default     q_offset=0
        x x x . .   x . . . .         . . .       x . .
        x x x x .   x x . . .         . . .       x x .
        x x x x x   x x x . .         x . .       x x x
                                      x x .       x x x
                                      x x x       x x x

    With ``window=(1, 0)`` instead of `causal`, each query sees one key back and its own::

        . x x . .   x . . . .         . . .       x . .
        . . x x .   x x . . .         . . .       x x .
        . . . x x   . x x . .         x . .       . x x
                                      x x .       . . x
                                      . x x       . . .

    References
    ----------
    Softmax in blocks: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018,
    https://arxiv.org/abs/1805.02867; T. Dao et al., "FlashAttention", 2022,
    https://arxiv.org/abs/2205.14135.  Grouped heads: J. Ainslie et al., 2023,
    https://arxiv.org/abs/2305.13245.  ALiBi: O. Press et al., 2022,
    https://arxiv.org/abs/2108.12409.  Sinks: G. Xiao et al., 2023,
    https://arxiv.org/abs/2309.17453.  Dropout by counter: J. Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", 2011, https://doi.org/10.1145/2063384.2063405.  Softmax over the
    queries: F. Locatello et al., "Slot Attention", 2020, https://arxiv.org/abs/2006.15055.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 4, 16, 8), dtype=np.float32)
    >>> out = fa.attention(q, k, v)
    >>> out.shape
    (2, 4, 16, 8)
    >>> bool(np.allclose(out, fa.reference.attention(q, k, v), atol=1e-5))
    True

    The last query sees every key, with or without `causal`:

    >>> out_causal, lse = fa.attention(q, k, v, causal=True, return_lse=True)
    >>> bool(np.allclose(out_causal[..., -1, :], out[..., -1, :], atol=1e-5)), lse.shape
    (True, (2, 4, 16))

    A mask by batch entry and key needs its axes between them; scores of 0 make exp(lse) the number
    of keys that a query sees:

    >>> x = np.zeros((2, 1, 2, 8))  # as many batch entries as queries
    >>> keep = np.array([[True, False], [True, True]])
    >>> _, lse = fa.attention(x, x, x, mask=keep[:, None, None, :], return_lse=True)
    >>> np.exp(lse[:, 0]).round()  # batch entry by query
    array([[1., 1.],
           [2., 2.]])
    >>> _, lse = fa.attention(x, x, x, mask=keep, return_lse=True)  # read as query by key
    >>> np.exp(lse[:, 0]).round()
    array([[1., 2.],
           [1., 2.]])

    With every key masked out there is nothing to average:

    >>> fa.attention(q, k, v, mask=False, return_lse=True)[1][0, 0, 0]
    np.float32(-inf)
    """
    problem = of_arrays(q, k, v)
    set_options(
        problem,
        (
            scale,
            softcap,
            bias,
            alibi_slopes,
            mask,
            causal,
            window,
            q_offset,
            kv_lengths,
            segment_ids,
            sinks,
            softmax_axis,
            dropout_p,
            dropout_seed,
            residual,
            num_threads,
        ),
    )
    result, lse = place_results(problem, out, return_lse)
    _core.attention(problem)
    return result if lse is None else (result, lse)


@overload
def self_attention(
    x: ArrayLike,
    *,
    num_heads: int = ...,
    residual: bool = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[LayerOptions],
) -> Array: ...
@overload
def self_attention(
    x: ArrayLike,
    *,
    num_heads: int = ...,
    residual: bool = ...,
    return_lse: Literal[True],
    **options: Unpack[LayerOptions],
) -> tuple[Array, Array]: ...
@overload
def self_attention(
    x: ArrayLike,
    *,
    num_heads: int = ...,
    residual: bool = ...,
    return_lse: bool,
    **options: Unpack[LayerOptions],
) -> Array | tuple[Array, Array]: ...
def self_attention(
    x: ArrayLike,
    *,
    num_heads: int = 1,
    residual: bool = True,
    return_lse: bool = False,
    **options: Unpack[LayerOptions],
) -> Array | tuple[Array, Array]:
    """``y = x + attention(x, x, x)``: every position looks at every other, head by head.

    Each head takes its slice of x's last axis as its queries, keys and values; scores, softmax,
    weighted sum and residual are one pass, without a copy of `x`.

    Parameters
    ----------
    x : array_like, (..., seqlen, embed_dim)
        float32, float64, float16 or bfloat16.
    num_heads : int, optional
        Number of heads, a divisor of embed_dim; head h is ``x[..., h * head_dim : (h + 1) *
        head_dim]`` with ``head_dim = embed_dim // num_heads``.
    residual : bool, optional
        Whether to add `x`.
    return_lse : bool, optional
        Whether to return `lse` too.
    **options
        As in `attention`, of whose options all but `residual` and `return_lse` are meant.  The
        scores have shape (..., num_heads, seqlen, seqlen), `out` has the shape and dtype of `x` and
        may not overlap it.

    Returns
    -------
    out : ndarray, (..., seqlen, embed_dim)
        In the dtype and memory order of `x`; `out` itself if it was given.
    lse : ndarray, (..., num_heads, seqlen)
        With `return_lse`; see `attention`.

    Raises
    ------
    TypeError
        An argument has the wrong dtype or kind; the message names it.
    ValueError
        An argument has the wrong shape or value; the message names it.
    MemoryError
        The result or the workspace cannot be allocated.

    References
    ----------
    A. Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762, without
    the projections.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    >>> y = fa.self_attention(x)
    >>> bool(np.allclose(y, x + fa.attention(x, x, x), atol=1e-6))
    True

    A position that sees only itself gets its own value:

    >>> fa.self_attention(x, mask=np.eye(2, dtype=bool))
    array([[2., 0.],
           [0., 2.]], dtype=float32)
    """
    refuse_unknown("self_attention", options, LayerOptions.__annotations__)
    x = _validate.float_array("x", x)
    if x.ndim < 2:
        raise ValueError(
            f"`x` must have at least 2 dimensions, (..., seqlen, embed_dim), got shape {x.shape}"
        )
    num_heads = _validate.count("num_heads", num_heads)
    if x.shape[-1] % num_heads:
        raise ValueError(f"`num_heads` must divide embed_dim {x.shape[-1]} of `x`, got {num_heads}")
    shared: dict[str, Any] = {**options}
    out = shared.pop("out", None)
    if out is None:
        result = empty_result(x, x.shape)
    else:
        result = check_out(out, x.shape, x.dtype, "x")
        refuse_overlap(result, x=x)
    heads = _split_heads(x, num_heads)
    attended = attention(
        heads,
        heads,
        heads,
        residual=heads if _validate.flag("residual", residual) else None,
        return_lse=return_lse,
        out=_split_heads(result, num_heads),
        **shared,
    )
    y = result if out is None else out
    return (y, attended[1]) if isinstance(attended, tuple) else y


def _split_heads(x: Array, num_heads: int) -> Array:
    """A view of (..., seqlen, embed_dim) as (..., num_heads, seqlen, head_dim)."""
    # Splitting one axis never copies, whatever the strides.
    heads = x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)
    return heads.swapaxes(-2, -3)


def merge_attention(
    outs: Sequence[ArrayLike] | Array, lses: Sequence[ArrayLike] | Array
) -> tuple[Array, Array]:
    """Attention over all keys, from the results of `attention` over parts of the keys.

    The merge is exact: ``out = sum_p exp(lse_p - lse) * out_p`` with
    ``lse = log(sum_p exp(lse_p))``, summed in float64 in the order of the parts and rounded once.
    One part, or one with a finite lse among empty ones, comes back with the same bits.

    Parameters
    ----------
    outs : sequence of array_like or ndarray, each (..., seqlen_q, head_dim_v)
        The results, all of one shape and dtype, any of `attention`'s; or one array of them stacked
        along its first axis.  They hold no residual.
    lses : sequence of array_like or ndarray, each (..., seqlen_q)
        Their lse (``return_lse=True``), of the dtype that it has with results of such dtype.  -inf
        is a part without keys; its `out` is not used.  At most one part may have had `sinks`.

    Returns
    -------
    out : ndarray, (..., seqlen_q, head_dim_v)
        In the parts' dtype; 0 where every part is without keys.
    lse : ndarray, (..., seqlen_q)
        In the dtype of `lses`; -inf where every part is without keys.

    Raises
    ------
    TypeError
        A part has a dtype that `attention` does not give, or not the first part's.
    ValueError
        There is no part, or the shapes do not match.

    Notes
    -----
    Besides the parts and the result, memory is two float64 arrays of the result's shape, however
    many parts there are.  This merge is for the softmax over the keys.  With
    ``softmax_axis="queries"`` each key has its own softmax, and the results over parts of the keys
    simply add up.

    References
    ----------
    J. Juravsky et al., "Hydragen", 2024, https://arxiv.org/abs/2402.05099, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 6, 8))
    >>> near = fa.attention(q, k[:, :2], v[:, :2], return_lse=True)
    >>> far = fa.attention(q, k[:, 2:], v[:, 2:], return_lse=True)
    >>> out, lse = fa.merge_attention(*zip(near, far))
    >>> bool(np.allclose(out, fa.attention(q, k, v)))
    True
    """
    parts = [_validate.float_array(f"outs[{p}]", out) for p, out in enumerate(outs)]
    part_lses = [_validate.float_array(f"lses[{p}]", lse) for p, lse in enumerate(lses)]
    if not parts:
        raise ValueError("`outs` must have at least one part, got none")
    if len(part_lses) != len(parts):
        raise ValueError(f"`lses` must have {len(parts)} parts like `outs`, got {len(part_lses)}")
    shape, dtype = parts[0].shape, parts[0].dtype
    if len(shape) < 2:
        raise ValueError(
            f"`outs[0]` must have at least 2 dimensions, (..., seqlen_q, head_dim_v), "
            f"got shape {shape}"
        )
    lse_dtype = _validate.lse_dtype(dtype)
    for name, arrays, rule, kind, of in (
        ("outs", parts, shape, dtype, "like"),
        ("lses", part_lses, shape[:-1], lse_dtype, "to match"),
    ):
        for p, array in enumerate(arrays):
            if array.dtype != kind:
                raise TypeError(
                    f"`{name}[{p}]` must have dtype {kind} {of} `outs[0]`, got {array.dtype}"
                )
            if array.shape != rule:
                raise ValueError(
                    f"`{name}[{p}]` must have shape {rule} to match `outs[0]`, "
                    f"got shape {array.shape}"
                )

    # NaN and +inf are carried through, not warned about.
    with _core.DefaultFloatMode(), np.errstate(all="ignore"):
        top = part_lses[0].astype(np.float64)
        for part_lse in part_lses[1:]:
            np.maximum(top, part_lse, out=top)
        # -inf - -inf would be NaN where every part is empty.
        shift = np.where(top == -np.inf, 0.0, top)
        total = np.zeros(shape[:-1], np.float64)
        for part_lse in part_lses:
            total += np.exp(part_lse - shift)
        merged = np.zeros(shape, np.float64)
        contribution = np.empty(shape, np.float64)
        for part, part_lse in zip(parts, part_lses, strict=True):
            exps = np.exp(part_lse - shift)
            np.multiply(part, (exps / total)[..., np.newaxis], out=contribution)
            # Selected, not multiplied: a part of weight 0 adds nothing, whatever it holds.
            np.add(merged, contribution, out=merged, where=(exps != 0.0)[..., np.newaxis])
        lse = shift + np.log(total)
        return round_once(merged, dtype), lse.astype(lse_dtype, copy=False)
