"""Every kernel set on this machine, also those that its CPU lacks: `make emulate`.

Builds csrc/ with the driver tests/c/kernel_sets.c, without Python, and runs it

- natively, with and without OpenMP, which must give the same bits;
- with AVX-512 in terms of AVX2 (SIMDe) and AMX in plain C, which must give the bits of a CPU that
  has them;
- for aarch64, with and without OpenMP, under qemu;

then a sample of the float32 numbers through exp2 and tanh (tests/c/*_exhaustive.c) of the last two.
C assertions are on.  The last line is "N passed, N failed".
"""

import ast
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "emulate"

# What Debian calls the tools that are no part of a usual installation.
CROSS_COMPILER = ("aarch64-linux-gnu-gcc",)
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
PACKAGES = {
    "gcc-aarch64-linux-gnu": lambda: shutil.which(CROSS_COMPILER[0]),
    "libc6-dev-arm64-cross": lambda: Path("/usr/aarch64-linux-gnu/include/stdio.h").exists(),
    "qemu-user": lambda: shutil.which(QEMU[0]),
    "libsimde-dev": lambda: Path("/usr/include/simde/x86/avx512.h").exists(),
}

# One vector of neighbours in this many goes through exp2 and tanh: 2 million of 1.1e9 numbers.
FUNCTION_STEP = 499
FUNCTIONS = ("exp2", "tanh")

# What SIMDe stands in for.
SIMDE_SETS = ("avx512", "amx")

LINE = re.compile(r"^(\w+) +\d+ cases, .* digest (\w+)$", re.MULTILINE)
CLOSING_LINE = re.compile(r"^(\d+) passed, (\d+) failed$", re.MULTILINE)


class Outcome(NamedTuple):
    passed: int
    failed: int
    digests: dict[str, str]  # of the results of each kernel set that ran


def setup_value(name: str) -> ast.expr:
    """The expression that setup.py assigns to `name`, without running setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value
    raise LookupError(name)


def kernel_sets(machine: str) -> dict[str, list[str]]:
    """Names and compiler flags of the kernel sets that setup.py builds for a machine."""
    rows = [[ast.literal_eval(x) for x in call.args] for call in setup_value("KERNEL_SETS").elts]
    return {name: list(flags) for name, on, flags in rows if re.search(on, f"linux-{machine}")}


def unknown_sets(compiler: Sequence[str], machine: str) -> set[str]:
    """Optional kernel sets whose flags the compiler does not know: setup.py leaves them out."""
    calls = setup_value("KERNEL_SETS").elts
    optional = {ast.literal_eval(call.args[0]) for call in calls if call.keywords}
    probe = ["-x", "c", "-fsyntax-only", os.devnull]
    return {
        name
        for name, flags in kernel_sets(machine).items()
        if name in optional
        and subprocess.run([*compiler, *flags, *probe], capture_output=True, timeout=60).returncode
    }


def compile_program(compiler: Sequence[str], target: Path, *arguments: str | Path) -> Path:
    subprocess.run([*compiler, *map(str, arguments), "-o", str(target)], check=True, timeout=900)
    return target


def native_compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def code_flags() -> list[str]:
    flags = [*ast.literal_eval(setup_value("CODE_FLAGS"))]
    return [*flags, *ast.literal_eval(setup_value("WARNING_FLAGS")), "-Werror"]


def simde_flags(*headers: str) -> list[str]:
    """In place of the flags of the avx512 set; a 64-byte vector in AVX2 registers is a warning.

    -O1 compiles in 20 s what -O3 takes 160 for, and gives the same bits.
    """
    flags = [*kernel_sets("x86_64")["avx2"], "-Wno-psabi", "-O1"]
    for header in ("avx512_simde.h", *headers):
        flags += ["-include", str(ROOT / "tests" / "c" / header)]
    return flags


def has_openmp(compiler: Sequence[str], folder: Path) -> bool:
    source = folder / "openmp.c"
    source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
    command = [*compiler, "-fopenmp", str(source), "-o", str(folder / "openmp")]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def build(
    folder: Path, compiler: Sequence[str], machine: str, *, openmp: bool, simde: bool = False
) -> Path:
    """Link the driver with all of csrc/ for `machine`; `simde` replaces AVX-512 and AMX by AVX2."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = kernel_sets(machine)
    for name in set() if simde else unknown_sets(compiler, machine):
        del sets[name]
    flags = [*code_flags(), f"-I{ROOT / 'csrc'}", "-DFA_DEBUG=1"]
    flags += [f"-DFA_HAVE_{name.upper()}=1" for name in sets]
    flags += ["-fopenmp"] if openmp else []
    own_flags = {f"kernels_{name}": own for name, own in sets.items()}
    if simde:
        own_flags["kernels_avx512"] = simde_flags()
        own_flags["kernels_amx"] = simde_flags("amx_emulated.h")
        emulated = [f"fa_cpu_has_{name}" for name in SIMDE_SETS] + ["fa_request_amx"]
        own_flags["dispatch"] = [f"-D{question}=fa_cpu_has_avx2" for question in emulated]
    sources = [*(ROOT / "csrc").glob("*.c"), ROOT / "tests" / "c" / "kernel_sets.c"]
    kernels = [*(ROOT / "csrc" / "kernels").glob("*/kernels_*.c")]
    sources += [path for path in kernels if path.stem in own_flags]

    def compile_one(source: Path) -> Path:
        own = own_flags.get(source.stem, [])
        return compile_program(compiler, folder / f"{source.stem}.o", *flags, *own, "-c", source)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    threads = "-fopenmp" if openmp else "-pthread"
    return compile_program(compiler, folder / "kernel_sets", *objects, threads, "-lm")


