"""From what a caller passes to what the C core takes.

Every check of a call is made here, before C sees a pointer, and what was checked is what is used:
each argument is converted to an array once, numbers that say where memory is read (lengths,
offsets, starts of sequences) are copied before they are looked at, and the sizes that a call was
planned for go to the core, which compares each array's own with them.  Arrays are broadcast to
their full shapes as views, never copied whole.  Other values, of q or a mask for example, may
change while a call reads them: they change its result and nothing else.

Errors read "`name` must <rule>, got <what was given>": TypeError for a wrong dtype or kind,
ValueError for a wrong shape or value.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray

from fastattn import _config, _core

Array = NDArray[Any]
Shape = tuple[int, ...]
Window = Sequence[int | None]

FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
# Positions and window sides are clipped to this magnitude, within which the core's 64-bit sums of
# them cannot overflow.  No array reaches that far.
MAX_POSITION = 2**60
MAX_C_INT = 2**31 - 1
# The default of `softmax_axis`, one object wherever it is written: known without a comparison.
KEYS = "keys"
# What np.shares_memory may spend on an exact answer.  Views into one packed array need less; what
# needs more counts as overlapping.
OVERLAP_WORK: Any = 100_000  # Any: NumPy's stubs know 0 and -1 only

# By name, because bfloat16 is a dtype of ml_dtypes, which is not imported here.
FLOAT_NAMES = ("float16", "bfloat16", "float32", "float64")

# The dtype of bits of bfloat16 numbers in arrays that this package makes itself, where no library
# that defines bfloat16 need be there.  A copy is not the same object as the uint16 of callers.
BFLOAT16_BITS = np.dtype(np.uint16, copy=True)

# Names of what ``_core.attention`` and ``_core.describe`` take, in order.
CORE_ARGUMENTS = (
    "isa",
    "q",
    "k",
    "v",
    "q_shape",
    "num_kv_heads",
    "seqlen_k",
    "head_dim_v",
    "out",
    "lse",
    "residual",
    "scale",
    "softcap",
    "bias",
    "alibi_slopes",
    "sinks",
    "mask",
    "kv_lengths",
    "q_offset",
    "q_segment_ids",
    "k_segment_ids",
    "causal",
    "window_left",
    "window_right",
    "softmax_over_queries",
    "num_threads",
    "dropout_p",
    "dropout_seed",
)


def core_arguments(
    q: Any,
    k: Any,
    v: Any,
    scale: float | None,
    softcap: float | None,
    bias: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
    mask: ArrayLike | None,
    causal: bool,
    window: Window | None,
    q_offset: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    segment_ids: Sequence[ArrayLike] | None,
    sinks: ArrayLike | None,
    softmax_axis: str,
    residual: ArrayLike | None,
    return_lse: bool,
    out: Array | None,
    num_threads: int | None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    made: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[tuple[Any, ...], Array, Array | None]:
    """Validate the arguments of `fastattn.attention` and allocate its results.

    `made` is the (out, lse) of an earlier call with the same arguments, to be read: they are
    checked, and nothing is allocated.

    Returns
    -------
    arguments : tuple
        What ``_core.attention`` takes, in the order of `CORE_ARGUMENTS`.
    out, lse : array, array or None
        The results as the caller sees them: views of, or the same as, the ones in `arguments`.
    """
    shapes = _plain_shapes(q, k, v)
    if shapes is not None:
        q_shape, v_shape = shapes
        given_q, single_head = q, False
    else:
        q, k, v, given_q, single_head = _operands(q, k, v)
        q_shape, v_shape = q.shape, v.shape
    batch_shape = q_shape[:-3]
    num_heads, seqlen_q, head_dim = q_shape[-3:]
    num_kv_heads, seqlen_k, head_dim_v = v_shape[-3:]
    dtype = q.dtype

    scale_value = _core.default_scale(head_dim) if scale is None else real("scale", scale)
    softcap_value = 0.0 if softcap is None else _positive("softcap", softcap)
    if causal is not False:
        causal = flag("causal", causal)
    window_left, window_right = (-1, -1) if window is None else _window(window)
    over_queries = False if softmax_axis is KEYS else _is_over_queries(softmax_axis)
    if return_lse is not False:
        return_lse = flag("return_lse", return_lse)
    if num_threads is None:
        num_threads = _config.default_num_threads()
    elif type(num_threads) is not int or not 1 <= num_threads <= MAX_C_INT:
        num_threads = min(count("num_threads", num_threads), MAX_C_INT)
    dropout_value, seed_value = 0.0, 0
    if type(dropout_p) is not float or dropout_p != 0.0 or dropout_seed is not None:
        dropout_value, seed_value = _dropout(dropout_p, dropout_seed)

    if bias is not None:
        bias = float_array("bias", bias)
        bias = _to_scores(bias, "bias", batch_shape, num_heads, seqlen_q, seqlen_k, single_head)
    if mask is not None:
        mask = _bool_array("mask", mask)
        mask = _to_scores(mask, "mask", batch_shape, num_heads, seqlen_q, seqlen_k, single_head)
    if alibi_slopes is not None:
        alibi_slopes = _real_array("alibi_slopes", alibi_slopes)
        alibi_slopes = _broadcast("alibi_slopes", alibi_slopes, (*batch_shape, num_heads))
    if sinks is not None:
        sinks = _sinks(sinks, num_heads, over_queries)
    if kv_lengths is not None:
        kv_lengths = _kv_lengths(kv_lengths, batch_shape, seqlen_k)
    if q_offset is not None:
        q_offset = q_offsets(q_offset, batch_shape)
    q_segment_ids = k_segment_ids = None
    if segment_ids is not None:
        q_segment_ids, k_segment_ids = _segment_ids(segment_ids, batch_shape, seqlen_q, seqlen_k)

    # The caller's shapes: without the head axis where every operand is 2-D.
    rows_shape = (seqlen_q,) if single_head else q_shape[:-1]
    out_shape = (*rows_shape, head_dim_v)
    if residual is not None:
        residual = exact_array("residual", residual, out_shape, dtype)
    lse_shape = (*rows_shape[:-1], seqlen_k) if over_queries else rows_shape
    lse = None
    if made is not None:
        result = exact_array("out", made[0], out_shape, dtype)
        lse = exact_array("lse", made[1], lse_shape, lse_dtype(dtype))
    elif out is None:
        result = empty_result(given_q, out_shape)
    else:
        result = check_out(out, out_shape, dtype, "q")
    if return_lse:
        lse = allocate(lse_shape, lse_dtype(dtype))

    core_q, core_k, core_v, core_out, core_residual = q, k, v, result, residual
    if dtype.itemsize == 2:
        core_q, core_k, core_v, core_out = map(core_view, (q, k, v, result))
        core_residual = None if residual is None else core_view(residual)
    arguments = (
        _config.ISA,
        core_q,
        core_k,
        core_v,
        q_shape,
        num_kv_heads,
        seqlen_k,
        head_dim_v,
        core_out[np.newaxis] if single_head else core_out,
        lse[np.newaxis] if single_head and lse is not None else lse,
        core_residual[np.newaxis] if single_head and core_residual is not None else core_residual,
        scale_value,
        softcap_value,
        None if bias is None else core_view(bias),
        alibi_slopes,
        sinks,
        mask,
        kv_lengths,
        q_offset,
        q_segment_ids,
        k_segment_ids,
        causal,
        window_left,
        window_right,
        over_queries,
        num_threads,
        dropout_value,
        seed_value,
    )
    if out is not None:
        refuse_overlap(
            result,
            q=q,
            k=k,
            v=v,
            bias=bias,
            mask=mask,
            segment_ids=q_segment_ids,
            segment_ids_of_k=k_segment_ids,
        )
        if residual is not None and not _same_memory(result, residual):
            refuse_overlap(result, residual=residual)
    return arguments, result if out is None else out, lse


# --- q, k, v ----------------------------------------------------------------------------------


def _plain_shapes(q: Any, k: Any, v: Any) -> tuple[Shape, Shape] | None:
    """The shapes of q and v, where all three can go to the core as they are, with nothing to
    convert or to broadcast; else None.  They are the caller's own arrays, whose shapes the core
    compares with these."""
    if not (type(q) is ndarray and type(k) is ndarray and type(v) is ndarray):
        return None
    dtype = q.dtype
    known = dtype is FLOAT32 or dtype is FLOAT64 or dtype is FLOAT16 or dtype is BFLOAT16_BITS
    if not (known and k.dtype is dtype and v.dtype is dtype):
        return None
    # Whole shapes first: comparing those is quicker than taking them apart.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) < 3 or (v_shape != k_shape and v_shape[:-1] != k_shape[:-1]):
        return None
    if q_shape == k_shape or (
        len(q_shape) == len(k_shape)
        and q_shape[:-3] == k_shape[:-3]
        and q_shape[-1] == k_shape[-1]
        and (q_shape[-3] == k_shape[-3] or (k_shape[-3] > 0 and q_shape[-3] % k_shape[-3] == 0))
    ):
        return q_shape, v_shape
    return None


def _operands(
    given_q: ArrayLike, given_k: ArrayLike, given_v: ArrayLike
) -> tuple[Array, Array, Array, Array, bool]:
    """q, k and v at their full shapes, q as an array of its own shape, and whether all are 2-D."""
    q = plain_q = _operand("q", given_q, "num_heads, seqlen_q, head_dim")
    k = _operand("k", given_k, "num_kv_heads, seqlen_k, head_dim")
    v = _operand("v", given_v, "num_kv_heads, seqlen_k, head_dim_v")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(f"`{name}` must have dtype {q.dtype} like `q`, got {array.dtype}")
    single_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (q, k, v))
    num_heads, _, head_dim = q.shape[-3:]
    num_kv_heads, seqlen_k, _ = k.shape[-3:]
    if k.shape[-1] != head_dim:
        raise ValueError(f"`k` must have head_dim {head_dim} like `q`, got {k.shape[-1]}")
    if v.shape[-2] != seqlen_k:
        raise ValueError(f"`v` must have seqlen_k {seqlen_k} like `k`, got {v.shape[-2]}")
    if v.shape[-3] != num_kv_heads:
        raise ValueError(f"`v` must have num_kv_heads {num_kv_heads} like `k`, got {v.shape[-3]}")
    if num_heads != 0 and (num_kv_heads == 0 or num_heads % num_kv_heads != 0):
        raise ValueError(
            f"`k` must have a num_kv_heads that divides num_heads {num_heads} of `q`, "
            f"got {num_kv_heads}"
        )
    batch_shape = q.shape[:-3]
    for name, array, others in (("k", k, "`q`"), ("v", v, "`q` and `k`")):
        joint = _joint_shape(batch_shape, array.shape[:-3])
        if joint is None:
            raise ValueError(
                f"`{name}` must have leading dimensions that broadcast with {batch_shape} "
                f"of {others}, got {array.shape[:-3]}"
            )
        batch_shape = joint
    q = _broadcast("q", q, batch_shape + q.shape[-3:])
    k = _broadcast("k", k, batch_shape + k.shape[-3:])
    v = _broadcast("v", v, batch_shape + v.shape[-3:])
    return q, k, v, plain_q, single_head


def _operand(name: str, x: ArrayLike, axes: str) -> Array:
    array = float_array(name, x)
    if array.ndim < 2:
        raise ValueError(
            f"`{name}` must have at least 2 dimensions, (..., {axes}) or one head alone, "
            f"got shape {array.shape}"
        )
    return array


def _joint_shape(a: Shape, b: Shape) -> Shape | None:
    """The shape that `a` and `b` broadcast to, or None.  np.broadcast_shapes ends at 32 axes."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    padded = (1,) * (len(longer) - len(shorter)) + shorter
    if any(m != n and m != 1 and n != 1 for m, n in zip(longer, padded, strict=True)):
        return None
    return tuple(n if m == 1 else m for m, n in zip(longer, padded, strict=True))


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
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _bool_array(name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    if array.dtype != np.bool_:
        hint = " (a float mask, which is added to the scores, goes to `bias`)"
        raise TypeError(f"`{name}` must be bool, True = takes part{hint}, got {_kind(x, array)}")
    return array


def _real_array(name: str, x: ArrayLike) -> NDArray[np.float64]:
    """A float64 copy of a few real numbers."""
    array = as_array(name, x)
    if not _holds(array, "fiu", np.float64):
        raise TypeError(f"`{name}` must be real numbers, got {_kind(x, array)}")
    return array.astype(np.float64)


def integer_array(name: str, x: ArrayLike) -> Array:
    """A copy, so that what is found out about its values stays true."""
    return _of_integers(name, x).copy()


def _of_integers(name: str, x: ArrayLike) -> Array:
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


def _broadcast(name: str, array: Array, shape: Shape) -> Array:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"`{name}` must broadcast to {shape}, got shape {array.shape}") from None


