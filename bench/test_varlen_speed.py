"""Sequences of different lengths, packed one after another."""

from collections.abc import Callable

import pytest


@pytest.mark.workloads(lambda w: w.packed)
def test_varlen(measure: Callable[[], None]) -> None:
    measure()
