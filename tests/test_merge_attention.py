"""`merge_attention`: its values, special values, what it refuses."""

import re
from math import inf, nan

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from operands import CLOSE, FLOATS, LK, once, operands, read_only, zeros

import fastattn as fa


@once
@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "`outs` must have at least one part, got none"),
        (zeros(0, 3, 4), zeros(0, 3), ValueError, "`outs` must have at least one part, got none"),
        (zeros(2, 3, 4), zeros(3, 3), ValueError, "`lses` must have 2 parts like `outs`, got 3"),
        (
            np.ones((2, 3, 4), int),
            zeros(2, 3),
            TypeError,
            f"`outs[0]` must be {FLOATS}, got int64",
        ),
        (
            [zeros(3, 4), zeros(3, 4, dtype=np.float64)],
            zeros(2, 3),
            TypeError,
            "`outs[1]` must have dtype float32 like `outs[0]`, got float64",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 3, dtype=np.float64),
            TypeError,
            "`lses[0]` must have dtype float32 to match `outs[0]`, got float64",
        ),
        (
            [zeros(3, 4), zeros(2, 4)],
            [zeros(3), zeros(2)],
            ValueError,
            "`outs[1]` must have shape (3, 4) to match `outs[0]`, got shape (2, 4)",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4),
            ValueError,
            "`lses[0]` must have shape (3,) to match `outs[0]`, got shape (4,)",
        ),
        (
            zeros(2, 3),
            zeros(2),
            ValueError,
            "`outs[0]` must have at least 2 dimensions, (..., seqlen_q, head_dim_v), "
            "got shape (3,)",
        ),
        (
            [np.ma.masked_array(zeros(3, 4))],
            zeros(1, 3),
            TypeError,
            "`outs[0]` must be a plain array, got a numpy.ma.MaskedArray",
        ),
    ],
)
def test_refused_by_merge_attention(outs, lses, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fa.merge_attention(outs, lses)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merge_attention_of_parts_of_the_keys(dtype):
    q, k, v = operands(dtype)
    parts = [
        fa.attention(q, k[..., part, :], v[..., part, :], return_lse=True)
        for part in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, LK))
    ]
    outs, lses = zip(*parts, strict=True)
    out, lse = fa.merge_attention(outs, lses)
    assert out.dtype == lse.dtype == dtype
    expected_out, expected_lse = fa.reference.attention(q, k, v, return_lse=True)
    assert_allclose(out, expected_out, **CLOSE)
    assert_allclose(lse, expected_lse, **CLOSE)
    for stacked in (
        fa.merge_attention(np.stack(outs), np.stack(lses)),
        fa.merge_attention([x.tolist() for x in outs], [x.tolist() for x in lses])
        if dtype == np.float64
        else fa.merge_attention(list(outs), list(lses)),
    ):
        assert_array_equal(stacked[0], out)
        assert_array_equal(stacked[1], lse)


@once
def test_merge_attention_keeps_the_bits_of_a_single_part(rng):
    out = rng.standard_normal((2, 5, 3)).astype(np.float32)
    lse = (100 * rng.standard_normal((2, 5))).astype(np.float32)
    out[0, 0], lse[0, 0] = 0.0, -inf
    empty_out, empty_lse = np.full_like(out, nan), np.full_like(lse, -inf)
    for parts in ([(out, lse)], [(empty_out, empty_lse), (out, lse), (empty_out, empty_lse)]):
        merged_out, merged_lse = fa.merge_attention(*zip(*parts, strict=True))
        assert merged_out.tobytes() == out.tobytes()
        assert merged_lse.tobytes() == lse.tobytes()


@once
def test_merge_attention_against_the_reference(rng):
    outs = rng.standard_normal((5, 2, 4, 3))
    lses = 1000 * rng.standard_normal((5, 2, 4))
    lses[1, 0] = -inf
    lses[:, 1, 2] = -inf
    lses[2:, 1, 3] = lses[2, 1, 3]
    copies = outs.tobytes(), lses.tobytes()
    out, lse = fa.merge_attention(read_only(outs), read_only(lses))
    expected_out, expected_lse = fa.reference.merge_attention(outs, lses)
    assert_allclose(out, expected_out, rtol=1e-12, atol=1e-15)
    assert_allclose(lse, expected_lse, rtol=1e-14)
    assert not out[1, 2].any() and lse[1, 2] == -inf
    assert (outs.tobytes(), lses.tobytes()) == copies


@once
def test_merge_attention_rounds_once():
    # In float32 the sum 1 + 2**-24 + 2**-24 would lose both small terms.
    outs = np.array([[[1.0]], [[2.0**-23]], [[2.0**-23]]], np.float32) * np.float32(3)
    out, lse = fa.merge_attention(outs, zeros(3, 1))
    assert out[0, 0] == np.float32(1 + 2.0**-22)
    assert lse[0] == np.float32(np.log(3))


@once
@pytest.mark.parametrize("special", [nan, inf])
def test_merge_attention_of_nan_and_inf_lses_stays_in_its_row(special):
    outs = np.ones((2, 3, 4), np.float32)
    lses = zeros(2, 3)
    lses[0, 1] = special
    out, lse = fa.merge_attention(outs, lses)
    assert_array_equal(np.isnan(out).all(axis=-1), [False, True, False])
    assert_array_equal(out[[0, 2]], np.ones((2, 4)))
    assert_array_equal(np.isnan(lse), [False, True, False])


@once
def test_merge_attention_of_zero_sizes():
    for shape in ((0, 4), (3, 0), (0, 3, 4)):
        out, lse = fa.merge_attention(zeros(2, *shape), zeros(2, *shape[:-1]))
        assert out.shape == shape and lse.shape == shape[:-1]