def _to_scores(
    array: Array,
    name: str,
    batch_shape: Shape,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    single_head: bool,
) -> Array | None:
    """`array` as a view of the scores' shape, with a head axis whatever the caller's shapes; None
    where there are no scores."""
    shape = (*batch_shape, num_heads, seqlen_q, seqlen_k)
    of_caller = shape[-2:] if single_head else shape
    if 0 in shape and _joint_shape(of_caller, array.shape) == of_caller:
        return None  # NumPy may have no view of the shape: it counts the other axes
    view = _broadcast(name, array, of_caller)
    return view[np.newaxis] if single_head else view


# --- options ----------------------------------------------------------------------------------


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


def _integer(name: str, x: object, rule: str) -> int:
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
    value = _integer(name, x, "an int >= 1")
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


def _positive(name: str, x: object) -> float:
    value = real(name, x)
    if value <= 0.0:
        raise ValueError(f"`{name}` must be greater than 0 (None for no {name}), got {x!r}")
    return value


def _dropout(dropout_p: object, dropout_seed: object) -> tuple[float, int]:
    """The core's share and seed."""
    share = real("dropout_p", dropout_p)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`dropout_p` must be 0 to 1, got {dropout_p!r}")
    if dropout_seed is None:
        if share > 0.0:
            raise ValueError(
                "`dropout_seed` must be an int where `dropout_p` is greater than 0, got None"
            )
        return share, 0
    seed = _integer("dropout_seed", dropout_seed, "an int")
    if not 0 <= seed < 2**64:
        raise ValueError(f"`dropout_seed` must be 0 to 2**64 - 1, got {seed}")
    return share, seed


