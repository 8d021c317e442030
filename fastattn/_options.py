"""The options of attention, one row each.

A row says what an option is called, what it is when it is not given, how a value is checked by
itself and against the sizes of a problem, and which fields of the problem it sets.  Every function
that takes options reads this table: `attention` and what is built on it, both caches, the operators
of PyTorch, the self-test and the benchmarks.  Public signatures are written out for ``help()``;
tests/test_options.py holds them, the stub, the operators and the documentation to the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _config, _core, _validate
from fastattn._core import Problem
from fastattn._validate import MAX_C_INT, MAX_POSITION, Array, Shape

Window = Sequence[int | None]

# The kinds of calls that take options.
ARRAYS, PACKED, CACHE, WEIGHTS = "arrays", "packed", "cache", "weights"
EVERY_CALL = frozenset({ARRAYS, PACKED, CACHE, WEIGHTS})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One option of attention."""

    name: str
    default: Any
    #: The value by itself, checked and converted: ``check(name, value)``.
    check: Callable[[str, Any], Any]
    #: The fields of `Problem` that it sets; default: the one of its name.
    fields: tuple[str, ...] = ()
    #: The checked value in the problem's sizes: ``place(problem, name, value)``; None: as it is.
    place: Callable[[Problem, str, Any], Any] | None = None
    calls: frozenset[str] = EVERY_CALL
    #: Whether `attention_backward` returns a gradient by it.
    gradient: bool = False
    #: Whether it takes keys out of the softmax, so that score tiles may be skipped.
    rules_out: bool = False
    #: Its arguments of the operators of PyTorch, with their types in a schema.
    torch: tuple[tuple[str, str], ...] = ()

    def set(self, problem: Problem, value: Any) -> None:
        """Check a value that is given and set the problem's fields."""
        value = self.check(self.name, value)
        if self.place is not None:
            value = self.place(problem, self.name, value)
        if len(self.fields) == 1:
            setattr(problem, self.fields[0], value)
        else:
            for field, part in zip(self.fields, value, strict=True):
                setattr(problem, field, part)

    def differs(self, problem: Problem, plain: Problem) -> bool:
        """Whether the option makes a problem another than the one without options."""
        for field in self.fields:
            value, off = getattr(problem, field), getattr(plain, field)
            if value is not off and (off is None or value != off):
                return True
        return False


# --- types of options, for type checkers ---------------------------------------------------------
#
# `return_lse` is in none of them: it decides the type of a result, and so stands in the signatures.


class _SharedOptions(TypedDict, total=False):
    """Those of every call that has a result."""

    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    causal: bool
    window: Window | None
    q_offset: ArrayLike | None
    sinks: ArrayLike | None
    dropout_p: float
    dropout_seed: int | None
    out: Array | None
    num_threads: int | None


class PackedOptions(_SharedOptions, total=False):
    """Those of `attention_varlen`."""

    residual: ArrayLike | None


class _ScoreOptions(_SharedOptions, total=False):
    """And those that speak of scores of one shape."""

    bias: ArrayLike | None
    mask: ArrayLike | None
    segment_ids: Sequence[ArrayLike] | None
    softmax_axis: Literal["keys", "queries"]


class CacheOptions(_ScoreOptions, total=False):
    """Those of the caches, which know their lengths."""

    residual: ArrayLike | None


class LayerOptions(_ScoreOptions, total=False):
    """Those of `self_attention` and `MultiHeadAttention`, whose `residual` is another."""

    kv_lengths: ArrayLike | None


class AttentionOptions(LayerOptions, total=False):
    """Those of `attention`: all."""

    residual: ArrayLike | None


# --- checks of values ---------------------------------------------------------------------------


def _window(name: str, window: Window) -> tuple[int, int]:
    """The core's window: -1 for an open side."""
    try:
        sides = tuple(window)
    except TypeError:
        raise TypeError(f"`{name}` must be a pair (left, right), got {window!r}") from None
    if len(sides) != 2:
        raise ValueError(f"`{name}` must be a pair (left, right), got {len(sides)} entries")
    left, right = (_window_side(name, side) for side in sides)
    return left, right


def _window_side(name: str, side: object) -> int:
    if side is None:
        return -1
    value = _validate.integer(name, side, "a pair of ints >= 0 or None")
    if value < 0:
        raise ValueError(f"`{name}` must hold ints >= 0, or None for an open side, got {value}")
    return min(value, MAX_POSITION)


