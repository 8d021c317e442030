"""What caches store: dtypes, sizes, and what they refuse."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from caches import (
    DTYPES,
    FLOAT_DTYPES,
    HEAD_DIM,
    HEAD_DIM_V,
    NUM_KV_HEADS,
    make_cache,
    make_paged,
    make_tokens,
    once,
    snapshot,
)

import fastattn as fa

FLOAT32_MAX = float(np.finfo(np.float32).max)


def rounded(x, significant_bits, smallest_exponent):
    """`x` to the nearest number of a binary format, ties to even, in exact arithmetic."""
    quantum = Fraction(2) ** max(int(np.frexp(x)[1]) - significant_bits, smallest_exponent)
    return float(round(Fraction(float(x)) / quantum) * quantum)


@once
@pytest.mark.parametrize(
    ("dtype", "bits", "smallest_exponent"),
    [(np.float16, 11, -24), (ml_dtypes.bfloat16, 8, -133), (np.float32, 24, -149)],
)
@pytest.mark.parametrize("source", [np.float64, np.float32])
def test_floats_are_rounded_once(rng, dtype, bits, smallest_exponent, source):
    # Ties and their neighbours in `source`, over the whole range of `dtype`.
    largest = float(ml_dtypes.finfo(dtype).max)
    exponents = rng.uniform(smallest_exponent - 2, np.log2(largest) - 1, 2000)
    values = 2.0**exponents * rng.choice([-1, 1], 2000)
    ties = np.array([rounded(x, bits + 1, smallest_exponent - 1) for x in values], source)
    x = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), [0.0, -0.0]])
    x = x.astype(source)
    x = x[np.abs(x) < largest]
    cache = fa.KVCache(1, 1, 1, len(x), dtype=dtype)
    cache.append(x.reshape(1, 1, 1, -1), x.reshape(1, 1, 1, -1))
    expected = [rounded(value, bits, smallest_exponent) for value in x]
    for stored in (cache.k, cache.v):
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored.ravel().astype(np.float64), expected)


@once
@pytest.mark.parametrize("source", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_float_dtype_goes_into_every_other(source, dtype):
    x = np.array([1.5, -0.25, np.inf, -np.inf, np.nan, 0.0], source).reshape(1, 1, 1, 6)
    cache = fa.KVCache(1, 1, 2, 6, dtype=dtype)
    with np.errstate(all="raise"):
        cache.append(x, x)
    np.testing.assert_array_equal(cache.k.astype(np.float64), x.astype(np.float64))


@once
@pytest.mark.parametrize(
    ("dtype", "source", "value"),
    [
        (np.float16, np.float32, 65520.0),
        (np.float16, ml_dtypes.bfloat16, -1e30),
        (ml_dtypes.bfloat16, np.float64, 3.4e38),
        (np.float32, np.float64, 1e39),
    ],
)
def test_floats_out_of_range_are_refused(dtype, source, value):
    cache = fa.KVCache(1, 1, 2, 1, dtype=dtype)
    wrong, right = (np.full((1, 1, 1, 1), x).astype(source) for x in (value, 1.0))
    for name, k, v in (("k", wrong, right), ("v", right, wrong)):
        message = f"`{name}` must be within the range of {np.dtype(dtype)}, got "
        with np.errstate(all="raise"), pytest.raises(ValueError, match=message):
            cache.append(k, v)
        cache.append(k, v, counts=[0])  # padding is not looked at
    assert cache.lengths().tolist() == [0]


@once
@pytest.mark.parametrize("source", FLOAT_DTYPES, ids=str)
def test_int8_keeps_within_half_a_scale(rng, source):
    x = rng.standard_normal((2, NUM_KV_HEADS, 50, HEAD_DIM))
    x *= 10.0 ** rng.uniform(-3, 3, (2, NUM_KV_HEADS, 50, 1))
    x[0, :, 3] = 0.0
    x[1, 0, 4, 1:] = 0.0
    x = x.astype(source)
    cache = fa.KVCache(2, NUM_KV_HEADS, 50, HEAD_DIM, dtype=np.int8)
    with np.errstate(all="raise"):
        cache.append(x, -x)
    exact = x.astype(np.float64)
    largest = np.abs(exact).max(axis=-1)
    for codes, scale, sign in zip(cache._arrays[:2], cache._arrays[2:], (1, -1), strict=True):
        assert codes.dtype == np.int8
        assert scale.dtype == np.float32
        np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
        assert scale[0, 0, 3] == 0.0
        assert not codes[0, :, 3].any()
        assert np.abs(codes.astype(int)).max() == 127
        error = np.abs(codes * scale[..., np.newaxis].astype(np.float64) - sign * exact)
        # The quotient is rounded before it is made an integer.
        assert np.all(error <= scale[..., np.newaxis] * 0.5 * (1 + 1e-4))
        error = np.abs(codes * scale[..., np.newaxis] - sign * exact)
        assert np.all(error <= 0.004 * largest[..., np.newaxis])
    k, v = cache.to_arrays(1)
    assert k.dtype == np.float32
    np.testing.assert_array_equal(k, cache._arrays[0][1] * cache._arrays[2][1][..., np.newaxis])
    np.testing.assert_array_equal(v, -k)


@once
@pytest.mark.parametrize(
    ("source", "value"),
    [
        (np.float32, 1e-45),
        (np.float32, 1e-43),
        (np.float32, 1e-40),
        (np.float32, 1.5e-36),
        (np.float32, 3e38),
        (np.float32, FLOAT32_MAX),
        (np.float32, np.nextafter(np.float32(FLOAT32_MAX), np.float32(0))),
        (np.float64, FLOAT32_MAX),
        (np.float64, 1e-40),
        (np.float64, 1e-300),
        (np.float64, 5e-324),
        (np.float16, 65504.0),
        (np.float16, 6e-8),
    ],
)
def test_int8_at_the_ends_of_the_range(source, value):
    row = [value, value / 3, -value, -value / 7, 0.0]
    x = np.array(row, source).reshape(1, 1, 1, 5)
    cache = fa.KVCache(1, 1, 1, 5, dtype=np.int8)
    with np.errstate(all="raise", under="ignore"):
        cache.append(x, x)
        decoded = cache.to_arrays(0)[0]
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    scale = float(cache._arrays[2][0, 0, 0])
    # As fine as float32 allows: its smallest number bounds the scale of what is smaller.
    assert scale <= max(float(value) / 127 * (1 + 2**-23), float(value) / 127 + 2**-149)
    # The quotient, and the product with the scale, are rounded.
    exact = x[0].astype(np.float64)
    assert np.all(np.abs(cache._arrays[0][0] * scale - exact) <= scale * (0.5 + 1e-4))
    np.testing.assert_allclose(decoded, exact, rtol=0, atol=scale * (0.5 + 1e-4))
    q = np.zeros((1, 1, 1, 5), np.float32)
    np.testing.assert_array_equal(cache.attention(q)[0], decoded)


@once
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_int8_refuses_what_is_not_finite(value):
    cache = fa.KVCache(1, 1, 2, 2, dtype=np.int8)
    wrong, right = np.array([1.0, value]).reshape(1, 1, 1, 2), np.ones((1, 1, 1, 2))
    for name, k, v in (("k", wrong, right), ("v", right, wrong)):
        message = (
            f"`{name}` must be finite and within the range of float32 for int8, got {value:.6g}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            cache.append(k, v)
    assert cache.lengths().tolist() == [0]
    assert not cache._arrays[0].any()


@once
def test_storage_dtype_is_named():
    for dtype in ("float8_e4m3fn", "int16", "nonsense", ">f4", None, [("k", "f4")]):
        given = ml_dtypes.float8_e4m3fn if dtype == "float8_e4m3fn" else dtype
        for make in (make_cache, make_paged):
            with pytest.raises(
                TypeError, match="`dtype` must be float32, float64, float16, bfloat"
            ):
                make(dtype=given)


@once
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": 1.0}, TypeError, "`batch_size` must be an int >= 1, got 1.0"),
        ({"num_kv_heads": -1}, ValueError, "`num_kv_heads` must be at least 1"),
        ({"max_seqlen": 0}, ValueError, "`max_seqlen` must be at least 1"),
        ({"head_dim": True}, TypeError, "`head_dim` must be an int >= 1, got True"),
        ({"head_dim_v": 0}, ValueError, "`head_dim_v` must be at least 1, got 0"),
        ({"window_tokens": 0}, ValueError, "`window_tokens` must be at least 1, got 0"),
        (
            {"window_tokens": 3, "sink_tokens": -1},
            ValueError,
            "`sink_tokens` must be at least 0, got -1",
        ),
        (
            {"window_tokens": 3, "sink_tokens": 0.5},
            TypeError,
            "`sink_tokens` must be an int >= 0, got 0.5",
        ),
        ({"sink_tokens": 1}, ValueError, "`sink_tokens` must be 0 without `window_tokens`, got 1"),
        (
            {"window_tokens": 7, "sink_tokens": 2},
            ValueError,
            "`max_seqlen` must be at least sink_tokens 2 + window_tokens 7, got 8",
        ),
        ({"max_seqlen": 2**62}, MemoryError, "a cache of shape"),
    ],
)
def test_wrong_sizes(options, error, message):
    sizes = {"batch_size": 1, "num_kv_heads": 1, "max_seqlen": 8, "head_dim": 4}
    with pytest.raises(error, match=re.escape(message)):
        fa.KVCache(**{**sizes, **options})


@once
def test_wrong_page_sizes():
    for name in ("num_pages", "page_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            make_paged(**{name: 0})


@once
@pytest.mark.parametrize("make", [make_cache, make_paged])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_tokens_change_nothing(rng, make, dtype):
    cache = make(dtype=dtype)
    args = () if make is make_cache else ([cache.add(), cache.add()],)
    k, v = make_tokens(rng, 2, new=3)
    cache.append(k, v, *args)
    before = snapshot(cache)
    for wrong_k, wrong_v, options, error, message in (
        (
            k.astype(int),
            v,
            {},
            TypeError,
            "`k` must be float16, bfloat16, float32 or float64, got int64",
        ),
        (k, v > 0, {}, TypeError, "`v` must be float16, bfloat16, float32 or float64, got bool"),
        (k.astype(">f4"), v, {}, TypeError, "`k` must be in native byte order"),
        (k[:1], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (1, 2, 3, 6)"),
        (k[:, :1], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (2, 1, 3, 6)"),
        (k[..., :5], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (2, 2, 3, 5)"),
        (k[0], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (2, 3, 6)"),
        (
            k,
            v[:, :, :2],
            {},
            ValueError,
            "`v` must have shape (2, 2, 3, 4) to match `k`, got (2, 2, 2,",
        ),
        (
            k,
            v[..., :3],
            {},
            ValueError,
            "`v` must have shape (2, 2, 3, 4) to match `k`, got (2, 2, 3, 3",
        ),
        (k, v, {"counts": [1.0, 2.0]}, TypeError, "`counts` must be integers"),
        (k, v, {"counts": [1]}, ValueError, "`counts` must have shape (2,), got shape (1,)"),
        (
            k,
            v,
            {"counts": [1, 4]},
            ValueError,
            "`counts` must be 0 to the 3 new tokens of `k`, got 4",
        ),
        (
            k,
            v,
            {"counts": [-1, 1]},
            ValueError,
            "`counts` must be 0 to the 3 new tokens of `k`, got -1",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            cache.append(wrong_k, wrong_v, *args, **options)
        assert snapshot(cache) == before


@once
def test_more_than_fits_changes_nothing(rng):
    cache = make_cache(2, 5)
    cache.append(*make_tokens(rng, 2, new=4), counts=[4, 1])
    before = snapshot(cache)
    message = (
        "`k` must have at most 1 new tokens for sequence 0, which has 4 of max_seqlen 5, got 2"
    )
    with pytest.raises(ValueError, match=message):
        cache.append(*make_tokens(rng, 2, new=2))
    assert snapshot(cache) == before
    cache.append(*make_tokens(rng, 2, new=4), counts=[1, 4])
    assert cache.lengths().tolist() == [5, 5]


@once
def test_padding_and_any_strides(rng):
    k, v = make_tokens(rng, 2, new=4)
    expected, cache = make_cache(), make_cache()
    expected.append(k, v, counts=[2, 4])
    k[0, :, 2:] = np.nan
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v)]
    for x in swapped:
        x.flags.writeable = False
    cache.append(*swapped, counts=np.array([2, 4], np.uint8))
    assert snapshot(cache) == snapshot(expected)


@once
@pytest.mark.parametrize("window", [None, 5])
def test_tokens_from_the_cache_itself(rng, window):
    cache = fa.KVCache(1, 1, 8, 3, window_tokens=window)
    x = rng.standard_normal((1, 1, 6, 3), dtype=np.float32)
    cache.append(x, x)
    if window is None:
        cache.append(cache.k[:, :, 4:], cache.v[:, :, 4:])
        expected = np.concatenate([x, x[:, :, 4:]], axis=2)
    else:
        cache.append(cache.k[:, :, ::-1], cache.v[:, :, ::-1])
        expected = np.concatenate([x[:, :, 4:], x[:, :, ::-1]], axis=2)
    np.testing.assert_array_equal(cache.k, expected)


@once
def test_views_cannot_be_written(rng):
    cache = make_cache()
    cache.append(*make_tokens(rng, 2, new=2))
    assert cache.k.shape == (2, NUM_KV_HEADS, 2, HEAD_DIM)
    assert cache.v.shape == (2, NUM_KV_HEADS, 2, HEAD_DIM_V)
    for view in (cache.k, cache.v):
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
    lengths = cache.lengths()
    cache.truncate(1)
    assert lengths.tolist() == [2, 2]  # those of its moment
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"`index` must be 0 to 1, got {index}"):
            cache.to_arrays(index)
    with pytest.raises(TypeError, match=r"`index` must be an int from 0 to 1, got 0\.5"):
        cache.positions(0.5)


@once
def test_sizes_and_repr():
    cache = fa.KVCache(3, 2, 10, 8, dtype=np.int8, window_tokens=4, sink_tokens=1)
    assert cache.nbytes == 3 * 2 * 10 * (8 + 8 + 4 + 4)
    assert repr(cache) == (
        "KVCache(batch_size=3, num_kv_heads=2, max_seqlen=10, head_dim=8, dtype=int8, "
        "window_tokens=4, sink_tokens=1): 0 tokens"
    )
    paged = fa.PagedKVCache(5, 2, 3, 8, head_dim_v=4, dtype=ml_dtypes.bfloat16)
    assert paged.nbytes == 5 * 2 * 3 * (8 + 4) * 2
    assert repr(paged) == (
        "PagedKVCache(num_pages=5, page_size=2, num_kv_heads=3, head_dim=8, head_dim_v=4, "
        "dtype=bfloat16): 0 sequences, 5 free pages"
    )
