"""The specification against hand values, exact fractions and other ways to compute the same."""

from fractions import Fraction
from math import exp, inf, log, nan, sqrt, tanh

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from reference_cases import LOG2, LOG3, column, scores_as_bias

from fastattn import reference

pytestmark = pytest.mark.any_kernel_set


# --- softmax -----------------------------------------------------------------------------------


def test_exact_fractions():
    # Scores that are logarithms of integers make weights that are fractions of them.
    numbers = [[1, 2, 5], [3, 3, 1], [7, 1, 1]]
    values = [Fraction(2), Fraction(-3), Fraction(1, 2)]
    expected = [
        sum(Fraction(n, sum(row)) * value for n, value in zip(row, values, strict=True))
        for row in numbers
    ]
    v = column(*map(float, values))
    out, lse = scores_as_bias(np.log(numbers), v, return_lse=True)
    assert_allclose(out[:, 0], [float(x) for x in expected], rtol=1e-15)
    assert_allclose(lse, np.log([8, 7, 9]), rtol=1e-15)


def test_exact_fractions_over_queries():
    numbers = [[1, 2, 5], [3, 3, 1], [7, 1, 1]]
    values = [Fraction(2), Fraction(-3), Fraction(1, 2)]
    sums = [sum(key) for key in zip(*numbers, strict=True)]
    assert sums == [11, 6, 7]
    expected = [
        sum(Fraction(n, s) * x for n, s, x in zip(row, sums, values, strict=True))
        for row in numbers
    ]
    v = column(*map(float, values))
    out, lse = scores_as_bias(np.log(numbers), v, softmax_axis="queries", return_lse=True)
    assert_allclose(out[:, 0], [float(x) for x in expected], rtol=1e-15)
    assert_allclose(lse, np.log(sums), rtol=1e-15)


def test_weights_over_queries_sum_to_one(rng):
    q, k = rng.standard_normal((2, 3, 6, 4))
    v = np.broadcast_to(np.eye(6), (3, 6, 6))  # the result is the weights
    weights = reference.attention(q, k, v, softmax_axis="queries")
    assert_allclose(weights.sum(axis=-2), 1.0, rtol=1e-14)
    assert_allclose(reference.attention(q, k, v).sum(axis=-1), 1.0, rtol=1e-14)


def test_large_scores_do_not_overflow():
    out, lse = scores_as_bias([[1e5, 1e5 - LOG3]], column(0.0, 4.0), return_lse=True)
    assert_allclose(out, [[1.0]], rtol=1e-10)
    assert_allclose(lse, [1e5 + log(4 / 3)], rtol=1e-15)


def test_single_key_is_its_value():
    v = np.array([[3.5, -2.0, 7.25]])
    out = reference.attention(np.ones((4, 2)), np.ones((1, 2)), v)
    assert_array_equal(out, np.repeat(v, 4, axis=0))


# --- scores --------------------------------------------------------------------------------------


def test_default_scale():
    # <q, k> = 4 and 0, head_dim 4: scores 2 and 0.
    out, lse = reference.attention(
        np.ones((1, 4)), [[1.0] * 4, [0.0] * 4], column(1.0, 0.0), return_lse=True
    )
    assert_allclose(out, [[exp(2) / (exp(2) + 1)]], rtol=1e-15)
    assert_allclose(lse, [log(exp(2) + 1)], rtol=1e-15)


@pytest.mark.parametrize("scale", [0.0, 0.25, -1.5])
def test_scale(scale):
    out, lse = reference.attention(
        [[2.0]], column(1.0, 0.0), column(1.0, 0.0), scale=scale, return_lse=True
    )
    assert_allclose(out, [[exp(2 * scale) / (exp(2 * scale) + 1)]], rtol=1e-15)
    assert_allclose(lse, [log(exp(2 * scale) + 1)], rtol=1e-15)


