"""What this installation is and how many threads a call may use."""

import os
import platform
import sys
from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np

from fastattn import _core

#: The kernel set that calls use, chosen at import: the best that this CPU and OS run, or the one
#: that the environment variable FASTATTN_ISA names.
ISA: str = _core.selected_isa()

# Linux tells a process its control groups here, and their limits below the mount point.
CGROUP_FILE = "/proc/self/cgroup"
CGROUP_ROOT = "/sys/fs/cgroup"


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return None


def _quota_of(folder: str, unified: bool) -> float | None:
    """CPUs that the control group in `folder` may use, None without a limit."""
    if unified:
        quota, _, period = (_read(f"{folder}/cpu.max") or "").partition(" ")
    else:
        quota = _read(f"{folder}/cpu.cfs_quota_us") or ""
        period = _read(f"{folder}/cpu.cfs_period_us") or ""
    try:
        cpus = int(quota) / int(period)  # "max" and a missing file are no limit, nor is -1
    except (ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None


def cgroup_cpus() -> int | None:
    """CPUs that control groups (v1 or v2) grant this process.

    Returns
    -------
    int or None
        The smallest quota / period of the process's group and its ancestors, rounded up; None
        where there is no limit or no control group.

    Notes
    -----
    Inside a container the path in /proc/self/cgroup may be the host's, which does not exist below
    the container's mount; the mount's root, always looked at, is then the container's own group.
    The formats: Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst
    of the Linux kernel.
    """
    quotas = []
    for line in (_read(CGROUP_FILE) or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = hierarchy == "0" and not controllers
        if unified:
            root = CGROUP_ROOT
        elif "cpu" in controllers.split(","):
            root = f"{CGROUP_ROOT}/cpu"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            quota = _quota_of("/".join([root, *parts[:depth]]), unified)
            if quota is not None:
                quotas.append(quota)
    return -int(-min(quotas) // 1) if quotas else None


def affinity_cpus() -> int:
    """CPUs that the scheduler lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_AFFINITY_CPUS = affinity_cpus()
_CGROUP_CPUS = cgroup_cpus()
_CPUS = min(_AFFINITY_CPUS, _CGROUP_CPUS or _AFFINITY_CPUS)
_HAS_OPENMP = _core.has_openmp()
_OPENMP_MAX_THREADS = _core.openmp_max_threads()


def _environment(name: str) -> Callable[[], str | None]:
    """A function that reads the variable as it is now.

    os.environ.get costs more than a microsecond, a good part of a small call of attention; the
    dict under it costs a twentieth of that.
    """
    data = getattr(os.environ, "_data", None)
    if not isinstance(data, dict):
        return lambda: os.environ.get(name)
    key, decode = os.environ.encodekey(name), os.environ.decodevalue

    def read() -> str | None:
        raw = data.get(key)
        return None if raw is None else decode(raw)

    return read


_fastattn_num_threads = _environment("FASTATTN_NUM_THREADS")
_omp_num_threads = _environment("OMP_NUM_THREADS")


# Where a number of threads fits in C.  Fewer are made, see `_core.team_limit`.
_MAX_THREADS = 2**31 - 1


def _is_thread_count(text: str) -> bool:
    try:
        return 1 <= int(text) <= _MAX_THREADS
    except ValueError:
        return False


def thread_rule() -> tuple[int, str]:
    """The default number of threads, and what sets it."""
    threads, rule = _CPUS, "CPUs of this process"
    if text := _fastattn_num_threads():
        if not _is_thread_count(text):
            raise ValueError(
                f"`FASTATTN_NUM_THREADS` must be an integer from 1 to {_MAX_THREADS}, got {text!r}"
            )
        threads, rule = int(text), "FASTATTN_NUM_THREADS"
    elif text := _omp_num_threads():
        counts = text.split(",")  # one for each nesting level
        if not all(map(_is_thread_count, counts)):
            raise ValueError(
                f"`OMP_NUM_THREADS` must be an integer from 1 to {_MAX_THREADS}, or several with "
                f"commas between them, got {text!r}"
            )
        threads, rule = int(counts[0]), "OMP_NUM_THREADS"
    if not _HAS_OPENMP:
        return 1, "built without OpenMP"
    limit = _core.openmp_max_threads()
    if limit < _OPENMP_MAX_THREADS and limit < threads:
        threads, rule = limit, "limit set on the OpenMP runtime"
    return threads, rule


def default_num_threads() -> int:
    """The number of threads that a call with ``num_threads=None`` may use.

    Returns
    -------
    int
        At least 1.  The environment variable FASTATTN_NUM_THREADS, else the first number of
        OMP_NUM_THREADS, else the CPUs in this process's affinity mask or its control group's
        quota rounded up, whichever is less.  A limit put on the OpenMP runtime after import
        (``threadpoolctl.threadpool_limits``, ``torch.set_num_threads``) lowers all of them.

    Raises
    ------
    ValueError
        If FASTATTN_NUM_THREADS, or else OMP_NUM_THREADS, is set to anything but an integer from 1
        to 2147483647; OMP_NUM_THREADS may list several, with commas between them.

    Notes
    -----
    The variables are read at every call; affinity and control groups at import.  A call never uses
    more threads than it has work for, nor more than the machine has CPUs (16, where it has fewer);
    a build without OpenMP always uses one.  Threads that the system refuses are done without.

    Examples
    --------
    >>> from fastattn import _config
    >>> _config.default_num_threads() >= 1
    True
    """
    return thread_rule()[0]


def _config() -> dict[str, dict[str, Any]]:
    from importlib import metadata  # takes longer than all of this package's own import

    threads, rule = thread_rule()
    return {
        "fastattn": {
            "version": metadata.version("fastattn"),
            "path": os.path.dirname(__file__),
        },
        "build": dict(_core.build_info()),
        "kernels": {
            "selected": ISA,
            "engines": list(_core.engines(ISA)),
            "available": list(_core.available_isas()),
            "known": list(_core.known_isas()),
            "FASTATTN_ISA": os.environ.get("FASTATTN_ISA"),
        },
        "threads": {
            "default": threads,
            "set by": rule,
            "openmp limit": _core.openmp_max_threads(),
            "affinity cpus": _AFFINITY_CPUS,
            "cgroup cpus": _CGROUP_CPUS,
            "FASTATTN_NUM_THREADS": os.environ.get("FASTATTN_NUM_THREADS"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "runtime": {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "platform": platform.platform(),
        },
    }


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, dict[str, Any]]: ...
def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Show how this installation was built and what it would run on.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print a readable table and return None, or return the same as a dict of dicts.

    Returns
    -------
    dict or None
        Keys ``"fastattn"``, ``"build"`` (compiler, flags, switches), ``"kernels"`` (selected,
        its engines, available on this CPU, known), ``"threads"`` (the default and what sets it) and
        ``"runtime"``.

    Raises
    ------
    ValueError
        If `mode` is neither of the two.

    Examples
    --------
    >>> import fastattn as fa
    >>> config = fa.show_config("dicts")
    >>> config["kernels"]["selected"] in config["kernels"]["available"]
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f'`mode` must be "stdout" or "dicts", got {mode!r}')
    config = _config()
    if mode == "dicts":
        return config
    for title, section in config.items():
        print(f"{title}:")
        for key, value in section.items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {key}: {'-' if text is None or text == '' else text}")
    return None
