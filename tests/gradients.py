"""Calls for the tests of the backward pass, and gradients beside those of the reference."""

from typing import Any

import numpy as np
import pytest

import fastattn as fa
from fastattn._backward import attention_and_kept, attention_backward_of_kept

NAMES = fa.Gradients._fields
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])


def gradients_of(
    grad_out: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    grad_lse: np.ndarray | None = None,
    **options: Any,
) -> Any:
    """The forward pass, then `attention_backward` of it."""
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    return fa.attention_backward(grad_out, q, k, v, out, lse, grad_lse=grad_lse, **options)


def kept_gradients_of(
    grad_out: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    grad_lse: np.ndarray | None = None,
    **options: Any,
) -> Any:
    """The same, by what the forward pass keeps for the backward pass."""
    out, lse, kept = attention_and_kept(q, k, v, **options)
    return attention_backward_of_kept(
        grad_out, q, k, v, out, lse, kept, grad_lse=grad_lse, **options
    )


def random_call(
    rng: np.random.Generator, dtype: Any = np.float64
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """(grad_out, q, k, v), and any options with `grad_lse` among them."""
    batch = int(rng.integers(1, 4))
    num_kv_heads = int(rng.integers(1, 4))
    num_heads = num_kv_heads * int(rng.integers(1, 4))
    seqlen_q = int(rng.choice([1, 3, 24, 33, 97, 130]))
    seqlen_k = int(rng.choice([1, 5, 32, 63, 129, 200]))
    head_dim, head_dim_v = int(rng.choice([1, 3, 8, 16, 33])), int(rng.choice([1, 5, 8, 40]))
    kv_batch = 1 if rng.random() < 0.3 else batch

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    def chosen() -> bool:
        return bool(rng.random() < 0.25)

    q = draw(batch, num_heads, seqlen_q, head_dim)
    k = draw(kv_batch, num_kv_heads, seqlen_k, head_dim)
    v = draw(kv_batch, num_kv_heads, seqlen_k, head_dim_v)
    grad_out = draw(batch, num_heads, seqlen_q, head_dim_v)
    options: dict[str, Any] = {}
    if chosen():
        options["scale"] = float(rng.choice([0.3, -0.5, 2.0]))
    if chosen():
        options["softcap"] = 1.5
    if chosen():
        shapes: list[tuple[int, ...]] = [
            (batch, num_heads, seqlen_q, seqlen_k),
            (num_heads, 1, seqlen_k),
            (seqlen_q, seqlen_k),
            (batch, 1, 1, seqlen_k),
            (1, seqlen_q, 1),
            (1,),
        ]
        options["bias"] = draw(*shapes[rng.integers(len(shapes))])
    if chosen():
        options["alibi_slopes"] = rng.random(num_heads) * 0.1
    if chosen():
        options["mask"] = rng.random((seqlen_q, seqlen_k)) < 0.6
    if chosen():
        options["causal"] = True
    if chosen():
        options["window"] = (int(rng.integers(0, 50)), int(rng.integers(0, 50)))
    if chosen():
        options["q_offset"] = int(rng.integers(-5, 20))
    if chosen():
        options["kv_lengths"] = rng.integers(0, seqlen_k + 1, batch)
    if chosen():
        options["segment_ids"] = (
            np.sort(rng.integers(0, 3, seqlen_q)),
            np.sort(rng.integers(0, 3, seqlen_k)),
        )
    over_queries = chosen()
    if over_queries:
        options["softmax_axis"] = "queries"
    elif chosen():
        options["sinks"] = rng.standard_normal(num_heads)
    if chosen():
        options["residual"] = draw(batch, num_heads, seqlen_q, head_dim_v)
    if chosen():
        options["dropout_p"] = float(rng.choice([0.1, 0.5, 1.0]))
        options["dropout_seed"] = int(rng.integers(2**63))
    if chosen():
        options["grad_lse"] = draw(batch, num_heads, seqlen_k if over_queries else seqlen_q)
    return [grad_out, q, k, v], options


def without_residual(options: dict[str, Any]) -> dict[str, Any]:
    """What `reference.attention_backward` takes: it has no use for `residual`."""
    return {name: x for name, x in options.items() if name != "residual"}


def described(arrays: list[np.ndarray], options: dict[str, Any]) -> str:
    shown = {name: getattr(x, "shape", x) for name, x in options.items() if name != "segment_ids"}
    return f"{[x.shape for x in arrays]}, {shown}"


def assert_equal_gradients(grads: Any, expected: Any, where: str = "") -> None:
    """Float64 against the reference: 1e-9 of the largest element."""
    for name in NAMES:
        x, y = getattr(grads, name), getattr(expected, name)
        assert (x is None) == (y is None), f"{name} {where}"
        if x is None:
            continue
        assert x.shape == y.shape, f"{name} {where}"
        largest = np.abs(y).max(initial=1e-3)
        assert np.all(np.abs(x - y) <= 1e-9 * largest), f"{name} {where}"


def check(arrays: list[np.ndarray], **options: Any) -> Any:
    grads = gradients_of(*arrays, **options)
    expected = fa.reference.attention_backward(*arrays, **without_residual(options))
    assert_equal_gradients(grads, expected, described(arrays, options))
    return grads


def make(
    *shape: int, batch: tuple[int, ...] = (2,), heads: tuple[int, int] = (4, 2), seed: int = 0
) -> list[np.ndarray]:
    """grad_out, q, k, v of (seqlen_q, seqlen_k, head_dim, head_dim_v)."""
    seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((*batch, heads[0], seqlen_q, head_dim_v)),
        rng.standard_normal((*batch, heads[0], seqlen_q, head_dim)),
        rng.standard_normal((*batch, heads[1], seqlen_k, head_dim)),
        rng.standard_normal((*batch, heads[1], seqlen_k, head_dim_v)),
    ]
