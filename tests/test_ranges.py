"""Values, scores, options and biases over the whole range of their types."""

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
    each_dtype,
    gradients_of,
)
from gauge import (
    MAX_GAUGE,
    MAX_ONE_SIGN_GAUGE,
    MAX_QUERIES_GAUGE,
    naive_attention,
)

import fastattn as fa
from fastattn import _config
from fastattn._gauge import UNIT_ROUNDOFF, WEIGHT_FLOOR

# Naive float64 measures up to 5.1 itself (test_accuracy.py).
MAX_GAUGE_FLOAT64 = 8.0

# The scalar set sums the weights of a tile, of one sign, in one lane: the last row of the table
# under Accuracy in docs/design.md.
MAX_GAUGE_ONE_LANE = 10.0


# --- sums of values ---------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 40])
@pytest.mark.parametrize("seqlen_k", [2, 300, 5000])
def test_average_of_the_largest_number(dtype: Any, seqlen_q: int, seqlen_k: int) -> None:
    """Packed keys and those that are read where they lie, one split and several."""
    largest = np.finfo(dtype).max
    v = np.full((seqlen_k, 3), largest)
    v[:, 1] = -largest
    v[:, 2] = np.where(np.arange(seqlen_k) % 2, largest, -largest)
    zeros = np.zeros((max(seqlen_q, seqlen_k), 8), dtype)
    out = fa.attention(zeros[:seqlen_q], zeros[:seqlen_k], v)
    expected = np.broadcast_to([largest, -largest, 0], out.shape)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=largest * 1e-7)


@each_dtype
def test_large_values_leave_other_features_alone(dtype: Any) -> None:
    """Only sums that left the range are computed again: the others keep their bits."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 16)).astype(dtype) for n in (50, 200, 200))
    clean = fa.attention(q, k, v)
    v[:, :, 5] = np.finfo(dtype).max * 0.9
    out = fa.attention(q, k, v, residual=clean)
    twice = clean + clean
    others = np.arange(16) != 5
    assert out[..., others].tobytes() == twice[..., others].tobytes()
    np.testing.assert_allclose(out[..., 5], v[:, :50, 5], rtol=1e-5)


def test_large_values_with_the_residual_in_place() -> None:
    q = np.zeros((30, 4), F32)
    v = np.zeros((100, 6), F32)
    v[:, 2] = 3e38
    x = np.ones((30, 6), F32)
    assert fa.attention(q, np.zeros((100, 4), F32), v, residual=x, out=x) is x
    expected = np.ones(6)
    expected[2] = 3e38
    np.testing.assert_allclose(x, np.broadcast_to(expected, x.shape), rtol=1e-6)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_unseen_large_values_change_nothing(axis: str) -> None:
    """Values and keys of any size that no row attends to leave every bit as it is."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, 150, 32), dtype=F32)
    clean = fa.attention(q, k, v, causal=True, softmax_axis=axis, return_lse=True)
    for value in (MAX32, 1e30, np.inf, np.nan):
        k[:, 70:], v[:, 70:] = value, value
        out, lse = fa.attention(q, k, v, causal=True, softmax_axis=axis, return_lse=True)
        assert out[:, :70].tobytes() == clean[0][:, :70].tobytes()
        assert lse[:, :70].tobytes() == clean[1][:, :70].tobytes()


# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_scores_beyond_the_range_of_float32(seqlen_q: int) -> None:
    """The key with the largest product wins, though all products are infinite in float32."""
    k = column(*(-3e38 if j % 7 == 0 else -2e38 for j in range(100)))
    k[[33, 60]] = -1.5e38
    v = column(*range(100))
    q = np.full((seqlen_q, 1), 3e38, F32)
    out, lse = fa.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, np.full((seqlen_q, 1), 46.5))
    assert np.all(lse == -np.inf)  # -4.5e76 in float32


