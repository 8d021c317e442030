"""The specification of fastattn, in float64 NumPy: readable before fast.

Each function has the name and the options of its counterpart in ``fastattn``, follows the
definition step by step on the whole score matrix, and computes and returns float64 whatever it is
given.  Arguments are not validated.  What the kernels compute is tested against this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]

# Positions are clipped to this magnitude: nothing in memory is farther away, and sums of a few such
# numbers still fit in 64 bits.
MAX_POSITION = 2**60


class Gradients(NamedTuple):
    """Gradients of `attention` by its arguments; None where none was asked for."""

    q: NDArray[Any] | None
    k: NDArray[Any] | None
    v: NDArray[Any] | None
    bias: NDArray[Any] | None
    sinks: NDArray[Any] | None


@np.errstate(all="ignore")
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
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    sinks: ArrayLike | None = None,
    softmax_axis: str = "keys",
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    residual: ArrayLike | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention by its definition; see `fastattn.attention` for the arguments.

    Returns
    -------
    out : float64 array, (..., num_heads, seqlen_q, head_dim_v)
    lse : float64 array, (..., num_heads, seqlen_q), or (..., num_heads, seqlen_k) with
        ``softmax_axis="queries"``; only with `return_lse`.

    Examples
    --------
    >>> from fastattn import reference
    >>> print(reference.attention([[0.0]], [[1.0], [2.0]], [[10.0], [30.0]]))
    [[20.]]
    """
    of_weights = dict(locals())
    del of_weights["residual"], of_weights["return_lse"]
    steps = _compute_weights(**of_weights)
    # 6. Weighted sum.
    out, lse = _weighted_sum(steps.dropped, steps.v), steps.lse
    if all(np.ndim(x) == 2 for x in (q, k, v)):
        out, lse = out[0], lse[0]
    if residual is not None:
        out = out + np.asarray(residual, dtype=np.float64)
    return (out, lse) if return_lse else out


@np.errstate(all="ignore")
def attention_weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    rows: ArrayLike | slice | None = None,
    heads: ArrayLike | slice | None = None,
    pool: tuple[int, int] | None = None,
    reduce: str | None = None,
    **options: Any,
) -> Float64Array:
    """The weights that `attention` multiplies the values by; see `fastattn.attention_weights`.

    Examples
    --------
    >>> from fastattn import reference
    >>> q, k = [[0.0], [0.0]], [[1.0], [2.0], [3.0], [4.0]]
    >>> print(reference.attention_weights(q, k, causal=True))
    [[0.33333333 0.33333333 0.33333333 0.        ]
     [0.25       0.25       0.25       0.25      ]]
    >>> print(reference.attention_weights(q, k, causal=True, reduce="keys"))
    [0.58333333 0.58333333 0.58333333 0.25      ]
    """
    weights = _compute_weights(q, k, k, **options).weights
    if heads is not None:
        weights = weights[..., heads if isinstance(heads, slice) else np.asarray(heads), :, :]
    if rows is not None:
        weights = weights[..., rows if isinstance(rows, slice) else np.asarray(rows), :]
    if pool is not None:
        for axis, blocks in zip((-2, -1), pool, strict=True):
            edges = np.arange(blocks + 1) * weights.shape[axis] // blocks
            lengths = np.expand_dims(np.diff(edges), 1 if axis == -2 else 0)
            weights = np.add.reduceat(weights, edges[:-1], axis=axis) / lengths
    if reduce == "keys":
        weights = np.sum(weights, axis=-2)
    return weights[0] if np.ndim(q) == np.ndim(k) == 2 else weights


