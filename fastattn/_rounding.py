"""Rounding to a float dtype once, whatever the arithmetic behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@np.errstate(all="ignore")
def round_once(x: Array, dtype: np.dtype[Any]) -> Array:
    """`x` in another float dtype, each element rounded once; `x` itself where it has that dtype."""
    if x.dtype == dtype:
        return x
    # ml_dtypes goes through float32, which would round twice.
    twice = x.dtype == np.float64 and dtype.name == "bfloat16"
    return (_round_to_odd(x) if twice else x).astype(dtype)


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
