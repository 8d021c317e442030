"""Attention of JAX's arrays: a function that compiled code calls back, with a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastattn.keras import _numpy
from fastattn.keras._jax_callback import call_back
from fastattn.keras._numpy import Call


def refusal(query: Any) -> str:
    """Why a call cannot be computed here, whatever its arguments are; empty if it can."""
    backend = jax.default_backend()
    if backend != "cpu":
        return f"attention is computed on the CPU, and JAX uses {backend}"
    return ""


class _CalledBack(NamedTuple):
    """A function as JAX keeps it: the same for the same call, so that it is compiled once."""

    function: Callable[..., Any]
    call: Call

    def __call__(self, *arrays: Any) -> Any:
        return self.function(self.call, *arrays)


def attend(call: Call, q: Any, k: Any, v: Any, *arrays: Any) -> tuple[Any, Any]:
    """`_numpy.attend`, and `_numpy.gradients` for its gradient."""
    result: tuple[Any, Any] = _attend(call, q, k, v, arrays)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, q: Any, k: Any, v: Any, arrays: tuple[Any, ...]) -> Any:
    results = (
        jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct(
            (q.shape[0], q.shape[2], q.shape[1]),
            jnp.float64 if q.dtype == jnp.float64 else jnp.float32,
        ),
    )
    function = _CalledBack(_numpy.attend, call)
    return call_back(function, results, q, k, v, *arrays)


def _forward(call: Call, q: Any, k: Any, v: Any, arrays: tuple[Any, ...]) -> Any:
    out, lse = _attend(call, q, k, v, arrays)
    return (out, lse), (q, k, v, out, lse, arrays)


def _backward(call: Call, kept: Any, upstream: Any) -> Any:
    *inputs, arrays = kept
    of = (*inputs[:3], *arrays)[: call.num_gradients]
    grads = call_back(
        _CalledBack(_numpy.gradients, call),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of),
        upstream[0],
        *inputs,
        *arrays,
    )
    without = 3 + len(arrays) - call.num_gradients
    return (*grads[:3], (*grads[3:], *[None] * without))


_attend.defvjp(_forward, _backward)