def _window(window: Window) -> tuple[int, int]:
    """The core's window: -1 for an open side."""
    try:
        sides = tuple(window)
    except TypeError:
        raise TypeError(f"`window` must be a pair (left, right), got {window!r}") from None
    if len(sides) != 2:
        raise ValueError(f"`window` must be a pair (left, right), got {len(sides)} entries")
    left, right = (_window_side(side) for side in sides)
    return left, right


def _window_side(side: object) -> int:
    if side is None:
        return -1
    value = _integer("window", side, "a pair of ints >= 0 or None")
    if value < 0:
        raise ValueError(f"`window` must hold ints >= 0, or None for an open side, got {value}")
    return min(value, MAX_POSITION)


def _is_over_queries(softmax_axis: object) -> bool:
    if not isinstance(softmax_axis, str):
        raise TypeError(f'`softmax_axis` must be "keys" or "queries", got {softmax_axis!r}')
    if softmax_axis not in ("keys", "queries"):
        raise ValueError(f'`softmax_axis` must be "keys" or "queries", got "{softmax_axis}"')
    return softmax_axis == "queries"


def _sinks(sinks: ArrayLike, num_heads: int, over_queries: bool) -> NDArray[np.float64]:
    array = _real_array("sinks", sinks)
    if over_queries:
        raise ValueError(
            '`sinks` must be None with softmax_axis="queries" (a sink joins the sum over the keys '
            f"of a query), got shape {array.shape}"
        )
    if array.shape != (num_heads,):
        raise ValueError(f"`sinks` must have shape ({num_heads},), one per head, got {array.shape}")
    return array


