"""One query per sequence: reading keys and values bounds the time."""

from collections.abc import Callable

import pytest


@pytest.mark.workloads(lambda w: w.reads and w.kind == "decode" and not w.cache)
def test_decode(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(lambda w: w.reads and w.cache == "KVCache")
def test_cache(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(lambda w: w.reads and w.cache == "PagedKVCache")
def test_paged_cache(measure: Callable[[], None]) -> None:
    measure()
