"""Which kernel set runs, and that no instruction leaks out of its object file."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from process import output_of, run_python

from fastattn import _core

pytestmark = pytest.mark.any_kernel_set

SELECTED = "from fastattn import _config, _core; print(_core.selected_isa(), _config.ISA)"

# Kept by setup.py for these tests; the build without switches, whatever build is being tested.
OBJECTS = Path(__file__).parents[1] / "build" / "objects" / "csrc"
KERNEL_OBJECTS = sorted(OBJECTS.glob("kernels/*/*.o"))
OBJECT_OF = {path.stem.removeprefix("kernels_"): path for path in KERNEL_OBJECTS}
OTHER_OBJECTS = sorted(OBJECTS.glob("*.o"))

needs_objects = pytest.mark.skipif(not KERNEL_OBJECTS, reason="no objects: not a source tree")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
needs_objdump = pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason="no objdump, or not x86",
)

# An instruction in VEX or EVEX encoding, as objdump prints it: its name starts with v.  The
# baseline's only names that do are verr and verw, which compilers do not use.
VEX = re.compile(r"^\s+[0-9a-f]+:\s+(v[a-z]+\w*)\s", re.MULTILINE)


# Names of intrinsics, which only vec_<isa>.h may say; of instruction sets and engines, which only
# kernels/, dispatch.c and cpu_features.c may.
INTRINSIC = re.compile(
    r"\b(_mm\w*|__m\d+\w*|_tile_\w+|v(ld|st|add|mul|fma)\w*_f(32|64)x?\d*q?|float(32x4|64x2)_t"
    r"|immintrin\.h|arm_neon\.h)\b"
)
SET_OR_ENGINE = re.compile(r"\b(amx|avx\w*|neon|sse\w*|f32x3|vector_f\d+|amx_\w+)\b", re.IGNORECASE)
CSRC = Path(__file__).parents[1] / "csrc"


@pytest.mark.parametrize("path", sorted(CSRC.rglob("*.[ch]")), ids=lambda path: path.name)
def test_instruction_sets_stay_where_they_belong(path: Path) -> None:
    text = path.read_text()
    if not re.match("vec_.*[.]h$|cpu_features[.]c$", path.name):
        assert INTRINSIC.findall(text) == []
    if path.parent == CSRC and path.name not in ("dispatch.c", "cpu_features.c", "cpu_features.h"):
        assert SET_OR_ENGINE.findall(text) == []


# ---- choice of the kernel set -------------------------------------------------------------------


def test_default_is_the_best_available() -> None:
    best = _core.available_isas()[0]
    assert output_of("-c", SELECTED) == f"{best} {best}"
    assert output_of("-c", SELECTED, FASTATTN_ISA="") == f"{best} {best}"


def test_available_is_in_order_of_known() -> None:
    known, available = _core.known_isas(), _core.available_isas()
    assert available == tuple(isa for isa in known if isa in available)
    assert available[-1] == "scalar"
    assert set(known) >= {"scalar", "avx2"}


@pytest.mark.parametrize("isa", _core.available_isas())
def test_override(isa: str) -> None:
    assert output_of("-c", SELECTED, FASTATTN_ISA=isa) == f"{isa} {isa}"


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 ", "scalar,avx2"])
def test_unknown_name(isa: str) -> None:
    done = run_python("-c", "import fastattn", FASTATTN_ISA=isa)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "FASTATTN_ISA" in last
    assert repr(isa) in last
    for known in _core.known_isas():
        assert known in last


UNAVAILABLE = sorted(set(_core.known_isas()) - set(_core.available_isas()))


@pytest.mark.skipif(not UNAVAILABLE, reason="this CPU runs every kernel set")
@pytest.mark.parametrize("isa", UNAVAILABLE)
def test_unsupported_name(isa: str) -> None:
    done = run_python("-c", "import fastattn", FASTATTN_ISA=isa)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "FASTATTN_ISA" in last
    assert isa in last


# ---- objects ------------------------------------------------------------------------------------


def _symbols(*arguments: str) -> set[str]:
    command = ["nm", "--defined-only", *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line.split()[-1] for line in printed.splitlines()}


def _vex_instructions(path: Path) -> list[str]:
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return VEX.findall(printed)


@needs_objects
@needs_nm
@pytest.mark.parametrize("path", KERNEL_OBJECTS, ids=lambda path: path.stem)
def test_kernel_object_exports_one_symbol(path: Path) -> None:
    assert _symbols("--extern-only", str(path)) == {"fa_" + path.stem}


@needs_objects
@needs_objdump
@pytest.mark.parametrize(
    "path",
    [*OTHER_OBJECTS, *(path for path in KERNEL_OBJECTS if path.stem == "kernels_scalar")],
    ids=lambda path: path.stem,
)
def test_baseline_object_holds_no_avx(path: Path) -> None:
    assert _vex_instructions(path) == []


@needs_objects
@needs_objdump
def test_avx2_object_holds_avx() -> None:
    found = _vex_instructions(OBJECT_OF["avx2"])
    assert any(name.startswith("vfmadd") for name in found)


@needs_nm
@pytest.mark.skipif(_core.build_info()["switches"] != "", reason="an instrumented build")
def test_module_exports_only_its_init_function() -> None:
    symbols = _symbols("--dynamic", "--extern-only", _core.__file__)
    assert symbols - {"_init", "_fini", "_edata", "_end", "__bss_start"} == {"PyInit__core"}


def test_no_fast_math() -> None:
    flags = _core.build_info()["flags"]
    assert "-ffp-contract=off" in flags
    for forbidden in ("-ffast-math", "-Ofast", "-march=native", "-funsafe-math-optimizations"):
        assert forbidden not in flags


# ---- hot loops ----------------------------------------------------------------------------------

# One instruction of a disassembly: its address and text.
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(.*)$", re.MULTILINE)
BACKWARD_JUMP = re.compile(r"j\w+\s+([0-9a-f]+)")

# Multiply-adds of one step of depth: MR x NR_VECTORS of csrc/kernels/vec_<isa>.h.
TILE_FMAS = {"avx2": 12, "avx512": 24, "amx": 24}


def _fma_loops(path: Path, function: str) -> list[list[str]]:
    """The innermost loops with multiply-adds in functions of that name, as instructions."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loops = []
    for name, body in re.findall(r"^[0-9a-f]+ <([^>]+)>:\n((?:.+\n)+)", text, re.MULTILINE):
        if not name.startswith(function):
            continue
        code = [(int(address, 16), what) for address, what in INSTRUCTION.findall(body)]
        jumps = [(BACKWARD_JUMP.match(what), end) for end, what in code]
        bounds = [(int(jump[1], 16), end) for jump, end in jumps if jump and int(jump[1], 16) < end]
        for first, end in bounds:
            if any(first <= a and b < end for a, b in bounds):
                continue
            loop = [what for address, what in code if first <= address <= end]
            if any("fmadd" in what for what in loop):
                loops.append(loop)
    return loops


@needs_objects
@needs_objdump
@pytest.mark.parametrize("isa", TILE_FMAS)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("function", ["matmul_tile_full", "matmul_tile_transposed"])
def test_product_loop_does_not_spill(isa: str, function: str, dtype: str) -> None:
    loops = _fma_loops(OBJECT_OF[isa], f"{function}_{dtype}")
    assert loops
    for loop in loops:
        assert sum("fmadd" in what for what in loop) == TILE_FMAS[isa]
        assert [what for what in loop if "%rsp" in what or "%rbp)" in what] == []
