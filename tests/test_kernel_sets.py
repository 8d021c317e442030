"""Every kernel set of this CPU, called from C without Python: tests/c/kernel_sets.c.

`make emulate` runs the same driver for the kernel sets that this CPU lacks.
"""

import platform
from pathlib import Path

import emulate
import pytest

from fastattn import _core

# One build of the driver is for all tests.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.any_kernel_set,
    pytest.mark.xdist_group("kernel_sets"),
]


@pytest.fixture(scope="module")
def without_openmp(tmp_path_factory: pytest.TempPathFactory) -> emulate.Outcome:
    folder = tmp_path_factory.mktemp("without_openmp")
    return _build_and_run(folder, openmp=False)


def _build_and_run(folder: Path, *, openmp: bool) -> emulate.Outcome:
    compiler = emulate.native_compiler()
    program = emulate.build(folder, compiler, platform.machine(), openmp=openmp)
    return emulate.run(program, "natively")


def test_every_case_on_every_set(without_openmp: emulate.Outcome) -> None:
    assert without_openmp.failed == 0
    assert without_openmp.passed > 0
    assert set(without_openmp.digests) == set(_core.available_isas())


def test_tiles_compute_what_they_are_for(without_openmp: emulate.Outcome) -> None:
    if "amx" not in without_openmp.digests:
        pytest.skip("this CPU, or its operating system, lacks AMX")
    avx512, amx = (without_openmp.digests[name].split("_") for name in ("avx512", "amx"))
    float32, float64, bfloat16 = range(3)
    assert amx[float32] != avx512[float32]
    assert amx[float64] == avx512[float64]
    assert amx[bfloat16] != avx512[bfloat16]


def test_openmp_leaves_the_bits_alone(without_openmp: emulate.Outcome, tmp_path: Path) -> None:
    if not emulate.has_openmp(emulate.native_compiler(), tmp_path):
        pytest.skip("the compiler has no OpenMP")
    with_openmp = _build_and_run(tmp_path, openmp=True)
    assert with_openmp.failed == 0
    assert with_openmp.passed > without_openmp.passed  # two threads besides
    assert with_openmp.digests == without_openmp.digests
