"""Checks of single arguments: arrays and numbers of a kind.

Every check of a call is made before C sees a pointer, and what was checked is what is used: each
argument is converted to an array once, numbers that say where memory is read (lengths, offsets,
starts of sequences) are copied before they are looked at, and the sizes that a call was planned for
go to the core, which compares each array's own with them.  Arrays are broadcast to their full
shapes as views, never copied whole.  Other values, of q or a mask for example, may change while a
call reads them: they change its result and nothing else.

Errors read "`name` must <rule>, got <what was given>": TypeError for a wrong dtype or kind,
ValueError for a wrong shape or value.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]

FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
# Positions and window sides are clipped to this magnitude, within which the core's 64-bit sums of
# them cannot overflow.  No array reaches that far.
MAX_POSITION = 2**60
MAX_C_INT = 2**31 - 1

# By name, because bfloat16 is a dtype of ml_dtypes, which is not imported here.
FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")

# The dtype of bits of bfloat16 numbers in arrays that this package makes itself, where no library
# that defines bfloat16 need be there.  A copy is not the same object as the uint16 of callers.
BFLOAT16_BITS = np.dtype(np.uint16, copy=True)

# --- arrays -----------------------------------------------------------------------------------


def as_array(name: str, x: ArrayLike, *, any_byte_order: bool = False) -> Array:
    """`x` as a base-class array in native byte order, whose shape and dtype are nobody else's."""
    if type(x) is ndarray:
        array: Array = x.view()
    else:
        # numpy.ma is not imported for the question: a masked array exists only if it is, and not
        # while another thread imports it.
        masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
        if masked is not None and isinstance(x, masked):
            raise TypeError(
                f"`{name}` must be a plain array, got a numpy.ma.MaskedArray "
                "(pass its data, and what takes part as `mask`)"
            )
        try:
            # Of an `__array__` that gives out one array again and again, a view too.
            array = np.asarray(x).view()
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be an array or a regular nested sequence of numbers, "
                f"got a {type(x).__name__}: {error}"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # of an `__array__`: a tensor that has a gradient, for example
            raise TypeError(
                f"`{name}` must be an array or what NumPy makes one of, "
                f"got a {type(x).__name__}: {error}"
            ) from error
    if not (array.dtype.isnative or any_byte_order):
        raise TypeError(f"`{name}` must be in native byte order, got dtype {array.dtype.str}")
    return array


def float_array(name: str, x: ArrayLike, allowed: Sequence[str] = FLOAT_NAMES) -> Array:
    array = as_array(name, x)
    if array.dtype is not BFLOAT16_BITS and array.dtype.name not in allowed:
        listed = " or ".join([", ".join(allowed[:-1]), allowed[-1]])
        raise TypeError(f"`{name}` must be {listed}, got {_kind(x, array)}")
    return array


def lse_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the lse of a result: what its softmax is computed in."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def core_view(array: Array) -> Array:
    """`array` as the core's buffers take it: bfloat16, which they do not know, as uint16."""
    dtype = array.dtype  # whose name takes NumPy longer to make than its size
    return array.view(np.uint16) if dtype.itemsize == 2 and dtype.name == "bfloat16" else array


