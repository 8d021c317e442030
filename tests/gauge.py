"""Attention written straight from the formulas, in any precision, and the gauge of its errors.

`naive_attention` computes every option by materialising the scores, so it serves three ways:
in float64 (float32 results) or longdouble (float64 results) it is the value to compare with; in
float32 it is the naive computation whose error ours may not exceed twice; and its `out_unit` and
`lse_unit` scale the errors, as fastattn._gauge explains.  It shares no code with
fastattn.reference, which the tests compare with it.

The errors of gradients are measured in units of

    W_ij = P_ij ((|dO||V|^T)_ij + sum_c |dO_ic| (P|V|)_ic) K_i
    dQ: u |scale| (W|K|)      dK: u |scale| (W^T|Q|)      dV: u ((P K)^T |dO|)

where P carries the factors of dropout, and the second term what delta sums besides: grad_lse, and
out as it was rounded.  Weights are made again from lse, so K is at least 1 + |lse| there; that is
more where head_dim is small.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn._gauge import UNIT_ROUNDOFF, WEIGHT_FLOOR, Exact, largest, lse_gauge, out_gauge

Array = NDArray[Any]

# Positions past this are clipped, as in fastattn: sums of two then stay within int64.
MAX_POSITION = 2**60

# Section 4 of the design: the gauge of every result is at most this, to head_dim 1024; and beyond.
MAX_GAUGE = 5.0
MAX_GAUGE_BEYOND = 8.0

# Of values of one sign.  Chains of 64 measure up to 6.4 of uniform(0, 8) entries at head_dim 64,
# where naive float32 measures 5.7; 5 would need chains of 32, which measure 3.7 (and 6.4 at 4096).
MAX_ONE_SIGN_GAUGE = 7.0

# Of softmax over the queries, where a key's weights are one factor of a whole column of products:
# an error of the sum of 33 like weights is in all of them, and measures 5.3.
MAX_QUERIES_GAUGE = 8.0

# The same of gradients.  Naive float32 measures up to 0.61, 0.75 and 4.4 of the first three.
MAX_GRADIENT_GAUGES = {"q": 2.0, "k": 2.0, "v": 8.0, "bias": 2.0, "sinks": 2.0}


def _with_heads(x: Array) -> Array:
    return x[None] if x.ndim == 2 else x


def _clipped(positions: Any) -> Array:
    if isinstance(positions, int):  # of any size
        positions = max(-MAX_POSITION, min(positions, MAX_POSITION))
    return np.clip(np.asarray(positions, np.int64), -MAX_POSITION, MAX_POSITION)


class _Weights(NamedTuple):
    """What comes before the weighted sum: (..., num_heads, seqlen_q, seqlen_k), heads repeated."""

    q: Array
    k: Array
    v: Array
    scale: Any
    cap_input: Array | float  # scores / softcap, of which softcap takes tanh
    weights: Array
    gain: Array  # K, one per softmax
    lse: Array  # one per softmax
    empty: Array  # softmax without a score
    sink_weights: Array | float


def _naive_weights(
    q: Array,
    k: Array,
    v: Array,
    *,
    dtype: Any = np.float64,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    mask: Array | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    kv_lengths: Any = None,
    segment_ids: tuple[Array, Array] | None = None,
    sinks: Array | None = None,
    softmax_axis: str = "keys",
) -> _Weights:
    q, k, v = (_with_heads(np.asarray(x)).astype(dtype) for x in (q, k, v))
    group_size = q.shape[-3] // k.shape[-3] if k.shape[-3] else 1
    k, v = (np.repeat(x, group_size, axis=-3) for x in (k, v))
    seqlen_q, head_dim = q.shape[-2:]
    seqlen_k = k.shape[-2]
    if scale is None:
        scale = 1.0 / np.sqrt(head_dim) if head_dim else 0.0

    kt = np.swapaxes(k, -1, -2)
    scores = np.matmul(q, kt) * dtype(scale)
    magnitude = np.matmul(np.abs(q), np.abs(kt)) * dtype(abs(scale))
    cap_input: Array | float = dtype(0)
    if softcap is not None:
        cap_input = scores / dtype(softcap)
        scores = dtype(softcap) * np.tanh(cap_input)

    valid = np.asarray(seqlen_k if kv_lengths is None else kv_lengths)[..., None, None, None]
    offset = valid - seqlen_q if q_offset is None else _clipped(q_offset)[..., None, None, None]
    i = np.arange(seqlen_q)[:, None] + offset
    j = np.arange(seqlen_k)
    if bias is not None:
        scores = scores + np.asarray(bias).astype(dtype)
        magnitude = magnitude + np.abs(bias)
    if alibi_slopes is not None:
        slopes = np.asarray(alibi_slopes).astype(dtype)[..., None, None]
        distance = np.abs(i - j).astype(dtype)
        scores = scores - slopes * distance
        magnitude = magnitude + np.abs(slopes) * distance

    keep = np.broadcast_to(j < valid, scores.shape)
    if bias is not None:
        keep = keep & (np.asarray(bias) != -np.inf)
    if mask is not None:
        keep = keep & mask
    if causal:
        keep = keep & (j <= i)
    if window is not None:
        left, right = window
        if left is not None:
            keep = keep & (j >= i - _clipped(left))
        if right is not None:
            keep = keep & (j <= i + _clipped(right))
    if segment_ids is not None:
        q_ids, k_ids = (np.asarray(ids) for ids in segment_ids)
        keep = keep & (q_ids[..., None, :, None] == k_ids[..., None, None, :])
    scores = np.where(keep, scores, dtype(-np.inf))
    magnitude = np.where(scores > -np.inf, magnitude, dtype(0))

    axis = -1 if softmax_axis == "keys" else -2
    top = np.max(scores, axis=axis, keepdims=True, initial=-np.inf)
    gain = 1 + np.max(magnitude, axis=axis, keepdims=True, initial=0)
    if sinks is not None:
        sink = np.asarray(sinks).astype(dtype)[:, None, None]
        top = np.maximum(top, sink)
        gain = np.maximum(gain, 1 + np.abs(sink))
    empty = top == -np.inf
    top = np.where(empty, dtype(0), top)
    weights = np.exp(scores - top)
    total = np.sum(weights, axis=axis, keepdims=True)
    sink_weights: Array | float = 0.0
    if sinks is not None:
        total = total + np.exp(sink - top)
        sink_weights = np.where(empty, dtype(0), np.exp(sink - top) / total)
    lse = np.where(empty, dtype(-np.inf), top + np.log(total))
    weights = np.where(empty, dtype(0), weights / total)
    return _Weights(q, k, v, dtype(scale), cap_input, weights, gain, lse, empty, sink_weights)


def naive_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    dtype: Any = np.float64,
    residual: Array | None = None,
    softmax_axis: str = "keys",
    **options: Any,
) -> Exact:
    """Attention by full score matrices, every step rounded to `dtype`."""
    all_2d = q.ndim == k.ndim == v.ndim == 2
    with np.errstate(all="ignore"):
        steps = _naive_weights(q, k, v, dtype=dtype, softmax_axis=softmax_axis, **options)
        weights, gain, v = steps.weights, steps.gain, steps.v
        out = np.matmul(weights, v)
        out_unit = np.matmul(weights * gain, np.abs(v))
        if residual is not None:
            residual = residual[None] if all_2d else residual
            out = out + residual.astype(dtype)
            out_unit = out_unit + np.abs(residual)
        lse_unit = gain + np.where(steps.empty, 0, np.abs(steps.lse))
        floor_unit = np.sum(np.abs(v), axis=-2, keepdims=True)

    axis = -1 if softmax_axis == "keys" else -2
    lse, lse_unit = np.squeeze(steps.lse, axis), np.squeeze(lse_unit, axis)
    result = Exact(out, lse, out_unit, lse_unit, floor_unit)
    return Exact(*(x[0] for x in result)) if all_2d else result


def weights_gauge(weights: Array, expected: Array, q: Array, k: Array, **options: Any) -> float:
    """The largest error of weights of all queries in units of u K P: |P - P64| / (u K P64)."""
    with np.errstate(all="ignore"):
        gain = _naive_weights(q, k, k, **options).gain
    gain = gain[0] if weights.ndim == 2 else gain
    error = np.abs(weights - expected) - WEIGHT_FLOOR
    return largest(error, UNIT_ROUNDOFF[weights.dtype] * gain * expected)


class NaiveGradients(NamedTuple):
    """Result of `naive_gradients`; keys of the dicts are the names of the arguments."""

    values: dict[str, Array]
    units: dict[str, Array]
    floors: dict[str, Array]


def naive_gradients(
    grad_out: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    dtype: Any = np.float64,
    bias: Array | None = None,
    sinks: Array | None = None,
    residual: Array | None = None,
    grad_lse: Array | None = None,
    kept: Array | None = None,
    softmax_axis: str = "keys",
    out_roundoff: float = 0.0,
    **options: Any,
) -> NaiveGradients:
    """Gradients of attention by full matrices, every step rounded to `dtype`, and their units.

    `kept` holds the factors of dropout.  `out_roundoff` is how many units the result itself was
    rounded by before it was read again: 2^16 / 2^8 for bfloat16 beside float32's u.
    """
    all_2d = q.ndim == k.ndim == v.ndim == 2
    given = {"q": q, "k": k, "v": v, "bias": bias, "sinks": sinks}
    axis = -1 if softmax_axis == "keys" else -2
    with np.errstate(all="ignore"):
        steps = _naive_weights(
            q, k, v, dtype=dtype, bias=bias, sinks=sinks, softmax_axis=softmax_axis, **options
        )
        weights, scale = steps.weights, steps.scale
        gain = np.maximum(steps.gain, 1 + np.where(steps.empty, 0, np.abs(steps.lse)))
        q, k, v = steps.q, steps.k, steps.v
        grad_out = np.asarray(grad_out[None] if all_2d else grad_out).astype(dtype)
        kept = np.ones((1, 1), dtype) if kept is None else np.asarray(kept).astype(dtype)
        dropped = weights * kept
        vt = np.swapaxes(v, -1, -2)
        grad_weights = kept * np.matmul(grad_out, vt)
        size_weights = kept * np.matmul(np.abs(grad_out), np.abs(vt))
        if grad_lse is None:
            lse_part = np.zeros_like(steps.lse)
        else:
            grad_lse = np.asarray(grad_lse[None] if all_2d else grad_lse).astype(dtype)
            lse_part = np.where(steps.empty, dtype(0), np.expand_dims(grad_lse, axis))
        delta = np.sum(weights * grad_weights, axis=axis, keepdims=True) - lse_part
        size_delta = np.sum(weights * size_weights, axis=axis, keepdims=True) + np.abs(lse_part)
        if axis == -1:  # delta is made of out, which was rounded, with the residual in it
            out_size = np.matmul(dropped, np.abs(v))
            if residual is not None:
                out_size = out_size + np.abs(residual[None] if all_2d else residual)
            rounded = np.sum(np.abs(grad_out) * out_size, axis=-1, keepdims=True)
            size_delta = size_delta + (1 + out_roundoff) / gain * rounded
        grad_scores = weights * (grad_weights - delta)
        size_sum = (size_weights + size_delta) * gain
        tanh = np.tanh(steps.cap_input)
        slope, size_slope = 1 - tanh * tanh, 1 + np.abs(tanh)
        grad_products = scale * np.where(weights == 0, 0, grad_scores * slope)
        size_scores = weights * size_sum
        # Of weights that are 0 because they are below the smallest that exp2 gives.
        floor_scores = np.broadcast_to(size_sum, weights.shape)
        floor_weights = np.broadcast_to(kept, weights.shape)

        def gradients(scores: Array, products: Array, weights: Array, of: Any) -> dict[str, Array]:
            found = {
                "q": np.matmul(products, of(k)),
                "k": np.matmul(np.swapaxes(products, -1, -2), of(q)),
                "v": np.matmul(np.swapaxes(weights, -1, -2), of(grad_out)),
                "bias": scores,
            }
            return {
                name: _sum_to(x, np.shape(given[name]))
                for name, x in found.items()
                if given[name] is not None
            }

        def positive(x: Array) -> Array:
            return np.abs(x)

        values = gradients(grad_scores, grad_products, dropped, lambda x: x)
        cap = abs(scale) * size_slope
        units = gradients(size_scores, cap * size_scores, dropped * gain, positive)
        floors = gradients(floor_scores, cap * floor_scores, floor_weights, positive)
        if sinks is not None:
            per_sink = steps.sink_weights * np.ones_like(delta)
            units["sinks"] = _sum_to(
                (per_sink * size_delta * gain).swapaxes(-2, -3)[..., 0], np.shape(sinks)
            )
            values["sinks"] = _sum_to((-per_sink * delta).swapaxes(-2, -3)[..., 0], np.shape(sinks))
            floors["sinks"] = np.zeros(np.shape(sinks))
    return NaiveGradients(values, units, floors)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over what was broadcast from `shape`, shared heads included."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    if len(shape) >= 3 and padded[-3] not in (1, x.shape[-3]):  # heads that share keys
        group = x.shape[-3] // max(padded[-3], 1)
        x = x.reshape(*x.shape[:-3], padded[-3], group, *x.shape[-2:]).sum(axis=-3)
    axes = tuple(i for i, n in enumerate(padded) if n == 1 and x.shape[i] != 1)
    return np.asarray(x.sum(axis=axes, keepdims=True).reshape(shape))


def gradient_gauges(gradients: Any, exact: NaiveGradients) -> dict[str, float]:
    """The largest error of each gradient in its units, less what exp2's floor allows."""
    gauges, computed_in = {}, gradients.q.dtype  # sinks and bias may have wider dtypes
    for name, value in exact.values.items():
        gradient = getattr(gradients, name)
        assert gradient.shape == value.shape, name
        error = np.abs(gradient - value) - WEIGHT_FLOOR * exact.floors[name]
        unit = UNIT_ROUNDOFF[computed_in] * exact.units[name]
        gauges[name] = largest(error, unit)
    return gauges


def assert_close(
    out: Array,
    lse: Array | None,
    expected: tuple[Array, Array],
    exact: Exact,
    max_gauge: float = MAX_GAUGE,
) -> None:
    """Assert that out and lse lie within the gauge of `expected`, with the units of `exact`."""
    expected_out, expected_lse = expected
    assert out.shape == expected_out.shape
    value = out_gauge(out, exact._replace(out=expected_out))
    assert value <= max_gauge, f"out: gauge {value:.3g} > {max_gauge}"
    if lse is not None:
        assert lse.shape == expected_lse.shape
        value = lse_gauge(lse, exact._replace(lse=expected_lse))
        assert value <= max_gauge, f"lse: gauge {value:.3g} > {max_gauge}"
