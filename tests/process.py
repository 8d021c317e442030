"""Python code in a process of its own, with an environment of its own."""

import os
import subprocess
import sys

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
