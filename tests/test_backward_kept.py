"""Gradients from what the forward pass kept: shift and factor of weights, exact results."""

import itertools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradients import NAMES, gradients_of, kept_gradients_of, random_call
from test_backward_bitwise import DTYPES, SHAPES, make, option_sets, same
from test_backward_scores import assert_beside, draw, masked_by

import fastattn as fa
from fastattn import _core
from fastattn._backward import Kept, attention_and_kept, attention_backward_of_kept
from fastattn._options import set_named
from fastattn._problem import of_packed
from fastattn._results import place_results

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])

LOG2_E = np.log2(np.e)


def weights_of(kept: Kept, scores: np.ndarray, axis: str) -> np.ndarray:
    """What csrc/fastattn.h says that the kept numbers mean."""
    weighing = kept.weighing.astype(np.float64)
    if axis == "queries":
        weighing = weighing.swapaxes(-1, -2)
        shift, factor = weighing[..., :1, :], weighing[..., 1:, :]
    else:
        shift, factor = weighing[..., :1], weighing[..., 1:]
    return np.exp2(scores * LOG2_E - shift) * factor


# ---- what is kept --------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("first", [0, 20])
def test_the_results_are_those_of_attention(dtype: Any, first: int) -> None:
    for seed in range(first, first + 20):
        (_, *arrays), options = random_call(np.random.default_rng(seed), dtype)
        options.pop("grad_lse", None)
        out, lse, kept = attention_and_kept(*arrays, **options)
        expected = fa.attention(*arrays, return_lse=True, **options)
        assert out.tobytes() == expected[0].tobytes() and lse.tobytes() == expected[1].tobytes()
        assert kept.weighing.shape == (*lse.shape, 2) and kept.weighing.dtype == lse.dtype
        keeps = options.get("softmax_axis") != "queries" and (
            dtype in (np.float16, ml_dtypes.bfloat16) or "residual" in options
        )
        assert (kept.exact is not None) == keeps


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3, 70])
@each_axis
def test_weights_come_out_of_what_is_kept(dtype: Any, seqlen_q: int, axis: str) -> None:
    """Of one query, whose keys are shared out by splits, and of many; empty softmaxes weigh 0."""
    _, q, k, v = draw((4, seqlen_q, 2300, 16), 0.5, 0, dtype)
    mask = np.random.default_rng(1).random((seqlen_q, 2300)) < 0.5
    mask[0, 2000:] = False
    mask[:, 7] = False
    mask[-1] &= seqlen_q < 3
    _, _, kept = attention_and_kept(q, k, v, mask=mask, softmax_axis=axis, num_threads=2)
    assert np.isfinite(kept.weighing).all()
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / 4
    scores = np.where(mask, scores, -np.inf)
    weights = weights_of(kept, scores, axis)
    sums = weights.sum(axis=-1 if axis == "keys" else -2)
    takes_part = np.broadcast_to(mask.any(axis=-1 if axis == "keys" else -2), sums.shape)
    tolerance = 1e-12 if dtype == np.float64 else 3e-6
    assert np.abs(sums - takes_part).max() <= tolerance


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_exact_results(dtype: Any) -> None:
    """Neither the residual nor 16 bits have left a trace in them."""
    _, q, k, v = draw((4, 40, 1500, 32), 1.0, 0, dtype)
    residual = np.full((4, 40, 16), 1000, dtype)
    wide = [x.astype(np.float32) for x in (q, k, v)]
    expected = fa.reference.attention(*wide)
    _, _, kept = attention_and_kept(q, k, v, residual=residual)
    assert kept.exact is not None and kept.exact.dtype == np.float32
    assert np.abs(kept.exact - expected).max() <= 1e-5


def test_sinks_share_the_sum() -> None:
    """Also one far above the scores, and one beside no key at all."""
    _, q, k, v = draw((4, 20, 30, 8), 1.0, 0, np.float32)
    sinks = np.array([0.5, 60.0, 500.0, -np.inf])
    mask = np.ones((20, 30), bool)
    mask[3] = False
    _, lse, kept = attention_and_kept(q, k, v, sinks=sinks, mask=mask)
    scores = np.where(mask, q.astype(np.float64) @ k.swapaxes(-1, -2) / np.sqrt(8), -np.inf)
    weights = weights_of(kept, scores, "keys").sum(axis=-1)
    expected = 1 - np.exp(sinks[:, None] - np.maximum(lse, -1e30))
    assert np.abs(weights - np.where(mask.any(axis=1), expected, 0)).max() <= 1e-5
    assert not kept.weighing[:, 3].any()