def read_positions(name: str, x: ArrayLike) -> NDArray[np.int64]:
    if type(x) is int:  # which an array of integers may be too small for
        return np.array(max(-MAX_POSITION, min(x, MAX_POSITION)))
    array = _validate.integer_array(name, x)
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(MAX_POSITION))
    return np.clip(array.astype(np.int64, copy=False), -MAX_POSITION, MAX_POSITION)


def read_pair(name: str, pair: Any) -> tuple[Any, Any]:
    """What the queries and the keys have each, not looked at yet."""
    if not isinstance(pair, tuple | list):
        raise TypeError(f"`{name}` must be a pair (q_ids, k_ids), got a {type(pair).__name__}")
    of_both = tuple(pair)
    if len(of_both) != 2:
        raise ValueError(f"`{name}` must be a pair (q_ids, k_ids), got {len(of_both)} entries")
    return of_both


def _pair_of_ids(name: str, pair: Sequence[ArrayLike]) -> list[Array]:
    ids = []
    for index, x in enumerate(read_pair(name, pair)):
        # Compared with each other, never an index: not copied.
        array = _validate.of_integers(f"{name}[{index}]", x)
        if array.dtype == np.uint64 and np.any(array > np.iinfo(np.int64).max):
            raise ValueError(f"`{name}[{index}]` must be less than 2**63, got {array.max()}")
        ids.append(array.astype(np.int64, copy=False))
    return ids


def _is_over_queries(name: str, axis: object) -> bool:
    if not isinstance(axis, str):
        raise TypeError(f'`{name}` must be "keys" or "queries", got {axis!r}')
    if axis not in ("keys", "queries"):
        raise ValueError(f'`{name}` must be "keys" or "queries", got "{axis}"')
    return axis == "queries"


def _share(name: str, x: object) -> float:
    share = _validate.real(name, x)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`{name}` must be 0 to 1, got {x!r}")
    return share


def _seed(name: str, x: object) -> int:
    seed = _validate.integer(name, x, "an int")
    if not 0 <= seed < 2**64:
        raise ValueError(f"`{name}` must be 0 to 2**64 - 1, got {seed}")
    return seed


def _threads(name: str, x: object) -> int:
    return min(_validate.count(name, x), MAX_C_INT)


# --- values in the sizes of a problem -----------------------------------------------------------


def _as_scores(problem: Problem, name: str, array: Array) -> Array | None:
    """A view of the scores' shape, with a head axis whatever the caller's shapes; None where there
    are no scores."""
    shape: Shape = (*problem.q_shape[:-1], problem.seqlen_k)
    of_caller = shape[-2:] if problem.single_head else shape
    if 0 in shape and _validate.joint_shape(of_caller, array.shape) == of_caller:
        return None  # NumPy may have no view of the shape: it counts the other axes
    view = _validate.core_view(_validate.broadcast(name, array, of_caller))
    return view[np.newaxis] if problem.single_head else view


def _as_heads(problem: Problem, name: str, array: Array) -> Array:
    if problem.q_starts is not None and array.ndim != 1:
        raise ValueError(f"`{name}` must have one dimension, (num_heads,), got {array.ndim}")
    return _validate.broadcast(name, array, problem.q_shape[:-2])


def _as_entries(problem: Problem, name: str, array: Array) -> Array:
    return _validate.broadcast(name, array, problem.entries)


def _as_lengths(problem: Problem, name: str, array: Array) -> Array:
    wrong = array[(array < 0) | (array > problem.seqlen_k)]
    if wrong.size:
        raise ValueError(f"`{name}` must be 0 to seqlen_k {problem.seqlen_k}, got {wrong[0]}")
    return _validate.broadcast(name, array.astype(np.int64, copy=False), problem.entries)


def _as_segments(problem: Problem, name: str, ids: list[Array]) -> tuple[Array, Array]:
    q_ids, k_ids = (
        _validate.broadcast(f"{name}[{index}]", array, (*problem.batch_shape, length))
        for index, (array, length) in enumerate(
            zip(ids, (problem.seqlen_q, problem.seqlen_k), strict=True)
        )
    )
    return q_ids, k_ids


def _as_sinks(problem: Problem, name: str, array: Array) -> Array:
    heads = problem.num_heads
    if array.shape != (heads,):
        raise ValueError(f"`{name}` must have shape ({heads},), one per head, got {array.shape}")
    return array


def _without_sinks(problem: Problem, name: str, over_queries: bool) -> bool:
    if over_queries and problem.sinks is not None:
        raise ValueError(
            f'`sinks` must be None with {name}="queries" (a sink joins the sum over the keys of a '
            f"query), got shape {problem.sinks.shape}"
        )
    return over_queries


