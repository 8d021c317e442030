"""What every test has: a kernel set to run on, and random numbers of its own."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastattn import _config, _core

# Their assertions too say what they compared.
pytest.register_assert_rewrite(
    "caches", "gauge", "gradients", "keras_cases", "layers", "operands", "torch_cases"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # `kernel_set` is autouse: a test that is not marked runs once on each set of this CPU.
    if "kernel_set" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker
        isas = (_config.ISA,) if marker("any_kernel_set") else _core.available_isas()
        marks = [pytest.mark.slow] if marker("slow_on_other_sets") else []
        params = [pytest.param(isa, marks=marks if isa != _config.ISA else []) for isa in isas]
        metafunc.parametrize("kernel_set", params, indirect=True)


@pytest.fixture(autouse=True)
def kernel_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the kernel set that calls in this test use."""
    isa: str = getattr(request, "param", _config.ISA)  # doctests are not parametrized
    monkeypatch.setattr(_config, "ISA", isa)
    return isa


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that are the same for a test in every run and on every kernel set."""
    test = getattr(request.node, "originalname", None) or request.node.name
    return np.random.default_rng(zlib.crc32(test.encode()))


# --- PyTorch and Keras, which only the tests that need them import --------------------------------


@pytest.fixture
def seeded_torch() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import torch

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def untouched() -> Iterator[None]:
    """The test leaves PyTorch as it found it."""
    from torch_cases import state_of_torch

    import fastattn.torch as ft

    before = state_of_torch()
    yield
    left_enabled = ft.is_enabled()
    ft.disable()
    assert not left_enabled
    assert state_of_torch() == before


@pytest.fixture
def seeded_keras() -> None:
    from keras_cases import keras

    keras.utils.set_random_seed(0)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What fastattn.keras attended to, call by call: the shapes and the options."""
    from fastattn.keras import _ops

    seen = []
    attend = _ops.BACKEND.attend

    def recording(call: Any, q: Any, k: Any, v: Any, *arrays: Any) -> Any:
        seen.append((tuple(q.shape), tuple(k.shape), call))
        return attend(call, q, k, v, *arrays)

    monkeypatch.setattr(_ops.BACKEND, "attend", recording)
    return seen