@np.errstate(all="ignore")
def attention_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    **options: Any,
) -> Gradients:
    """Gradients of `attention` by the chain rule; see `fastattn.attention_backward`.

    `out` and `lse` are not needed: everything is computed again.

    Examples
    --------
    >>> from fastattn import reference
    >>> grads = reference.attention_backward([[1.0]], [[0.0]], [[1.0], [3.0]], [[10.0], [30.0]])
    >>> print(grads.q, grads.v.ravel())
    [[10.]] [0.5 0.5]
    """
    steps = _compute_weights(q, k, v, bias=bias, sinks=sinks, **options)
    weights, dropped = steps.weights, steps.dropped
    rows = weights.shape[:-1]
    grad_out = np.broadcast_to(np.asarray(grad_out, np.float64), (*rows, steps.v.shape[-1]))
    # 6. Weighted sum.  A weight of 0 has no gradient, whatever its value holds.
    grad_v = _weighted_sum(dropped.swapaxes(-1, -2), grad_out)
    grad_dropped = grad_out @ steps.v.swapaxes(-1, -2)
    grad_weights = np.where(dropped == 0, 0.0, steps.kept * grad_dropped)
    # 5. Softmax: each weight pulls down the others of its sum.
    axis = -2 if options.get("softmax_axis") == "queries" else -1
    delta = np.sum(weights * grad_weights, axis=axis, keepdims=True)
    if grad_lse is not None:
        grad_lse = np.expand_dims(np.asarray(grad_lse, np.float64), axis)
        delta = delta - np.where(np.expand_dims(steps.lse, axis) == -np.inf, 0.0, grad_lse)
    grad_scores = np.where(weights == 0, 0.0, weights * (grad_weights - delta))
    grad_sinks = None
    if sinks is not None:
        per_head = np.sum(-steps.sink_weights * delta, axis=(-2, -1))
        grad_sinks = per_head.reshape(-1, per_head.shape[-1]).sum(axis=0)
    # 2. and 1. Soft cap and scaled products.
    grad_products = steps.scale * np.where(weights == 0, 0.0, grad_scores * steps.slope)
    grad_q = _weighted_sum(grad_products, steps.k)
    grad_k = _weighted_sum(grad_products.swapaxes(-1, -2), steps.q)
    return Gradients(
        q=_sum_to(grad_q, np.shape(q)),
        k=_sum_to(_sum_groups(grad_k, steps.group_size), np.shape(k)),
        v=_sum_to(_sum_groups(grad_v, steps.group_size), np.shape(v)),
        bias=None if bias is None else _sum_to(grad_scores, np.shape(bias)),
        sinks=grad_sinks,
    )


class _Steps(NamedTuple):
    """What comes before the weighted sum; arrays with a head axis and all heads."""

    q: Float64Array
    k: Float64Array
    v: Float64Array
    group_size: int
    scale: float
    slope: Float64Array  # of the soft cap
    weights: Float64Array
    sink_weights: Float64Array  # (..., num_heads, seqlen_q, 1)
    kept: Float64Array  # factors of dropout
    dropped: Float64Array  # weights times these
    lse: Float64Array


