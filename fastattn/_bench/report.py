"""Results as tables, and two runs compared."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Below this many operations a call is all overhead: its time says more than its speed.
SMALL_FLOPS = 1e6
# Above this load for each CPU before the start, threads wait for cores, and others for them.
BUSY_SHARE = 0.5


class _Measure(NamedTuple):
    """How fast something is, and what bounds it."""

    rate: str  # keys of a contender's entry
    share: str
    unit: str
    limit: str

    def rows(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        """The rate and the share, as they are shown."""
        return f"{entry[self.rate]:.1f}", f"{100 * entry[self.share]:.1f} %"


_ARITHMETIC = _Measure("gflops", "share_of_peak", "GFLOP/s", "of peak")
_READING = _Measure("gbytes_per_second", "share_of_read", "GB/s", "of read")


def _measure(result: Mapping[str, Any]) -> _Measure | None:
    """What bounds a workload; None if it is all overhead."""
    if result["kv_bytes"] is not None:
        return _READING
    return None if result["flops"] < SMALL_FLOPS else _ARITHMETIC


def header(report: Mapping[str, Any]) -> str:
    """The lines above the results: the machine and what the columns mean.

    Parameters
    ----------
    report : mapping
        What `fastattn._bench.runner.run` returns, results or not.

    Returns
    -------
    str
        Several lines.
    """
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    load = machine["load_average"] or 0.0
    busy = [f"busy: load average {load:.1f}; calls of several threads suffer most"]
    return "\n".join(
        [
            *(busy if load > machine["cpus"] * BUSY_SHARE else []),
            f"{machine['cpu'] or machine['architecture']}, {machine['cpus']} CPUs, "
            f"{report['num_threads']} threads, kernel set {machine['kernels']}, "
            f"memory reads at {report['read_gbytes_per_second']:.1f} GB/s",
            versions,
            f"{report['rounds']} rounds; beside: time over fastattn's; memory: peak growth in one "
            "call, result included;",
            "of peak: useful operations against fused multiply-adds without memory, of read: bytes "
            "of keys and values",
            "against reading as many bytes, both in the same rounds.",
        ]
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _memory(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.1f} MiB"


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


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
    title = f"{result['workload']}: {result['label']}, {_threads(threads)}, "
    if result["kv_bytes"] is None:
        title += f"peak {result['peak_gflops']:.1f} GFLOP/s"
    else:
        title += (
            f"{result['kv_bytes'] / 2**20:.0f} MiB read at "
            f"{result['read_gbytes_per_second']:.1f} GB/s"
        )
    measure = _measure(result)
    unit, limit = (measure.unit, measure.limit) if measure else ("", "")
    lines = [
        title,
        f"{'':<14}{'median':>12}{'best':>12}{unit:>10}{limit:>9}{'beside':>9}{'memory':>12}",
    ]
    for name, entry in result["contenders"].items():
        speed, share = measure.rows(entry) if measure else ("-", "-")
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
        What `fastattn._bench.runner.run` returns.

    Returns
    -------
    str
        Several lines; none if no workload has a baseline.
    """
    lines = []
    for result in report["results"]:
        ours, baseline = result["contenders"].get("fastattn"), result["baseline"]
        if ours and baseline and baseline["num_threads"] == result["num_threads"]:
            work = result["flops"] / baseline["flops"]
            cost = _ratio(ours, baseline) / work
            lines.append(
                f"  {result['workload']:<26}{_duration(ours['median']):>12}"
                f"{_memory(ours['memory_bytes']):>12}  {baseline['label']:<36}"
                f"{_duration(baseline['median']):>12}{_memory(baseline['memory_bytes']):>12}"
                f"{work:>9.3g}x{cost:>8.2f}x"
            )
    if lines:
        lines[:0] = [
            "fastattn beside a baseline in the same rounds; work: useful operations over the "
            "baseline's;",
            "cost: time over the baseline's, for the same work, median of the rounds",
            f"{'':<28}{'median':>12}{'memory':>12}  {'baseline':<36}{'median':>12}{'memory':>12}"
            f"{'work':>10}{'cost':>9}",
        ]
    return "\n".join(lines)