def test_head_dim_zero_is_the_mean():
    out, lse = reference.attention(
        np.empty((2, 0)), np.empty((4, 0)), column(1, 2, 3, 6), return_lse=True
    )
    assert_array_equal(out, [[3.0], [3.0]])
    assert_allclose(lse, [log(4)] * 2, rtol=1e-15)


def test_softcap_comes_after_scale_and_before_bias():
    # <q, k> = 12, times scale 0.5 is 6, capped 2 tanh(6 / 2), plus bias 1.
    score = 2 * tanh(3.0) + 1
    out, lse = reference.attention(
        [[3.0]],
        column(4.0, 0.0),
        column(1.0, 0.0),
        scale=0.5,
        softcap=2.0,
        bias=[[1.0, 0.0]],
        return_lse=True,
    )
    assert_allclose(out, [[exp(score) / (exp(score) + 1)]], rtol=1e-14)
    assert_allclose(lse, [log(exp(score) + 1)], rtol=1e-14)


def test_bias_broadcasts(rng):
    q, k, v = rng.standard_normal((3, 2, 3, 4, 5))
    per_key = rng.standard_normal(4)
    scores = np.einsum("bhid,bhjd->bhij", q, k) / sqrt(5) + per_key
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhij,bhjd->bhid", weights, v)
    assert_allclose(reference.attention(q, k, v, bias=per_key), expected, rtol=1e-12)
    full = np.broadcast_to(per_key, (2, 3, 4, 4))
    assert_array_equal(
        reference.attention(q, k, v, bias=full), reference.attention(q, k, v, bias=per_key)
    )


def test_alibi():
    # Two heads, three queries and three keys at positions 0, 1, 2; slopes log 2 and 0.
    lse = reference.attention(
        np.empty((2, 3, 0)),
        np.empty((2, 3, 0)),
        np.empty((2, 3, 1)),
        alibi_slopes=[LOG2, 0.0],
        return_lse=True,
    )[1]
    halves = [1 + 1 / 2 + 1 / 4, 1 / 2 + 1 + 1 / 2, 1 / 4 + 1 / 2 + 1]
    assert_allclose(np.exp(lse), [halves, [3, 3, 3]], rtol=1e-15)


@pytest.mark.parametrize(("q_offset", "distances"), [(None, [2, 1, 0]), (0, [0, 1, 2])])
def test_alibi_stands_at_the_offset(q_offset, distances):
    weights = scores_as_bias(np.zeros((1, 3)), np.eye(3), alibi_slopes=[LOG2], q_offset=q_offset)
    powers = 0.5 ** np.array(distances)
    assert_allclose(weights[0], powers / powers.sum(), rtol=1e-15)


def test_alibi_per_batch_entry():
    lse = reference.attention(
        np.empty((2, 1, 1, 0)),
        np.empty((2, 1, 2, 0)),
        np.empty((2, 1, 2, 1)),
        alibi_slopes=[[LOG2], [LOG3]],
        return_lse=True,
    )[1]
    assert_allclose(np.exp(lse[:, 0, 0]), [1 + 1 / 2, 1 + 1 / 3], rtol=1e-15)


# --- sinks, residual, lse ------------------------------------------------------------------------


def test_sinks_join_the_denominator_only():
    out, lse = reference.attention(
        np.empty((2, 1, 0)),
        np.empty((2, 2, 0)),
        np.array([[[3.0], [6.0]]] * 2),
        sinks=[0.0, log(7.0)],
        return_lse=True,
    )
    assert_allclose(out[:, 0, 0], [9 / 3, 9 / 9], rtol=1e-14)
    assert_allclose(lse[:, 0], [log(3), log(9)], rtol=1e-14)


def test_sink_of_minus_infinity_is_none(rng):
    q, k, v = rng.standard_normal((3, 2, 4, 5))
    assert_array_equal(
        reference.attention(q, k, v, sinks=[-inf, -inf]), reference.attention(q, k, v)
    )


