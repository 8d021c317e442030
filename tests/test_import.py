"""What `import fastattn` leaves behind: its own modules, and nothing else."""

import ast
import importlib.util
import json

import pytest
from process import output_of

import fastattn

pytestmark = pytest.mark.any_kernel_set

# Prints what differs between just before the import and just after it.
SNAPSHOTS = """
import json, os, signal, subprocess, sys, threading, warnings
import numpy as np

def snapshot():
    tasks = os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else []
    return {
        "threads": max(len(tasks), threading.active_count()),
        # A new process inherits the C environment, which os.environ does not show.
        "environment": subprocess.run(["env", "-0"], capture_output=True, text=True).stdout,
        "warnings": [str(entry) for entry in warnings.filters],
        "errstate": np.geterr(),
        "signals": [str(signal.getsignal(n)) for n in signal.valid_signals()],
        "path": sys.path[:],
        "meta_path": [str(finder) for finder in sys.meta_path],
        "subnormal": float(np.finfo(np.float32).smallest_subnormal) > 0,
    }

before, modules = snapshot(), set(sys.modules)
import fastattn
after = snapshot()
changed = sorted(key for key in before if before[key] != after[key])
new = sorted({name.partition(".")[0] for name in set(sys.modules) - modules})
new = [name for name in new if name not in sys.stdlib_module_names]
# Cython's runtime enters two modules of its own, which are no files.
new = [name for name in new if not name.startswith(("_cython_", "cython_runtime"))]
print(json.dumps({"changed": changed, "modules": new, "subnormal": after["subnormal"]}))
"""


def test_import_leaves_no_trace() -> None:
    seen = json.loads(output_of("-c", SNAPSHOTS))
    assert seen["changed"] == []
    assert set(seen["modules"]) <= {"fastattn", "numpy"}
    assert seen["subnormal"]


@pytest.mark.parametrize(
    "library", ["torch", "jax", "keras", "transformers", "dask", "ml_dtypes", "threadpoolctl"]
)
def test_optional_library_is_not_imported(library: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; import fastattn; fastattn.show_config()"
    assert "kernels:" in output_of("-c", code)


@pytest.mark.parametrize(
    ("module", "library"), [("reference", "numpy"), ("plot", "matplotlib"), ("torch", "torch")]
)
def test_dir_shows_the_public_names_alone(module: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    code = (
        f"import json, fastattn, fastattn.{module}; "
        "print(json.dumps([name for name in dir(fastattn) if name[0] != '_']))"
    )
    assert json.loads(output_of("-c", code)) == sorted({*fastattn.__all__, module})


def test_a_function_is_not_a_module_too() -> None:
    for name in fastattn.__all__:
        if name != "reference":
            assert importlib.util.find_spec(f"fastattn.{name}") is None


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import fastattn", set()),
        ("from fastattn.__main__ import main; main(['info'])", set()),
        ("from fastattn.__main__ import main; main(['selftest'])", {"_selftest", "_gauge"}),
    ],
    ids=["import", "info", "selftest"],
)
def test_what_the_command_line_runs_is_loaded_by_it_alone(code: str, loaded: set[str]) -> None:
    code += "\nimport sys; print([n for n in sys.modules if n.startswith('fastattn.')])"
    modules = ast.literal_eval(output_of("-c", code).splitlines()[-1])
    commands = {"_selftest", "_bench", "_gauge"}
    assert {name.split(".")[1] for name in modules} & commands == loaded


def test_the_command_line_needs_no_optional_library() -> None:
    blocked = ["torch", "ml_dtypes", "matplotlib", "tqdm"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); "
    assert output_of("-c", code + "import fastattn.__main__, fastattn._bench.cli") == ""
