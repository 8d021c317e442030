"""Build the extension module: plain C objects with their own flags, then the Cython module.

Everything else about the package is declared in pyproject.toml.  Environment switches (1 or 0):

    FASTATTN_DEBUG      assertions of the C contracts (FA_ASSERT), debug information and symbols
    FASTATTN_SANITIZE   AddressSanitizer and UndefinedBehaviorSanitizer
    FASTATTN_COVERAGE   gcov instrumentation
    FASTATTN_NO_OPENMP  one thread, no OpenMP runtime
    FASTATTN_WERROR     warnings in csrc/ are errors
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError
from setuptools.modified import newer_group


class KernelSet(NamedTuple):
    """csrc/kernels/*/kernels_<name>.c, the only files compiled beyond the baseline."""

    name: str
    machine: str  # regular expression over the platform, as in "linux-x86_64"
    flags: tuple[str, ...]
    optional: bool = False  # left out where the compiler is too old for the flags


# Adding an instruction set is one row.  dispatch.c sees FA_HAVE_<NAME> for each set built.
KERNEL_SETS = (
    KernelSet("scalar", "", ()),
    KernelSet("avx2", "x86_64|amd64", ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")),
    KernelSet("avx512", "x86_64|amd64", (
        "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2",
        "-mavx512f", "-mavx512cd", "-mavx512dq", "-mavx512bw", "-mavx512vl",
    )),
    KernelSet("amx", "(x86_64|amd64)$", (
        "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2",
        "-mavx512f", "-mavx512cd", "-mavx512dq", "-mavx512bw", "-mavx512vl",
        "-mamx-tile", "-mamx-bf16",
    ), optional=True),
    # Advanced SIMD needs no flag.  GCC 12's scheduler hoists loads above the 24 accumulators of the
    # register tile until some spill; clang has no such pass, and would warn of the flag.
    KernelSet("neon", "(aarch64|arm64)$", (
        "-fno-schedule-insns", "-Wno-ignored-optimization-argument",
    )),
)  # fmt: skip

# No -ffast-math, and contraction is off: a fused multiply-add is written where it is meant.
CODE_FLAGS = ("-std=c11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
WARNING_FLAGS = ("-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wvla")

# Switches that change the code, with flags for the compiler and the linker alike.
# The interpreter's own -fwrapv would hide signed overflow from the sanitizer.
SWITCH_FLAGS = {
    "DEBUG": ("-g",),
    "SANITIZE": (
        "-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv",
        "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    ),
    "COVERAGE": ("-O1", "-g", "--coverage"),
    "NO_OPENMP": (),
}  # fmt: skip

# Without one of these switches, the linker drops the symbols, and the debug information that some
# interpreters' own flags ask for.  Apple's linker has no such option.
KEEP_SYMBOLS = {"DEBUG", "SANITIZE", "COVERAGE"}
STRIP_FLAGS = () if sys.platform == "darwin" else ("-Wl,--strip-all",)

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIMITED_API = "0x030B0000"

OPENMP_PROBE = """
#include <omp.h>
int main(void)
{
    int threads = 0;
#pragma omp parallel num_threads(2) reduction(+ : threads)
    threads += 1;
    return threads >= 1 && omp_get_max_threads() >= 1 ? 0 : 1;
}
"""

PROBE_FAILURES = (CompileError, LinkError, ExecError, OSError, subprocess.SubprocessError)


def switched_on(name: str) -> bool:
    value = os.environ.get(f"FASTATTN_{name}", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"FASTATTN_{name} must be 0 or 1, got {value!r}")
    return value == "1"


def c_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class BuildExt(build_ext):
    """Compile csrc/ into objects, each with the flags of its kernel set, and link them in."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("fastattn needs gcc or clang, got " + self.compiler.compiler_type)
        switches = [name for name in SWITCH_FLAGS if switched_on(name)]
        flags = [*CODE_FLAGS, *(flag for name in switches for flag in SWITCH_FLAGS[name])]
        openmp = self.find_openmp() if "NO_OPENMP" not in switches else []
        kernel_sets = [
            row
            for row in KERNEL_SETS
            if re.search(row.machine, self.plat_name) and (not row.optional or self.accepts(row))
        ]

        build_info = [
            ("FA_BUILD_COMPILER", self.compiler_version()),
            ("FA_BUILD_FLAGS", self.describe_flags(flags + openmp, kernel_sets)),
            ("FA_BUILD_SWITCHES", " ".join(map(str.lower, switches))),
        ]
        ext.extra_objects = self.compile_csrc(switches, flags + openmp, kernel_sets)
        ext.define_macros += [(name, c_string(text)) for name, text in build_info]
        ext.extra_compile_args = flags
        strip = () if KEEP_SYMBOLS.intersection(switches) else STRIP_FLAGS
        ext.extra_link_args = [*flags, *openmp, *strip]
        self.force = True  # the module holds the flags of this build: never take an older one
        super().build_extension(ext)

    def compile_csrc(
        self, switches: list[str], flags: list[str], kernel_sets: list[KernelSet]
    ) -> list[str]:
        """Compile what is older than its source, any header, the compiler's flags or this file."""
        macros = [(f"FA_HAVE_{row.name.upper()}", "1") for row in kernel_sets]
        if "DEBUG" in switches:
            macros.append(("FA_DEBUG", "1"))
        flags = [*flags, *WARNING_FLAGS, *(["-Werror"] if switched_on("WERROR") else [])]
        jobs = [(str(source), flags) for source in sorted(Path("csrc").glob("*.c"))]
        for row in kernel_sets:
            [source] = Path("csrc/kernels").glob(f"*/kernels_{row.name}.c")
            jobs.append((str(source), [*flags, *row.flags]))

        # In the source tree even for an editable build: tests/test_dispatch.py reads the objects.
        output_dir = Path("build", "-".join(["objects", *map(str.lower, switches)]))
        output_dir.mkdir(parents=True, exist_ok=True)
        stamp = output_dir / "flags.txt"
        stamp_text = "\n".join([*self.compiler.compiler_so, str(macros), *map(str, jobs)])
        if not stamp.exists() or stamp.read_text() != stamp_text:
            stamp.write_text(stamp_text)
        common = [*map(str, Path("csrc").rglob("*.h")), str(stamp), __file__]

        def compile_one(job: tuple[str, list[str]]) -> str:
            source, source_flags = job
            [target] = self.compiler.object_filenames([source], output_dir=str(output_dir))
            if newer_group([source, *common], target):
                self.compiler.compile(
                    [source],
                    output_dir=str(output_dir),
                    macros=macros,
                    include_dirs=["csrc"],
                    extra_postargs=source_flags,
                )
            return target

        # The compiler driver is a subprocess: threads keep every core busy.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, jobs))

    def find_openmp(self) -> list[str]:
        """The flags of OpenMP if a program compiles, links and runs with them, else none."""
        flags = ["-fopenmp"]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            program = str(Path(folder, "probe"))
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=flags)
                self.compiler.link_executable(objects, program, extra_postargs=flags)
                subprocess.run([program], check=True, timeout=60)
            except PROBE_FAILURES as error:
                self.warn(f"building without OpenMP, calls will use one thread: {error}")
                return []
        return flags

    def accepts(self, row: KernelSet) -> bool:
        """Whether the compiler knows the flags of a kernel set."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("int probe;\n")
            try:
                self.compiler.compile([str(source)], folder, extra_postargs=list(row.flags))
            except PROBE_FAILURES as error:
                self.warn(f"building without the kernel set {row.name}: {error}")
                return False
        return True

    def compiler_version(self) -> str:
        command = [*self.compiler.compiler_so, "--version"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        return answer.stdout.splitlines()[0]

    def describe_flags(self, flags: list[str], kernel_sets: list[KernelSet]) -> str:
        inherited = self.compiler.compiler_so[1:]
        parts = [shlex.join([*inherited, *flags])]
        parts += [f"{row.name}: {shlex.join(row.flags)}" for row in kernel_sets if row.flags]
        return "; ".join(parts)


core = Extension(
    "fastattn._core",
    ["fastattn/_core.pyx"],
    include_dirs=["csrc"],
    define_macros=[] if FREE_THREADED else [("Py_LIMITED_API", LIMITED_API)],
    py_limited_api=not FREE_THREADED,
)
core.cython_c_in_temp = True  # the generated C file stays out of the package

setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildExt},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
