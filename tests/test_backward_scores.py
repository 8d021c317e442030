"""Gradients agree with the forward pass whatever the scores are: errors beside naive ones."""

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gauge import naive_gradients
from gradients import gradients_of, kept_gradients_of

import fastattn as fa

Array = np.ndarray
Options = dict[str, Any]

# No gradient may be further off than so many times the naive largest error: in the (geometric) mean
# of some calls, and in any of them.
MAX_RATIO, MAX_SINGLE = 2.0, 30.0

# Base-2 scores of 144 for natural ones of 100, of which the bias is rounded once more than naive's.
MAX_SHIFTED = 2.5

# (heads, seqlen_q, seqlen_k, head_dim): one query and many, few keys and many.
SHAPES = [(40, 1, 7, 8), (40, 1, 300, 32), (40, 3, 6, 8), (4, 60, 40, 16), (2, 130, 300, 32)]
SCALES = [0.1, 1.0, 4.0, 15.0, 60.0, 300.0]

# From lse, and from what the forward pass kept besides.
each_way = pytest.mark.parametrize("gradients", [gradients_of, kept_gradients_of])

# Naive gradients take most of a test's time, and both ways have nearly the same errors.
one_way_is_quick = pytest.mark.parametrize(
    "gradients", [gradients_of, pytest.param(kept_gradients_of, marks=pytest.mark.slow)]
)
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])


def draw(shape: tuple[int, int, int, int], scale: float, seed: int, dtype: Any) -> list[Array]:
    """grad_out, q, k, v; scores have about the deviation `scale`."""
    heads, seqlen_q, seqlen_k, head_dim = shape
    rng = np.random.default_rng(seed)
    arrays = [
        rng.standard_normal((heads, seqlen_q, 16)),
        rng.standard_normal((heads, seqlen_q, head_dim)) * scale,
        rng.standard_normal((heads, seqlen_k, head_dim)),
        rng.standard_normal((heads, seqlen_k, 16)),
    ]
    return [x.astype(dtype) for x in arrays]


