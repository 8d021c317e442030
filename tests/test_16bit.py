"""float16 and bfloat16: every option against the float64 reference, rounded once."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from narrow import operations_of_narrow_types

import fastattn as fa
from fastattn._rounding import round_once

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
AXES = ["keys", "queries"]
# (seqlen_q, seqlen_k, head_dim, head_dim_v): many rows and few, whole vectors and tails, splits of
# the keys.
SHAPES = [
    (130, 150, 64, 64),
    (61, 77, 17, 40),
    (1, 300, 128, 64),
    (3, 1100, 40, 130),
    (8, 65, 96, 5),
]
# The promise: design, section 4.
SHARE_WITHIN_AN_ULP = 0.999

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_axis = pytest.mark.parametrize("axis", AXES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def ordered(x: np.ndarray) -> np.ndarray:
    """Integers in the order of the 16-bit floats: neighbours differ by one, both zeros are 0."""
    bits = x.view(np.int16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_within_an_ulp(out: np.ndarray, exact: np.ndarray) -> None:
    assert out.shape == exact.shape
    expected = round_once(exact, out.dtype)
    assert np.array_equal(np.isfinite(out), np.isfinite(expected))
    distance = np.abs(ordered(np.ascontiguousarray(out)) - ordered(expected))
    # One more: of a few hundred elements a single one is more than the share.
    allowed = 1 + (1 - SHARE_WITHIN_AN_ULP) * distance.size
    beyond = np.sum(distance > 1)
    assert beyond <= allowed, f"{beyond} of {distance.size} elements are beyond an ulp"


def draw(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    return round_once(rng.standard_normal(shape), dtype)


def option_sets(
    rng: np.random.Generator, shape: Any, dtype: Any, num_heads: int, axis: str
) -> Iterator[dict[str, Any]]:
    """Each option alone, then many together; arrays that are floats of q's own dtype too."""
    seqlen_q, seqlen_k, _, head_dim_v = shape
    scores = (2, num_heads, seqlen_q, seqlen_k)
    mask = rng.random(scores) < 0.7
    bias = rng.standard_normal(scores)
    segments = (
        np.sort(rng.integers(0, 3, (2, seqlen_q))),
        np.sort(rng.integers(0, 3, (2, seqlen_k))),
    )
    lengths = rng.integers(seqlen_k // 2, seqlen_k + 1, 2)
    residual = draw(rng, dtype, 2, num_heads, seqlen_q, head_dim_v)
    yield {}
    yield {"scale": -0.3}
    yield {"causal": True}
    yield {"window": (40, 9)}
    yield {"causal": True, "q_offset": 5}
    yield {"softcap": 3.0}
    yield {"bias": bias.astype(np.float32)}
    yield {"bias": bias[0, 0]}
    yield {"bias": round_once(bias, dtype)}
    yield {"mask": mask}
    yield {"alibi_slopes": rng.random((2, num_heads)) / 16}
    yield {"kv_lengths": lengths}
    yield {"segment_ids": segments}
    yield {"residual": residual}
    yield {"dropout_p": 0.3, "dropout_seed": 7}
    together = {
        "causal": True,
        "window": (70, 3),
        "softcap": 5.0,
        "bias": bias[:, :1],
        "mask": mask[:1],
        "alibi_slopes": rng.random(num_heads) / 16,
        "kv_lengths": lengths,
        "segment_ids": segments,
        "residual": residual,
    }
    if axis == "keys":
        sinks = rng.standard_normal(num_heads)
        yield {"sinks": sinks}
        together["sinks"] = sinks
    yield together


@each_shape
@each_dtype
@each_axis
def test_every_option(rng: np.random.Generator, shape: Any, dtype: Any, axis: str) -> None:
    seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    num_heads, num_kv_heads = 4, 2
    q = draw(rng, dtype, 2, num_heads, seqlen_q, head_dim)
    k = draw(rng, dtype, 2, num_kv_heads, seqlen_k, head_dim)
    v = draw(rng, dtype, 2, num_kv_heads, seqlen_k, head_dim_v)
    for options in option_sets(rng, shape, dtype, num_heads, axis):
        out, lse = fa.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
        assert out.dtype == dtype
        assert lse.dtype == np.float32
        exact = fa.reference.attention(q, k, v, softmax_axis=axis, return_lse=True, **options)
        assert_within_an_ulp(out, exact[0])
        np.testing.assert_allclose(lse, exact[1], rtol=2e-6, atol=2e-5)


@each_dtype
@each_axis
def test_bits_of_float32_rounded_once(
    rng: np.random.Generator, dtype: Any, axis: str, kernel_set: str
) -> None:
    """What is computed is float32 attention of the same numbers, rounded at the end."""
    if kernel_set == "amx" and dtype == DTYPES[1]:
        pytest.skip("bfloat16 in the tile unit has other errors: docs/kernels.md")
    for shape in SHAPES:
        seqlen_q, seqlen_k, head_dim, head_dim_v = shape
        q = draw(rng, dtype, 4, seqlen_q, head_dim)
        k = draw(rng, dtype, 2, seqlen_k, head_dim)
        v = draw(rng, dtype, 2, seqlen_k, head_dim_v)
        residual = draw(rng, dtype, 4, seqlen_q, head_dim_v)
        options: dict[str, Any] = {"softmax_axis": axis, "causal": True, "return_lse": True}
        out, lse = fa.attention(q, k, v, residual=residual, **options)
        wide = [x.astype(np.float32) for x in (q, k, v, residual)]
        with operations_of_narrow_types():
            wide_out, wide_lse = fa.attention(*wide[:3], residual=wide[3], **options)
        assert round_once(wide_out, dtype).tobytes() == out.tobytes()
        assert wide_lse.tobytes() == lse.tobytes()


@each_dtype
@np.errstate(invalid="ignore")  # signalling NaNs
def test_every_number_goes_through(dtype: Any) -> None:
    """One key of weight 1: its value is the result, for all 65536 bit patterns."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    for width in (1, 3, 64):  # tails and whole vectors
        v = np.resize(patterns, (-(-patterns.size // width), 1, width))
        q = np.zeros((len(v), 1, 4), dtype)
        for rows in (1, 40):  # where keys lie, and packed
            out = fa.attention(np.repeat(q, rows, axis=1), np.zeros((len(v), 1, 4), dtype), v)
            expected = np.broadcast_to(v, out.shape)
            nan = np.isnan(expected)
            assert np.array_equal(np.isnan(out), nan)
            # + 0: a result of -0 is stored as 0.
            np.testing.assert_array_equal(out[~nan], expected[~nan] + dtype.type(0))


@each_dtype
@np.errstate(invalid="ignore")
def test_results_round_to_nearest_even(dtype: Any) -> None:
    """Averages of neighbours lie half-way between them."""
    low = np.arange(1, 1 << 15, dtype=np.uint16)
    a, b = low.view(dtype), (low + 1).astype(np.uint16).view(dtype)
    # The sum before the division by the weights is a float32 too.
    fits = a.astype(np.float64) + b.astype(np.float64) < np.finfo(np.float32).max
    a, b = a[fits], b[fits]
    v = np.stack([a, b])[np.newaxis]
    out = fa.attention(np.zeros((1, 1, 1), dtype), np.zeros((1, 2, 1), dtype), v)[0, 0]
    middle = (a.astype(np.float64) + b.astype(np.float64)) / 2
    # float32 holds the averages but for the smallest bfloat16 subnormals.
    exact = middle == middle.astype(np.float32)
    assert exact.mean() > 0.99
    np.testing.assert_array_equal(out[exact], round_once(middle, dtype)[exact])


@each_dtype
def test_results_too_large_are_infinite(dtype: Any) -> None:
    largest = np.array(np.finfo(np.float16).max if dtype == np.float16 else 3.3895314e38, dtype)
    q = k = np.zeros((1, 4), dtype)
    v = np.full((1, 20), largest, dtype)
    assert np.all(fa.attention(q, k, v) == largest)
    assert np.all(np.isposinf(fa.attention(q, k, v, residual=v)))
    assert np.all(np.isneginf(fa.attention(q, k, -v, residual=-v)))


@each_dtype
def test_any_strides_and_out(rng: np.random.Generator, dtype: Any) -> None:
    for seqlen_q in (2, 70):
        plain = [draw(rng, dtype, 2, 4, n, 24) for n in (seqlen_q, 90, 90)]
        whole = fa.attention(*plain, causal=True)
        views = {
            "heads inside": [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in plain],
            "features first": [x.swapaxes(-1, -2).copy().swapaxes(-1, -2) for x in plain],
            "backwards": [x[..., ::-1, ::-1].copy()[..., ::-1, ::-1] for x in plain],
            "every third": [np.repeat(x, 3, axis=-1)[..., ::3] for x in plain],
        }
        for name, view in views.items():
            out = fa.attention(*view, causal=True)
            assert np.ascontiguousarray(out).tobytes() == whole.tobytes(), name
        out = np.zeros((2, 4, seqlen_q, 48), dtype)[..., ::2]
        assert fa.attention(*plain, causal=True, out=out) is out
        assert np.ascontiguousarray(out).tobytes() == whole.tobytes()


@each_dtype
@each_axis
def test_masked_out_nan_changes_nothing(rng: np.random.Generator, dtype: Any, axis: str) -> None:
    for seqlen_q in (2, 70):
        q, k, v = (draw(rng, dtype, 2, n, 40) for n in (seqlen_q, 150, 150))
        mask = np.arange(150) % 7 != 3
        clean = fa.attention(q, k, v, mask=mask, softmax_axis=axis)
        for poison in (np.nan, np.inf):
            k[:, ~mask], v[:, ~mask] = poison, poison
            dirty = fa.attention(q, k, v, mask=mask, softmax_axis=axis)
            assert dirty.tobytes() == clean.tobytes()
