"""Dropout: which weights are dropped depends on seed and place alone, forward and backward."""

from typing import Any

import numpy as np
import pytest
from gradients import gradients_of

import fastattn as fa

each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])
each_dtype = pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__
)

SEED = 0x0123_4567_89AB_CDEF


def weights_of(*shape: int, dtype: Any = np.float32, **options: Any) -> np.ndarray:
    """The weights (batch, num_heads, seqlen_q, seqlen_k) of equal scores: v is the identity."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    q = np.zeros((batch, num_heads, seqlen_q, 4), dtype)
    k = np.zeros((1, 1, seqlen_k, 4), dtype)
    v = np.eye(seqlen_k, dtype=dtype)[None, None]
    return fa.attention(q, k, v, **options)


@each_axis
@each_dtype
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_kernels_draw_the_mask_of_the_specification(
    dropout_p: float, dtype: Any, axis: str
) -> None:
    for shape in ((2, 3, 30, 150), (1, 1, 1, 300), (3, 2, 130, 7)):
        weights = weights_of(
            *shape, dtype=dtype, dropout_p=dropout_p, dropout_seed=SEED, softmax_axis=axis
        )
        mask = fa.reference.dropout_mask(dropout_p, SEED, shape)
        assert np.array_equal(weights != 0, mask)
        each = 1 / shape[3 if axis == "keys" else 2] / (1 - dropout_p)
        rounding = 1e-6 if dtype != np.float16 else 1e-3
        np.testing.assert_allclose(weights[mask].astype(float), each, rtol=rounding)


@each_axis
def test_gradients_use_the_same_mask(axis: str) -> None:
    """The gradient of v by a row is its dropped weights."""
    shape = (2, 3, 1, 300)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 3, 1, 4))
    k, v = rng.standard_normal((2, 2, 3, 300, 4))
    grads = gradients_of(
        np.ones((2, 3, 1, 4)), q, k, v, dropout_p=0.3, dropout_seed=SEED, softmax_axis=axis
    )
    mask = fa.reference.dropout_mask(0.3, SEED, shape)[..., 0, :]
    assert np.array_equal(grads.v[..., 0] != 0, mask)


def test_rate() -> None:
    """Of 2.4 million weights, within 5 standard deviations; rows, columns and heads alike."""
    p, shape = 0.3, (2, 3, 400, 1000)
    kept = weights_of(*shape, dropout_p=p, dropout_seed=1) != 0

    def assert_rate(rates: np.ndarray, draws: int) -> None:
        deviation = (p * (1 - p) / draws) ** 0.5
        assert np.abs(rates - (1 - p)).max() < 5.5 * deviation

    assert_rate(kept.mean(), kept.size)
    assert_rate(kept.mean(axis=(0, 1, 2)), 2 * 3 * 400)
    assert_rate(kept.mean(axis=(0, 1, 3)), 2 * 3 * 1000)
    assert_rate(kept.mean(axis=(2, 3)), 400 * 1000)
    # Neighbours in any direction, and the same place of another seed, have nothing in common.
    other = weights_of(*shape, dropout_p=p, dropout_seed=2) != 0
    pairs = [
        (kept[..., 1:], kept[..., :-1]),
        (kept[..., 4:], kept[..., :-4]),
        (kept[..., 1:, :], kept[..., :-1, :]),
        (kept[:, 1:], kept[:, :-1]),
        (kept[1:], kept[:-1]),
        (kept, other),
    ]
    for x, y in pairs:
        both = np.mean(x & y)
        assert abs(both - (1 - p) ** 2) < 6 / x.size**0.5


def test_the_upper_half_of_the_seed_counts() -> None:
    low = weights_of(1, 1, 20, 100, dropout_p=0.5, dropout_seed=5)
    high = weights_of(1, 1, 20, 100, dropout_p=0.5, dropout_seed=5 + 2**40)
    assert not np.array_equal(low, high)
    largest = 2**64 - 1
    weights = weights_of(1, 1, 20, 100, dropout_p=0.5, dropout_seed=largest)
    mask = fa.reference.dropout_mask(0.5, largest, (1, 1, 20, 100))
    assert np.array_equal(weights != 0, mask)


@each_axis
def test_smallest_and_largest_p(axis: str) -> None:
    arrays = np.random.default_rng(0).standard_normal((4, 2, 40, 8))
    plain = fa.attention(*arrays[1:], softmax_axis=axis)
    options: dict[str, Any] = {"softmax_axis": axis, "dropout_seed": 1}
    assert np.array_equal(fa.attention(*arrays[1:], dropout_p=0.0, **options), plain)
    gradients = gradients_of(*arrays, softmax_axis=axis)
    same = gradients_of(*arrays, dropout_p=0.0, **options)
    assert all(np.array_equal(getattr(same, n), getattr(gradients, n)) for n in "qkv")
    # Fewer than one word in 2^32 is dropped: the factor is all that is left.
    tiny = fa.attention(*arrays[1:], dropout_p=2.0**-40, **options)
    np.testing.assert_allclose(tiny, plain, rtol=1e-11, atol=1e-12)
    assert not fa.attention(*arrays[1:], dropout_p=1.0, **options).any()
    nothing = gradients_of(*arrays, dropout_p=1.0, **options)
    assert not any(x.any() for x in (nothing.q, nothing.k, nothing.v))


@each_axis
def test_lse_is_that_of_all_weights(axis: str) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 40, 8))
    _, lse = fa.attention(q, k, v, return_lse=True, softmax_axis=axis)
    _, dropped = fa.attention(
        q, k, v, return_lse=True, softmax_axis=axis, dropout_p=0.6, dropout_seed=2
    )
    assert np.array_equal(dropped, lse)


@each_axis
@each_dtype
def test_any_number_of_threads(axis: str, dtype: Any) -> None:
    arrays = np.random.default_rng(0).standard_normal((4, 2, 3, 200, 24)).astype(dtype)
    options: dict[str, Any] = {"dropout_p": 0.2, "dropout_seed": SEED, "softmax_axis": axis}
    out = fa.attention(*arrays[1:], num_threads=1, **options)
    grads = gradients_of(*arrays, num_threads=1, **options)
    for num_threads in (2, 3, 7):
        assert np.array_equal(fa.attention(*arrays[1:], num_threads=num_threads, **options), out)
        again = gradients_of(*arrays, num_threads=num_threads, **options)
        assert all(np.array_equal(getattr(again, n), getattr(grads, n)) for n in "qkv")


def test_shared_heads_draw_as_repeated_ones() -> None:
    """Heads are counted among the queries'."""
    rng = np.random.default_rng(0)
    grad_out, q = rng.standard_normal((2, 2, 6, 30, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 2, 90, 8)).astype(np.float32)
    options = {"dropout_p": 0.4, "dropout_seed": 3}
    shared = fa.attention(q, k, v, **options)
    apart = [np.repeat(x, 3, axis=1) for x in (k, v)]
    assert np.array_equal(shared, fa.attention(q, *apart, **options))
    grads, repeated = (
        gradients_of(grad_out, q, k, v, **options),
        gradients_of(grad_out, q, *apart, **options),
    )
    assert np.array_equal(grads.q, repeated.q)