def masked_by(value: float) -> Callable[..., Options]:
    """Half of the keys, and all of every third query, carry a huge negative bias."""

    def make(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Options:
        _, seqlen_q, seqlen_k, _ = shape
        hidden = (rng.random((seqlen_q, seqlen_k)) < 0.5) | (np.arange(seqlen_q) % 3 == 0)[:, None]
        return {"bias": np.where(hidden, dtype(value), dtype(0))}

    return make


OPTIONS: dict[str, Callable[..., Options]] = {
    "plain": lambda rng, shape, dtype: {},
    "causal": lambda rng, shape, dtype: {"causal": True},
    "window": lambda rng, shape, dtype: {"window": (20, 5)},
    "softcap": lambda rng, shape, dtype: {"softcap": 50.0},
    "sinks": lambda rng, shape, dtype: {"sinks": rng.standard_normal(shape[0]) * 3},
    "-1e9": masked_by(-1e9),
    "shifted": lambda rng, shape, dtype: {"bias": (100 + rng.random(shape[1:3])).astype(dtype)},
    "mask": lambda rng, shape, dtype: {"mask": rng.random(shape[1:3]) < 0.3},
    "alibi": lambda rng, shape, dtype: {"alibi_slopes": rng.random(shape[0]) * 0.3},
    "residual": lambda rng, shape, dtype: {
        "residual": (10 * rng.standard_normal((*shape[:2], 16))).astype(dtype)
    },
    "grad_lse": lambda rng, shape, dtype: {
        "grad_lse": rng.standard_normal(shape[:2]).astype(dtype)
    },
    "queries": lambda rng, shape, dtype: {"softmax_axis": "queries"},
    "queries, causal": lambda rng, shape, dtype: {"softmax_axis": "queries", "causal": True},
    "queries, softcap": lambda rng, shape, dtype: {"softmax_axis": "queries", "softcap": 20.0},
}


def calls(name: str, scale: float, dtype: Any) -> Iterator[tuple[list[Array], Options]]:
    for seed, shape in enumerate(SHAPES * 3):
        rng = np.random.default_rng(seed + 100)
        yield draw(shape, scale, seed, dtype), OPTIONS[name](rng, shape, dtype)


def ratios(
    results: Iterator[tuple[dict[str, Array], dict[str, Array], dict[str, Array]]], unit: float
) -> dict[str, list[float]]:
    """For each gradient the largest error over naive's, call by call; errors below a unit of the
    largest element are as good as none."""
    found: dict[str, list[float]] = {}
    for ours, naive, exact in results:
        for name, value in exact.items():
            floor = unit * max(float(np.abs(value).max()), 1e-30)
            errors = [float(np.abs(x[name] - value).max()) for x in (ours, naive)]
            assert np.isfinite(errors[0]), name
            found.setdefault(name, []).append(max(errors[0], floor) / max(errors[1], floor))
    return found


def assert_beside(found: dict[str, list[float]], where: str) -> None:
    """One call's ratio owes much to luck, where a row or two make the largest errors of both."""
    for name, values in found.items():
        mean = float(np.exp(np.mean(np.log(values))))
        limit = MAX_SHIFTED if where.startswith("shifted") else MAX_RATIO
        assert mean <= limit, f"{name}: {mean:.2f} times naive's error, {where}"
        assert max(values) <= MAX_SINGLE, f"{name}: {max(values):.2f} times, {where}"


@pytest.mark.slow_on_other_sets
@one_way_is_quick
@pytest.mark.parametrize("name", OPTIONS)
def test_float32_beside_naive_float32(name: str, gradients: Callable[..., Any]) -> None:
    for scale in SCALES:
        found = ratios(_float32(name, scale, gradients), 2.0**-24)
        assert_beside(found, f"{name}, scores of {scale}")


def _float32(name: str, scale: float, gradients: Callable[..., Any]) -> Iterator[Any]:
    for arrays, options in calls(name, scale, np.float32):
        grads = gradients(*arrays, **options)._asdict()
        naive = naive_gradients(*arrays, dtype=np.float32, **options).values
        yield grads, naive, naive_gradients(*arrays, **options).values


@pytest.mark.slow_on_other_sets
@one_way_is_quick
@pytest.mark.parametrize("name", ["plain", "softcap", "residual", "queries"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_beside_widened_inputs(name: str, dtype: Any, gradients: Callable[..., Any]) -> None:
    """Naive is what PyTorch's exact path does: float32 of the widened inputs, rounded once."""
    for scale in SCALES[:-1]:
        floor = float(ml_dtypes.finfo(dtype).eps) / 2
        where = f"{name}, scores of {scale}"
        assert_beside(ratios(_narrow(name, scale, dtype, gradients), floor), where)


def _narrow(name: str, scale: float, dtype: Any, gradients: Callable[..., Any]) -> Iterator[Any]:
    for arrays, options in calls(name, scale, dtype):
        wide = [x.astype(np.float32) for x in arrays]
        grads = {
            of: x.astype(np.float64)
            for of, x in gradients(*arrays, **options)._asdict().items()
            if x is not None
        }
        options.pop("residual", None)
        naive = naive_gradients(*wide, dtype=np.float32, **options).values
        rounded = {of: x.astype(dtype).astype(np.float64) for of, x in naive.items()}
        yield grads, rounded, naive_gradients(*wide, **options).values


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("name", ["plain", "softcap", "-1e9", "sinks", "queries"])
def test_float64_beside_naive_float64(name: str, gradients: Callable[..., Any]) -> None:
    for scale in SCALES[1::2]:  # products of long doubles take long
        found = ratios(_float64(name, scale, gradients), 2.0**-53)
        assert_beside(found, f"{name}, scores of {scale}")


def _float64(name: str, scale: float, gradients: Callable[..., Any]) -> Iterator[Any]:
    for arrays, options in calls(name, scale, np.float64):
        grads = gradients(*arrays, **options)._asdict()
        naive = naive_gradients(*arrays, dtype=np.float64, **options).values
        yield grads, naive, naive_gradients(*arrays, dtype=np.longdouble, **options).values


# ---- rows of one huge score ----------------------------------------------------------------------

HUGE = [
    (np.float32, float(np.finfo(np.float32).min)),
    (np.float32, -1e9),
    (np.float16, -1e9),
    (np.float64, float(np.finfo(np.float64).min)),
    (np.float64, -1e300),
]


@each_way
@pytest.mark.parametrize(("dtype", "value"), HUGE, ids=str)
@each_axis
def test_rows_of_one_huge_bias_have_the_gradients_of_their_average(
    dtype: Any, value: float, axis: str, gradients: Callable[..., Any]
) -> None:
    q = np.zeros((4, 1) if axis == "queries" else (1, 1), dtype)
    k = np.zeros((1, 1) if axis == "queries" else (4, 1), dtype)
    v = np.arange(len(k), dtype=dtype)[:, None]
    grad_out = np.arange(1, len(q) + 1, dtype=dtype)[:, None]
    bias = np.full((len(q), len(k)), value, np.float64 if dtype == np.float64 else np.float32)
    grads = gradients(grad_out, q, k, v, bias=bias, softmax_axis=axis)
    exact = fa.reference.attention_backward(grad_out, q, k, v, bias=bias, softmax_axis=axis)
    if axis == "keys":
        assert np.array_equal(exact.v, np.full((4, 1), 0.25))
        assert np.array_equal(exact.bias, [[-0.375, -0.125, 0.125, 0.375]])
    for name in ("q", "k", "v", "bias"):
        assert np.array_equal(getattr(grads, name), getattr(exact, name)), name


@each_way
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("seqlen_k", [5, 130, 1500])
def test_rows_masked_by_finfo_min(dtype: Any, seqlen_k: int, gradients: Callable[..., Any]) -> None:
    """Some rows have nothing else, the others average what is left."""
    grad_out, q, k, v = draw((2, 90, seqlen_k, 8), 1.0, 0, dtype)
    rng = np.random.default_rng(1)
    hidden = (rng.random((90, seqlen_k)) < 0.5) | (np.arange(90) % 3 == 0)[:, None]
    bias = np.where(hidden, np.finfo(dtype).min, dtype(0))
    grads = gradients(grad_out, q, k, v, bias=bias)
    exact = fa.reference.attention_backward(grad_out, q, k, v, bias=bias)
    eps = float(np.finfo(dtype).eps)
    for name in ("q", "k", "v", "bias"):
        value = getattr(exact, name)
        error = np.abs(getattr(grads, name) - value).max()
        assert error <= 16 * eps * np.abs(value).max(), name


@each_way
def test_a_row_of_one_weight_has_no_gradient_of_scores(gradients: Callable[..., Any]) -> None:
    """Weights of 1 and 0, in rows and in columns: delta is what it is subtracted from."""
    grad_out, q, k, v = draw((2, 40, 70, 32), 1e4, 0, np.float32)
    bias = np.full((40, 70), -1e6, np.float32)
    bias[np.arange(40), np.arange(40) + 3] = 1e6
    for options in ({}, {"softmax_axis": "queries"}):
        grads = gradients(grad_out, q, k, v, bias=bias, scale=1e-3, **options)
        if not options:
            assert np.array_equal(grads.v[:, 3:43], grad_out)
            assert not grads.q.any() and not grads.k.any() and not grads.bias.any()
        else:
            assert np.array_equal(grads.v[:, 3:43], grad_out)
            assert not grads.k[:, 3:43].any() and not grads.bias[:, 3:43].any()


@each_way
def test_residual_far_larger_than_the_result(gradients: Callable[..., Any]) -> None:
    arrays = draw((2, 100, 200, 16), 1.0, 0, np.float32)
    residual = np.full((2, 100, 16), 1e6, np.float32)
    grads = gradients(*arrays, residual=residual)
    plain = gradients(*arrays)
    for name in "qkv":
        x, y = getattr(grads, name), getattr(plain, name)
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max(), name


@each_way
def test_sinks_far_from_the_scores(gradients: Callable[..., Any]) -> None:
    """A sink that takes next to all of the weight, and one of a score of 1e4."""
    arrays = draw((3, 20, 30, 8), 1.0, 0, np.float32)
    arrays[1][2] *= 1e4
    sinks = np.array([60.0, 500.0, 2e4])
    grads = gradients(*arrays, sinks=sinks)
    exact = fa.reference.attention_backward(*arrays, sinks=sinks)
    np.testing.assert_allclose(grads.sinks, exact.sinks, rtol=2e-2, atol=1e-30)
    np.testing.assert_allclose(grads.v[:2], exact.v[:2], rtol=1e-4, atol=1e-30)


# ---- attention that was merged -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_parts_of_the_keys_with_the_lse_of_all(scale: float) -> None:
    """Each part gets what attention over all keys returned, and gives its own keys gradients."""
    grad_out, q, k, v = draw((2, 70, 300, 16), scale, 0, np.float32)
    out, lse = fa.attention(q, k, v, return_lse=True)
    whole = fa.attention_backward(grad_out, q, k, v, out, lse)
    parts = [slice(0, 90), slice(90, 300)]
    some = [fa.attention_backward(grad_out, q, k[:, part], v[:, part], out, lse) for part in parts]
    joined = {
        "q": some[0].q + some[1].q,
        "k": np.concatenate([x.k for x in some], axis=1),
        "v": np.concatenate([x.v for x in some], axis=1),
    }
    for name, x in joined.items():
        y = getattr(whole, name)
        assert np.abs(x - y).max() <= 2e-5 * np.abs(y).max(), name