@each_axis
def test_what_another_pass_computed_is_not_known(axis: str) -> None:
    """Rows that leave the range of float32 are computed by float64, and so are their gradients."""
    grad_out, q, k, v = draw((2, 40, 60, 8), 1.0, 0, np.float32)
    q[0, 5] *= 1e30
    k[0, 3] *= 1e30
    given = {"softmax_axis": axis}
    _, _, kept = attention_and_kept(q, k, v, **given)
    unknown = np.isnan(kept.weighing[..., 1])
    assert unknown[0].any() and not unknown[1].any() and not unknown[0].all()
    grads = kept_gradients_of(grad_out, q, k, v, **given)
    exact = fa.reference.attention_backward(grad_out, q, k, v, **given)
    for name in "qkv":
        value = getattr(exact, name)
        error = np.abs(getattr(grads, name)[0] - value[0]).max()
        assert error <= 1e-5 * np.abs(value[0]).max(), name
    _, _, kept = attention_and_kept(q, k, v, scale=1e39, **given)
    assert np.isnan(kept.weighing[..., 1]).all()


# ---- gradients -----------------------------------------------------------------------------------


@each_dtype
@each_axis
def test_nothing_of_lse_is_needed(dtype: Any, axis: str) -> None:
    """Nor of `out` where it is not exact: the kept arrays stand for both."""
    grad_out, q, k, v = make(SHAPES[1], dtype)
    options = {"softmax_axis": axis, "scale": 1.0}
    out, lse, kept = attention_and_kept(q, k, v, **options)
    grads = attention_backward_of_kept(grad_out, q, k, v, out, lse, kept, **options)
    if kept.exact is not None and not np.isnan(kept.weighing).any():
        out = np.zeros_like(out)
    if not np.isnan(kept.weighing).any():
        lse = np.zeros_like(lse)
    same(attention_backward_of_kept(grad_out, q, k, v, out, lse, kept, **options), grads)


@each_dtype
@each_axis
def test_what_is_not_known_is_computed_again(dtype: Any, axis: str) -> None:
    grad_out, q, k, v = make(SHAPES[1], dtype)
    options = {"softmax_axis": axis, "scale": 1.0}
    out, lse, kept = attention_and_kept(q, k, v, **options)
    kept.weighing[..., 1] = np.nan
    grads = attention_backward_of_kept(
        grad_out, q, k, v, out, lse, kept._replace(exact=None), **options
    )
    same(grads, fa.attention_backward(grad_out, q, k, v, out, lse, **options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=str)
@pytest.mark.parametrize("first", [0, 25])
def test_random_calls(dtype: Any, first: int) -> None:
    """All options in all combinations, against the gradients without."""
    tolerance = {np.float32: 3e-5, np.float64: 1e-12, np.float16: 2e-2}[dtype]
    for seed in range(first, first + 25):
        arrays, options = random_call(np.random.default_rng(seed), dtype)
        if dtype == np.float16 and "grad_lse" in options:
            options["grad_lse"] = options["grad_lse"].astype(np.float32)
        grads = kept_gradients_of(*arrays, **options)
        expected = gradients_of(*arrays, **options)
        for name in NAMES:
            x, y = getattr(grads, name), getattr(expected, name)
            assert (x is None) == (y is None), name
            if x is not None and x.size:
                x, y = x.astype(np.float64), y.astype(np.float64)
                assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max()), (name, seed)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("scale", [5.0, 20.0])
def test_rows_that_one_weight_dominates(dropout_p: float, scale: float) -> None:
    """Their errors are a few roundings of the products that the gradient is the difference of."""
    grad_out, q, k, v = draw((2, 130, 300, 32), scale, 0, np.float32)
    options = {"dropout_p": dropout_p, "dropout_seed": 1, "softcap": 300.0}
    bias = np.zeros((130, 300), np.float32)
    grads = kept_gradients_of(grad_out, q, k, v, bias=bias, **options)
    exact = fa.reference.attention_backward(grad_out, q, k, v, bias=bias, **options)
    products = np.abs(grad_out).astype(np.float64) @ np.abs(v).swapaxes(-1, -2)
    assert np.abs(grads.bias - exact.bias).max() <= 4e-5 * products.max()


def test_sinks_far_from_the_scores() -> None:
    arrays = draw((3, 20, 30, 8), 1.0, 0, np.float32)
    arrays[1][2] *= 1e4
    sinks = np.array([60.0, 500.0, 2e4])
    mask = np.ones((20, 30), bool)
    mask[4] = False
    options = {"sinks": sinks, "mask": mask}
    grad_lse = np.ones((3, 20), np.float32)
    grads = kept_gradients_of(*arrays, grad_lse=grad_lse, **options)
    exact = fa.reference.attention_backward(*arrays, grad_lse=grad_lse, **options)
    np.testing.assert_allclose(grads.sinks, exact.sinks, rtol=1e-5)
    np.testing.assert_allclose(grads.v[:2], exact.v[:2], rtol=1e-4, atol=1e-30)