def test_products_that_overflow_on_the_way() -> None:
    """The partial sums of a product pass the range, the product does not."""
    q = np.array([[3e38, 3e38, 3e38, 3e38, 1.0]], F32)
    k = np.array([[-1, -1, 1, 1, 0], [-1, -1, 1, 1, 2], [0, 0, 0, 0, 1]], F32)
    v = column(1, 2, 4)
    expected = fa.reference.attention(q, k, v, scale=1.0)
    np.testing.assert_allclose(fa.attention(q, k, v, scale=1.0), expected, rtol=1e-6)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1e39},
        {"scale": -1e39},
        {"scale": 1e-44},
        {"scale": 1e-200},
        {"softcap": MAX32, "scale": 1.0},
        {"softcap": 1e39, "scale": 1.0},
        {"softcap": 1e-40, "scale": 1.0},
        {"softcap": 1e200, "scale": 1e-100},
        {"alibi_slopes": [1e39]},
        {"alibi_slopes": [1e300]},
        {"alibi_slopes": [1e-60]},
    ],
    ids=str,
)
def test_options_that_float32_cannot_hold(options: dict[str, Any], axis: str) -> None:
    rng = np.random.default_rng(2)
    k, v = rng.standard_normal((2, 50, 8), dtype=F32)
    scale = options.get("scale", 1.0)
    q = rng.standard_normal((30, 8)) * (1 if abs(scale) > 1e100 else 2 / abs(scale))
    q = np.clip(q, -MAX32, MAX32).astype(F32)
    out, lse = fa.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
    expected = fa.reference.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(lse, expected[1].astype(F32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scaled_queries_beyond_the_range_of_float64(axis: str, sign: int) -> None:
    """A query times the scale is infinite, a product times the scale is not."""
    q, k, v = (column(*x, dtype=np.float64) for x in ((1e300, 2e300), (1e-300, 3e-301), (1, 2)))
    options: dict[str, Any] = {"scale": sign * 1e60, "softmax_axis": axis, "return_lse": True}
    out, lse = fa.attention(q, k, v, **options)
    expected = fa.reference.attention(q, k, v, **options)
    np.testing.assert_allclose(out, expected[0], rtol=1e-15)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-15)


def test_products_that_overflow_on_the_way_in_float64() -> None:
    """With the scale in the query they do: one that would be -inf is no masked key."""
    q = np.array([[1e300, 1e300, 1e300, 1e300, 2.0**-30]])
    k = np.array([[-1, -1, 1, 1, 0], [-1, -1, 1, 1, 2], [0, 0, 0, 0, 1]]) * 2.0**20
    v = column(1, 2, 4, dtype=np.float64)
    expected = fa.reference.attention(q, k, v, scale=2.0**10)
    np.testing.assert_allclose(fa.attention(q, k, v, scale=2.0**10), expected, rtol=1e-15)


def test_a_scale_that_products_need() -> None:
    """A product of 6e350 is infinite, as in the reference, if the scale does not come first."""
    q, k, v = (column(*x, dtype=np.float64) for x in ((1e200,), (6e150, 4e150), (1, 2)))
    out, lse = fa.attention(q, k, v, scale=1e-300, return_lse=True)
    np.testing.assert_array_equal(out, [[1.0]])
    np.testing.assert_allclose(lse, [6e50], rtol=1e-15)


def test_a_scale_that_only_products_can_take() -> None:
    q, k, v = column(1e20), column(1e-30, 2e-30), column(1, 2)
    out, lse = fa.attention(q, k, v, scale=1e300, return_lse=True)
    np.testing.assert_array_equal(out, [[2.0]])
    assert lse[0] == np.inf  # 2e290 in float32


@pytest.mark.parametrize(
    ("dtype", "tiny", "huge"), [(np.float64, 1e-250, 1e300), (F32, 1e-13, 1e38)]
)
def test_small_queries_under_a_large_softcap(dtype: Any, tiny: float, huge: float) -> None:
    """A query divided by the cap is a subnormal number: the cap would multiply what that loses."""
    rng = np.random.default_rng(6)
    q = (rng.standard_normal((30, 1)) * tiny).astype(dtype)
    k = (rng.standard_normal((40, 1)) * huge / 10).astype(dtype)
    v = rng.standard_normal((40, 3)).astype(dtype)
    options = {"scale": 10 / (tiny * huge), "softcap": 1e35 if dtype is np.float64 else 1e27}
    out = fa.attention(q, k, v, **options)
    expected = fa.reference.attention(q, k, v, **options)
    np.testing.assert_allclose(out, expected, rtol=3e-5 if dtype is F32 else 1e-13, atol=1e-6)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_slopes_beyond_float32_at_a_distance(axis: str) -> None:
    """No key is at distance 0, where the score would not be infinite in float32."""
    q, k, v = column(1, 1), column(1, 1, 1, 1), column(1, 2, 4, 8)
    options: dict[str, Any] = {"alibi_slopes": [1e39], "softmax_axis": axis}
    options["mask"] = np.array([[True, True, False, False], [True, True, False, False]])
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    expected = fa.reference.attention(q, k, v, return_lse=True, **options)
    np.testing.assert_allclose(out, expected[0], rtol=1e-6)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(lse, expected[1].astype(F32))
    computed, reference = gradients_of([q, k, v], np.ones((2, 1), F32), options)
    for name in "qkv":
        np.testing.assert_allclose(getattr(computed, name), getattr(reference, name), rtol=1e-6)


# --- biases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize(
    "bias",
    [
        [MIN64] * 4,
        [0, 0, 1e300, 0],
        [1e300, 2e300, 3e300, -1e300],
        [-1e9, -1e9 + 1, -1e9 + 2, -1e9 + 3],
        [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3],
        [-MAX32, -1e300, -2e300, -MAX32],
        [-1e39, -1e300, -2e300, -np.inf],
        [1e39, 0, 0, 0],
    ],
    ids=str,
)
def test_float64_biases_keep_their_order(bias: list[float], axis: str) -> None:
    q, k, v = (np.linspace(lo, 1, n, dtype=F32)[:, None] for lo, n in ((-1, 3), (0, 4), (2, 4)))
    rows = np.broadcast_to(np.array(bias), (3, 4))
    out, lse = fa.attention(q, k, v, bias=rows, softmax_axis=axis, return_lse=True)
    expected = fa.reference.attention(q, k, v, bias=rows, softmax_axis=axis, return_lse=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-6)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(lse, expected[1].astype(F32), rtol=1e-6)


