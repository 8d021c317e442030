"""Python code in a process of its own, with an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What steers fastattn or its OpenMP runtime must come from the test alone.
_STEERING = ("FASTATTN_", "OMP_", "GOMP_", "KMP_")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments...`` with `environment` added to this process's own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_STEERING)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def output_of(*arguments: str, **environment: str) -> str:
    """The standard output of a run that must succeed."""
    done = run_python(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- scripts of tests -----------------------------------------------------------------------------
#
# Every script runs in a fresh interpreter on one kernel set.  None asserts a speed: calls that must
# be under way for a while are sized by a measurement of their own.

ROOT = Path(__file__).parent

# What every file of such tests sets `pytestmark` to.
marks = [
    pytest.mark.slow_on_other_sets,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

# What the scripts share.
PRELUDE = """
import hashlib, os, signal, sys, threading, time
import numpy as np
import fastattn as fa

# A job in the background inherits SIGINT as ignored, and Python then leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

def make(seqlen, batch=1, num_heads=1, head_dim=64, dtype=np.float32):
    rng = np.random.default_rng(0)
    shape = (batch, num_heads, seqlen, head_dim)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(3)]

def digest(*arrays):
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()

def seqlen_for(seconds, **options):
    # Length of a one-head call that takes about that long on one thread.
    q, k, v = make(1024)
    fa.attention(q, k, v, num_threads=1, **options)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fa.attention(q, k, v, num_threads=1, **options)
        times.append(time.perf_counter() - start)
    return int(1024 * (seconds / min(times)) ** 0.5)

def interrupt_in(seconds):
    # Ctrl-C after that time; the list has the moment once it was sent.
    sent = []
    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    threading.Timer(seconds, interrupt).start()
    return sent

def busy_threads(call):
    # Result of call(), and how many threads of this process spent processor time in it.
    def ticks():
        spent = {}
        for task in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{task}/stat") as stat:
                    fields = stat.read().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            spent[int(task)] = int(fields[11]) + int(fields[12])
        return spent

    before, latest, done = ticks(), {}, threading.Event()
    def watch():
        while not done.wait(0.02):
            latest.update(ticks())
        latest.pop(threading.get_native_id(), None)
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    latest.update(ticks())
    done.set()
    watcher.join()
    return result, sum(latest[task] - before.get(task, 0) >= 2 for task in latest)

def wait_for(pid):
    # Exit status of a child that must not hang.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"
"""


def run(script: str, kernel_set: str, *args: str, **env: str) -> str:
    return output_of(
        "-X", "faulthandler", "-c", PRELUDE + script, *args, FASTATTN_ISA=kernel_set, **env
    )
