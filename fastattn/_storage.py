"""Storage of tokens' keys and values in any dtype, and the attention over it.

What `KVCache` and `PagedKVCache` share.  They reach the core through `attend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn import _core
from fastattn._core import Problem
from fastattn._explain import Explanation, explained
from fastattn._options import AttentionOptions, refuse_unknown, set_named
from fastattn._problem import of_cache, of_pages
from fastattn._results import place_results
from fastattn._rounding import in_default_float_mode, round_once
from fastattn._validate import (
    FLOAT_NAMES,
    Array,
    Shape,
    as_array,
    count,
    float_array,
    integer_array,
)

Lengths = NDArray[np.int64]
# The assignments ``(target, key, value)`` of a change; see `_core.Gate.change`.
Changes = list[tuple[Any, Any, Any]]

DTYPE_NAMES = (*FLOAT_NAMES, "int8")
# What queries may be beside each storage: its own dtype, or float32 where it is smaller than that.
QUERY_NAMES = {
    "float64": ("float64",),
    "float32": ("float32",),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "int8": ("float16", "bfloat16", "float32"),
}
INT8_MAX = 127  # -128 is not used: the codes are symmetric
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
# The scale of a row of the largest float32: one ulp more, and 127 times it would be infinite.
MAX_SCALE = np.nextafter(np.float32(FLOAT32_MAX / INT8_MAX), np.float32(0))


class TokenStore:
    """Keys and values of tokens in blocks (sequences or pages) of slots, in one dtype.

    ``_arrays`` is ``(k, v)``, or ``(k, v, k_scale, v_scale)`` for int8.  All have shape (blocks,
    num_kv_heads, slots, ...), so that one index finds the same tokens in each.

    A method that changes a cache converts and checks what it is given, and then has ``_gate`` make
    the change: a function prepares it, writing to slots that nobody looks at and nowhere else, and
    returns the assignments that make it visible.  So an error or a KeyboardInterrupt, on whatever
    line it comes, leaves the cache as it was before or as it is afterwards.  A method that reads
    one takes a view of the storage, the lengths and the pages, all of one moment; what a view shows
    is not written until its reader is done.
    """

    # What the constructor takes, in order.
    _PARAMETERS: tuple[str, ...]
    _arrays: tuple[Array, ...]

    def _configure_store(
        self,
        blocks: int,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None,
        dtype: DTypeLike,
    ) -> None:
        self.num_kv_heads = count("num_kv_heads", num_kv_heads)
        self.head_dim = count("head_dim", head_dim)
        self.head_dim_v = self.head_dim if head_dim_v is None else count("head_dim_v", head_dim_v)
        self.dtype = _cache_dtype(dtype)
        self._rows = (blocks, self.num_kv_heads, slots)
        self._gate = _core.Gate()

    def _new_storage(self) -> tuple[Array, ...]:
        widths = (self.head_dim, self.head_dim_v)
        arrays = [zeros((*self._rows, width), self.dtype) for width in widths]
        if self.dtype == np.int8:
            arrays += [zeros(self._rows, np.dtype(np.float32)) for _ in range(2)]
        return tuple(arrays)

    def _parameters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._PARAMETERS}

    def _call(self) -> str:
        """The constructor's call, without what is as by default."""
        default = {"head_dim_v": self.head_dim, "window_tokens": None, "sink_tokens": 0}
        given = (
            f"{name}={value}"
            for name, value in self._parameters().items()
            if name not in default or value != default[name]
        )
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def nbytes(self) -> int:
        """Bytes of the storage: keys, values and scales.

        The operating system provides them as they are first written.
        """
        return sum(array.nbytes for array in self._arrays)

    def _encode(
        self, k: ArrayLike, v: ArrayLike, lead: Shape, counts: ArrayLike | None = None
    ) -> tuple[tuple[Array, ...], Lengths]:
        """New tokens as they will be stored, and how many of them each sequence takes.

        Everything that can be wrong with them is found here, before any storage is written.
        """
        k, v = float_array("k", k), float_array("v", v)
        rows = (*lead, self.num_kv_heads)
        if k.ndim != len(rows) + 2 or (k.shape[:-2], k.shape[-1]) != (rows, self.head_dim):
            raise ValueError(
                f"`k` must have shape ({', '.join(map(str, rows))}, new, {self.head_dim}), "
                f"got {k.shape}"
            )
        if v.shape != (*k.shape[:-1], self.head_dim_v):
            raise ValueError(
                f"`v` must have shape {(*k.shape[:-1], self.head_dim_v)} to match `k`, "
                f"got {v.shape}"
            )
        num_sequences, new = lead[0] if lead else 1, k.shape[-2]
        if counts is None:
            taken = np.full(num_sequences, new, np.int64)
        else:
            taken = _counts(counts, num_sequences, new)
            # What pads a ragged batch may be anything, so it is not looked at.
            real = np.arange(new) < taken[:, np.newaxis, np.newaxis]
            k, v = (np.where(real[..., np.newaxis], x, x.dtype.type(0)) for x in (k, v))
        # Views of this very storage would change while it is written.
        arrays = self._arrays
        k, v = (
            x.copy() if any(np.may_share_memory(x, array) for array in arrays) else x
            for x in (k, v)
        )
        if self.dtype == np.int8:
            (k, k_scale), (v, v_scale) = _quantize("k", k), _quantize("v", v)
            return (k, v, k_scale, v_scale), taken
        return (_rounded("k", k, self.dtype), _rounded("v", v, self.dtype)), taken

    @staticmethod
    def _decode(arrays: tuple[Array, ...], index: Any) -> tuple[Array, Array]:
        """Copies of stored keys and values, int8 times its scale in float32."""
        k, v, *scales = (array[index].copy() for array in arrays)
        if scales:
            k, v = (x * scale[..., np.newaxis] for x, scale in zip((k, v), scales, strict=True))
        return k, v

    def _queries(self, q: ArrayLike, num_sequences: int) -> Array:
        q = as_array("q", q)
        names = QUERY_NAMES[self.dtype.name]
        if q.dtype.name not in names:
            raise TypeError(
                f"`q` must be {' or '.join(names)} with a cache of {self.dtype}, got {q.dtype}"
            )
        if (
            q.ndim != 4
            or (q.shape[0], q.shape[3]) != (num_sequences, self.head_dim)
            or q.shape[1] % self.num_kv_heads
        ):
            raise ValueError(
                f"`q` must have shape ({num_sequences}, a multiple of {self.num_kv_heads} heads, "
                f"seqlen_q, {self.head_dim}), got {q.shape}"
            )
        return q


