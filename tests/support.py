"""C compiled on the spot, for the tests that need some."""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path


def compile_c(source: Path, target: Path, *flags: str) -> str:
    """Compile one C file with the compiler that builds Python extensions; returns the target."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    command = [*compiler, "-O2", "-Wall", "-Wextra", "-Werror", *flags, source, "-o", target, "-lm"]
    subprocess.run(command, check=True, timeout=300)
    return str(target)
