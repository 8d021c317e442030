"""`self_attention`: its values, its layouts, what it refuses."""

import re
from math import nan

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from operands import CLOSE, FLOATS, once, read_only, zeros

import fastattn as fa


@once
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (np.ones((3, 4), int), {}, TypeError, f"`x` must be {FLOATS}, got int64"),
        (
            np.ma.masked_array(np.ones((3, 4))),
            {},
            TypeError,
            "`x` must be a plain array, got a numpy.ma.MaskedArray (pass its data, and what takes "
            "part as `mask`)",
        ),
        (
            zeros(4),
            {},
            ValueError,
            "`x` must have at least 2 dimensions, (..., seqlen, embed_dim), got shape (4,)",
        ),
        (
            zeros(3, 4),
            {"num_heads": 3},
            ValueError,
            "`num_heads` must divide embed_dim 4 of `x`, got 3",
        ),
        (zeros(3, 4), {"num_heads": 0}, ValueError, "`num_heads` must be at least 1, got 0"),
        (zeros(3, 4), {"num_heads": 2.0}, TypeError, "`num_heads` must be an int >= 1, got 2.0"),
        (zeros(3, 4), {"residual": 1}, TypeError, "`residual` must be True or False, got 1"),
        (
            zeros(3, 4),
            {"residual": zeros(3, 4)},
            TypeError,
            "`residual` must be True or False, got array(",
        ),
        (zeros(3, 4), {"causal": 1}, TypeError, "`causal` must be True or False, got 1"),
        (
            zeros(3, 4),
            {"num_heads": 2, "mask": np.ones((2, 2), bool)},
            ValueError,
            "`mask` must broadcast to (2, 3, 3), got shape (2, 2)",
        ),
        (
            zeros(3, 4),
            {"out": zeros(3, 4, dtype=np.float64)},
            TypeError,
            "`out` must have dtype float32 like `x`, got <f8",
        ),
        (
            zeros(3, 4),
            {"out": zeros(1, 3, 4)},
            ValueError,
            "`out` must have the result's shape (3, 4), got shape (1, 3, 4)",
        ),
        (zeros(3, 4), {"k": zeros(3, 4)}, TypeError, "unexpected keyword argument 'k'"),
        (zeros(3, 4), {"heads": 2}, TypeError, "unexpected keyword argument 'heads'"),
    ],
)
def test_refused_by_self_attention(x, options, error, message):
    arrays = [x, *options.values()]
    before = [a.tobytes() for a in arrays if isinstance(a, np.ndarray)]
    with pytest.raises(error, match=re.escape(message)):
        fa.self_attention(x, **options)
    assert [a.tobytes() for a in arrays if isinstance(a, np.ndarray)] == before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_heads", [1, 2, 6])
def test_self_attention(rng, dtype, num_heads):
    for shape in ((5, 6), (2, 5, 6), (3, 2, 5, 6), (0, 5, 6), (2, 0, 6), (5, 0)):
        x = rng.standard_normal(shape).astype(dtype)
        before = x.tobytes()
        y, lse = fa.self_attention(read_only(x), num_heads=num_heads, return_lse=True)
        expected, expected_lse = fa.reference.self_attention(
            x, num_heads=num_heads, return_lse=True
        )
        assert y.shape == shape and lse.shape == (*shape[:-2], num_heads, shape[-2])
        assert y.dtype == lse.dtype == dtype
        assert_allclose(y, expected, **CLOSE)
        assert_allclose(lse, expected_lse, **CLOSE)
        alone = fa.self_attention(x, num_heads=num_heads, residual=False)
        assert_allclose(alone + x, expected, **CLOSE)
        assert x.tobytes() == before


def test_self_attention_options(rng):
    x = rng.standard_normal((2, 5, 6)).astype(np.float32)
    options = {
        "scale": 0.7,
        "softcap": 2.0,
        "bias": rng.standard_normal((3, 5, 5)),
        "alibi_slopes": [1.0, 0.5, 0.25],
        "mask": rng.random((2, 1, 5, 5)) < 0.9,
        "causal": True,
        "window": (3, None),
        "q_offset": [0, 1],
        "kv_lengths": [5, 4],
        "segment_ids": ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1]),
        "sinks": [0.0, 1.0, -1.0],
    }
    expected = fa.reference.self_attention(x, num_heads=3, **options)
    out = np.full_like(x, nan)
    assert fa.self_attention(x, num_heads=3, out=out, num_threads=1, **options) is out
    assert_allclose(out, expected, **CLOSE)
    expected = fa.reference.self_attention(x, softmax_axis="queries")
    assert_allclose(fa.self_attention(x, softmax_axis="queries"), expected, **CLOSE)


def test_self_attention_takes_any_layout(rng):
    x = rng.standard_normal((4, 5, 6)).astype(np.float32)
    expected = fa.self_attention(x, num_heads=2)
    for view in (
        np.asfortranarray(x),
        x.transpose(1, 2, 0).copy().transpose(2, 0, 1),
        x[::-1].copy()[::-1],
        np.repeat(x, 2, axis=-1)[..., ::2],
        x[..., ::-1].copy()[..., ::-1],
    ):
        y = fa.self_attention(view, num_heads=2)
        assert_array_equal(y, expected)
    assert fa.self_attention(np.asfortranarray(x)).flags.f_contiguous
    row = np.broadcast_to(x[0], (3, 5, 6))
    assert_array_equal(fa.self_attention(row), np.broadcast_to(fa.self_attention(x[0]), (3, 5, 6)))
    assert_array_equal(fa.self_attention(x[0].tolist()).shape, (5, 6))
