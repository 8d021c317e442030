"""Results as tables, and two runs compared."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Below this many operations a call is all overhead: its time says more than its speed.
SMALL_FLOPS = 1e6

_COLUMNS = (
    f"{'':<14}{'median':>12}{'best':>12}{'GFLOP/s':>10}{'of peak':>9}{'beside':>9}{'memory':>12}"
)


def header(report: Mapping[str, Any]) -> str:
    """The lines above the results: the machine and what the columns mean.

    Parameters
    ----------
    report : mapping
        What `fastattn.bench.runner.run` returns, results or not.

    Returns
    -------
    str
        Several lines.
    """
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            f"{machine['cpu'] or machine['architecture']}, {machine['cpus']} CPUs, "
            f"{report['num_threads']} threads, kernel set {machine['kernels']}, "
            f"memory reads at {report['read_gbytes_per_second']:.1f} GB/s",
            versions,
            f"{report['rounds']} rounds; beside: time over fastattn's; memory: peak growth in one "
            "call, result included;",
            "of peak: useful operations against fused multiply-adds without memory, in the same "
            "run.",
        ]
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _memory(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.1f} MiB"


def table(result: Mapping[str, Any]) -> str:
    """The table of one workload.

    Parameters
    ----------
    result : mapping
        One of the report's ``"results"``.

    Returns
    -------
    str
        Several lines.
    """
    threads = result["num_threads"]
    title = (
        f"{result['workload']}: {result['label']}, {threads} thread{'s' if threads > 1 else ''}, "
        f"peak {result['peak_gflops']:.1f} GFLOP/s"
    )
    lines = [title, _COLUMNS]
    small = result["flops"] < SMALL_FLOPS
    for name, entry in result["contenders"].items():
        speed = "-" if small else f"{entry['gflops']:.1f}"
        share = "-" if small else f"{100 * entry['share_of_peak']:.1f} %"
        ratio = "-" if entry["ratio"] is None else f"{entry['ratio']:.2f}x"
        lines.append(
            f"  {name:<12}{_duration(entry['median']):>12}{_duration(entry['best']):>12}"
            f"{speed:>10}{share:>9}{ratio:>9}{_memory(entry['memory_bytes']):>12}"
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in result["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def costs(report: Mapping[str, Any]) -> str:
    """The table of what options and length cost fastattn, each beside its baseline.

    Parameters
    ----------
    report : mapping
        What `fastattn.bench.runner.run` returns.

    Returns
    -------
    str
        Several lines; none if no workload has a baseline.
    """
    lines = []
    for result in report["results"]:
        ours, baseline = result["contenders"].get("fastattn"), result["baseline"]
        if ours and baseline:
            work = result["flops"] / baseline["flops"]
            # Round by round: another program may slow half of the rounds, of which each median
            # would show another half.
            rounds = zip(ours["seconds"], baseline["seconds"], strict=True)
            cost = statistics.median(time / base for time, base in rounds) / work
            lines.append(
                f"  {result['workload']:<14}{_duration(ours['median']):>12}"
                f"{_memory(ours['memory_bytes']):>12}  {baseline['label']:<16}"
                f"{_duration(baseline['median']):>12}{_memory(baseline['memory_bytes']):>12}"
                f"{work:>9.3g}x{cost:>8.2f}x"
            )
    if lines:
        lines[:0] = [
            "fastattn beside a baseline in the same rounds; work: useful operations over the "
            "baseline's;",
            "cost: time over the baseline's, for the same work, median of the rounds",
            f"{'':<16}{'median':>12}{'memory':>12}  {'baseline':<16}{'median':>12}{'memory':>12}"
            f"{'work':>10}{'cost':>9}",
        ]
    return "\n".join(lines)


class Change(NamedTuple):
    """How one contender did on one workload in two runs."""

    workload: str
    contender: str
    before: float  # median seconds
    after: float

    @property
    def ratio(self) -> float:
        """Of the times: above 1 is slower."""
        return self.after / self.before


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """What both reports measured.

    Parameters
    ----------
    before, after : mapping
        Reports of `fastattn.bench.runner.run`.

    Yields
    ------
    Change
        One for each workload and contender.

    Raises
    ------
    ValueError
        If one of them has another schema than the other.
    """
    if before["schema"] != after["schema"]:
        raise ValueError(f"schemas {before['schema']} and {after['schema']} do not compare")
    earlier = {(r["workload"], r["label"], r["num_threads"]): r for r in before["results"]}
    for result in after["results"]:
        old = earlier.get((result["workload"], result["label"], result["num_threads"]))
        for name, entry in result["contenders"].items():
            if old is not None and name in old["contenders"]:
                median = old["contenders"][name]["median"]
                yield Change(result["workload"], name, median, entry["median"])


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], threshold: float
) -> tuple[str, bool]:
    """A table of two runs.

    Parameters
    ----------
    before, after : mapping
        Reports of `fastattn.bench.runner.run`.
    threshold : float
        A call of fastattn that takes more than ``1 + threshold`` of its earlier time has
        regressed.  The other contenders show how far the machine itself differs.

    Returns
    -------
    text : str
        Several lines.
    regressed : bool
        Whether any call of fastattn has.
    """
    lines = []
    keys = ("cpu", "cpus", "kernels", "compiler", "platform")
    for key in keys:
        old, new = before["machine"].get(key), after["machine"].get(key)
        if old != new:
            lines.append(f"another {key}: {old} -> {new}")
    lines.append(f"{'workload':<24}{'contender':<14}{'before':>12}{'after':>12}{'ratio':>8}")
    regressed = False
    shown = ""
    for change in changes(before, after):
        verdict = ""
        if change.contender == "fastattn" and change.ratio > 1 + threshold:
            verdict = "  REGRESSION"
            regressed = True
        label = "" if change.workload == shown else change.workload
        shown = change.workload
        lines.append(
            f"{label:<24}{change.contender:<14}{_duration(change.before):>12}"
            f"{_duration(change.after):>12}{change.ratio:>8.3f}{verdict}"
        )
    if not shown:
        lines.append("nothing in common")
    return "\n".join(lines), regressed
