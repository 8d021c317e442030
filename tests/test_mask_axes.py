"""Which axis a mask or bias of each number of dimensions means, where every axis of the scores has
the same length, so that its shape would fit in any place."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

import fastattn as fa

# Batch entries, heads, queries and keys: all axes of the scores.
N = 3

# What an array is to say, `x[indices]` for the score of (b, h, i, j), and how it is passed: the
# forms of the docstring of `attention`.
FORMS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "call": ("", lambda x: x),
    "key": ("j", lambda x: x),
    "query, key": ("ij", lambda x: x),
    "head, query, key": ("hij", lambda x: x),
    "batch, head, query, key": ("bhij", lambda x: x),
    "batch, key": ("bj", lambda x: x[:, None, None, :]),
    "batch, query, key": ("bij", lambda x: x[:, None, :, :]),
    "batch, head, key": ("bhj", lambda x: x[:, :, None, :]),
    "head, key": ("hj", lambda x: x[:, None, :]),
    "query": ("i", lambda x: x[:, None]),
}

each_form = pytest.mark.parametrize("form", FORMS)


def spread(x: np.ndarray, indices: str, axes: str = "bhij") -> np.ndarray:
    """x at every score, written out."""
    full = np.empty((N,) * len(axes), x.dtype)
    for place in itertools.product(range(N), repeat=len(axes)):
        at = dict(zip(axes, place, strict=True))
        full[place] = x[tuple(at[index] for index in indices)]
    return full


def weights(
    q: np.ndarray, k: np.ndarray, full_mask: np.ndarray, full_bias: np.ndarray
) -> np.ndarray:
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + full_bias
    exps = np.where(full_mask, np.exp(scores), 0)
    sums = exps.sum(axis=-1, keepdims=True)
    return np.divide(exps, sums, where=sums > 0, out=np.zeros_like(exps))


@each_form
def test_which_axis_is_which(rng: np.random.Generator, form: str) -> None:
    indices, passed = FORMS[form]
    q, k, v = rng.standard_normal((3, N, N, N, 8))
    mask = rng.random((N,) * len(indices)) < 0.6
    bias = rng.standard_normal((N,) * len(indices))
    full_mask, full_bias = spread(mask, indices), spread(bias, indices)
    for options, expected in (
        ({"mask": passed(mask)}, weights(q, k, full_mask, np.zeros(()))),
        ({"bias": passed(bias)}, weights(q, k, np.ones((), bool), full_bias)),
        ({"mask": passed(mask), "bias": passed(bias)}, weights(q, k, full_mask, full_bias)),
    ):
        np.testing.assert_allclose(fa.attention(q, k, v, **options), expected @ v, atol=1e-12)
        reference = fa.reference.attention(q, k, v, **options)
        np.testing.assert_allclose(reference, expected @ v, atol=1e-12)


@each_form
def test_which_axis_is_which_in_the_backward_pass(rng: np.random.Generator, form: str) -> None:
    indices, passed = FORMS[form]
    q, k, v, grad_out = rng.standard_normal((4, N, N, N, 8))
    mask = rng.random((N,) * len(indices)) < 0.6
    bias = rng.standard_normal((N,) * len(indices))

    def gradients(mask: np.ndarray, bias: np.ndarray) -> fa.Gradients:
        options = {"mask": mask, "bias": bias}
        out, lse = fa.attention(q, k, v, return_lse=True, **options)
        return fa.attention_backward(grad_out, q, k, v, out, lse, **options)

    found = gradients(passed(mask), passed(bias))
    full = gradients(spread(mask, indices), spread(bias, indices))
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(getattr(found, name), getattr(full, name))
    assert found.bias is not None and full.bias is not None
    others = tuple(axis for axis, index in enumerate("bhij") if index not in indices)
    expected = full.bias.sum(axis=others)
    np.testing.assert_allclose(found.bias, passed(expected), atol=1e-12)


@pytest.mark.parametrize("indices", ["", "j", "ij", "hij"])
def test_without_a_batch_axis(rng: np.random.Generator, indices: str) -> None:
    q, k, v = rng.standard_normal((3, N, N, 8))
    mask = rng.random((N,) * len(indices)) < 0.6
    expected = weights(q, k, spread(mask, indices, "hij"), np.zeros(())) @ v
    np.testing.assert_allclose(fa.attention(q, k, v, mask=mask), expected, atol=1e-12)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_more_dimensions_than_the_scores_are_refused(ndim: int, name: str) -> None:
    q = np.zeros((N,) * ndim)
    given = np.ones((1,) + (N,) * ndim, bool if name == "mask" else float)
    message = f"`{name}` must broadcast to {(N,) * ndim}, got shape {given.shape}"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        fa.attention(q, q, q, **{name: given})


@each_form
@pytest.mark.any_kernel_set
def test_which_axis_is_which_in_layers_and_caches(rng: np.random.Generator, form: str) -> None:
    indices, passed = FORMS[form]
    mask = rng.random((N,) * len(indices)) < 0.6
    full = spread(mask, indices)
    eye = np.eye(N * 2)
    layer = fa.MultiHeadAttention(eye, eye, eye, num_heads=N)
    x = rng.standard_normal((N, N, N * 2))
    np.testing.assert_array_equal(layer(x, mask=passed(mask)), layer(x, mask=full))
    q, k, v = rng.standard_normal((3, N, N, N, 8), np.float32)
    cache = fa.KVCache(N, N, N, 8)
    cache.append(k, v)
    expected = fa.attention(q, k, v, mask=full)
    found = cache.attention(q, mask=passed(mask), causal=False)
    np.testing.assert_array_equal(found, expected)
