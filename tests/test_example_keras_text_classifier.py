"""examples/keras_text_classifier.py, in its short form."""

import importlib
import os
import re
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.any_kernel_set,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_keras_classifier(monkeypatch, tmp_path, capsys):
    if os.environ.get("KERAS_BACKEND") != "tensorflow":
        pytest.skip("runs with KERAS_BACKEND=tensorflow, as `make test-keras` does")
    for name in ("tensorflow", "keras", "matplotlib"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(EXAMPLES)
    classifier = importlib.import_module("keras_text_classifier")
    picture = tmp_path / "classifier.png"
    assert classifier.main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    rows = re.findall(
        r"^(fastattn|Keras|no attention) +([\d.]+) +([\d.]+) +([\d.]+)%", report, re.M
    )
    assert [row[0] for row in rows] == ["fastattn", "Keras", "no attention"]
    (_, first, last, _), (_, first_by_keras, last_by_keras, _), _ = rows
    assert float(last) < float(first) - 0.5
    assert float(first) == pytest.approx(float(first_by_keras), abs=0.01)
    assert float(last) == pytest.approx(float(last_by_keras), abs=0.05)
    last_line = report.splitlines()[-1]
    assert re.fullmatch(
        r"accuracy [\d.]+% on \d+ held-out docstrings, Keras's layer [\d.]+% \(target 30%\): ok",
        last_line,
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