def _compute_weights(
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
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    segment_ids: tuple[ArrayLike, ArrayLike] | None = None,
    sinks: ArrayLike | None = None,
    softmax_axis: str = "keys",
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
) -> _Steps:
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (q, k, v))
    num_heads, seqlen_q, head_dim = q.shape[-3:]
    num_kv_heads, seqlen_k, _ = k.shape[-3:]
    batch_shape = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (np.broadcast_to(x, batch_shape + x.shape[-3:]) for x in (q, k, v))
    # Grouped-query attention: query head h reads K and V head h // group_size.
    group_size = num_heads // max(num_kv_heads, 1)
    k, v = (np.repeat(x, group_size, axis=-3) for x in (k, v))

    # 1. Scaled products.  An empty head_dim makes them all zero.
    if scale is None:
        scale = 1.0 / np.sqrt(max(head_dim, 1))
    scores = scale * (q @ k.swapaxes(-1, -2))
    # 2. Soft cap.
    slope = np.ones_like(scores)
    if softcap is not None:
        slope = np.cosh(scores / softcap) ** -2.0  # 1 - tanh^2, which cancels where tanh is near 1
        scores = softcap * np.tanh(scores / softcap)
    # 3. Terms added to the scores.  Query i stands at `position` on the key axis.
    lengths = _per_batch_entry(seqlen_k if kv_lengths is None else kv_lengths, batch_shape)
    offset = lengths - seqlen_q if q_offset is None else _per_batch_entry(q_offset, batch_shape)
    position = np.arange(seqlen_q)[:, np.newaxis] + offset
    key = np.arange(seqlen_k)
    if bias is not None:
        scores = scores + np.asarray(bias, dtype=np.float64)
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes, dtype=np.float64)[..., np.newaxis, np.newaxis]
        scores = scores - slopes * np.abs(position - key)
    # 4. Which keys take part.  The others are selected away: their scores, even NaN, are not read.
    takes_part = key < lengths
    if bias is not None:
        takes_part = takes_part & (np.asarray(bias, dtype=np.float64) != -np.inf)
    if mask is not None:
        takes_part = takes_part & np.asarray(mask)
    if causal:
        takes_part = takes_part & (key <= position)
    if window is not None:
        left, right = (None if side is None else min(side, MAX_POSITION) for side in window)
        if left is not None:
            takes_part = takes_part & (position - left <= key)
        if right is not None:
            takes_part = takes_part & (key <= position + right)
    if segment_ids is not None:
        q_ids, k_ids = (np.asarray(ids)[..., np.newaxis, :] for ids in segment_ids)
        takes_part = takes_part & (q_ids[..., :, np.newaxis] == k_ids[..., np.newaxis, :])
    scores = np.where(takes_part, scores, -np.inf)
    # 5. Softmax.
    sink_weights = np.zeros((1, 1, 1))
    if softmax_axis == "keys":
        extra = None if sinks is None else np.asarray(sinks, dtype=np.float64)[:, None, None]
        weights, lse = _softmax(scores, axis=-1, extra=extra)
        if extra is not None:
            # Where lse is -inf, so is the sink: it weighs nothing.
            sink_weights = np.where(lse == -np.inf, 0.0, np.exp(extra[..., 0] - lse))
            sink_weights = sink_weights[..., np.newaxis]
    elif sinks is None:
        weights, lse = _softmax(scores, axis=-2)
    else:
        raise ValueError('`sinks` must be None with softmax_axis="queries"')
    # Dropout takes weights away after they were summed.
    kept = np.ones((1, 1, 1))
    if dropout_p > 0:
        drawn = dropout_mask(dropout_p, dropout_seed or 0, weights.shape)
        kept = np.where(drawn, 1.0 / np.float64(1.0 - dropout_p), 0.0)
    dropped = np.where(kept == 0, 0.0, kept * weights)
    return _Steps(q, k, v, group_size, scale, slope, weights, sink_weights, kept, dropped, lse)


def _sum_groups(per_query_head: Float64Array, group_size: int) -> Float64Array:
    """Gradients of key heads from those of the query heads that read them."""
    *batch_shape, num_heads, rows, columns = per_query_head.shape
    groups = num_heads // max(group_size, 1), max(group_size, 1)
    total: Float64Array = per_query_head.reshape(*batch_shape, *groups, rows, columns).sum(axis=-3)
    return total


def _sum_to(array: Float64Array, shape: tuple[int, ...]) -> Float64Array:
    """The sum of what was broadcast from an array of `shape`."""
    padded = (1,) * (array.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(padded) if n == 1 and array.shape[i] != 1)
    total: Float64Array = array.sum(axis=axes, keepdims=True).reshape(shape)
    return total


def dropout_mask(dropout_p: float, seed: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which weights dropout keeps, (..., num_heads, seqlen_q, seqlen_k).

    The random word of a weight is word ``key % 4`` of Philox-4x32-10 with the counter ``(key // 4,
    query, head, batch entry)``, leading dimensions counted as one in C order, and the key `seed`;
    it is kept where the word is at least ``dropout_p * 2**32``.

    Examples
    --------
    >>> from fastattn import reference
    >>> reference.dropout_mask(0.5, 7, (1, 2, 6)).astype(int)
    array([[[1, 1, 0, 0, 0, 1],
            [0, 0, 1, 1, 0, 0]]])
    """
    *batch_shape, num_heads, seqlen_q, seqlen_k = shape
    entries = int(np.prod(batch_shape, dtype=np.int64))
    groups = -(-seqlen_k // 4)
    ranges = [np.arange(n, dtype=np.uint64) for n in (entries, num_heads, seqlen_q, groups)]
    entry, head, query, group = np.meshgrid(*ranges, indexing="ij")
    words = _philox((group, query, head, entry), seed)
    keep = np.stack(words, axis=-1) >= np.uint64(int(dropout_p * 2**32))
    kept: NDArray[np.bool_] = keep.reshape(entries, num_heads, seqlen_q, 4 * groups)[..., :seqlen_k]
    return kept.reshape(shape)


def _philox(counter: tuple[NDArray[np.uint64], ...], seed: int) -> tuple[NDArray[np.uint64], ...]:
    """Philox-4x32-10 (Salmon et al., 2011) on 32-bit words held in 64 bits."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = (c & low for c in counter)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        even, odd = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (odd >> half) ^ c1 ^ k0, odd & low, (even >> half) ^ c3 ^ k1, even & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


def self_attention(
    x: ArrayLike, *, num_heads: int = 1, residual: bool = True, **options: Any
) -> Any:
    """``x + attention(x, x, x)``, head by head; see `fastattn.self_attention`.

    Examples
    --------
    >>> from fastattn import reference
    >>> print(reference.self_attention([[1.0, 2.0]]))
    [[2. 4.]]
    """
    x = np.asarray(x, dtype=np.float64)
    return_lse = options.pop("return_lse", False)
    heads = x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads).swapaxes(-2, -3)
    out, lse = attention(heads, heads, heads, return_lse=True, **options)
    out = out.swapaxes(-2, -3).reshape(x.shape)
    if residual:
        out = out + x
    return (out, lse) if return_lse else out