def copy_tokens(
    to: tuple[Array, ...], to_index: Any, source: tuple[Array, ...], source_index: Any
) -> None:
    for array, tokens in zip(to, source, strict=True):
        array[to_index] = tokens[source_index]


def at_slots(block: int, start: int, stop: int) -> tuple[Any, ...]:
    """The index of some slots of a block, in each of the arrays of a store."""
    return block, slice(None), slice(start, stop)


def own_options(function: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `attention`, with what is different in a cache."""
    refuse_unknown(function, options, AttentionOptions.__annotations__)
    if options.get("kv_lengths") is not None:
        raise ValueError("`kv_lengths` must be None: the cache knows its lengths")
    return {"causal": True, **{k: v for k, v in options.items() if k != "kv_lengths"}}


# --- dtypes and checks ------------------------------------------------------------------------


def _cache_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        result = None if dtype is None else np.dtype(dtype)
    except TypeError:
        result = None
    if result is None or result.name not in DTYPE_NAMES or not result.isnative:
        raise TypeError(
            "`dtype` must be float32, float64, float16, bfloat16 (ml_dtypes.bfloat16) or int8, "
            f"got {dtype!r}"
        )
    return result


def zeros(shape: Shape, dtype: np.dtype[Any]) -> Array:
    try:
        return np.zeros(shape, dtype)
    except ValueError as error:  # more bytes than an address can tell apart
        raise MemoryError(f"a cache of shape {shape} and dtype {dtype} is too large") from error


def _counts(counts: ArrayLike, num_sequences: int, new: int) -> Lengths:
    array = integer_array("counts", counts)
    if array.shape != (num_sequences,):
        raise ValueError(f"`counts` must have shape ({num_sequences},), got shape {array.shape}")
    wrong = array[(array < 0) | (array > new)]
    if wrong.size:
        raise ValueError(f"`counts` must be 0 to the {new} new tokens of `k`, got {wrong[0]}")
    return array.astype(np.int64)


def new_lengths(lengths: ArrayLike, num_sequences: int) -> Array:
    """What sequences are truncated to, one number each."""
    array = integer_array("lengths", lengths)
    if array.shape not in ((), (num_sequences,)):
        raise ValueError(
            f"`lengths` must be an int or have shape ({num_sequences},), got shape {array.shape}"
        )
    return np.broadcast_to(array, (num_sequences,))


def _rounded(name: str, x: Array, dtype: np.dtype[Any]) -> Array:
    """`x` in another float dtype; a number that does not fit is an error, not infinity."""
    rounded = round_once(x, dtype)
    overflown = np.isinf(rounded) & np.isfinite(x)
    if overflown.any():
        wrong = float(x[overflown][0])
        raise ValueError(f"`{name}` must be within the range of {dtype}, got {wrong:.6g}")
    return rounded


@in_default_float_mode
def _quantize(name: str, x: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 codes and one scale per row, with ``abs(x - code * scale) <= scale / 2``."""
    if x.dtype.itemsize == 2:
        x = x.astype(np.float32)
    magnitudes = np.abs(x)
    fits = magnitudes <= FLOAT32_MAX  # NaN does not
    if not fits.all():
        wrong = float(x[~fits][0])
        raise ValueError(
            f"`{name}` must be finite and within the range of float32 for int8, got {wrong:.6g}"
        )
    largest = magnitudes.max(axis=-1)
    scale = (largest / INT8_MAX).astype(np.float32)
    # A rounded quotient may be below the exact one, by half an ulp.  That is nothing, but where
    # scales are subnormal: there the next one up still reaches the largest element with 127.
    low = (scale < FLOAT32_TINY) & (scale * np.float64(INT8_MAX) < largest)
    scale = np.where(low, np.nextafter(scale, np.float32(1)), scale)
    scale = np.minimum(scale, MAX_SCALE)
    scale[largest == 0] = 0
    divisor = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(x / divisor[..., np.newaxis]), -INT8_MAX, INT8_MAX)
    return codes.astype(np.int8), scale