def test_sink_above_every_score():
    out = scores_as_bias([[0.0]], column(1.0), sinks=[1e5])
    assert_array_equal(out, [[0.0]])


def test_sinks_with_queries_are_refused():
    with pytest.raises(ValueError, match="`sinks`"):
        scores_as_bias([[0.0]], column(1.0), sinks=[0.0], softmax_axis="queries")


def test_residual(rng):
    q, k, v = rng.standard_normal((3, 2, 4, 5))
    residual = rng.standard_normal((2, 4, 5))
    assert_array_equal(
        reference.attention(q, k, v, residual=residual), reference.attention(q, k, v) + residual
    )


# --- shapes --------------------------------------------------------------------------------------


def test_shapes():
    ones = np.ones
    cases = [
        ((3, 4), (5, 4), (5, 6), (3, 6), (3,)),
        ((2, 3, 4), (5, 4), (5, 6), (2, 3, 6), (2, 3)),
        ((3, 4), (1, 5, 4), (1, 5, 6), (1, 3, 6), (1, 3)),
        ((7, 2, 3, 4), (2, 5, 4), (2, 5, 6), (7, 2, 3, 6), (7, 2, 3)),
        ((2, 3, 4), (7, 2, 5, 4), (2, 5, 6), (7, 2, 3, 6), (7, 2, 3)),
        ((2, 3, 4), (2, 5, 4), (7, 2, 5, 6), (7, 2, 3, 6), (7, 2, 3)),
        ((8, 1, 4, 3, 4), (7, 2, 5, 4), (2, 5, 6), (8, 7, 4, 3, 6), (8, 7, 4, 3)),
        ((0, 2, 3, 4), (2, 5, 4), (2, 5, 6), (0, 2, 3, 6), (0, 2, 3)),
        ((0, 3, 4), (0, 5, 4), (0, 5, 6), (0, 3, 6), (0, 3)),
        ((3, 4), (5, 4), (5, 0), (3, 0), (3,)),
    ]
    for q, k, v, expected_out, expected_lse in cases:
        out, lse = reference.attention(ones(q), ones(k), ones(v), return_lse=True)
        assert (out.shape, lse.shape) == (expected_out, expected_lse), (q, k, v)
        assert out.dtype == lse.dtype == np.float64
        lse = reference.attention(
            ones(q), ones(k), ones(v), return_lse=True, softmax_axis="queries"
        )[1]
        assert lse.shape == (*expected_lse[:-1], 5)


def test_every_dtype_gives_float64():
    for dtype in (np.float16, np.float32, np.float64):
        x = np.ones((2, 2), dtype)
        assert reference.attention(x, x, x).dtype == np.float64