def _as_result(problem: Problem, name: str, array: Array) -> Array:
    checked = _validate.exact_array(name, array, problem.out_shape, problem.dtype)
    return problem.as_in_core(_validate.core_view(checked))


# --- the table ----------------------------------------------------------------------------------


def _row(name: str, default: Any, check: Callable[[str, Any], Any], **more: Any) -> Option:
    """A row whose field and whose operator's argument have its own name, if nothing else is said:
    an argument that is a tensor, as most are."""
    more = {"fields": (name,), "torch": ((name, "Tensor?"),), **more}
    return Option(name, default, check, **more)


# In the order of the public signatures.  A row may look at what the rows before it have set.
OPTIONS = (
    _row("scale", None, _validate.real, torch=(("scale", "float?"),)),
    _row("softcap", None, _validate.positive, torch=(("softcap", "float?"),)),
    _row(
        "bias",
        None,
        _validate.float_array,
        place=_as_scores,
        calls=EVERY_CALL - {PACKED},
        gradient=True,
    ),
    _row("alibi_slopes", None, _validate.real_array, place=_as_heads),
    _row(
        "mask",
        None,
        _validate.bool_array,
        place=_as_scores,
        calls=EVERY_CALL - {PACKED},
        rules_out=True,
    ),
    _row("causal", False, _validate.flag, rules_out=True, torch=(("causal", "bool"),)),
    _row(
        "window",
        None,
        _window,
        fields=("window_left", "window_right"),
        rules_out=True,
        torch=(("window_left", "SymInt?"), ("window_right", "SymInt?")),
    ),
    # A tensor has no room for every integer.
    _row(
        "q_offset",
        None,
        read_positions,
        place=_as_entries,
        torch=(("q_offset", "SymInt?"), ("q_offsets", "Tensor?")),
    ),
    _row(
        "kv_lengths",
        None,
        _validate.integer_array,
        place=_as_lengths,
        calls=EVERY_CALL - {PACKED, CACHE},
        rules_out=True,
    ),
    _row(
        "segment_ids",
        None,
        _pair_of_ids,
        fields=("q_segment_ids", "k_segment_ids"),
        place=_as_segments,
        calls=EVERY_CALL - {PACKED},
        rules_out=True,
        torch=(("q_segment_ids", "Tensor?"), ("k_segment_ids", "Tensor?")),
    ),
    _row("sinks", None, _validate.real_array, place=_as_sinks, gradient=True),
    _row(
        "softmax_axis",
        "keys",
        _is_over_queries,
        fields=("softmax_over_queries",),
        place=_without_sinks,
        calls=EVERY_CALL - {PACKED},
        torch=(("softmax_axis", "str"),),
    ),
    _row("dropout_p", 0.0, _share, calls=EVERY_CALL - {WEIGHTS}, torch=(("dropout_p", "float"),)),
    _row("dropout_seed", None, _seed, calls=EVERY_CALL - {WEIGHTS}),
    _row("residual", None, _validate.float_array, place=_as_result, calls=EVERY_CALL - {WEIGHTS}),
    _row("num_threads", None, _threads, torch=(("num_threads", "SymInt?"),)),
)
NAMES = tuple(option.name for option in OPTIONS)
DEFAULTS = tuple(option.default for option in OPTIONS)
BY_NAME = {option.name: option for option in OPTIONS}


def of_call(call: str) -> tuple[str, ...]:
    """The names of the options that a kind of call takes."""
    return tuple(option.name for option in OPTIONS if call in option.calls)


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a function: ``given(locals())``, its first statement."""
    return {name: arguments[name] for name in NAMES if name in arguments}


def set_options(problem: Problem, values: tuple[Any, ...]) -> None:
    """Set all options of a problem: a value for each row."""
    for index in _core.differing(values, DEFAULTS):
        OPTIONS[index].set(problem, values[index])
    if problem.dropout_p > 0.0 and problem.dropout_seed is None:
        raise ValueError(
            "`dropout_seed` must be an int where `dropout_p` is greater than 0, got None"
        )
    if problem.num_threads == 0:
        problem.num_threads = _config.default_num_threads()


def set_named(problem: Problem, options: Mapping[str, Any]) -> None:
    """Set options by name; those that are left out have their defaults."""
    set_options(problem, tuple(map(options.get, NAMES, DEFAULTS)))


def refuse_unknown(function: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = options.keys() - set(known)
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {min(unknown)!r}")