def bool_array(name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    if array.dtype != np.bool_:
        hint = " (a float mask, which is added to the scores, goes to `bias`)"
        raise TypeError(f"`{name}` must be bool, True = takes part{hint}, got {_kind(x, array)}")
    return array


def real_array(name: str, x: ArrayLike) -> NDArray[np.float64]:
    """A float64 copy of a few real numbers."""
    array = as_array(name, x)
    if not _holds(array, "fiu", np.float64):
        raise TypeError(f"`{name}` must be real numbers, got {_kind(x, array)}")
    return array.astype(np.float64)


def integer_array(name: str, x: ArrayLike) -> Array:
    """A copy, so that what is found out about its values stays true."""
    return of_integers(name, x).copy()


def of_integers(name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    if not _holds(array, "iu", np.int64):
        raise TypeError(f"`{name}` must be integers of at most 64 bits, got {_kind(x, array)}")
    return array.astype(np.int64) if array.dtype.kind == "V" else array


def indices(name: str, x: ArrayLike | slice | None, length: int) -> NDArray[np.int64] | None:
    """Indices into an axis as a private array of numbers from 0 on; None for all."""
    if x is None:
        return None
    if isinstance(x, slice):
        try:
            start, stop, step = x.indices(length)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{name}` must be a slice of ints, got {x}: {error}") from None
        return np.arange(start, stop, step, dtype=np.int64)
    array = as_array(name, x)
    if array.ndim != 1:
        raise ValueError(
            f"`{name}` must be a slice or have one dimension, got shape {array.shape}"
            f"{' (a single index is a list of one)' if array.ndim == 0 else ''}"
        )
    if array.size == 0:
        return np.empty(0, np.int64)
    found = integer_array(name, array)
    wrong = found[(found < -length) | (found >= length)]
    if wrong.size:
        raise ValueError(f"`{name}` must be {-length} to {length - 1}, got {wrong[0]}")
    found = found.astype(np.int64, copy=False)
    return np.where(found < 0, found + length, found)


def _holds(array: Array, kinds: str, widest: type[np.generic]) -> bool:
    """Whether the dtype is a number's of these kinds, or one of ml_dtypes that is part of
    `widest`: those have the kind of raw memory, which no cast makes numbers of."""
    dtype = array.dtype
    return dtype.kind in kinds or (dtype.kind == "V" and np.can_cast(dtype, widest))


def _kind(x: object, array: Array) -> str:
    """How an error names the type of `x`, whose array is `array`."""
    return f"{array.dtype}" if array.dtype != object else f"{type(x).__name__} (dtype object)"


def broadcast(name: str, array: Array, shape: Shape) -> Array:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"`{name}` must broadcast to {shape}, got shape {array.shape}") from None


def joint_shape(a: Shape, b: Shape) -> Shape | None:
    """The shape that `a` and `b` broadcast to, or None.  np.broadcast_shapes ends at 32 axes."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = (1,) * (len(longer) - len(shorter)) + shorter
    if any(m != n and m != 1 and n != 1 for m, n in zip(longer, padded, strict=True)):
        return None
    return tuple(n if m == 1 else m for m, n in zip(longer, padded, strict=True))


def exact_array(name: str, x: ArrayLike, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """An input that has the shape and dtype of a result."""
    array = as_array(name, x)
    if array.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype} to match `q`, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"`{name}` must have the result's shape {shape}, got shape {array.shape}")
    return array


# --- numbers ---------------------------------------------------------------------------------


def flag(name: str, x: object) -> bool:
    if x is True or x is False:
        return x
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"`{name}` must be True or False, got {x!r}")
    return bool(x)


def _scalar(name: str, x: object) -> object:
    """A number as Python's own, out of a NumPy or ml_dtypes scalar or an array of no dimensions;
    anything else as it is."""
    if not hasattr(x, "__array__"):
        return x
    try:
        array = as_array(name, x)
    except TypeError:  # the caller says what it must be
        return x
    return x if array.ndim != 0 or array.dtype == object else array.item()


def integer(name: str, x: object, rule: str) -> int:
    if type(x) is int:
        return x
    value = _scalar(name, x)
    if not isinstance(value, bool | ndarray):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"`{name}` must be {rule}, got {x!r}")


def count(name: str, x: object) -> int:
    """An integer >= 1."""
    value = integer(name, x, "an int >= 1")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
    return value


def real(name: str, x: object) -> float:
    number = x if type(x) is float else _scalar(name, x)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"`{name}` must be a real number, got {x!r}")
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {x!r}")
    return value


def positive(name: str, x: object) -> float:
    value = real(name, x)
    if value <= 0.0:
        raise ValueError(f"`{name}` must be greater than 0 (None for no {name}), got {x!r}")
    return value
