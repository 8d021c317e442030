"""Every kernel set of this CPU, called from C without Python: tests/c/kernel_sets.c.

`make emulate` runs the same driver for the kernel sets that this CPU lacks.
"""

import platform
from pathlib import Path

import emulate
import pytest

from fastattn import _core

pytestmark = pytest.mark.any_kernel_set


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


def test_amx_leaves_float32_and_float64_alone(without_openmp: emulate.Outcome) -> None:
    if "amx" not in without_openmp.digests:
        pytest.skip("this CPU, or its operating system, lacks AMX")
    amx, avx512 = (without_openmp.digests[name].split("_") for name in ("amx", "avx512"))
    assert amx[0] == avx512[0]
    assert amx[1] != avx512[1]  # bfloat16 by tiles


def test_openmp_leaves_the_bits_alone(without_openmp: emulate.Outcome, tmp_path: Path) -> None:
    if not emulate.has_openmp(emulate.native_compiler(), tmp_path):
        pytest.skip("the compiler has no OpenMP")
    with_openmp = _build_and_run(tmp_path, openmp=True)
    assert with_openmp.failed == 0
    assert with_openmp.passed > without_openmp.passed  # two threads besides
    assert with_openmp.digests == without_openmp.digests
