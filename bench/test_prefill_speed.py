"""Forward passes with as many queries as keys."""

from collections.abc import Callable

import pytest

# Sequences of at most this length are short: a call is over before threads and caches are warm.
SHORT = 256
SIXTEEN_BITS = ("float16", "bfloat16")


@pytest.mark.workloads(
    lambda w: (
        w.kind == "prefill"
        and not (w.causal or w.group_size > 1 or w.dtype in SIXTEEN_BITS or w.seqlen_q <= SHORT)
    )
)
def test_forward(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(
    lambda w: w.kind == "prefill" and w.causal and w.group_size == 1 and w.dtype == "float32"
)
def test_causal(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(lambda w: w.kind == "prefill" and w.group_size > 1)
def test_grouped(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(lambda w: w.kind == "prefill" and w.seqlen_q <= SHORT)
def test_short(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(lambda w: w.kind == "prefill" and w.dtype in SIXTEEN_BITS)
def test_16bit(measure: Callable[[], None]) -> None:
    measure()


@pytest.mark.workloads(lambda w: w.kind == "options")
def test_options(measure: Callable[[], None]) -> None:
    measure()
