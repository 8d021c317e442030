"""What the benchmarks share: who computes a workload, and what a measured time means.

The workloads are those of ``python -m fastattn bench``, ``fastattn/_bench/grid.py``.  A benchmark
says by the marker `workloads` which of them it measures, and calls `measure`.
"""

from collections.abc import Callable
from typing import Any

import pytest

from fastattn import _config
from fastattn._bench.check import check
from fastattn._bench.contenders import CONTENDERS, installed
from fastattn._bench.forms import Unsupported
from fastattn._bench.grid import GRID
from fastattn._bench.plain import reference
from fastattn._bench.runner import probe_bandwidth, probe_peak, rates, too_large
from fastattn._bench.workloads import Workload

MAKERS = {
    "fastattn": CONTENDERS["fastattn"].make,
    "reference": reference,
    "numpy": CONTENDERS["numpy"].make,
    "torch": CONTENDERS["torch"].make,
}
# The reference holds scores, and keys and values of every query head, in float64.  With more
# numbers than this a call takes longer than about half a second, and NumPy's plain attention is
# what fastattn is compared with.
MAX_REFERENCE_NUMBERS = 2**24
# More keys and values than this, bytes, are left to ``python -m fastattn bench``: they need
# gigabytes, which take longer to fill than to attend to.
MAX_KV_BYTES = 2**28
# The longest sequence with --benchmark-disable, where each call is made and checked once: some more
# than a block of keys.
UNTIMED_LENGTH = 150


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install --group benchmarks")
    config.addinivalue_line("markers", "workloads(chosen): which of the grid are measured")


def _reference_numbers(workload: Workload) -> int:
    keys = workload.num_heads * sum(workload.key_lengths)
    return workload.num_scores + 2 * keys * workload.head_dim


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" not in metafunc.fixturenames:  # it times what no other library computes
        return
    marker = metafunc.definition.get_closest_marker("workloads")
    assert marker is not None, f"{metafunc.function.__name__} says no workloads"
    [chosen] = marker.args
    names = [name for name in MAKERS if name == "reference" or name in installed()]
    metafunc.parametrize(
        ("workload", "contender"),
        [
            pytest.param(workload, name, id=f"{workload.name}-{name}")
            for workload in GRID
            # Programs and models are more than a call: `python -m fastattn bench` has them.
            if not (workload.product_of or workload.model)
            and chosen(workload)
            and workload.kv_bytes <= MAX_KV_BYTES
            for name in names
            if name != "reference" or _reference_numbers(workload) <= MAX_REFERENCE_NUMBERS
        ],
    )


@pytest.hookimpl(optionalhook=True)  # of pytest-benchmark
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["kernels"] = _config.ISA


@pytest.fixture
def measure(benchmark: Any, workload: Workload, contender: str) -> Callable[[], None]:
    """Compare a contender's result with the reference, then time the call that made it."""

    def measure() -> None:
        called = workload
        if benchmark.disabled:
            called = workload.shortened(UNTIMED_LENGTH)
        # The reference holds whole score matrices, as NumPy's plain attention does.
        if reason := too_large("numpy" if contender == "reference" else contender, called):
            pytest.skip(reason)
        num_threads = called.num_threads or _config.default_num_threads()
        try:
            call = MAKERS[contender](called, num_threads)
        except Unsupported as reason:
            pytest.skip(str(reason))
        check(call, call.run(), called)

        benchmark.group = f"{called.kind}: {called.label}"
        benchmark(call.run)
        if benchmark.disabled:
            return
        peak = probe_peak(called.dtype, num_threads)
        read_rate = probe_bandwidth(num_threads, called.kv_bytes) if called.reads else None
        benchmark.extra_info |= {
            "num_threads": num_threads,
            **rates(called, benchmark.stats.stats.median, peak, read_rate),
        }

    return measure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What pytest-benchmark's tables do not show: speeds, as shares of the machine's limits."""
    session = terminalreporter.config._benchmarksession
    timed = [b for b in session.benchmarks if "gflops" in b.extra_info]
    if not timed:
        return
    terminalreporter.section("useful work per second by medians, share of the probed limit")
    width = max(len(b.params["workload"].name) for b in timed)
    for b in timed:
        found = b.extra_info
        if "share_of_read" in found:
            rate, unit, share = found["gbytes_per_second"], "GB/s", found["share_of_read"]
        else:
            rate, unit, share = found["gflops"], "GFLOP/s", found["share_of_peak"]
        name = f"{b.params['workload'].name:<{width}}  {b.params['contender']:<10}"
        terminalreporter.line(f"{name}{rate:9.1f} {unit:<8}{share:7.1%}")
