"""Python functions of NumPy arrays that compiled code of JAX calls back.

``jax.pure_callback`` hands its function arrays of JAX, copies of those that XLA gives it.  The
threads that make such copies are those that call back: where as many callbacks run at once as there
are threads, each waits for a copy that no thread is left to make
(https://github.com/jax-ml/jax/issues/24255).  Two calls of attention are enough on two cores.  A
primitive of our own takes XLA's arrays as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_CALL = Primitive("fastattn_call")
_CALL.multiple_results = True


def call_back(
    function: Any, results: Sequence[jax.ShapeDtypeStruct], *arrays: Any
) -> tuple[Any, ...]:
    """``function(*arrays)``, which has no effect but its results.

    Parameters
    ----------
    function : callable
        Of NumPy arrays, to NumPy arrays.  Hashable: equal functions are compiled once.
    results : sequence of jax.ShapeDtypeStruct
        What the results are.
    *arrays : jax.Array
        Its arguments.
    """
    computed = _CALL.bind(*arrays, function=function, results=tuple(results))
    return tuple(computed)


@functools.lru_cache(maxsize=256)
def _compiled(function: Any, results: tuple[Any, ...]) -> Any:
    return jax.jit(functools.partial(_CALL.bind, function=function, results=results))


def _run(*arrays: Any, function: Any, results: Any) -> Any:
    return _compiled(function, results)(*arrays)


def _shapes(*_: Any, results: Any, **__: Any) -> Any:
    return [jax.core.ShapedArray(result.shape, result.dtype) for result in results]


def _lowered(ctx: Any, *operands: Any, function: Any, results: Any) -> Any:
    del results

    def on_arrays(*arrays: Any) -> tuple[Any, ...]:
        return tuple(np.asarray(result) for result in function(*arrays))

    lowered, _, _ = mlir.emit_python_callback(
        ctx, on_arrays, None, list(operands), ctx.avals_in, ctx.avals_out, has_side_effect=False
    )
    return lowered


def _differentiated(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "fastattn has no second derivatives, and no derivatives in forward mode"
    )


def _batched(arrays: Sequence[Any], axes: Sequence[Any], **parameters: Any) -> Any:
    """One entry after the other."""
    moved = [
        array if axis is None else jax.numpy.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    mapped = [axis is not None for axis in axes]

    def entry(some: Sequence[Any]) -> Any:
        each = iter(some)
        chosen = [
            next(each) if is_mapped else array
            for array, is_mapped in zip(moved, mapped, strict=True)
        ]
        return _CALL.bind(*chosen, **parameters)

    results = jax.lax.map(
        entry, [array for array, is_mapped in zip(moved, mapped, strict=True) if is_mapped]
    )
    return results, [0] * len(results)


_CALL.def_impl(_run)
_CALL.def_abstract_eval(_shapes)
ad.primitive_jvps[_CALL] = _differentiated
mlir.register_lowering(_CALL, _lowered)
batching.primitive_batchers[_CALL] = _batched
