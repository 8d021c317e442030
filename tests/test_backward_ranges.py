"""Gradients over the whole range of their types."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from draws import (
    DRAWS_PER_TEST,
    F32,
    MAX32,
    MIN64,
    NUM_DRAWS,
    column,
    draw_call,
    draw_numbers,
    each_dtype,
    gradients_of,
)
from gauge import (
    MAX_GRADIENT_GAUGES,
    naive_attention,
    naive_gradients,
)

import fastattn as fa
from fastattn._gauge import UNIT_ROUNDOFF, WEIGHT_FLOOR

# Gradients of any numbers may have so much of the gauges of test_backward_accuracy.py.
GRADIENT_SLACK = 2.0


@each_dtype
@pytest.mark.parametrize("sign", [-1, 1])
def test_gradients_of_rows_at_the_ends_of_the_range(dtype: Any, sign: int) -> None:
    """Rows whose keys all carry the lowest, or the largest, bias are averages in both passes."""
    rng = np.random.default_rng(3)
    q, grad_out = rng.standard_normal((2, 2, 5, 8)).astype(dtype)
    k, v = rng.standard_normal((2, 2, 40, 8)).astype(dtype)
    bias = np.zeros((5, 40), dtype)
    bias[1:4] = sign * np.finfo(dtype).max
    out, lse = fa.attention(q, k, v, bias=bias, return_lse=True)
    grads = fa.attention_backward(grad_out, q, k, v, out, lse, bias=bias)
    expected = fa.reference.attention_backward(grad_out, q, k, v, bias=bias)
    for name in "qkv":
        found, value = getattr(grads, name), getattr(expected, name)
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1.0, {"scale": 1e39}),
        (1.0, {"scale": 1e-44}),
        (1.0, {"softcap": 1e39, "scale": 1.0}),
        (1.0, {"bias": np.array([MIN64, -1e300, -1e9, 0.5])}),
        (1.0, {"bias": np.full(4, MIN64)}),
        (1.0, {"bias": np.full(4, -1e9)}),
        (1e38, {}),  # products of grad_out and v, and sums of them with keys, pass the range
        (3e38, {"causal": True}),
    ],
    ids=str,
)
def test_gradients_beyond_the_range_of_float32(
    size: float, options: dict[str, Any], axis: str
) -> None:
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 2, 4, 8), dtype=F32)
    scale = options.get("scale", 1.0)
    q, grad_out = rng.standard_normal((2, 2, 30, 8), dtype=F32)
    q = np.clip(q.astype(np.float64) * min(1 / scale, 1e38), -MAX32, MAX32).astype(F32)
    v = np.clip(v.astype(np.float64) * size, -MAX32, MAX32).astype(F32)
    options = {**options, "softmax_axis": axis}
    computed, expected = gradients_of([q, k, v], grad_out, options)
    for name in ("q", "k", "v"):
        value = getattr(expected, name)
        fits = np.abs(value) < MAX32
        largest = float(np.max(np.abs(value), where=fits, initial=0))
        error = np.abs(getattr(computed, name)[fits].astype(np.float64) - value[fits])
        # The last term is a rounding to the least numbers of float32.
        assert np.all(error <= 1e-5 * largest + 2e-45), name


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("other", [1.0, 1e38])
def test_gradients_of_a_head_depend_on_no_other(other: float, axis: str, with_bias: bool) -> None:
    """Heads whose gradients leave the range are computed again, and no others."""
    rng = np.random.default_rng(4)
    q, k, v, grad_out = rng.standard_normal((4, 2, 70, 16), dtype=F32)
    options: dict[str, Any] = {"softmax_axis": axis}
    if with_bias:
        options["bias"] = rng.standard_normal((1, 70), dtype=F32)
    alone = [x[:1] for x in (q, k, v, grad_out)]
    out, lse = fa.attention(*alone[:3], return_lse=True, **options)
    expected = fa.attention_backward(alone[3], *alone[:3], out, lse, **options)
    v[1] *= F32(other)
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    computed = fa.attention_backward(grad_out, q, k, v, out, lse, **options)
    for name in ("q", "k", "v"):
        assert getattr(computed, name)[:1].tobytes() == getattr(expected, name).tobytes()


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_gradients_of_large_scores_that_leave_the_range(axis: str) -> None:
    """lse is of the forward pass' scores in float32, which float64 finds elsewhere."""
    rng = np.random.default_rng(7)
    q, k, v, grad_out = rng.standard_normal((4, 2, 40, 64), dtype=F32)
    k, v = k * F32(1e20), v * F32(8e37)
    computed, expected = gradients_of([q, k, v], grad_out, {"softmax_axis": axis})
    np.testing.assert_allclose(computed.v, expected.v, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(computed.q, expected.q)  # each softmax has one weight: 0
    np.testing.assert_array_equal(computed.k, expected.k)


@each_dtype
def test_merged_gradients_that_leave_the_range(dtype: Any) -> None:
    """lse of more keys than a call's: their number is kept when the call is computed again."""
    rng = np.random.default_rng(8)
    q, k, v, grad_out = rng.standard_normal((4, 2, 60, 16)).astype(dtype)
    v *= dtype(np.finfo(dtype).max / 1e3)
    grad_out[:, ::2] *= dtype(1e3)
    out, lse = fa.attention(q, k, v, return_lse=True)
    whole = fa.reference.attention_backward(
        grad_out.astype(np.longdouble) if dtype is np.float64 else grad_out, q, k, v
    )
    parts = [
        fa.attention_backward(grad_out, q, k[:, part], v[:, part], out, lse)
        for part in (slice(0, 25), slice(25, 60))
    ]
    found = np.concatenate([part.v for part in parts], axis=1)
    rtol = 1e-5 if dtype is F32 else 1e-13
    np.testing.assert_allclose(found, whole.v, rtol=rtol, atol=1e3 * rtol)


def test_gradients_of_a_scale_beyond_float32_behind_a_softcap() -> None:
    """Their quotient is an ordinary number; all scores are at the cap, whose slope is 0."""
    rng = np.random.default_rng(9)
    q, k, v, grad_out = np.abs(rng.standard_normal((4, 20, 8), dtype=F32))
    computed, expected = gradients_of([q, k, v], grad_out, {"scale": 1e43, "softcap": 1e23})
    assert not np.any(computed.q) and not np.any(computed.k)
    np.testing.assert_allclose(computed.v, expected.v, rtol=1e-5)


def test_gradients_of_sinks_beyond_float32() -> None:
    """The sinks' own dtype decides what is infinite."""
    q, k, v = column(0.5), column(1, 2), column(3e37, 1e37)
    grad_out = column(1e28)
    for dtype in (np.float64, F32):
        sinks = np.array([0.25], dtype)
        computed, expected = gradients_of([q, k, v], grad_out, {"sinks": sinks})
        assert computed.sinks is not None and computed.sinks.dtype == dtype
        with np.errstate(over="ignore"):
            value = expected.sinks.astype(dtype)
        np.testing.assert_allclose(computed.sinks, value, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (30, 1), (1, 1)])
