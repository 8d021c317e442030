"""Time and peak memory of one attention, each in a process of its own."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastattn as fa
from demo.encoder import plain_attention


class MeasureError(Exception):
    """The process that measured came to no result."""


def measure_in_process(
    contender: str, path: Path, num_heads: int, num_threads: int | None
) -> dict[str, Any]:
    """`measure` in a process of its own, so that no other call's memory counts.

    Returns
    -------
    dict
        ``seconds`` and ``bytes``; the latter is None where the system does not tell.
    """
    code = f"from demo.measure import measure; measure({contender!r}, {str(path)!r}, {num_heads}, "
    code += f"{num_threads})"
    search_path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    kernel_set = fa.show_config("dicts")["kernels"]["selected"]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search_path, "FASTATTN_ISA": kernel_set},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise MeasureError(f"measuring {contender} failed: {last_line}")
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


CONTENDERS: dict[str, Callable[..., Any]] = {
    "fastattn": fa.attention,
    "plain NumPy": plain_attention,
}


def measure(contender: str, path: str, num_heads: int, num_threads: int | None) -> None:
    """Print seconds and peak bytes of one attention as JSON; meant for a fresh process.

    Parameters
    ----------
    contender : str
        A key of `CONTENDERS`.
    path : str
        An .npy file of q, k and v, (3, seqlen, num_heads * head_dim).
    num_heads : int
        Heads side by side in these arrays.
    num_threads : int or None
        For fastattn; NumPy's BLAS has its own setting.
    """
    q, k, v = (
        x.reshape(len(x), num_heads, x.shape[1] // num_heads).swapaxes(0, 1) for x in np.load(path)
    )
    options: dict[str, Any] = {} if contender != "fastattn" else {"num_threads": num_threads}
    function = CONTENDERS[contender]

    def seconds_of_call() -> float:
        start = time.perf_counter()
        out = np.empty((q.shape[1], num_heads, v.shape[-1]), v.dtype).swapaxes(0, 1)
        function(q, k, v, out=out, **options)
        return time.perf_counter() - start

    # NumPy's BLAS allocates buffers at its first product and keeps them; they are not counted.
    square = np.ones((512, 512), q.dtype)
    np.matmul(square, square)
    before = _resident_bytes("VmRSS", reset_peak=True)
    seconds = [seconds_of_call()]
    peak = _resident_bytes("VmHWM")
    while len(seconds) < 5 and sum(seconds) < 2:
        seconds.append(seconds_of_call())
    used = None if before is None or peak is None else max(0, peak - before)
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": used}))


def _resident_bytes(field: str, reset_peak: bool = False) -> int | None:
    """Memory of this process now (VmRSS) or at its highest (VmHWM); None outside Linux.

    Linux counts pages per CPU and adds the counts up in batches of at least 32 pages, so that
    either figure is off by some 128 KiB for each CPU (lib/percpu_counter.c).
    """
    try:
        if reset_peak:
            # Sets VmHWM to VmRSS: proc_pid_clear_refs(5).
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None
