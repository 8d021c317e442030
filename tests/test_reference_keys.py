"""The specification: which keys take part, and what infinities and NaN reach."""

from math import inf, nan

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from reference_cases import LOG2, LOG3, column, scores_as_bias

from fastattn import reference

pytestmark = pytest.mark.any_kernel_set


def rows_seen(**options):
    """Which of five keys each of three queries sees, as strings of x and dots."""
    seqlen_q, seqlen_k = options.pop("seqlen_q", 3), options.pop("seqlen_k", 5)
    weights = scores_as_bias(np.zeros((seqlen_q, seqlen_k)), np.eye(seqlen_k), **options)
    return ["".join("x" if weight else "." for weight in row) for row in weights]


# --- which keys take part ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["xxxxx", "xxxxx", "xxxxx"]),
        ({"causal": True}, ["xxx..", "xxxx.", "xxxxx"]),
        ({"causal": True, "q_offset": 0}, ["x....", "xx...", "xxx.."]),
        ({"causal": True, "q_offset": -1}, [".....", "x....", "xx..."]),
        ({"causal": True, "q_offset": 10**30}, ["xxxxx", "xxxxx", "xxxxx"]),
        ({"causal": True, "q_offset": -(10**30)}, [".....", ".....", "....."]),
        ({"window": (1, 0)}, [".xx..", "..xx.", "...xx"]),
        ({"window": (1, 0), "q_offset": 0}, ["x....", "xx...", ".xx.."]),
        ({"window": (0, 1), "q_offset": 0}, ["xx...", ".xx..", "..xx."]),
        ({"window": (None, 0)}, ["xxx..", "xxxx.", "xxxxx"]),
        ({"window": (0, None)}, ["..xxx", "...xx", "....x"]),
        ({"window": (None, None)}, ["xxxxx", "xxxxx", "xxxxx"]),
        ({"window": (10**30, 0)}, ["xxx..", "xxxx.", "xxxxx"]),
        ({"window": (0, 0), "q_offset": 7}, [".....", ".....", "....."]),
        ({"window": (1, 1), "causal": True}, [".xx..", "..xx.", "...xx"]),
        ({"kv_lengths": 4}, ["xxxx.", "xxxx.", "xxxx."]),
        ({"kv_lengths": 0}, [".....", ".....", "....."]),
        ({"kv_lengths": 4, "causal": True}, ["xx...", "xxx..", "xxxx."]),
        ({"kv_lengths": 2, "causal": True}, [".....", "x....", "xx..."]),
        ({"kv_lengths": 4, "causal": True, "q_offset": 2}, ["xxx..", "xxxx.", "xxxx."]),
        ({"mask": [True, False, True, True, False]}, ["x.xx.", "x.xx.", "x.xx."]),
        ({"mask": [[False], [True], [True]]}, [".....", "xxxxx", "xxxxx"]),
        ({"segment_ids": ([0, 0, 1], [0, 0, 1, 1, 2])}, ["xx...", "xx...", "..xx."]),
        ({"segment_ids": ([-7, 5, 9], [5, 5, -7, 5, 0])}, ["..x..", "xx.x.", "....."]),
        (
            {"causal": True, "segment_ids": ([1, 1, 2], [1, 1, 1, 1, 2])},
            ["xxx..", "xxxx.", "....x"],
        ),
        ({"seqlen_q": 5, "seqlen_k": 3, "causal": True}, ["...", "...", "x..", "xx.", "xxx"]),
        (
            {"seqlen_q": 5, "seqlen_k": 3, "causal": True, "q_offset": 0},
            ["x..", "xx.", "xxx", "xxx", "xxx"],
        ),
        (
            {"seqlen_q": 5, "seqlen_k": 3, "window": (1, 0)},
            ["...", "...", "x..", "xx.", ".xx"],
        ),
        (
            {"seqlen_q": 5, "seqlen_k": 3, "window": (1, 0), "q_offset": 0},
            ["x..", "xx.", ".xx", "..x", "..."],
        ),
    ],
)
def test_keys_that_take_part(options, expected):
    assert rows_seen(**options) == expected