# --- attention over storage -------------------------------------------------------------------


def attend(
    q: Array,
    arrays: tuple[Array, ...],
    kv_lengths: Lengths,
    options: dict[str, Any],
    return_lse: bool = False,
    page_table: Lengths | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of (n, num_heads, seqlen_q, head_dim) over storage, in place.

    Parameters
    ----------
    q : array, (n, num_heads, seqlen_q, head_dim)
        Of a dtype that `QUERY_NAMES` allows.
    arrays : tuple of array
        `TokenStore._arrays`; one block for each row of q, or pages.
    kv_lengths : int64 array, (n,)
        Tokens of each row of q.
    options : dict
        Of `fastattn.attention`, those that have to do with the storage excepted.
    return_lse : bool, optional
        Whether to return `lse` too.
    page_table : int64 array, (n, pages), optional
        The pages of each row of q; only the first ``ceil(kv_lengths[i] / page_size)`` are read.
    """
    problem = _problem(q, arrays, kv_lengths, page_table)
    set_named(problem, options)
    result, lse = place_results(problem, options.get("out"), return_lse)
    _core.attention(problem)
    return result if lse is None else (result, lse)


def explain(
    q: Array,
    arrays: tuple[Array, ...],
    kv_lengths: Lengths,
    options: dict[str, Any],
    return_lse: bool = False,
    page_table: Lengths | None = None,
) -> Explanation:
    """What `attend` would run with the same arguments."""
    return explained(lambda: _problem(q, arrays, kv_lengths, page_table), options, return_lse)


def _problem(
    q: Array, arrays: tuple[Array, ...], kv_lengths: Lengths, page_table: Lengths | None
) -> Problem:
    if page_table is None:
        return of_cache(q, arrays, kv_lengths)
    return of_pages(q, arrays, kv_lengths, page_table)
