"""What a contender makes of a workload, and the workload's arguments in the forms that others take.

Layouts are changed, heads repeated, masks built, graphs compiled before the clock starts; a call
makes a new result, as users call them.  `Unsupported` says that a contender has no such call.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastattn._bench.workloads import Array, Workload

# Runs of each of several ways to the same result, of which the fastest is measured.
TRIALS = 3


class Unsupported(Exception):
    """The contender cannot compute this workload; the message says why."""


class Call(NamedTuple):
    """What is timed, and how to read its result."""

    run: Callable[[], Any]
    # The result as one array (num_heads, queries, head_dim) per sequence; of both passes, the
    # gradients of q, k and v in their shapes; or, where `scores_only` is true, the unscaled scores,
    # (batch, num_heads, seqlen_q, seqlen_k); or the features that a model ends in.
    read: Callable[[Any], Any]
    scores_only: bool = False
    # What `run` does one after the other: attention, and something else.
    parts: tuple[Callable[[], Any], ...] = ()


def fastest(calls: Sequence[Call]) -> Call:
    """The one whose best run of a few is shortest.

    Parameters
    ----------
    calls : sequence of Call
        Ways to the same result.

    Returns
    -------
    Call
        One of them.

    Examples
    --------
    >>> import time
    >>> from fastattn._bench.forms import Call, fastest
    >>> slow, quick = (Call(lambda s=s: time.sleep(s), print) for s in (0.01, 0))
    >>> fastest([slow, quick]) is quick
    True
    """

    def best(call: Call) -> float:
        call.run()
        seconds = []
        for _ in range(TRIALS):
            start = time.perf_counter()
            call.run()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return min(calls, key=best)


# ---- what a contender has -----------------------------------------------------------------------


def only_options(workload: Workload, *options: str) -> None:
    """Refuse all options but these; with causal or gradients, all."""
    if workload.option not in ("", *options):
        raise Unsupported(f"no {workload.option}")
    if workload.option and workload.causal:
        raise Unsupported(f"no {workload.option} with causal")
    if workload.option and workload.gradients:
        raise Unsupported(f"no gradients with {workload.option}")


def only_dtypes(workload: Workload, *dtypes: str) -> None:
    """Refuse all dtypes but these, and storage of another one."""
    if workload.dtype not in dtypes:
        raise Unsupported(f"no {workload.dtype}")
    if workload.cache_dtype:
        raise Unsupported(f"no {workload.cache_dtype} cache")


def no_gradients(workload: Workload) -> None:
    """Refuse the backward pass."""
    if workload.gradients:
        raise Unsupported("no gradients")


def no_layer(workload: Workload) -> None:
    """Refuse a layer with its projections."""
    if workload.layer:
        raise Unsupported("no layer")


def no_packed(workload: Workload) -> None:
    """Refuse packed sequences."""
    if workload.packed:
        raise Unsupported("no packed sequences")


# ---- arguments ----------------------------------------------------------------------------------


def takes_part(workload: Workload) -> Array | None:
    """Which keys take part, (seqlen_q, seqlen_k), for those who know no such option by name."""
    options = workload.options()
    shape = (workload.seqlen_q, workload.seqlen_k)
    offset = workload.seqlen_k - workload.seqlen_q
    keep: Array | None = options.get("mask")
    if "segment_ids" in options:
        q_ids, k_ids = options["segment_ids"]
        keep = q_ids[:, None] == k_ids
    if "window" in options:
        keep = np.tri(*shape, offset, dtype=bool)
        keep &= ~np.tri(*shape, offset - options["window"][0] - 1, dtype=bool)
    return keep


def is_there(workload: Workload) -> Array:
    """Which keys of the padded arrays are keys, (batch, 1, 1, seqlen_k)."""
    ends = np.array(workload.key_lengths)[:, None, None, None]
    made: Array = np.arange(workload.seqlen_k) < ends
    return made


def score_terms(workload: Workload) -> Array | None:
    """What is added to the scores, (num_heads, seqlen_q, seqlen_k)."""
    options = workload.options()
    if "alibi_slopes" in options:
        position = np.arange(workload.seqlen_q)[:, None] + workload.seqlen_k - workload.seqlen_q
        distance = np.abs(position - np.arange(workload.seqlen_k))
        terms = -options["alibi_slopes"][:, None, None] * distance
        made: Array = terms.astype(workload.dtype)
        return made
    bias: Array | None = options.get("bias")
    return bias


def additive_mask(workload: Workload) -> Array | None:
    """All that takes keys out or adds to scores as one array of terms, with four dimensions."""
    keep, terms = takes_part(workload), score_terms(workload)
    if workload.lengths:
        return np.where(is_there(workload), 0, -np.inf).astype(workload.dtype)
    if keep is not None:
        terms = np.where(keep, 0, -np.inf).astype(workload.dtype)[None]
    return None if terms is None else terms[None]


def grouped(workload: Workload, x: Array) -> Array:
    """Query heads beside the key head that they read: (batch, kv heads, group, rows, columns)."""
    return x.reshape(x.shape[0], workload.num_kv_heads, -1, *x.shape[2:])


def repeated(workload: Workload, x: Array) -> Array:
    """A key head for each query head."""
    return np.repeat(x, workload.group_size, axis=1)


def pack(workload: Workload, x: Array) -> Array:
    """Padded sequences one after another, (total, heads, head_dim), in memory of their own."""
    parts = [x[b, :, :n].swapaxes(0, 1) for b, n in enumerate(workload.lengths)]
    return np.concatenate(parts)


def starts(workload: Workload) -> Array:
    """Where packed sequences begin, and the last one ends."""
    made: Array = np.concatenate([[0], np.cumsum(workload.lengths)])
    return made


def sequences(workload: Workload) -> list[tuple[Array, Array, Array]]:
    """q, k and v of each sequence alone, batches of one, in memory of their own."""

    def alone(x: Array, b: int, length: int) -> Array:
        return np.ascontiguousarray(x[b : b + 1, :, :length])

    q, k, v = workload.arrays()
    pairs = zip(workload.query_lengths, workload.key_lengths, strict=True)
    return [
        (alone(q, b, rows), alone(k, b, keys), alone(v, b, keys))
        for b, (rows, keys) in enumerate(pairs)
    ]
