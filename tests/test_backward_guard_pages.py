"""No access outside the arrays by the backward pass; see test_guard_pages.py."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradients import NAMES
from test_guard_pages import HEAD_DIMS, LAYOUTS, TAILS, GuardedMemory, memory

import fastattn as fa
from fastattn import _results
from fastattn._backward import attention_and_kept, attention_backward_of_kept

__all__ = ["memory"]  # a fixture

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])


def make(dtype: Any, *shape: int) -> list[np.ndarray]:
    seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    rng = np.random.default_rng(0)
    shapes = [
        (2, seqlen_q, head_dim_v),
        (2, seqlen_q, head_dim),
        (1, seqlen_k, head_dim),
        (1, seqlen_k, head_dim_v),
    ]
    return [rng.standard_normal(x).astype(dtype) for x in shapes]


def check(guards: GuardedMemory, layout: str, arrays: list[np.ndarray], **options: Any) -> None:
    """Every input and every gradient flush against a guard page: the gradients of plain arrays."""
    place = LAYOUTS[layout]
    axis = options.get("softmax_axis", "keys")
    out, lse = fa.attention(*arrays[1:], return_lse=True, **options)
    grad_lse = np.ones_like(lse)
    expected = fa.attention_backward(*arrays, out, lse, grad_lse=grad_lse, **options)
    guarded = {
        name: place(guards, x) if isinstance(x, np.ndarray) and x.ndim > 1 else x
        for name, x in options.items()
    }
    given = [place(guards, x) for x in (*arrays, out)]
    assert axis in ("keys", "queries")

    def allocate(shape: Any, dtype: Any) -> np.ndarray:
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return guards.buffer(nbytes).view(dtype).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_results, "allocate", allocate)
        grads = fa.attention_backward(
            *given, guards.copy(lse), grad_lse=guards.copy(grad_lse), **guarded
        )
        *made, kept = attention_and_kept(*given[1:4], **guarded)
        by_kept = attention_backward_of_kept(*given[:4], *made, kept, **guarded)
    for name in NAMES:
        x, y = getattr(grads, name), getattr(expected, name)
        assert (x is None and y is None) or np.array_equal(x, y), name
    *made, kept = attention_and_kept(*arrays[1:], **options)
    plain = attention_backward_of_kept(*arrays, *made, kept, **options)
    for name in NAMES:
        x, y = getattr(by_kept, name), getattr(plain, name)
        assert (x is None and y is None) or np.array_equal(x, y), name


@each_layout
@each_dtype
@each_axis
def test_sequence_tails(memory: Any, layout: str, dtype: Any, axis: str) -> None:
    for seqlen_q, seqlen_k in TAILS:
        arrays = make(dtype, seqlen_q, seqlen_k, 24, 40)
        check(memory, layout, arrays, softmax_axis=axis)
    check(memory, layout, arrays, softmax_axis=axis, causal=True)


@each_layout
@each_dtype
@each_axis
def test_head_dim_tails(memory: Any, layout: str, dtype: Any, axis: str) -> None:
    for head_dim, head_dim_v in HEAD_DIMS:
        check(memory, layout, make(dtype, 13, 70, head_dim, head_dim_v), softmax_axis=axis)


@each_layout
@each_axis
def test_options(memory: Any, layout: str, axis: str) -> None:
    rng = np.random.default_rng(1)
    for seqlen_q, seqlen_k in TAILS[1::2]:
        arrays = make(np.float32, seqlen_q, seqlen_k, 24, 40)
        scores = (2, seqlen_q, seqlen_k)
        option_sets: list[dict[str, Any]] = [
            {"mask": rng.random(scores) < 0.7, "dropout_p": 0.3, "dropout_seed": 1},
            {
                "bias": rng.standard_normal(scores).astype(np.float32),
                "residual": np.ones_like(arrays[0]),
            },
            {"bias": rng.standard_normal((seqlen_q, 1)), "window": (30, 2)},
            {"bias": rng.standard_normal((1, seqlen_k)), "softcap": 2.0},
            {"kv_lengths": np.array(seqlen_k // 2), "causal": True, "q_offset": 3},
        ]
        for options in option_sets:
            check(memory, layout, arrays, softmax_axis=axis, **options)