def _kv_lengths(kv_lengths: ArrayLike, batch_shape: Shape, seqlen_k: int) -> Array:
    array = integer_array("kv_lengths", kv_lengths)
    wrong = array[(array < 0) | (array > seqlen_k)]
    if wrong.size:
        raise ValueError(f"`kv_lengths` must be 0 to seqlen_k {seqlen_k}, got {wrong[0]}")
    return _broadcast("kv_lengths", array.astype(np.int64, copy=False), batch_shape)


def q_offsets(q_offset: ArrayLike, batch_shape: Shape) -> Array:
    if type(q_offset) is int:  # which an array of integers may be too small for
        position = np.array(max(-MAX_POSITION, min(q_offset, MAX_POSITION)))
        return np.broadcast_to(position, batch_shape)
    array = integer_array("q_offset", q_offset)
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(MAX_POSITION))
    array = np.clip(array.astype(np.int64, copy=False), -MAX_POSITION, MAX_POSITION)
    return _broadcast("q_offset", array, batch_shape)


def _segment_ids(
    segment_ids: Sequence[ArrayLike], batch_shape: Shape, seqlen_q: int, seqlen_k: int
) -> tuple[Array, Array]:
    if not isinstance(segment_ids, tuple | list):
        raise TypeError(
            f"`segment_ids` must be a pair (q_ids, k_ids), got a {type(segment_ids).__name__}"
        )
    pair = tuple(segment_ids)
    if len(pair) != 2:
        raise ValueError(f"`segment_ids` must be a pair (q_ids, k_ids), got {len(pair)} entries")
    ids = []
    for index, length in enumerate((seqlen_q, seqlen_k)):
        name = f"segment_ids[{index}]"
        # Compared with each other, never an index: not copied.
        array = _of_integers(name, pair[index])
        if array.dtype == np.uint64 and np.any(array > np.iinfo(np.int64).max):
            raise ValueError(f"`{name}` must be less than 2**63, got {array.max()}")
        array = array.astype(np.int64, copy=False)
        ids.append(_broadcast(name, array, (*batch_shape, length)))
    return ids[0], ids[1]


# --- results ----------------------------------------------------------------------------------


def exact_array(name: str, x: ArrayLike, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """An input that has the shape and dtype of a result."""
    array = as_array(name, x)
    if array.dtype != dtype:
        raise TypeError(f"`{name}` must have dtype {dtype} to match `q`, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"`{name}` must have the result's shape {shape}, got shape {array.shape}")
    return array


def check_out(out: object, shape: Shape, dtype: np.dtype[Any], like: str) -> Array:
    """`out` as a base-class array that every element of a result can be written to."""
    if not isinstance(out, ndarray):
        raise TypeError(f"`out` must be a NumPy array, got a {type(out).__name__}")
    array = as_array("out", out, any_byte_order=True)
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
