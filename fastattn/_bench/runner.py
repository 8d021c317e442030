"""Measure: contenders in processes of their own that take turns, the machine's limits among them.

A process runs only during its turn; between its turns it is stopped, whatever its threads would do.
"""

import contextlib
import ctypes
import datetime
import gc
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fastattn import _config, _core
from fastattn._bench import program
from fastattn._bench.check import check
from fastattn._bench.contenders import CONTENDERS, environment
from fastattn._bench.forms import Unsupported
from fastattn._bench.workloads import Workload, lacks

#: Raised when the meaning of the JSON changes.
SCHEMA = 3

# A turn's clock runs at least this long, over as many calls as it takes: a call of microseconds
# alone would be lost in what the clock and the scheduler do.
TURN_SECONDS = 0.01
# From here on what a first call takes more is lost in its time, and it counts.
LONG_SECONDS = 0.25
# Who has used this much has no more turns, after the first few: a peer that takes seconds for one
# call takes them in every round.
BUDGET_SECONDS = 3.0
LEAST_TURNS = 3
# Where a process can be stopped, seen to have stopped, and made to end with the command that alone
# would continue it.  Elsewhere those whose turn it is not wait as their libraries do.
CAN_STOP = sys.platform == "linux"
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# A run of the peak: up to 10 ms on any kernel set of a recent CPU.
PEAK_FLOPS_PER_THREAD = 1e9
PEAK_FLOPS_PER_THREAD_SCALAR = 5e7
# Its turn, of which the best run counts: where other programs keep cores busy, threads that have
# just woken up share one until the system spreads them.
PEAK_SECONDS = 0.05
READ_BYTES = 256 << 20
READ_REPEATS = 5
# A contender that holds whole score matrices has about this many at a time, forward and in both
# passes, in float32 at least; it is left out where they would take more than half of the free
# memory.
SCORE_COPIES, SCORE_COPIES_BOTH = 3, 5
SCORE_BYTES = 4

# Larger workloads are fastattn's alone: a call of the others takes seconds.
MAX_SCORES = 2**28

# Sizes for a first call that loads what a library loads lazily.
WARM_UP_LENGTH = 64


# ---- in the contender's process -----------------------------------------------------------------


def _end_with_command() -> None:
    """Whatever ends the command: who is stopped does not see that the pipe is closed."""
    if CAN_STOP:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def resident_bytes(field: str, reset_peak: bool = False) -> int | None:
    """Memory of this process now (VmRSS) or at its highest (VmHWM).

    Parameters
    ----------
    field : {"VmRSS", "VmHWM"}
        What to read.
    reset_peak : bool
        First set VmHWM to VmRSS.

    Returns
    -------
    int or None
        Bytes; None outside Linux.

    Examples
    --------
    >>> from fastattn._bench.runner import resident_bytes
    >>> (resident_bytes("VmRSS") or 1) > 0
    True
    """
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _return_freed_memory() -> None:
    """Give back what the C library holds for reuse: a call that takes it would seem to use none."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _requests(pipe: Connection) -> Iterator[Any]:
    """What the command asks for, until it is gone."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            yield pipe.recv()


def turn(run: Callable[[], object]) -> float:
    """Time calls, after some that do not count, unless they are long: the process has slept, its
    caches are cold, and its threads may have woken up on one core.

    Parameters
    ----------
    run : callable
        The call.

    Returns
    -------
    float
        Seconds of one call, the mean of as many as it takes to last `TURN_SECONDS`.

    Examples
    --------
    >>> from fastattn._bench.runner import turn
    >>> turn(lambda: sum(range(1000))) > 0
    True
    """
    start = time.perf_counter()
    run()
    elapsed = time.perf_counter() - start
    if elapsed >= LONG_SECONDS:
        return elapsed
    while time.perf_counter() - start < TURN_SECONDS:
        run()
    repeats = 1
    while True:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        elapsed = time.perf_counter() - start
        if elapsed >= TURN_SECONDS:
            return elapsed / repeats
        repeats *= 2


def _serve(name: str, workload: Workload, num_threads: int, pipe: Connection) -> None:
    """A contender's process: prepare, check, then one turn per request."""
    _end_with_command()
    try:
        make = CONTENDERS[name].make
        make(workload.small(WARM_UP_LENGTH), num_threads).run()
        call = make(workload, num_threads)

        _return_freed_memory()
        before = resident_bytes("VmRSS", reset_peak=True)
        result = call.run()
        peak = resident_bytes("VmHWM")
        check(call, result, workload)
        del result
    except Unsupported as reason:
        pipe.send({"skipped": str(reason)})
        return
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        pipe.send({"failed": f"{type(error).__name__}: {lines[0]}"})
        return

    used = None if before is None or peak is None else max(0, peak - before)
    pipe.send({"memory_bytes": used})
    for _ in _requests(pipe):
        pipe.send(program.turn(call, turn) if call.parts else {"seconds": turn(call.run)})


