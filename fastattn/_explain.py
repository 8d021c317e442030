"""What a call would run, said without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from fastattn import _config, _core
from fastattn._core import Problem
from fastattn._options import (
    OPTIONS,
    AttentionOptions,
    PackedOptions,
    refuse_unknown,
    set_named,
)
from fastattn._problem import of_arrays, of_packed
from fastattn._results import place_results


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run; ``print`` shows it as text.

    Sizes are in elements unless their name says otherwise.  Lengths are those of the longest
    sequence, where sequences have lengths of their own.
    """

    isa: str  #: name of the kernel set
    engine: str  #: name of its engine, which multiplies
    dtype: str
    softmax: str  #: the algorithm
    form: str  #: "arrays", "packed sequences", "cache of" or "pages of" a dtype
    batch_shape: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    block_q: int  #: rows (queries, of each head that shares a key head) in a task
    block_k: int  #: keys in a block
    tile_q: int  #: rows in a score tile
    mr: int  #: rows of a register tile
    nr: int  #: columns of a register tile
    vl: int  #: lanes of a vector
    num_tasks: int
    num_threads: int  #: that would work
    num_threads_allowed: int  #: that may work
    num_threads_reason: str  #: why that many
    workspace_bytes: int  #: beyond inputs and outputs, all threads together
    tiles_total: int  #: score tiles (tile_q rows, block_k keys) of the problem
    tiles_computed: int  #: of these, the ones that are computed
    key_ranges: tuple[str, ...]  #: of mask and bias, those that leave each query one key range
    skipped_by: dict[str, int]  #: score tiles that each option alone rules out

    @property
    def tiles_skipped(self) -> int:
        """Score tiles that no query looks at, and that are not computed."""
        return self.tiles_total - self.tiles_computed

    def __str__(self) -> str:
        percent = 100.0 * self.tiles_skipped / self.tiles_total if self.tiles_total else 0.0
        skipped = f"{self.tiles_skipped:,} ({percent:.0f} %)"
        if self.skipped_by:
            alone = ", ".join(f"{name} {tiles:,}" for name, tiles in self.skipped_by.items())
            skipped += f"; each option alone: {alone}"
        else:
            skipped += "; no option rules keys out"
        rows = {
            "problem": f"{self.dtype}, batch {self.batch_shape}, num_heads {self.num_heads}, "
            f"num_kv_heads {self.num_kv_heads}, seqlen_q {self.seqlen_q:,}, "
            f"seqlen_k {self.seqlen_k:,}, head_dim {self.head_dim}, head_dim_v {self.head_dim_v}, "
            f"{self.form}",
            "kernel set": f"{self.isa}, engine {self.engine}, vectors of {self.vl}, "
            f"register tile {self.mr} x {self.nr}",
            "softmax": self.softmax,
            "blocks": f"{self.num_tasks:,} tasks of up to {self.block_q} rows, score tiles of "
            f"{self.tile_q} rows x {self.block_k} keys",
            "threads": f"{self.num_threads} ({self.num_threads_reason})",
            "workspace": f"{self.workspace_bytes / 1024:,.1f} KiB",
            "score tiles": f"{self.tiles_total:,}, computed {self.tiles_computed:,}, "
            f"skipped {skipped}",
        }
        if self.key_ranges:
            names = " and ".join(self.key_ranges)
            rows["key ranges"] = f"{names}: one for each query, read once for all heads"
        return "\n".join(f"{name:12}{text}" for name, text in rows.items())


