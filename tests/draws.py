"""Numbers of any size, and random calls with them."""

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa

# FASTATTN_FUZZ_DRAWS=2000 in the environment draws more calls, on every kernel set.
NUM_DRAWS = int(os.environ.get("FASTATTN_FUZZ_DRAWS", "120"))
DRAWS_PER_TEST = 20
F32 = np.float32
MAX32, MIN64 = float(np.finfo(np.float32).max), float(np.finfo(np.float64).min)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def column(*numbers: float, dtype: Any = F32) -> np.ndarray:
    """One head of single features."""
    return np.array(numbers, dtype)[:, None]


def draw_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Finite numbers: mostly of ordinary size, else of any size, alike or each its own."""
    info = ml_dtypes.finfo(dtype)
    lowest, highest = np.log2(float(info.tiny)), np.log2(float(info.max))
    kind = rng.random()
    exponent: Any = 0.0
    if kind > 0.85:
        exponent = rng.uniform(lowest, highest, shape)
    elif kind > 0.6:
        exponent = rng.uniform(lowest, highest)
    with np.errstate(over="ignore"):
        numbers = rng.standard_normal(shape) * np.exp2(exponent)
    if rng.random() < 0.2:
        numbers = np.abs(numbers)
    return np.clip(numbers, float(info.min), float(info.max)).astype(dtype)


def draw_call(rng: np.random.Generator, dtype: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    num_kv_heads, group = (int(n) for n in rng.integers(1, 3, 2))
    num_heads = num_kv_heads * group
    seqlen_q, seqlen_k = (int(n) for n in rng.choice([1, 2, 7, 33, 130, 300], 2))
    head_dim, head_dim_v = (int(n) for n in rng.choice([1, 3, 8, 33, 64], 2))
    q = draw_numbers(rng, (num_heads, seqlen_q, head_dim), dtype)
    k = draw_numbers(rng, (num_kv_heads, seqlen_k, head_dim), dtype)
    v = draw_numbers(rng, (num_kv_heads, seqlen_k, head_dim_v), dtype)
    axis = "queries" if rng.random() < 0.2 else "keys"
    options: dict[str, Any] = {"softmax_axis": axis}

    def chosen(probability: float = 0.25) -> bool:
        return bool(rng.random() < probability)

    if chosen(0.5):
        options["scale"] = float(rng.choice([-1, 1]) * 10.0 ** rng.uniform(-60, 60))
    if chosen():
        options["softcap"] = float(10.0 ** rng.uniform(-60, 60))
    if chosen(0.4):
        shape = [(num_heads, seqlen_q, seqlen_k), (1, seqlen_k), (seqlen_q, 1)][rng.integers(3)]
        kinds = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
        kind = np.float64 if dtype is np.float64 else kinds[rng.integers(4)]
        bias = draw_numbers(rng, shape, kind)
        if chosen():
            bias = np.where(rng.random(shape) < 0.5, bias, ml_dtypes.finfo(kind).min)
        options["bias"] = bias.astype(kind)
    if chosen():
        options["alibi_slopes"] = 10.0 ** rng.uniform(-60, 60, num_heads)
    if chosen():
        options["mask"] = rng.random((num_heads, seqlen_q, seqlen_k)) < 0.7
    if chosen():
        options["causal"] = True
    if chosen():
        options["kv_lengths"] = int(rng.integers(0, seqlen_k + 1))
    if chosen() and axis == "keys":
        options["sinks"] = rng.standard_normal(num_heads) * 10.0 ** rng.uniform(-5, 30)
    return [q, k, v], options


def gradients_of(
    arrays: list[np.ndarray], grad_out: np.ndarray, options: dict[str, Any]
) -> tuple[Any, Any]:
    """The gradients that the kernels compute, and those of the reference."""
    out, lse = fa.attention(*arrays, return_lse=True, **options)
    computed = fa.attention_backward(grad_out, *arrays, out, lse, **options)
    return computed, fa.reference.attention_backward(grad_out, *arrays, **options)
