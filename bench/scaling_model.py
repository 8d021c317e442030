"""How fastattn is expected to scale to more cores than it was measured on.

    python -m fastattn bench --filter scaling --json scaling.json
    python bench/scaling_model.py scaling.json

Times on one thread come from the JSON, tasks from `fastattn.explain`; what is assumed of the other
machine stands in the constants below.  ``docs/scaling.md`` explains the model.
"""

import heapq
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import fastattn as fa
from fastattn._bench.grid import SCALING
from fastattn._bench.workloads import Workload

CORES = (1, 2, 8, 16, 32, 64, 128)

# Handing out a call and waiting for its end, seconds, and the part of it that grows with threads.
FORK, FORK_PER_THREAD = 5e-6, 0.05e-6
# Packing a key costs as much as this many rows of work on it: 5 % of the time at 192 rows, 1 % at
# 768 (csrc/geometry.c).
PACKING_ROWS = 9
# Bytes per second that a core reads of keys and values that others read too: from a shared last
# cache, all cores at once.
SHARED_READ = 10e9
# Bytes per second that all cores of a NUMA node read from its memory: 8 channels of DDR5-4800 at
# 80 %; and its cores.
NODE_READ, NODE_CORES = 245e9, 64
# Keys of a split (csrc/geometry.c): the task of few queries.
SPLIT_K = 1024


def makespan(tasks: Iterable[float], threads: int) -> float:
    """Time until all are done when each thread takes the next one: one atomic counter."""
    free = [0.0] * threads
    for seconds in tasks:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def tasks_of(workload: Workload, threads: int) -> list[tuple[int, float, float]]:
    """(rows, scores, bytes of keys and values) of each task, in the order in which they start."""
    q, k, v = (np.broadcast_to(np.float32(0), x.shape) for x in workload.arrays())
    plan = fa.explain(q, k, v, causal=workload.causal, num_threads=threads)
    row_bytes = 4.0 * 2 * workload.head_dim
    heads = workload.batch * workload.num_heads
    made = []
    for start in range(0, workload.seqlen_q, plan.block_q):
        stop = min(start + plan.block_q, workload.seqlen_q)
        scores, seen = 0.0, 0
        for tile in range(start, stop, plan.tile_q):
            last = min(tile + plan.tile_q, stop)
            seen = workload.seqlen_k
            if workload.causal:
                seen = min(seen, -(-last // plan.block_k) * plan.block_k)
            scores += (last - tile) * seen
        made.append((stop - start, scores, seen * row_bytes))
    # Within a head the rows with the most keys first; one head after the other.
    return sorted(made, key=lambda task: -task[1]) * heads


def prefill(workload: Workload, threads: int, one_thread: float) -> float:
    """Seconds: every task computes, packs, and waits for its keys if they come more slowly."""

    def work(task: tuple[int, float, float]) -> float:
        rows, scores, _ = task
        return scores * (1 + PACKING_ROWS / rows)

    unit = one_thread / sum(map(work, tasks_of(workload, 1)))
    tasks = tasks_of(workload, threads)
    return makespan((max(work(t) * unit, t[2] / SHARED_READ) for t in tasks), threads)


def decode(workload: Workload, threads: int, one_thread: float, nodes: int) -> float:
    """Seconds: splits of the keys, each at the rate of one core or its share of the memory."""
    splits = workload.batch * workload.num_kv_heads * -(-workload.seqlen_k // SPLIT_K)
    busy = min(threads, splits)
    rate = min(workload.kv_bytes / one_thread, nodes * NODE_READ / busy)
    return makespan([workload.kv_bytes / splits / rate] * splits, threads)


def main(path: Path) -> None:
    """Print the table of docs/scaling.md."""
    results = {r["workload"]: r for r in json.loads(path.read_text())["results"]}
    header = "".join(f"{p:>8}" for p in CORES)
    print(f"{'':<22}{'1 thread':>10}{'2, measured':>13}   speedup on{header} cores")
    for workload in SCALING:
        result = results[workload.name]
        one = result["baseline"]["median"]
        measured = one / result["contenders"]["fastattn"]["median"]
        for nodes in (1, 2) if workload.reads else (1,):
            row = ""
            for p in CORES:
                fork = 0.0 if p == 1 else FORK + FORK_PER_THREAD * p
                if workload.reads:
                    seconds = decode(workload, p, one, min(nodes, -(-p // NODE_CORES)))
                else:
                    seconds = prefill(workload, p, one)
                row += f"{one / (fork + seconds):>8.1f}"
            name = workload.name.removeprefix("scaling-") + (" interleaved" if nodes > 1 else "")
            print(f"{name:<22}{one * 1e3:>7.2f} ms{measured:>12.2f}x{'':>13}{row}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