def explain(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Explanation:
    """Say what `attention` would run with the same arguments, without running it.

    Parameters
    ----------
    q, k, v, return_lse, **options
        As in `attention`, and validated the same way.  `out` is not written.
    cu_seqlens_q, cu_seqlens_k : array_like of int, (num_sequences + 1,), optional
        With both, the call is one of `attention_varlen`, and so are the other arguments.

    Returns
    -------
    Explanation
        Fields for programs, and text for ``print``: the kernel set and its engine, the algorithm,
        block sizes, threads and why that many, workspace, and the score tiles that are skipped
        and why.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention` or `attention_varlen` would.

    See Also
    --------
    KVCache.explain, PagedKVCache.explain : The same of the attention over a cache.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> x = np.zeros((1, 2, 4096, 64), dtype=np.float32)
    >>> plan = fa.explain(x, x, x, causal=True, num_threads=1)
    >>> plan.num_threads, plan.tiles_skipped > 0, list(plan.skipped_by)
    (1, True, ['causal'])

    Packed sequences of 96 and 4000 tokens:

    >>> x = np.zeros((4096, 2, 64), dtype=np.float32)
    >>> starts = [0, 96, 4096]
    >>> plan = fa.explain(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts)
    >>> plan.form, plan.batch_shape, plan.seqlen_q
    ('packed sequences', (2,), 4000)
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        refuse_unknown("explain", options, AttentionOptions.__annotations__)
        return explained(lambda: of_arrays(q, k, v), options, return_lse)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        given = "cu_seqlens_k" if cu_seqlens_q is None else "cu_seqlens_q"
        raise ValueError(
            f"`cu_seqlens_q` and `cu_seqlens_k` must be given together, got only `{given}`"
        )
    refuse_unknown("explain", options, PackedOptions.__annotations__)
    starts = cu_seqlens_q, cu_seqlens_k
    return explained(lambda: of_packed(q, k, v, *starts), options, return_lse)


def explained(
    make: Callable[[], Problem], options: Mapping[str, Any], return_lse: bool
) -> Explanation:
    """Explain the call whose problem `make` makes, with options that are known."""
    given = {**options}
    out = given.pop("out", None)

    def described(options: dict[str, Any]) -> Problem:
        problem = make()
        set_named(problem, options)
        place_results(problem, out, return_lse)  # which is not written
        return problem

    problem, plain = described(given), make()
    plan = _core.describe(problem)
    ruling_out = {
        option.name: given.pop(option.name)
        for option in OPTIONS
        if (option.rules_out or option.name in plan["key_ranges"])
        and option.differs(problem, plain)
    }
    if "kv_lengths" in ruling_out and problem.q_offset is None and plan["num_tasks"] > 0:
        assert problem.kv_lengths is not None
        # The default that `causal` and `window` keep when each is looked at alone.
        given["q_offset"] = problem.kv_lengths - problem.seqlen_q
    skipped_by = {}
    for name, value in ruling_out.items():
        alone = _core.describe(described({**given, name: value}))
        skipped_by[name] = alone["tiles_total"] - alone["tiles_computed"]

    batch_shape, seqlen_q, seqlen_k = problem.batch_shape, problem.seqlen_q, problem.seqlen_k
    if problem.q_starts is not None and problem.k_starts is not None:
        batch_shape = problem.entries
        seqlen_q, seqlen_k = (
            int(np.diff(starts).max(initial=0)) for starts in (problem.q_starts, problem.k_starts)
        )
    return Explanation(
        isa=problem.isa,
        dtype=str(problem.like.dtype),
        softmax=(
            "over the queries: log-sum-exp of each key first, then weights times values"
            if problem.softmax_over_queries
            else "over the keys: online, in one pass over keys and values"
        ),
        form=_form(problem, plain),
        batch_shape=batch_shape,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=problem.q_shape[-1],
        head_dim_v=problem.head_dim_v,
        num_threads_allowed=problem.num_threads,
        num_threads_reason=_threads_reason(
            options.get("num_threads"), problem.num_threads, plan["num_threads"]
        ),
        skipped_by=skipped_by,
        **plan,
    )


def _form(problem: Problem, plain: Problem) -> str:
    if problem.q_starts is not None:
        return "packed sequences"
    if problem.page_table is not None:
        return f"pages of {problem.k.dtype}"
    # Lengths before any option is set are those of a cache.
    return "arrays" if plain.kv_lengths is None else f"cache of {problem.k.dtype}"


def _threads_reason(asked: int | None, allowed: int, used: int) -> str:
    source = f"{allowed} allowed by "
    source += _config.thread_rule()[1] if asked is None else "num_threads"
    if used == allowed:
        return source
    if not _core.has_openmp():
        return f"{source}, but this build has no OpenMP"
    if used == _core.team_limit():
        return f"{source}, but a call has no more than {used} on this machine"
    return f"{source}, but there is no work for more"
