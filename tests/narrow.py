"""The float32 operations that serve narrower types: tests compare both, bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastattn import _config


@contextmanager
def operations_of_narrow_types() -> Iterator[None]:
    """Compute float32 as narrower types are, which amx leaves to avx512's operations."""
    with pytest.MonkeyPatch.context() as patch:
        if _config.ISA == "amx":
            patch.setattr(_config, "ISA", "avx512")
        yield
