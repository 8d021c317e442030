"""The accuracy gauge: errors of attention in units of what a backward-stable computation may show.

With u the unit roundoff of the result and P the softmax weights, an error is measured as

    C_O = max |O - O64| / (u * K_i * (P|V|) + u * |residual|)
    K_i = 1 + max_j (|scale| * sum_c |q_ic k_jc| + |bias_ij| + |alibi_ij|), |sink| included

because a relative error of u in a score s changes its weight by a factor 1 + u |s|, and the sum
that makes up a score may be wrong by u sum |q||k| however small it comes out.  For a softmax over
the queries the weights of a column share the column's K.

The self-test, the tests and the check before a benchmark measure with it.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNIT_ROUNDOFF = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}

# The kernels' exp2 is 0 below this (csrc/kernels/vector/exp2_template.h): each weight may be wrong
# by it.
WEIGHT_FLOOR = 2.0**-104


class Exact(NamedTuple):
    """A result in higher precision, and the units that errors beside it are measured in."""

    out: Array
    lse: Array
    # K (P|V|) + |residual|, broadcastable to the shape of out.
    out_unit: Array
    # K + |lse|, broadcastable to the shape of lse.
    lse_unit: Array
    # sum_j |v_j|, broadcastable to the shape of out.
    floor_unit: Array


def out_gauge(out: Array, exact: Exact) -> float:
    """C_O of `out`, a float32 or float64 result, against the value in higher precision."""
    error = np.abs(out - exact.out) - WEIGHT_FLOOR * exact.floor_unit
    return largest(error, UNIT_ROUNDOFF[out.dtype] * exact.out_unit)


def lse_gauge(lse: Array, exact: Exact) -> float:
    """The same for lse: |lse - lse64| / (u (K + |lse64|)); infinite where -inf meets another."""
    empty = np.isneginf(exact.lse)
    if not np.array_equal(np.isneginf(lse), empty):
        return np.inf
    error = np.abs(np.where(empty, 0, lse) - np.where(empty, 0, exact.lse))
    return largest(error, UNIT_ROUNDOFF[lse.dtype] * exact.lse_unit)


def largest(error: Array, unit: Array | float) -> float:
    """The largest of `in_units`, 0 of none."""
    return float(np.max(in_units(error, unit), initial=0.0))


def in_units(error: Array, unit: Array | float) -> Array:
    """error / unit; a NaN error and an error where none is allowed are infinite."""
    with np.errstate(all="ignore"):
        ratio = np.where(error <= 0, 0, error / unit)
    return np.where(np.isnan(ratio), np.inf, ratio)
