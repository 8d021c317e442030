"""Rounding to a float dtype once, whatever the arithmetic behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastattn import _core
from fastattn._validate import BFLOAT16_BITS

Array = NDArray[Any]
P = ParamSpec("P")
T = TypeVar("T")


def in_default_float_mode(function: Callable[P, T]) -> Callable[P, T]:
    """`function` in the default floating-point mode of this thread, and without NumPy's warnings.

    What a caller or another library left (rounding upward, subnormal numbers flushed to zero) does
    not reach its result.
    """

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        with _core.DefaultFloatMode(), np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return computed


@in_default_float_mode
def round_once(x: Array, dtype: np.dtype[Any]) -> Array:
    """`x` in another float dtype, each element rounded once; `x` itself where it has that dtype."""
    if x.dtype == dtype:
        return x
    if dtype is not BFLOAT16_BITS and dtype.name != "bfloat16":
        return x.astype(dtype)
    # ml_dtypes goes through float32, which would round twice.
    single = _round_to_odd(x) if x.dtype == np.float64 else x.astype(np.float32, copy=False)
    return _bfloat16_bits(single) if dtype is BFLOAT16_BITS else single.astype(dtype)


def _bfloat16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of `x`, to nearest, ties to even."""
    bits = x.view(np.uint32)
    upper = bits >> 16
    rounded = (bits + (np.uint32(0x7FFF) + (upper & 1))) >> 16
    # What is lost of a NaN may be all that made it one: set the bit that says that it is quiet.
    rounded = np.where(np.isnan(x), upper | 0x40, rounded)
    return rounded.astype(np.uint16).view(BFLOAT16_BITS)


def _round_to_odd(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 from which a further rounding, to 22 bits or less, gives what it would from `x`.

    Toward zero, with the last bit set if anything was lost: S. Boldo, G. Melquiond, "Emulation of
    FMA and correctly rounded sums", 2008, https://doi.org/10.1109/TC.2007.70819.
    """
    rounded = x.astype(np.float32)
    bits = rounded.view(np.uint32)
    inexact = rounded != x
    bits -= np.abs(rounded) > np.abs(x)
    bits |= inexact
    return rounded
