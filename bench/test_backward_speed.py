"""Forward and backward pass together."""

from collections.abc import Callable

import pytest


@pytest.mark.workloads(lambda w: w.gradients)
def test_backward(measure: Callable[[], None]) -> None:
    measure()