@pytest.mark.parametrize("bias", [1.7e308, 1e300, 1e290, 1e285, 1e100, 1e9])
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_lse_of_large_float64_biases(axis: str, bias: float) -> None:
    zeros = np.zeros((3, 1))
    for rows in (np.full((3, 3), bias), np.full((3, 3), -bias)):
        lse = fa.attention(zeros, zeros, zeros, bias=rows, softmax_axis=axis, return_lse=True)[1]
        np.testing.assert_allclose(lse, rows[0] + np.log(3), rtol=1e-15)


@pytest.mark.parametrize("bias_dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("score", [1.0, 1e30, 3e38])
def test_lowest_biases(bias_dtype: Any, score: float) -> None:
    """A row of the type's lowest number alone, beside any scores, is as the reference's."""
    lowest = float(ml_dtypes.finfo(bias_dtype).min)
    q = column(score, -score)
    k, v = column(1, 1, 1, 1), column(1, 2, 3, 6)
    bias = np.full((2, 4), lowest).astype(bias_dtype)
    out = fa.attention(q, k, v, bias=bias, scale=1.0)
    expected = fa.reference.attention(q, k, v, bias=bias, scale=1.0)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_bits_of_rows_that_leave_the_range(axis: str) -> None:
    """For any number of threads, and for a strided view or its copy, gradients included."""
    rng = np.random.default_rng(5)
    wide = rng.uniform(-1, 1, (4, 2, 190, 66)).astype(F32)
    wide[0, :, ::3] *= F32(1e37)
    wide[2, 1] *= F32(1e38)
    views = [x[..., ::-2] for x in wide]
    results = []
    for arrays in (views, [x.copy() for x in views]):
        for num_threads in (1, 2):
            options: dict[str, Any] = {"softmax_axis": axis, "num_threads": num_threads}
            out, lse = fa.attention(*arrays[:3], return_lse=True, **options)
            grads = fa.attention_backward(arrays[3], *arrays[:3], out, lse, **options)
            results.append([x.tobytes() for x in (out, lse, grads.q, grads.k, grads.v)])
    assert all(result == results[0] for result in results)


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("first", range(0, NUM_DRAWS, DRAWS_PER_TEST))
def test_random_calls(first: int, dtype: Any) -> None:
    """No NaN and no infinity where the reference is finite, and every result within its gauge."""
    for seed in range(first, first + DRAWS_PER_TEST):
        rng = np.random.default_rng(seed)
        check_call(f"seed {seed}, {np.dtype(dtype)}", *draw_call(rng, dtype))


def max_gauge(v: np.ndarray, softmax_axis: str) -> float:
    if v.dtype == np.float64:
        return MAX_GAUGE_FLOAT64
    if _config.ISA == "scalar":
        return MAX_GAUGE_ONE_LANE
    if softmax_axis == "queries":
        return MAX_QUERIES_GAUGE
    return MAX_GAUGE if np.min(v) < 0 < np.max(v) else MAX_ONE_SIGN_GAUGE


def check_call(name: str, arrays: list[np.ndarray], options: dict[str, Any]) -> None:
    dtype = arrays[0].dtype
    info = ml_dtypes.finfo(dtype)
    wide = np.longdouble if dtype == np.float64 else np.float64
    out, lse = fa.attention(*arrays, return_lse=True, **options)
    specified = fa.reference.attention(*arrays, return_lse=True, **options)
    exact = naive_attention(*arrays, dtype=wide, **options)
    with np.errstate(all="ignore"):
        fits = np.abs(specified[0]) < float(info.max) * (1 - float(info.eps))
        if dtype == np.float64:  # the reference has no wider type for scores that it cannot hold
            held = exact.lse_unit < float(info.max) / 4
            fits &= held[..., None] if options["softmax_axis"] == "keys" else np.all(held)
        out, computed_in = out.astype(wide), F32 if dtype.itemsize == 2 else dtype.type
        assert np.all(np.isfinite(out[fits])), f"{name}: not finite where the reference is"
        # Roundings of the result: to 16 bits, and among subnormal numbers.
        allowed = 2 * float(info.smallest_subnormal) + WEIGHT_FLOOR * exact.floor_unit
        if dtype.itemsize == 2:
            allowed = allowed + np.abs(out) * float(info.eps)
        unit = UNIT_ROUNDOFF[np.dtype(computed_in)] * exact.out_unit
        ratio = (np.abs(out - exact.out) - allowed) / unit
        worst = float(np.max(ratio, where=fits & np.isfinite(unit), initial=0))
    limit = max_gauge(arrays[2], options["softmax_axis"])
    assert worst <= limit, f"{name}: gauge {worst:.3g}, {sorted(options)}"
    missing = np.isnan(lse) & ~np.isnan(specified[1]) & (exact.lse_unit < float(info.max) / 4)
    assert not np.any(missing), f"{name}: lse is NaN"