def test_gradients_of_biases_pass_the_range_on_their_way(shape: tuple[int, int]) -> None:
    """Rows pull a bias up and down again; a float64 bias holds more than float32."""
    rng = np.random.default_rng(10)
    q, k = rng.standard_normal((2, 30, 4), dtype=F32)
    v = rng.standard_normal((4, 2), dtype=F32)
    grad_out = np.where(np.arange(30) < 15, 3e38, -3e38).astype(F32)[:, None] * np.ones(2, F32)
    q[15:], grad_out[14:16] = q[14::-1], grad_out[14:16] / F32(2)
    for dtype in (F32, np.float64):
        bias = np.zeros(shape, dtype)
        options: dict[str, Any] = {"bias": bias}
        computed, expected = gradients_of([q, k[:4], v], grad_out, options)
        assert computed.bias is not None and computed.bias.dtype == dtype
        np.testing.assert_allclose(computed.bias, expected.bias, rtol=1e-5, atol=1e30)
    big = np.full((30, 2), 3e38, F32)
    computed, expected = gradients_of([q, k[:4], v * F32(10)], big, {"bias": np.zeros((1, 4))})
    np.testing.assert_allclose(computed.bias, expected.bias, rtol=1e-5)
    assert np.max(np.abs(expected.bias)) > MAX32


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_sums_of_float64_gradients_pass_the_range_on_their_way(axis: str) -> None:
    """Each of the sums for q, k, v and bias has large terms that cancel."""
    rng = np.random.default_rng(11)
    q, k, v = rng.uniform(0.5, 1, (3, 1, 6, 4))
    v[..., 2:] = -v[..., :2]  # with rows of equal gradients, sums over v cancel
    grad_out = np.full((1, 6, 4), 1.7e308) * np.array([1, 1, 1, -1, -1, -1])[:, None]
    grad_out[0, 1] = 1e-300  # a row whose small gradients keep their bits
    q[0, 3:] = q[0, 2::-1]
    options: dict[str, Any] = {"softmax_axis": axis, "bias": rng.uniform(0, 1, (1, 6))}
    computed, _ = gradients_of([q, k, v], grad_out, options)
    exact = naive_gradients(grad_out, q, k, v, dtype=np.longdouble, **options)
    for name, value in exact.values.items():
        found = getattr(computed, name)
        assert np.all(np.isfinite(found)), name
        unit = UNIT_ROUNDOFF[np.dtype(np.float64)] * exact.units[name]
        assert np.all(np.abs(found - value) <= GRADIENT_SLACK * MAX_GRADIENT_GAUGES[name] * unit), (
            name
        )


