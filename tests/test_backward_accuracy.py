"""Rounding errors of gradients, in the units of tests/gauge.py."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gauge import MAX_GRADIENT_GAUGES, gradient_gauges, naive_gradients
from gradients import described, gradients_of, random_call
from narrow import operations_of_narrow_types

import fastattn as fa

NUM_CALLS = 120
CALLS_PER_TEST = 20

HALVES = [np.float16, ml_dtypes.bfloat16]

each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])
each_half = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])


def exact_gradients(arrays: list[np.ndarray], **options: Any) -> Any:
    """Values and units in float64, dropout as the specification draws it."""
    dropout_p, seed = options.pop("dropout_p", 0.0), options.pop("dropout_seed", None)
    q, k = arrays[1:3]
    if dropout_p > 0:
        shape = (*arrays[0].shape[:-2], q.shape[-2], k.shape[-2])
        drawn = fa.reference.dropout_mask(dropout_p, seed, shape)
        kept = np.where(drawn, 1 / np.float64(1 - dropout_p), 0) if dropout_p < 1 else 0.0 * drawn
        options["kept"] = kept
    return naive_gradients(*arrays, **options)


def check(arrays: list[np.ndarray], **options: Any) -> None:
    gauges = gradient_gauges(gradients_of(*arrays, **options), exact_gradients(arrays, **options))
    for name, value in gauges.items():
        where = f"{name}: gauge {value:.3g}, {described(arrays, options)}"
        assert value <= MAX_GRADIENT_GAUGES[name], where


@pytest.mark.parametrize("first", range(0, NUM_CALLS, CALLS_PER_TEST))
def test_float32_gauge(first: int) -> None:
    for seed in range(first, first + CALLS_PER_TEST):
        arrays, options = random_call(np.random.default_rng(seed), np.float32)
        check(arrays, **options)


@pytest.mark.parametrize("largest_logit", [1.0, 30.0, 300.0, 3000.0])
@each_axis
def test_large_logits(largest_logit: float, axis: str) -> None:
    rng = np.random.default_rng(0)
    grad_out, q, k, v = rng.standard_normal((4, 2, 150, 32)).astype(np.float32)
    scale = largest_logit / float(np.abs(q @ k.swapaxes(-1, -2)).max())
    check([grad_out, q, k, v], scale=scale, softmax_axis=axis)
    check([grad_out, q, k, v], scale=scale, softmax_axis=axis, causal=True)


@pytest.mark.slow_on_other_sets
@each_axis
def test_long_rows(axis: str) -> None:
    """Errors grow with blocks and their number, not with the sequence."""
    rng = np.random.default_rng(0)
    q, grad_out = rng.standard_normal((2, 1, 2500, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 2500, 16)).astype(np.float32)
    check([grad_out, q, k, v], softmax_axis=axis)


@pytest.mark.slow_on_other_sets
@pytest.mark.parametrize("shape", [(1, 1300), (400, 1), (1, 1), (4, 1, 1)], ids=str)
def test_sums_of_many_bias_gradients(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    grad_out, q = rng.standard_normal((2, 3, 4, 400, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, 3, 2, 1300, 16)).astype(np.float32)
    bias = rng.standard_normal(shape).astype(np.float32)
    check([grad_out, q, k, v], bias=bias, causal=True)


@each_half
@pytest.mark.parametrize("first", range(0, NUM_CALLS // 2, CALLS_PER_TEST))
def test_16_bit_gauge(dtype: Any, first: int) -> None:
    """Against float64 on the rounded inputs: float32's units, the rounding of `out`, of which delta
    is made, and one rounding of the result."""
    roundoff = float(ml_dtypes.finfo(dtype).eps) / 2
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    for seed in range(first, first + CALLS_PER_TEST):
        arrays, options = random_call(np.random.default_rng(seed), dtype)
        for name in ("bias", "grad_lse"):
            if name in options:
                options[name] = options[name].astype(np.float32)
        exact = exact_gradients(arrays, **options, out_roundoff=roundoff / 2.0**-24)
        grads = gradients_of(*arrays, **options)
        for name, value in exact.values.items():
            gradient = getattr(grads, name)
            assert gradient.shape == value.shape
            once = 0.0
            if name in "qkv":
                assert gradient.dtype == dtype
                once = roundoff * np.abs(value) + smallest / 2
            error = np.abs(gradient.astype(np.float64) - value) - once
            unit = 2.0**-24 * exact.units[name] + 2.0**-104 * exact.floors[name]
            # The rounding applies to a value that is itself that far off.
            assert np.all(error <= MAX_GRADIENT_GAUGES[name] * unit * (1 + roundoff) + 1e-30), (
                f"seed {seed}: {name}, {described(arrays, options)}"
            )


@each_half
def test_16_bit_is_rounded_once(dtype: Any) -> None:
    """grad_v owes nothing to out's rounding: all but a few are the nearest number."""
    rng = np.random.default_rng(0)
    arrays = [x.astype(dtype) for x in rng.standard_normal((4, 2, 400, 32))]
    exact = fa.reference.attention_backward(*arrays).v
    nearest = exact.astype(np.float32).astype(dtype)
    grads = gradients_of(*arrays)
    ulps = np.abs(grads.v.view(np.int16).astype(int) - nearest.view(np.int16))
    large = np.abs(exact) > 1e-3
    assert np.mean(ulps[large] == 0) > 0.99
    assert ulps[large].max() <= 1


@each_half
def test_16_bit_sums_over_shared_heads_in_float32(dtype: Any) -> None:
    """Gradients of a shared key head are added before they are rounded."""
    rng = np.random.default_rng(0)
    grad_out, q = rng.standard_normal((2, 8, 100, 32)).astype(dtype)
    k, v = rng.standard_normal((2, 1, 100, 32)).astype(dtype)
    wide = [x.astype(np.float32) for x in (grad_out, q, k, v)]
    out, lse = fa.attention(q, k, v, return_lse=True)
    grads = fa.attention_backward(grad_out, q, k, v, out, lse)
    with operations_of_narrow_types():
        expected = fa.attention_backward(*wide, out.astype(np.float32), lse)
    for name in "qkv":
        assert np.array_equal(getattr(grads, name), getattr(expected, name).astype(dtype)), name