def run(program: Path, where: str, *sets: str, under: Sequence[str] = ()) -> Outcome:
    """Run the driver; what it prints is shown."""
    done = subprocess.run(
        [*under, str(program), where, *sets], stdout=subprocess.PIPE, text=True, timeout=900
    )
    closing = CLOSING_LINE.search(done.stdout)
    print(CLOSING_LINE.sub("", done.stdout).strip(), flush=True)
    if closing is None or (done.returncode != 0 and closing[2] == "0"):
        print(f"FAILED {where}: the driver ended with status {done.returncode}")
        return Outcome(0, 1, {})
    return Outcome(int(closing[1]), int(closing[2]), dict(LINE.findall(done.stdout)))


def run_function(
    folder: Path,
    compiler: Sequence[str],
    function: str,
    name: str,
    flags: list[str],
    under: Sequence[str] = (),
) -> Outcome:
    """A sample of the arguments of exp2 or tanh: at most 1 or 1.5 ulp from the true value."""
    program = compile_program(
        compiler,
        folder / function,
        *code_flags(),
        *flags,
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc' / 'kernels' / 'vector'}",
        f'-DVEC_HEADER="vec_{name}.h"',
        ROOT / "tests" / "c" / f"{function}_exhaustive.c",
        "-lm",
    )
    command = [*under, str(program), "0", "1", str(FUNCTION_STEP)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900)
    what = f"{function} of every {FUNCTION_STEP}th vector"
    print(f"{name:7} {what}: {done.stdout.strip()}", flush=True)
    return Outcome(int(done.returncode == 0), int(done.returncode != 0), {})


def same_bits(what: str, first: Outcome, second: Outcome) -> Outcome:
    """Compare the digests of the kernel sets that ran in both."""
    common = sorted(first.digests.keys() & second.digests.keys())
    different = [name for name in common if first.digests[name] != second.digests[name]]
    if different:
        print(f"FAILED {what}: other bits from {', '.join(different)}")
    elif common:
        print(f"{', '.join(common)}: the same bits {what}", flush=True)
    return Outcome(len(common) - len(different), len(different), {})


def install_tools() -> None:
    """Install what is missing where that needs no questions: Debian, as root."""
    missing = [package for package, is_there in PACKAGES.items() if not is_there()]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(
            "make emulate needs a cross compiler, an emulator and SIMDe, on Debian and Ubuntu:\n"
            f"    sudo apt-get install {' '.join(missing)}"
        )
    print("installing", *missing, flush=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)


def run_both(
    folder: Path, compiler: Sequence[str], machine: str, where: str, under: Sequence[str] = ()
) -> list[Outcome]:
    """Run with OpenMP, if the compiler has it, and without."""
    outcomes = []
    if has_openmp(compiler, folder):
        program = build(folder / "openmp-on", compiler, machine, openmp=True)
        outcomes.append(run(program, where, under=under))
    else:
        print(f"{compiler[0]} has no OpenMP: {where} without it only")
    program = build(folder / "openmp-off", compiler, machine, openmp=False)
    outcomes.append(run(program, where, under=under))
    if len(outcomes) == 2:
        outcomes.append(same_bits("with and without OpenMP", *outcomes))
    return outcomes


def main() -> int:
    machine = platform.machine()
    compiler = native_compiler()
    if machine == "x86_64":
        install_tools()
    BUILD.mkdir(parents=True, exist_ok=True)

    outcomes = run_both(BUILD, compiler, machine, "natively")
    if machine == "x86_64":
        native = outcomes[0]
        folder = BUILD / "simde"
        program = build(folder, compiler, machine, openmp=False, simde=True)
        simde = run(program, "SIMDe over AVX2", *SIMDE_SETS)
        outcomes += [simde, same_bits("natively and through SIMDe", native, simde)]
        for name in SIMDE_SETS:
            if name not in native.digests:
                print(f"{name} did not run natively: this CPU or its operating system lacks it")
        for function in FUNCTIONS:
            outcomes.append(run_function(folder, compiler, function, "avx512", simde_flags()))

        folder = BUILD / "aarch64"
        folder.mkdir(exist_ok=True)
        outcomes += run_both(folder, CROSS_COMPILER, "aarch64", "qemu-aarch64", QEMU)
        neon_flags = kernel_sets("aarch64")["neon"]
        for function in FUNCTIONS:
            outcomes.append(
                run_function(folder, CROSS_COMPILER, function, "neon", neon_flags, QEMU)
            )

    failed = sum(outcome.failed for outcome in outcomes)
    print(f"{sum(outcome.passed for outcome in outcomes)} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