@np.errstate(all="ignore")
def merge_attention(outs: ArrayLike, lses: ArrayLike) -> tuple[Float64Array, Float64Array]:
    """Attention over all keys from the results over parts of them; see `fastattn.merge_attention`.

    Examples
    --------
    >>> from fastattn import reference
    >>> out, lse = reference.merge_attention([[[1.0]], [[3.0]]], [[0.0], [0.0]])
    >>> print(out, lse)
    [[2.]] [0.69314718]
    """
    outs, lses = np.asarray(outs, dtype=np.float64), np.asarray(lses, dtype=np.float64)
    # The parts are to a query what keys are in step 5: their scores are the lses.
    weights, lse = _softmax(np.moveaxis(lses, 0, -1), axis=-1)
    out = _weighted_sum(weights[..., np.newaxis, :], np.moveaxis(outs, 0, -2))
    return out[..., 0, :], lse


def _per_batch_entry(values: ArrayLike, batch_shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Integers, one or one per batch entry, shaped to meet (..., num_heads, seqlen_q, seqlen_k)."""
    # Through objects, because a Python int may be too large for 64 bits before it is clipped.
    clipped = np.clip(np.asarray(values, dtype=object), -MAX_POSITION, MAX_POSITION)
    per_entry = np.broadcast_to(np.asarray(clipped, dtype=np.int64), batch_shape)
    return per_entry[..., np.newaxis, np.newaxis, np.newaxis]


def _softmax(
    scores: Float64Array, axis: int, extra: Float64Array | None = None
) -> tuple[Float64Array, Float64Array]:
    """Weights and log-sum-exp along `axis`; `extra` scores join the denominator only.

    A score of -inf has weight 0; where every score is -inf, lse is `extra`, or -inf without one.  A
    score of NaN or +inf makes every other weight along `axis`, and the lse there, NaN.
    """
    top = np.max(scores, axis=axis, keepdims=True, initial=-np.inf)
    if extra is not None:
        top = np.maximum(top, extra)
    empty = top == -np.inf
    shift = np.where(empty, 0.0, top)
    exps = np.where(scores == -np.inf, 0.0, np.exp(scores - shift))
    total = np.sum(exps, axis=axis, keepdims=True)
    if extra is not None:
        total = total + np.exp(extra - shift)
    weights = np.where(scores == -np.inf, 0.0, exps / total)
    lse = np.where(empty, -np.inf, shift + np.log(total))
    return weights, np.squeeze(lse, axis=axis)


def _weighted_sum(weights: Float64Array, v: Float64Array) -> Float64Array:
    """``weights @ v``, where a weight of exactly 0 contributes nothing, even of inf or NaN."""
    out: Float64Array = weights @ np.where(np.isfinite(v), v, 0.0)
    counts = (weights != 0).astype(np.float64)
    for special, is_special in (
        (np.inf, v == np.inf),
        (-np.inf, v == -np.inf),
        (np.nan, np.isnan(v)),
    ):
        if is_special.any():
            out = out + np.where(counts @ is_special.astype(np.float64) > 0, special, 0.0)
    return out
