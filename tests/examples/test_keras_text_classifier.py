"""examples/keras_text_classifier.py, in its short form."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_kernel_set

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_keras_classifier(tmp_path):
    """In a process of its own: Keras has one backend in a process, and others may have chosen."""
    for name in ("tensorflow", "keras", "matplotlib"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    picture = tmp_path / "classifier.png"
    program = [sys.executable, EXAMPLES / "keras_text_classifier.py"]
    paths = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [*program, "--quick", "--plot", picture],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = re.findall(
        r"^(fastattn|Keras|no attention) +([\d.]+) +([\d.]+) +([\d.]+)%", ran.stdout, re.M
    )
    assert [row[0] for row in rows] == ["fastattn", "Keras", "no attention"]
    (_, first, last, _), (_, first_by_keras, last_by_keras, _), _ = rows
    assert float(last) < float(first) - 0.5
    assert float(first) == pytest.approx(float(first_by_keras), abs=0.01)
    assert float(last) == pytest.approx(float(last_by_keras), abs=0.05)
    assert re.fullmatch(
        r"accuracy [\d.]+% on \d+ held-out docstrings \(target 30%\), Keras's layer [\d.]+%: ok",
        ran.stdout.splitlines()[-1],
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
