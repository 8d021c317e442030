"""Where results go: allocated, or the caller's own, checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike

from fastattn import _validate
from fastattn._core import Problem
from fastattn._validate import Array, Shape

# What np.shares_memory may spend on an exact answer.  Views into one packed array need less; what
# needs more counts as overlapping.
OVERLAP_WORK: Any = 100_000  # Any: NumPy's stubs know 0 and -1 only


def place_results(
    problem: Problem, out: Array | None, return_lse: bool
) -> tuple[Array, Array | None]:
    """Find a place for the results of a problem whose options are set.

    Returns
    -------
    out, lse : array, array or None
        As the caller sees them: `out` itself if it was given.
    """
    shape = problem.out_shape
    if out is None:
        result = empty_result(problem.like, shape)
    else:
        result = check_out(out, shape, problem.dtype, "q")
    if problem.is_plain:
        problem.out = result
    else:
        problem.out = problem.as_in_core(_validate.core_view(result))
    lse = None
    if return_lse is not False and _validate.flag("return_lse", return_lse):
        lse = allocate(problem.lse_shape, _validate.lse_dtype(problem.dtype))
        problem.lse = problem.with_heads(lse)
    if out is None:
        return result, lse
    refuse_overlap(
        result,
        q=problem.q,
        k=problem.k,
        v=problem.v,
        bias=problem.bias,
        mask=problem.mask,
        segment_ids=problem.q_segment_ids,
        segment_ids_of_k=problem.k_segment_ids,
    )
    residual = problem.residual
    if residual is not None and not _same_memory(problem.out, residual):
        refuse_overlap(result, residual=residual)
    return out, lse


def read_results(problem: Problem, out: ArrayLike, lse: ArrayLike) -> None:
    """Give the problem the results of an earlier call with the same arguments, to be read."""
    result = _validate.exact_array("out", out, problem.out_shape, problem.dtype)
    lse_dtype = _validate.lse_dtype(problem.dtype)
    result_lse = _validate.exact_array("lse", lse, problem.lse_shape, lse_dtype)
    problem.out = problem.as_in_core(_validate.core_view(result))
    problem.lse = problem.with_heads(result_lse)


def check_out(out: object, shape: Shape, dtype: np.dtype[Any], like: str) -> Array:
    """`out` as a base-class array that every element of a result can be written to."""
    if not isinstance(out, ndarray):
        raise TypeError(f"`out` must be a NumPy array, got a {type(out).__name__}")
    array = _validate.as_array("out", out, any_byte_order=True)
    if array.dtype != dtype:
        raise TypeError(f"`out` must have dtype {dtype} like `{like}`, got {array.dtype.str}")
    if array.shape != shape:
        raise ValueError(f"`out` must have the result's shape {shape}, got shape {array.shape}")
    if not array.flags.writeable:
        raise ValueError("`out` must be writeable, got a read-only array")
    if _overlaps_itself(array):
        raise ValueError(
            f"`out` must not hold two elements in the same memory, got strides {array.strides}"
        )
    return array


def _overlaps_itself(array: Array) -> bool:
    if array.size == 0:
        return False
    axes = [(abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1]
    end = array.itemsize  # bytes that the axes so far span
    for stride, length in sorted(axes):
        if stride < end:
            break
        end += stride * (length - 1)
    else:
        return False
    if any(stride == 0 for stride, _ in axes):
        return True
    # Interleaved axes: look at every element's place.
    places = np.zeros((), dtype=np.int64)
    for stride, length in axes:
        places = np.add.outer(places, stride * np.arange(length, dtype=np.int64))
    return bool(np.any(np.diff(np.sort(places, axis=None)) < array.itemsize))


def _same_memory(a: Array, b: Array) -> bool:
    """Whether `a` and `b`, of one shape and dtype, are the same elements in the same order."""
    address_a, address_b = (x.__array_interface__["data"][0] for x in (a, b))
    return bool(address_a == address_b) and a.strides == b.strides


def refuse_overlap(out: Array, **inputs: Array | None) -> None:
    for name, array in inputs.items():
        if array is not None and _share_memory(out, array):
            name = name.removesuffix("_of_k")
            rule = " unless it is the same array" if name == "residual" else ""
            raise ValueError(f"`out` must not overlap `{name}`{rule}, got arrays that share memory")


def _share_memory(a: Array, b: Array) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def empty_result(q: Array, shape: Shape) -> Array:
    """An array of `shape` whose axes lie in memory in the order of q's, if it has as many."""
    strides = q.strides  # once: q may be an array that another thread gives a new shape
    if q.flags.c_contiguous or len(strides) != len(shape):
        return allocate(shape, q.dtype)
    # Outermost first.  An axis that was broadcast has no place in memory of its own, and comes
    # before the others as leading dimensions do; np.empty_like would put it innermost.
    places = [abs(stride) or sys.maxsize for stride in strides]
    order = sorted(range(len(shape)), key=places.__getitem__, reverse=True)
    result = allocate(tuple([shape[axis] for axis in order]), q.dtype)
    return result.transpose([order.index(axis) for axis in range(len(shape))])


def allocate(
    shape: Shape, dtype: np.dtype[Any], make: Callable[[Shape, np.dtype[Any]], Array] = np.empty
) -> Array:
    try:
        return make(shape, dtype)
    except ValueError as error:  # more bytes than an address can tell apart
        raise MemoryError(f"a result of shape {shape} and dtype {dtype} is too large") from error