OFFSETS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": lambda rng, shape, dtype: {},
    "finfo.min": masked_by(float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)),
}


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_values_far_from_zero(name: str, dtype: Any) -> None:
    """The rounding of `out` would be far more than that of any gradient: the mean of the values is
    most of it, and that of the keys multiplies it."""
    found: dict[str, list[float]] = {}
    for seed in range(6):
        shape = (2, 100, 300, 32)
        grad_out, q, k, v = (x.astype(np.float32) for x in draw(shape, 1.0, seed, np.float64))
        arrays = [x.astype(dtype) for x in (grad_out, q, k + 3, v + 5)]
        options = OFFSETS[name](np.random.default_rng(seed), shape, np.float32)
        grads = kept_gradients_of(*arrays, **options)
        exact = fa.reference.attention_backward(*(x.astype(np.float64) for x in arrays), **options)
        for of in "qkv":
            value = getattr(exact, of)
            error = np.abs(getattr(grads, of).astype(np.float64) - value).max()
            least = np.abs(value.astype(np.float32).astype(dtype).astype(np.float64) - value).max()
            found.setdefault(of, []).append(error / least)
    for of, ratios in found.items():
        assert max(ratios) <= 2, f"{of}: {max(ratios):.2f} times the error of one rounding"
    assert_beside(found, name)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_dtype
@each_axis
def test_bits(shape: Any, dtype: Any, axis: str) -> None:
    """Threads, strides and the rest of a batch leave no trace in gradients by kept arrays."""
    arrays = make(shape, dtype)
    for options in option_sets(arrays, axis):
        given = {"softmax_axis": axis, **options}
        once = kept_gradients_of(*arrays, num_threads=1, **given)
        for num_threads in (2, 7):
            same(kept_gradients_of(*arrays, num_threads=num_threads, **given), once)
        views = [np.repeat(x[..., ::-1], 2, axis=-1)[..., ::-2] for x in arrays]
        moved = kept_gradients_of(*views, num_threads=2, **given)
        for name in NAMES:
            x, y = getattr(moved, name), getattr(once, name)
            assert x is None or x.tobytes() == y.tobytes(), name
    for scale in (0.2, 2.0):
        both = kept_gradients_of(*arrays, softmax_axis=axis, scale=scale)
        alone = kept_gradients_of(*(x[1:] for x in arrays), softmax_axis=axis, scale=scale)
        for name in "qkv":
            assert getattr(both, name)[1:].tobytes() == getattr(alone, name).tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=str)
def test_packed_sequences(dtype: Any) -> None:
    """The core keeps them, too: of each sequence what it keeps of that alone."""
    starts = np.array([0, 3, 3, 70, 200])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((200, heads, 16)).astype(dtype) for heads in (4, 2, 2))
    firsts = [x.swapaxes(0, 1) for x in (q, k, v)]
    problem = of_packed(q, k, v, starts, starts)
    set_named(problem, {"causal": True})
    _, lse = place_results(problem, None, True)
    assert lse is not None
    kept = Kept(np.empty((4, 200, 2), lse.dtype), np.empty((4, 200, 16), lse.dtype))
    problem.weighing, problem.exact = kept
    _core.attention(problem)
    for lo, hi in itertools.pairwise(starts):
        part = [x[:, lo:hi] for x in firsts]
        _, _, alone = attention_and_kept(*part, causal=True)
        assert np.array_equal(kept.weighing[:, lo:hi], alone.weighing)
        if alone.exact is not None:
            assert kept.exact is not None and np.array_equal(kept.exact[:, lo:hi], alone.exact)


# ---- the door ------------------------------------------------------------------------------------


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("weighing", np.empty((2, 5, 3), np.float32)),
        ("weighing", np.empty((2, 4, 2), np.float32)),
        ("weighing", np.empty((5, 2), np.float32)),
        ("weighing", np.empty((2, 5, 2), np.float64)),
        ("exact", np.empty((2, 5, 7), np.float32)),
        ("exact", np.empty((1, 5, 8), np.float32)),
        ("exact", np.empty((2, 5, 8), np.float16)),
    ],
)
def test_arrays_of_other_sizes_are_refused_by_name(name: str, wrong: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    grad_out, q, k, v = rng.standard_normal((4, 2, 5, 8)).astype(np.float16)
    out, lse, kept = attention_and_kept(q, k, v)
    with pytest.raises(ValueError, match=f"`{name}` must keep its shape and dtype"):
        attention_backward_of_kept(grad_out, q, k, v, out, lse, kept._replace(**{name: wrong}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fastattn._backward._give_kept", lambda problem, kept: setattr(problem, name, wrong)
        )
        with pytest.raises(ValueError, match=f"`{name}` must keep its shape and dtype"):
            attention_and_kept(q, k, v)