def _ratio(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> float:
    """Of the times, median of the rounds.

    Round by round, because another program may slow half of the rounds, of which each median would
    show another half.  One of the two may have had more turns.
    """
    rounds = zip(ours["seconds"], baseline["seconds"], strict=False)
    made: float = statistics.median(time / base for time, base in rounds)
    return made


def speedups(report: Mapping[str, Any]) -> str:
    """The table of what threads gain, each beside the same call on fewer threads.

    Parameters
    ----------
    report : mapping
        What `fastattn._bench.runner.run` returns.

    Returns
    -------
    str
        Several lines; none if no workload has such a baseline.
    """
    lines = []
    for result in report["results"]:
        ours, baseline = result["contenders"].get("fastattn"), result["baseline"]
        if ours and baseline and baseline["num_threads"] != result["num_threads"]:
            speedup = 1 / _ratio(ours, baseline)
            few, many = baseline["num_threads"], result["num_threads"]
            lines.append(
                f"  {result['workload']:<24}{result['label']:<26}{few:>6}"
                f"{_duration(baseline['median']):>12}{many:>5}{_duration(ours['median']):>12}"
                f"{speedup:>9.2f}x{100 * speedup * few / many:>9.1f} %"
            )
    if lines:
        lines[:0] = [
            "fastattn beside fewer threads in the same rounds; speedup: median of the rounds",
            f"{'':<51}{'threads':>7}{'median':>12}{'':>5}{'median':>12}{'speedup':>10}"
            f"{'of ideal':>11}",
        ]
    return "\n".join(lines)


def programs(report: Mapping[str, Any]) -> str:
    """The table of attention in turns with a product, and of what a call leaves behind.

    Parameters
    ----------
    report : mapping
        What `fastattn._bench.runner.run` returns.

    Returns
    -------
    str
        Several lines; none if no program was measured.
    """
    lines = []
    for result in report["results"]:
        for name, entry in result["contenders"].items():
            if "alone" not in entry:
                continue
            after, callers = (statistics.median(entry[key]) for key in ("after", "callers"))
            in_turns = _ratio(entry, {"seconds": entry["alone"]})
            native = "-" if entry["threads"][0] is None else f"{max(entry['threads'])}"
            lines.append(
                f"  {result['workload']:<26}{name:<12}{_duration(entry['median']):>12}"
                f"{in_turns:>8.2f}x{_duration(after):>12}{native:>9}{callers:>12.2f}x"
            )
    if lines:
        lines[:0] = [
            "attention in turns with a product, over the sum of both alone, median of the rounds; "
            "after:",
            "processor time used in the 50 ms after a call of attention; callers: calls per second "
            "by 16",
            "Python threads over those by one, which may use as many native threads, and all "
            "native",
            "threads of the process besides these 16",
            f"{'':<40}{'median':>12}{'in turns':>9}{'after':>12}{'threads':>9}{'callers':>13}",
        ]
    return "\n".join(lines)


def summary(report: Mapping[str, Any]) -> str:
    """One line for each workload, kind by kind: fastattn's time and speed, and the others' times.

    Parameters
    ----------
    report : mapping
        What `fastattn._bench.runner.run` returns.

    Returns
    -------
    str
        Several lines; none if fastattn was not measured.
    """
    results = [r for r in report["results"] if "fastattn" in r["contenders"]]
    if not results:
        return ""
    label_width = max(len(result["label"]) for result in results) + 2
    lines = ["fastattn, and the times of the others over fastattn's"]
    # Kinds in the order in which they come first.
    for kind in dict.fromkeys(result["kind"] for result in results):
        of_kind = [{**r["contenders"], **r["left_out"]} for r in results if r["kind"] == kind]
        asked = set().union(*of_kind) - {"fastattn"}
        others = [name for name in report["versions"] if name in asked]
        columns = "".join(f"{name:>13}" for name in others)
        lines.append(
            f"{kind:<27}{'':<{label_width}}{'median':>12}{'speed':>15}{'share':>9}{columns}"
        )
        for result in results:
            if result["kind"] != kind:
                continue
            entry, measure = result["contenders"]["fastattn"], _measure(result)
            rate, share = measure.rows(entry) if measure else ("", "")
            speed = f"{rate} {measure.unit}" if measure else ""
            line = f"  {result['workload']:<25}{result['label']:<{label_width}}"
            line += f"{_duration(entry['median']):>12}{speed:>15}{share:>9}"
            for name in others:
                other = result["contenders"].get(name)
                line += f"{other['ratio']:>12.2f}x" if other else f"{'-':>13}"
            lines.append(line)
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
        Reports of `fastattn._bench.runner.run`.

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
        Reports of `fastattn._bench.runner.run`.
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
    lines.append(f"{'workload':<26}{'contender':<14}{'before':>12}{'after':>12}{'ratio':>8}")
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
            f"{label:<26}{change.contender:<14}{_duration(change.before):>12}"
            f"{_duration(change.after):>12}{change.ratio:>8.3f}{verdict}"
        )
    if not shown:
        lines.append("nothing in common")
    return "\n".join(lines), regressed
