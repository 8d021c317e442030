"""What several test files share: C compiled on the spot, scripts in processes of their own."""

import os
import shlex
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

TIMEOUT = 300  # seconds; only a hang gets there


def compile_c(source: Path, target: Path, *flags: str) -> str:
    """Compile one C file with the compiler that builds Python extensions; returns the target."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    command = [*compiler, "-O2", "-Wall", "-Wextra", "-Werror", *flags, source, "-o", target, "-lm"]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    return str(target)


def run_script(
    script: str, kernel_set: str, *args: str, env: dict[str, str] | None = None
) -> str:
    """Run `script` in a fresh interpreter on one kernel set; returns what it printed.

    A non-zero exit, a signal or a hang fails the test with all output shown.
    """
    environ = {**os.environ, "FASTATTN_ISA": kernel_set, **(env or {})}
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        raise AssertionError(f"hung\n{stdout}\n{stderr}") from None
    assert process.returncode == 0, f"exit {process.returncode}\n{stdout}\n{stderr}"
    return stdout
