"""How a test gets at an example."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Import an example by its name, beside its neighbours as running it does.

    The test is skipped where one of the packages that the example needs is missing.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")

    def load(name: str, *packages: str) -> ModuleType:
        for package in packages:
            pytest.importorskip(package)
        return importlib.import_module(name)

    return load