def test_small_float64_gradients_beside_large_ones() -> None:
    """What did not leave the range is not computed again with smaller numbers."""
    q, k, v = (np.array(x)[:, None] for x in ([1.0, 2.0], [0.0, 1.0], [1e300, 3e300]))
    grad_out = column(1e308, 1e-320, dtype=np.float64)
    computed, expected = gradients_of([q, k, v], grad_out, {})
    assert not np.isfinite(expected.q[0, 0]) and not np.isfinite(computed.q[0, 0])
    np.testing.assert_allclose(computed.q[1], expected.q[1], rtol=1e-14)


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("first", range(0, NUM_DRAWS, DRAWS_PER_TEST))
def test_gradients_of_random_calls(first: int, dtype: Any) -> None:
    """No NaN and no infinity where the reference is finite, and all within their gauges."""
    step = 4 if dtype is np.float64 else 1  # products of long doubles take that much longer
    for seed in range(first, first + DRAWS_PER_TEST, step):
        rng = np.random.default_rng(seed)
        arrays, options = draw_call(rng, dtype)
        shape = (*arrays[0].shape[:-1], arrays[2].shape[-1])
        kind = rng.random()
        grad_out = rng.standard_normal(shape).astype(dtype)
        if kind < 0.5:
            grad_out = draw_numbers(rng, shape, dtype)
        check_gradients(f"seed {seed}, {np.dtype(dtype)}", arrays, grad_out, options)


def check_gradients(
    name: str, arrays: list[np.ndarray], grad_out: np.ndarray, options: dict[str, Any]
) -> None:
    dtype = arrays[0].dtype
    wide: Any = np.longdouble if dtype == np.float64 else np.float64
    computing = np.dtype(np.float64 if dtype == np.float64 else F32)
    u = UNIT_ROUNDOFF[computing]
    out_roundoff = float(ml_dtypes.finfo(dtype).eps) / 2 / u if dtype.itemsize == 2 else 0.0
    computed, specified = gradients_of(arrays, grad_out, options)
    exact = naive_gradients(grad_out, *arrays, dtype=wide, out_roundoff=out_roundoff, **options)
    gain = naive_attention(*arrays, dtype=wide, **options).lse_unit
    if not np.all(gain < float(np.finfo(np.float64).max) / 4):
        return  # scores that float64 cannot hold: it has no wider type
    # Where roundings of the scores may give the weight to another key, a gauge of first order says
    # nothing.
    exactly = bool(np.all(gain * u < 2.0**-4))
    for of, value in exact.values.items():
        gradient, reference = getattr(computed, of), getattr(specified, of)
        info = ml_dtypes.finfo(gradient.dtype)
        with np.errstate(all="ignore"):
            found = gradient.astype(wide)
            allowed = GRADIENT_SLACK * MAX_GRADIENT_GAUGES[of] * u * exact.units[of]
            allowed = allowed + WEIGHT_FLOOR * exact.floors[of]
            # Where terms cancel, roundings alone may pass the range of a narrow type.
            fits = np.abs(value) + allowed < float(info.max) * (1 - float(info.eps))
            fits &= np.isfinite(reference)
            assert np.all(np.isfinite(found[fits])), f"{name}: {of} is not finite"
            allowed = allowed + underflow(arrays, grad_out, options, computing)
            allowed = allowed + float(info.smallest_subnormal)
            if gradient.dtype.itemsize == 2:
                allowed = allowed + np.abs(value) * float(info.eps)
            error = np.abs(found - value)
        if exactly:
            assert np.all(error[fits] <= allowed[fits]), f"{name}: {of}, {sorted(options)}"


def underflow(
    arrays: list[np.ndarray], grad_out: np.ndarray, options: dict[str, Any], dtype: Any
) -> float:
    """What sums may lose because their terms are subnormal numbers."""
    terms = sum(x.shape[-3] * x.shape[-2] for x in arrays)
    largest = max(float(np.max(np.abs(x.astype(np.float64)))) for x in (*arrays, grad_out))
    factor = max(1.0, abs(options.get("scale", 1.0)))
    return terms * max(1.0, largest) * factor * float(np.finfo(dtype).smallest_subnormal)