def probe_peak(dtype: str, num_threads: int) -> float:
    """Multiply-adds on registers only, by the kernel set that calls use.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of the numbers.
    num_threads : int
        All at once.

    Returns
    -------
    float
        Operations per second.

    Examples
    --------
    >>> from fastattn._bench.runner import probe_peak
    >>> probe_peak("float32", 1) > 0
    True
    """
    double = dtype == "float64"
    _, flops_of_a_round = _core.probe_fma(_config.ISA, double, 8, num_threads)
    flops_of_a_round /= 8 * num_threads
    scalar = _config.ISA == "scalar"
    goal = PEAK_FLOPS_PER_THREAD_SCALAR if scalar else PEAK_FLOPS_PER_THREAD
    rounds = int(goal / flops_of_a_round)
    peak, start = 0.0, time.perf_counter()
    while peak == 0 or time.perf_counter() - start < PEAK_SECONDS:
        seconds, flops = _core.probe_fma(_config.ISA, double, rounds, num_threads)
        peak = max(peak, flops / seconds)
    return peak


def probe_bandwidth(num_threads: int, num_bytes: int = READ_BYTES) -> float:
    """Read memory once, all threads together; the best of a few times.

    Parameters
    ----------
    num_threads : int
        All at once.
    num_bytes : int
        Size of the memory: far larger than the caches.

    Returns
    -------
    float
        Bytes per second.

    Examples
    --------
    >>> from fastattn._bench.runner import probe_bandwidth
    >>> probe_bandwidth(1, 1 << 20) > 0
    True
    """
    memory = np.ones(num_bytes // 8)
    seconds = min(_core.probe_read(memory, num_threads) for _ in range(READ_REPEATS))
    return memory.nbytes / seconds


def _serve_probes(dtype: str, read_bytes: int, num_threads: int, pipe: Connection) -> None:
    """The probes' process: told by "read" or "peak" what to measure.

    Its memory is of the size of the keys and values, so that the part of them that stays in the
    last cache from call to call, on machines with a large one, is as large.
    """
    _end_with_command()
    memory = np.ones(read_bytes // 8)
    for request in _requests(pipe):
        if request == "read":
            pipe.send(memory.nbytes / turn(lambda: _core.probe_read(memory, num_threads)))
        else:
            pipe.send(probe_peak(dtype, num_threads))


def _serve_bandwidth(num_threads: int, pipe: Connection) -> None:
    """A process for `probe_bandwidth`."""
    _end_with_command()
    for _ in _requests(pipe):
        pipe.send(probe_bandwidth(num_threads))


# ---- in the process of the command --------------------------------------------------------------


class ChildDied(Exception):
    """A contender's process ended without an answer."""


class _Child:
    """A process at the other end of a pipe, stopped from each of its answers to the next request.

    Many libraries' threads wait for more work in a loop, or still free memory, long after a call
    has returned: they would slow whoever has the next turn.
    """

    def __init__(self, target: Callable[..., None], *arguments: Any, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=target, args=(*arguments, num_threads, theirs), daemon=True
        )
        with _environment(environment(num_threads)), _interrupts_blocked():
            self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """Its answer, once all its threads stand still."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise ChildDied(f"its process ended with status {self.process.exitcode}") from None
        if pid := self._running_pid():
            os.kill(pid, signal.SIGSTOP)
            # A thread stops when it leaves the kernel, which can take long to free memory.  An end
            # is left to `process` to find.
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return answer

    def ask(self, request: object) -> Any:
        if pid := self._running_pid():
            os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(ConnectionError):  # receive says more
            self.pipe.send(request)
        return self.receive()

    def close(self) -> None:
        """End it, stopped or not: it has nothing to save."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()

    def _running_pid(self) -> int | None:
        """Whom to stop and continue; None where that cannot be, and after its end."""
        return self.process.pid if CAN_STOP and self.process.is_alive() else None


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a child that is started meanwhile."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Leave Ctrl-C to the command: a child that is started meanwhile never sees it."""
    # Starting a child starts this too, once, which would unblock what is blocked here.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _free_memory() -> float:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        found = None
    return int(found[1]) * 1024.0 if found else math.inf


def too_large(name: str, workload: Workload) -> str | None:
    """Why a contender is not even started on a workload, or None.

    Parameters
    ----------
    name : str
        A key of `CONTENDERS`.
    workload : Workload
        What it would compute.

    Returns
    -------
    str or None
        The reason.

    Examples
    --------
    >>> from fastattn._bench.runner import too_large
    >>> from fastattn._bench.workloads import prefill
    >>> too_large("numpy", prefill("", 1, 1, 2**15, 64))
    'more than 268,435,456 scores, fastattn only'
    """
    if name != "fastattn" and workload.alone:
        return "fastattn only"
    if name != "fastattn" and workload.num_scores > MAX_SCORES:
        return f"more than {MAX_SCORES:,} scores, fastattn only"
    padded = workload._replace(lengths=())
    score_bytes = padded.num_scores * (8 if workload.dtype == "float64" else SCORE_BYTES)
    copies = SCORE_COPIES_BOTH if workload.gradients else SCORE_COPIES
    needed = copies * score_bytes if CONTENDERS[name].holds_scores else 0
    if CONTENDERS[name].repeats_heads and workload.group_size > 1:
        needed += workload.group_size * padded.kv_bytes
    if needed > _free_memory() / 2:
        return "not enough memory"
    return lacks(workload)


def rates(
    workload: Workload, seconds: float, peak: float, read_rate: float | None
) -> dict[str, float]:
    """What a time means.

    Parameters
    ----------
    workload : Workload
        What was computed.
    seconds : float
        In this time.
    peak : float
        Operations per second that the machine can do at most.
    read_rate : float or None
        Bytes per second that it can read, where reading bounds the time.

    Returns
    -------
    dict
        ``"gflops"`` and ``"share_of_peak"``; with `read_rate` also ``"gbytes_per_second"`` and
        ``"share_of_read"``.

    Examples
    --------
    >>> from fastattn._bench.runner import rates
    >>> from fastattn._bench.workloads import prefill
    >>> rates(prefill("", 1, 1, 1000, 50), 0.01, 100e9, None)
    {'gflops': 20.0, 'share_of_peak': 0.2}
    """
    rate = workload.flops / seconds
    found = {"gflops": rate / 1e9, "share_of_peak": rate / peak}
    if read_rate is not None:
        rate = workload.kv_bytes / seconds
        found |= {"gbytes_per_second": rate / 1e9, "share_of_read": rate / read_rate}
    return found


def measure(
    workload: Workload, contenders: Sequence[str], num_threads: int, rounds: int
) -> dict[str, Any]:
    """Measure one workload.

    Parameters
    ----------
    workload : Workload
        What is computed.
    contenders : sequence of str
        Keys of `CONTENDERS`.
    num_threads : int
        Of every contender, unless the workload has its own number.
    rounds : int
        Turns of each.

    Returns
    -------
    dict
        The entry of this workload in the JSON's ``"results"``.
    """
    num_threads = workload.num_threads or num_threads
    able = [name for name in contenders if workload.what in CONTENDERS[name].does]
    calls = {name: (name, workload) for name in able}
    if workload.baseline and "fastattn" in calls:
        # First, so that the two turns come one after the other: what slows the machine slows both.
        calls = {"baseline": ("fastattn", workload.baseline), **calls}
    shown: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    peaks, read_rates = [], []
    with contextlib.ExitStack() as stack:
        children: dict[str, _Child] = {}
        # They load their libraries at the same time, each until it stands still.
        for key, (name, called) in calls.items():
            if reason := too_large(name, called):
                left_out[key] = reason
                continue
            threads = called.num_threads or num_threads
            children[key] = _Child(_serve, name, called, num_threads=threads)
            stack.callback(children[key].close)
        read_bytes = workload.kv_bytes if workload.reads else 0
        probes = _Child(_serve_probes, workload.dtype, read_bytes, num_threads=num_threads)
        stack.callback(probes.close)
        for key, child in list(children.items()):
            try:
                answer = child.receive()
            except ChildDied as error:
                answer = {"failed": str(error)}
            if reason := answer.get("skipped") or answer.get("failed"):
                left_out[key] = reason if "skipped" in answer else f"failed: {reason}"
                del children[key]
                continue
            shown[key] = {**answer, "seconds": []}
        for _ in range(rounds):
            peaks.append(probes.ask("peak"))
            if workload.reads:
                read_rates.append(probes.ask("read"))
            for key, child in children.items():
                seconds = shown[key]["seconds"]
                if len(seconds) < LEAST_TURNS or sum(seconds) < BUDGET_SECONDS:
                    for figure, value in child.ask("turn").items():
                        shown[key].setdefault(figure, []).append(value)

    peak = max(peaks)
    # Reading varies from round to round, with all that share the memory: like with like.
    read_rate = statistics.median(read_rates) if read_rates else None
    for key, entry in shown.items():
        called = calls[key][1]
        entry["median"] = statistics.median(entry["seconds"])
        entry["best"] = min(entry["seconds"])
        entry |= rates(called, entry["median"], peak, read_rate)
    baseline, ours = shown.pop("baseline", None), shown.get("fastattn")
    for entry in shown.values():
        entry["ratio"] = entry["median"] / ours["median"] if ours else None
    if baseline:
        called = calls["baseline"][1]
        baseline |= {"label": called.label, "flops": called.flops}
        baseline["num_threads"] = called.num_threads or num_threads
        for share in ("share_of_peak", "share_of_read"):  # of limits with other threads
            baseline.pop(share, None)
    return {
        "workload": workload.name,
        "kind": workload.kind,
        "label": workload.label,
        "seqlen": workload.seqlen_k,
        "flops": workload.flops,
        "kv_bytes": workload.kv_bytes if workload.reads else None,
        "num_threads": num_threads,
        "peak_gflops": peak / 1e9,
        "read_gbytes_per_second": read_rate and read_rate / 1e9,
        "contenders": shown,
        "baseline": baseline,
        "left_out": left_out,
    }


def read_bandwidth(num_threads: int) -> float:
    """`probe_bandwidth` in a process of its own.

    Parameters
    ----------
    num_threads : int
        All at once.

    Returns
    -------
    float
        Bytes per second.
    """
    child = _Child(_serve_bandwidth, num_threads=num_threads)
    try:
        rate: float = child.ask("read")
    finally:
        child.close()
    return rate


def machine() -> dict[str, Any]:
    """What tells this machine and installation from others.

    Returns
    -------
    dict
        The JSON's ``"machine"``; strings and numbers only, None for what is not known.

    Examples
    --------
    >>> from fastattn._bench.runner import machine
    >>> machine()["cpus"] >= 1
    True
    """

    def read(path: str, pattern: str = "(.+)") -> str | None:
        try:
            found = re.search(pattern, Path(path).read_text(), flags=re.MULTILINE)
        except (OSError, UnicodeDecodeError):
            return None
        return found[1].strip() if found else None

    cpu = "/sys/devices/system/cpu/cpu0"
    shown = _config.show_config("dicts")
    return {
        "cpu": read("/proc/cpuinfo", r"^model name\s*:(.+)$") or platform.processor() or None,
        "architecture": platform.machine(),
        "cpus": _config.affinity_cpus(),
        "cgroup_cpus": _config.cgroup_cpus(),
        "l2": read(f"{cpu}/cache/index2/size"),
        "l3": read(f"{cpu}/cache/index3/size"),
        "memory": read("/proc/meminfo", r"^MemTotal:(.+)$"),
        "governor": read(f"{cpu}/cpufreq/scaling_governor"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "fastattn": shown["fastattn"]["version"],
        "kernels": _config.ISA,
        "compiler": shown["build"]["compiler"],
        "flags": shown["build"]["flags"],
        "numpy": np.__version__,
    }


def run(
    workloads: Sequence[Workload],
    contenders: Mapping[str, str],
    num_threads: int,
    rounds: int,
    *,
    start: Callable[[dict[str, Any]], None] = lambda report: None,
    each: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure everything.

    Parameters
    ----------
    workloads : sequence of Workload
        What is computed.
    contenders : mapping
        Name to version, as `fastattn._bench.contenders.installed` returns.
    num_threads : int
        Of every contender.
    rounds : int
        Turns of each on each workload.
    start : callable
        Given the report before its first result.
    each : callable
        Given every result as it comes.

    Returns
    -------
    dict
        What the JSON holds.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": dict(contenders),
        "num_threads": num_threads,
        "rounds": rounds,
        "read_gbytes_per_second": read_bandwidth(num_threads) / 1e9,
        "results": [],
    }
    start(report)
    for workload in workloads:
        result = measure(workload, tuple(contenders), num_threads, rounds)
        report["results"].append(result)
        each(result)
    return report