def test_grouped_heads_are_consecutive(rng):
    q = rng.standard_normal((6, 4, 3))
    k, v = rng.standard_normal((2, 2, 5, 3))
    out = reference.attention(q, k, v)
    for head in range(6):
        expected = reference.attention(q[head], k[head // 3], v[head // 3])
        assert_allclose(out[head], expected, rtol=1e-14)


# --- self_attention, merge_attention -------------------------------------------------------------


def test_self_attention(rng):
    x = rng.standard_normal((2, 5, 6))
    heads = [x[..., :3], x[..., 3:]]
    attended = np.concatenate([reference.attention(h, h, h) for h in heads], axis=-1)
    y, lse = reference.self_attention(x, num_heads=2, return_lse=True)
    assert_allclose(y, x + attended, rtol=1e-13)
    assert lse.shape == (2, 2, 5)
    assert_allclose(reference.self_attention(x, num_heads=2, residual=False), attended, rtol=1e-13)
    one_head = reference.self_attention(x[0], causal=True)
    assert_allclose(one_head, x[0] + reference.attention(x[0], x[0], x[0], causal=True), rtol=1e-14)


def test_merge_attention_by_hand():
    outs = np.array([[[2.0]], [[5.0]], [[nan]]])
    lses = np.array([[log(1.0)], [log(3.0)], [-inf]])
    out, lse = reference.merge_attention(outs, lses)
    assert_allclose(out, [[(2.0 + 3 * 5.0) / 4]], rtol=1e-15)
    assert_allclose(lse, [log(4.0)], rtol=1e-15)


def test_merge_attention_of_empty_parts():
    out, lse = reference.merge_attention(np.full((2, 3, 4), nan), np.full((2, 3), -inf))
    assert_array_equal(out, np.zeros((3, 4)))
    assert_array_equal(lse, [-inf] * 3)


def test_merge_attention_of_parts_of_the_keys(rng):
    q, k, v = rng.standard_normal((3, 2, 6, 4))
    parts = [
        reference.attention(q, k[:, part], v[:, part], return_lse=True)
        for part in (slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 6))
    ]
    out, lse = reference.merge_attention(*zip(*parts, strict=True))
    expected = reference.attention(q, k, v, return_lse=True)
    assert_allclose(out, expected[0], rtol=1e-13)
    assert_allclose(lse, expected[1], rtol=1e-13)


# --- attention_weights -------------------------------------------------------------------------


def weights_of_scores(scores, **arguments):
    """Weights whose scores are given: head_dim 0 leaves them to the bias."""
    scores = np.asarray(scores, dtype=np.float64)
    seqlen_q, seqlen_k = scores.shape
    return reference.attention_weights(
        np.empty((seqlen_q, 0)), np.empty((seqlen_k, 0)), bias=scores, **arguments
    )


def test_weights_are_exact_fractions():
    numbers = np.array([[1, 2, 5], [3, 3, 1], [7, 1, 1]])
    by_rows, by_columns = numbers / [[8], [7], [9]], numbers / [11, 6, 7]
    assert_allclose(weights_of_scores(np.log(numbers)), by_rows, rtol=1e-15)
    assert_allclose(
        weights_of_scores(np.log(numbers), softmax_axis="queries"), by_columns, rtol=1e-15
    )
    assert_allclose(weights_of_scores(np.log(numbers), rows=[-1, 0]), by_rows[[2, 0]], rtol=1e-15)
    sums = weights_of_scores(np.log(numbers), reduce="keys")
    assert_allclose(sums, [1 / 8 + 3 / 7 + 7 / 9, 2 / 8 + 3 / 7 + 1 / 9, 5 / 8 + 1 / 7 + 1 / 9])


def test_pooled_weights_are_means_of_blocks():
    # 3 queries in 2 blocks: the first has 1, the second 2; 5 keys in 3: 1, 2 and 2.
    numbers = np.array([[1, 1, 1, 1, 4], [2, 2, 1, 1, 2], [4, 1, 1, 1, 1]])
    pooled = weights_of_scores(np.log(numbers), pool=(2, 3))
    assert_allclose(pooled, [[1 / 8, 1 / 8, 5 / 16], [3 / 8, 5 / 32, 5 / 32]], rtol=1e-14)
    one = weights_of_scores(np.log(numbers), rows=slice(0, 2), pool=(1, 1))
    assert_allclose(one, [[1 / 5]], rtol=1e-14)


def test_weights_of_heads_and_batch_entries():
    q, k = np.zeros((2, 4, 3, 1)), np.zeros((2, 2, 5, 1))
    weights = reference.attention_weights(q, k, kv_lengths=[5, 2], heads=[3, 0])
    assert weights.shape == (2, 2, 3, 5)
    assert_allclose(weights[0], 1 / 5)
    assert_allclose(weights[1], np.broadcast_to([1 / 2, 1 / 2, 0, 0, 0], (2, 3, 5)))
    assert reference.attention_weights(q[0, 0], k[0, 0], pool=(1, 2)).shape == (1, 2)