@each_axis
def test_dropped_values_may_hold_anything(axis: str) -> None:
    """A dropped weight is 0, and 0 times NaN is not added."""
    grad_out, q, k, v = np.random.default_rng(0).standard_normal((4, 1, 1, 60, 8))
    options: dict[str, Any] = {"dropout_p": 0.5, "dropout_seed": 4, "softmax_axis": axis}
    clean = fa.attention(q, k, v, **options)
    v[0, 0, 17] = np.nan
    kept = fa.reference.dropout_mask(0.5, 4, (1, 1, 60, 60))[0, 0, :, 17]
    out = fa.attention(q, k, v, **options)[0, 0]
    assert np.isnan(out[kept]).all()
    assert np.array_equal(out[~kept], clean[0, 0, ~kept])
    grads = gradients_of(grad_out, q, k, v, **options)
    expected = fa.reference.attention_backward(grad_out, q, k, v, **options)
    for name in "qkv":
        np.testing.assert_allclose(getattr(grads, name), getattr(expected, name), atol=1e-12)


def test_packed_sequences_are_batch_entries() -> None:
    rng = np.random.default_rng(0)
    q, k, v, grad_out = rng.standard_normal((4, 60, 2, 8))
    starts = [0, 20, 40, 60]
    options: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": 9, "causal": True}
    out, lse = fa.attention_varlen(q, k, v, starts, starts, return_lse=True, **options)
    grads = fa.attention_varlen_backward(grad_out, q, k, v, out, lse, starts, starts, **options)
    batched = [x.reshape(3, 20, 2, 8).swapaxes(1, 2) for x in (grad_out, q, k, v)]
    expected = fa.attention(*batched[1:], **options)
    assert np.array_equal(out.reshape(3, 20, 2, 8).swapaxes(1, 2), expected)
    whole = gradients_of(*batched, **options)
    for name in "qkv":
        packed = getattr(grads, name).reshape(3, 20, 2, 8).swapaxes(1, 2)
        assert np.array_equal(packed, getattr(whole, name))
