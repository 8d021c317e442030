"""Attention between its projections."""

from collections.abc import Callable

import pytest


@pytest.mark.workloads(lambda w: w.layer)
def test_layer(measure: Callable[[], None]) -> None:
    measure()