def test_per_batch_entry():
    q, k = np.empty((2, 1, 2, 0)), np.empty((2, 1, 3, 0))
    v = np.broadcast_to(np.eye(3), (2, 1, 3, 3))
    seen = reference.attention(q, k, v, kv_lengths=[3, 2], causal=True)[:, 0] > 0
    assert_array_equal(seen[0], [[1, 1, 0], [1, 1, 1]])
    assert_array_equal(seen[1], [[1, 0, 0], [1, 1, 0]])
    seen = reference.attention(q, k, v, q_offset=[0, 1], causal=True)[:, 0] > 0
    assert_array_equal(seen[0], [[1, 0, 0], [1, 1, 0]])
    assert_array_equal(seen[1], [[1, 1, 0], [1, 1, 1]])
    ids = ([[0, 1], [1, 1]], [0, 1, 1])
    seen = reference.attention(q, k, v, segment_ids=ids)[:, 0] > 0
    assert_array_equal(seen[0], [[1, 0, 0], [0, 1, 1]])
    assert_array_equal(seen[1], [[0, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize("softmax_axis", ["keys", "queries"])
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_masked_out_keys_do_not_leak(rng, softmax_axis, poison):
    q, k, v = rng.standard_normal((3, 2, 5, 4))
    options = {"mask": np.arange(5) != 3, "softmax_axis": softmax_axis, "return_lse": True}
    expected = reference.attention(q, k, v, **options)
    k[:, 3] = poison
    v[:, 3] = poison
    for got, want in zip(reference.attention(q, k, v, **options), expected, strict=True):
        assert_array_equal(got, want)


# --- rows without keys, infinities, NaN ----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"mask": [[True, True], [False, False]]},
        {"bias": [[0.0, 0.0], [-inf, -inf]]},
        {"mask": [[True, True], [True, False]], "bias": [[0.0, 0.0], [-inf, 0.0]]},
        {"mask": [[True, True], [False, False]], "sinks": [3.0]},
        {"bias": [[0.0, 0.0], [-inf, -inf]], "sinks": [3.0]},
        {"mask": [[True, True], [False, False]], "sinks": [-inf]},
    ],
)
def test_row_without_keys(options):
    out, lse = reference.attention(
        np.ones((2, 1)), np.ones((2, 1)), column(4.0, 4.0), return_lse=True, **options
    )
    assert out[1, 0] == 0.0
    assert lse[1] == options.get("sinks", [-inf])[0]
    assert np.isfinite(out[0, 0]) and np.isfinite(lse[0])
    with_residual = reference.attention(
        np.ones((2, 1)), np.ones((2, 1)), column(4.0, 4.0), residual=column(1, 7), **options
    )
    assert with_residual[1, 0] == 7.0


def test_column_without_queries():
    out, lse = scores_as_bias(
        [[0.0, 0.0], [0.0, 0.0]],
        column(4.0, nan),
        mask=[[True, False], [True, False]],
        softmax_axis="queries",
        return_lse=True,
    )
    assert_array_equal(out, column(2.0, 2.0))
    assert_allclose(lse, [LOG2, -inf])


@pytest.mark.parametrize("held", [nan, inf, -inf])
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_key_whose_bias_is_minus_infinity_takes_no_part(axis, held):
    q, v, bias = np.ones((2, 1)), column(1.0, held, 3.0), np.array([[0.0, -inf, 0.0]] * 2)
    options = {"softcap": 2.0, "softmax_axis": axis}
    for hold in (held, 0.0):
        k = column(1.0, hold, 1.0)
        masked = reference.attention(q, k, v, mask=bias == 0, return_lse=True, **options)
        for got, want in zip(
            reference.attention(q, k, v, bias=bias, return_lse=True, **options),
            masked,
            strict=True,
        ):
            assert_array_equal(got, want)
        assert np.isfinite(masked[0]).all()
        grads = reference.attention_backward(np.ones((2, 1)), q, k, v, bias=bias, **options)
        for gradient in (grads.q, grads.k, grads.v, grads.bias):
            assert np.isfinite(gradient).all()
        assert grads.k[1, 0] == grads.v[1, 0] == grads.bias[0, 1] == 0.0


def test_bias_of_nan_is_no_bias_of_minus_infinity():
    out = reference.attention([[1.0]], column(1, 1), column(1, 3), bias=[[nan, -inf]])
    assert np.isnan(out).all()


def test_sink_of_a_row_without_keys_has_the_gradient_of_lse():
    grads = reference.attention_backward(
        [[1.0]], [[1.0]], [[1.0]], [[1.0]], mask=[[False]], sinks=[3.0], grad_lse=[0.5]
    )
    assert grads.sinks == 0.5
    assert grads.q == grads.k == grads.v == 0.0


def test_no_keys_at_all():
    out, lse = reference.attention(
        np.ones((2, 3)), np.ones((0, 3)), np.ones((0, 4)), return_lse=True
    )
    assert_array_equal(out, np.zeros((2, 4)))
    assert_array_equal(lse, [-inf, -inf])
    out, lse = reference.attention(
        np.ones((0, 3)), np.ones((2, 3)), np.ones((2, 4)), softmax_axis="queries", return_lse=True
    )
    assert out.shape == (0, 4)
    assert_array_equal(lse, [-inf, -inf])


@pytest.mark.parametrize("special", [nan, inf])
def test_nan_and_inf_scores_stay_in_their_row(special):
    scores = [[0.0, special], [0.0, 0.0]]
    out, lse = scores_as_bias(scores, column(1.0, 3.0), return_lse=True)
    assert np.isnan(out[0, 0]) and np.isnan(lse[0])
    assert out[1, 0] == 2.0


@pytest.mark.parametrize("special", [nan, inf])
def test_nan_and_inf_scores_stay_in_their_column(special):
    scores = [[0.0, special], [0.0, 0.0], [0.0, -inf]]
    out, lse = scores_as_bias(scores, column(3.0, 1.0), softmax_axis="queries", return_lse=True)
    # The weights of key 1 are NaN, but for query 2: a score of -inf has weight exactly 0.
    assert_array_equal(out, column(nan, nan, 1.0))
    assert_allclose(lse, [LOG3, nan], rtol=1e-15)


@pytest.mark.parametrize("softmax_axis", ["keys", "queries"])
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_weight_zero_contributes_nothing(softmax_axis, poison):
    # Query 0 gives key 1 weight 0: by a bias of -inf, and by underflow.
    for low in (-inf, -1e5):
        out = scores_as_bias(
            [[0.0, low], [0.0, 0.0]], column(1.0, poison), softmax_axis=softmax_axis
        )
        assert out[0, 0] == (1.0 if softmax_axis == "keys" else 0.5)
        assert_array_equal(out[1, 0], poison)


def test_opposite_infinities_are_nan():
    out = scores_as_bias([[0.0, 0.0]], np.array([[inf, inf], [-inf, 1.0]]))
    assert_array_equal(out, [[nan, inf]])
