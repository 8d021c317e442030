"""exp2 and tanh of each kernel set at every float32: at most 1 and 1.5 ulp from the true value."""

import ast
import subprocess
from pathlib import Path

import pytest
from support import compile_c

ROOT = Path(__file__).parents[1]
PARTS = 2  # processes at a time; the whole takes some ten seconds of processor time


def kernel_set_flags(name: str) -> list[str]:
    """The flags that setup.py compiles kernels_<name>.c with, without running setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    rows = [[ast.literal_eval(x) for x in call.args] for call in values["KERNEL_SETS"].elts]
    (flags,) = [flags for row_name, _, flags in rows if row_name == name]
    return [*ast.literal_eval(values["CODE_FLAGS"]), *flags]


@pytest.mark.slow
@pytest.mark.parametrize("function", ["exp2", "tanh"])
def test_every_float32(kernel_set: str, function: str, tmp_path: Path) -> None:
    """exp2 over [-104, 0], tanh over [2^-12, 20] and as many float64 besides."""
    driver = compile_c(
        ROOT / "tests" / "c" / f"{function}_exhaustive.c",
        tmp_path / f"{function}_exhaustive",
        *kernel_set_flags(kernel_set),
        f"-I{ROOT / 'csrc'}",
        *(f"-I{ROOT / 'csrc' / 'kernels' / folder}" for folder in ("vector", "amx")),
        f'-DVEC_HEADER="vec_{kernel_set}.h"',
    )
    processes = [
        subprocess.Popen([driver, str(part), str(PARTS)], stdout=subprocess.PIPE, text=True)
        for part in range(PARTS)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    print(*outputs)
    failed = any(process.returncode != 0 for process in processes)
    assert not failed, f"{kernel_set}: {' '.join(outputs)}"
