"""Attention in turns with a product of another library, as in every real program, and what a call
of attention leaves behind: the threads of each must not stand in the way of the other's."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastattn._bench.forms import Call
from fastattn._bench.workloads import Array, Workload

# After a call, in which threads that wait for more work are seen to use a core.
AFTER_SECONDS = 0.05
# Python threads that call at once, and the least time of all their calls together.
CALLERS = 16
CALLERS_SECONDS = 0.2
REPEATS = 5


def of_numpy(workload: Workload, attend: Callable[..., Array], **options: Any) -> Call:
    """Attention of arrays, and a product of NumPy."""
    q, k, v = workload.arrays()
    x, w = workload.product_input()
    return _in_turns(lambda: attend(q, k, v, **options), lambda: x @ w)


def of_torch(workload: Workload, attend: Callable[..., Any], **options: Any) -> Call:
    """Attention of tensors, and a product of PyTorch."""
    import torch

    q, k, v = map(torch.from_numpy, workload.arrays())
    x, w = map(torch.from_numpy, workload.product_input())

    def inference(call: Callable[[], Any]) -> Callable[[], Any]:
        decorated: Callable[[], Any] = torch.inference_mode()(call)
        return decorated

    return _in_turns(inference(lambda: attend(q, k, v, **options)), inference(lambda: x @ w))


def _in_turns(attend: Callable[[], Any], multiply: Callable[[], Any]) -> Call:
    def run() -> Any:
        out = attend()
        multiply()
        return out

    return Call(run, np.asarray, parts=(attend, multiply))


def turn(call: Call, timed: Callable[[Callable[[], object]], float]) -> dict[str, float | None]:
    """Measure a program once.

    Parameters
    ----------
    call : Call
        With `parts`.
    timed : callable
        Seconds of a call: `runner.turn`.

    Returns
    -------
    dict
        ``"seconds"`` of both parts in turns, ``"alone"`` of each alone, added, each the best of
        `REPEATS`, since a program beside them may slow any one; ``"after"``, the processor time
        that is used in the 50 ms after a call of attention; ``"callers"``, calls of attention per
        second by 16 Python threads over those by one; ``"threads"``, the native threads meanwhile
        besides these 16, None outside Linux.
    """
    attend, multiply = call.parts
    time.sleep(AFTER_SECONDS)  # threads of the product may still wait awake since the last turn
    attention = timed(attend)
    before = time.process_time()
    time.sleep(AFTER_SECONDS)
    after = time.process_time() - before
    made: dict[str, float | None] = {"after": after, **_callers(attend, attention)}
    rounds = [[timed(run) for run in (attend, multiply, call.run)] for _ in range(REPEATS)]
    attention, product, seconds = map(min, zip(*rounds, strict=True))
    return {**made, "alone": attention + product, "seconds": seconds}


def _callers(attend: Callable[[], Any], seconds: float) -> dict[str, float | None]:
    calls_of_each = max(1, round(CALLERS_SECONDS / CALLERS / seconds))
    barrier = threading.Barrier(CALLERS + 1)

    def calls(number: int) -> None:
        for _ in range(number):
            attend()

    def caller() -> None:
        barrier.wait()
        calls(calls_of_each)
        barrier.wait()  # until all have called
        barrier.wait()  # until threads are counted

    start = time.perf_counter()
    calls(CALLERS * calls_of_each)
    by_one = time.perf_counter() - start
    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    by_all = time.perf_counter() - start
    native = None
    with contextlib.suppress(OSError):
        native = len(list(Path("/proc/self/task").iterdir())) - CALLERS
    barrier.wait()
    for thread in threads:
        thread.join()
    return {"callers": by_one / by_all, "threads": native}
