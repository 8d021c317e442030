"""The source distribution and the wheel hold what they must and work outside the source tree.
Modules keep their private names to themselves."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_kernel_set

ROOT = Path(__file__).parents[1]
# Debug information would double it.
MAX_WHEEL_BYTES = 1_500_000


def _files(*patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in found}
    return {name for name in names if not name.startswith(".") and "__pycache__" not in name}


def _run(*command: str | Path, cwd: Path) -> str:
    # Only what is installed may be found, and only the release build is meant.
    inherited = {k: v for k, v in os.environ.items() if not re.match("PYTHON|FASTATTN|LD_", k)}
    done = subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_version_is_single_sourced() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert metadata.version("fastattn") == declared


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it with the declared build requirements alone."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.packaging
def test_sdist_is_complete(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member.name.partition("/")[2] for member in archive if member.isfile()]
    expected = _files(
        "*.md", "LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml", "setup.py",
        "fastattn/**/*.py", "fastattn/*.pyi", "fastattn/*.pyx", "fastattn/*.pxd",
        "fastattn/py.typed",
        "csrc/**/*.[ch]", "csrc/**/*.md", "tests/**/*.py", "tests/**/*.[ch]",
        "bench/**/*.py", "bench/**/*.[ch]", "docs/**/*.md", "examples/**/*.py",
    )  # fmt: skip
    assert "csrc/fastattn.h" in expected
    assert expected - set(members) == set()
    stray = [name for name in members if re.search(r"(^build/)|\.(so|o|pyc)$|_core\.c$", name)]
    assert stray == []


@pytest.mark.packaging
def test_wheel_holds_the_package_alone(dist: Path) -> None:
    [path] = dist.glob("*.whl")
    assert path.stat().st_size <= MAX_WHEEL_BYTES
    names = set(zipfile.ZipFile(path).namelist())
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert "-abi3-" not in path.name
    else:
        assert "-cp311-abi3-" in path.name
    modules = {name for name in names if name.startswith("fastattn/")}
    sources = _files("fastattn/*.py", "fastattn/*/*.py", "fastattn/*.pyi", "fastattn/py.typed")
    [extension] = modules - sources
    assert sources <= modules
    assert re.fullmatch(r"fastattn/_core\.[\w.-]*so", extension)
    others = {name.partition("/")[0] for name in names - modules}
    assert all(name.endswith(".dist-info") for name in others)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.packaging
def test_wheel_works_on_its_own(dist: Path, tmp_path: Path) -> None:
    [wheel] = dist.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    code = "import fastattn; print(fastattn.__file__)"
    assert str(tmp_path) in _run(python, "-c", code, cwd=tmp_path)
    assert _run(python, "-m", "fastattn", "selftest", cwd=tmp_path).endswith(" 0 failed\n")


def test_a_private_name_is_of_one_module() -> None:
    """A module takes from another what is public there; modules themselves are private by name."""
    root = ROOT / "fastattn"
    files = [path.relative_to(root).with_suffix("") for path in root.rglob("*.py*")]
    modules = {".".join(("fastattn", *file.parts)) for file in files}
    for path in root.rglob("*.py"):
        taken = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastattn"):
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    assert whole in modules or not name.name.startswith("_"), (path, whole)
                    if whole in modules:
                        taken[name.asname or name.name] = whole
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not (private and node.value.id in taken), (path, ast.unparse(node))
