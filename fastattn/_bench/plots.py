"""Pictures: speed and memory against sequence length, and how fast decoding reads."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattn._bench.grid import DECODE_DTYPES, DECODE_GROWTH, GROWTH
from fastattn._bench.workloads import Workload

# Told apart without colour vision: the Okabe-Ito palette, and a marker each.
_STYLES = {
    "fastattn": ("#D55E00", "o"),
    "numpy": ("#999999", "v"),
    "blas": ("#000000", "s"),
    "torch": ("#0072B2", "^"),
    "onnxruntime": ("#009E73", "D"),
    "openvino": ("#CC79A7", "P"),
    "jax": ("#56B4E9", "X"),
}
_NAMES = {
    "numpy": "NumPy",
    "blas": "two bare products",
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "jax": "JAX",
}
_GROWTH_SIZES = (
    f"({GROWTH[0].batch}, {GROWTH[0].num_heads}, L, {GROWTH[0].head_dim}), {GROWTH[0].dtype}"
)
# A logarithmic axis has no 0, and a page or two are noise.
_LEAST_BYTES = 2**17


def _speed(name: str, entry: Mapping[str, Any]) -> float | None:
    gflops: float = entry["gflops"]
    return gflops


def _memory(name: str, entry: Mapping[str, Any]) -> float | None:
    """MiB; None where it is not known, or, for ``"blas"``, there before the call."""
    used: int | None = entry["memory_bytes"]
    return None if used is None or name == "blas" else max(used, _LEAST_BYTES) / 2**20


def _reading(name: str, entry: Mapping[str, Any]) -> float | None:
    rate: float = entry["gbytes_per_second"]
    return rate


def plot(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw what the report has of `GROWTH` (speed.png and memory.png) and of decoding (decode.png).

    Parameters
    ----------
    report : mapping
        What `fastattn._bench.runner.run` returns.
    directory : Path
        Where to; made if it is not there.

    Returns
    -------
    list of Path
        The files written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = {}
    if results := _found(report, GROWTH):
        figures["speed.png"] = _speeds(report, results)
        figures["memory.png"] = _memories(report, results)
    growth, dtypes = _found(report, DECODE_GROWTH), _found(report, DECODE_DTYPES)
    if growth and dtypes:
        figures["decode.png"] = _decoding(report, growth, dtypes)
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=150)
    return [directory / name for name in figures]


def _found(
    report: Mapping[str, Any], workloads: Sequence[Workload]
) -> list[tuple[Workload, Mapping[str, Any]]]:
    """The results of some workloads, in their order."""
    results = {result["workload"]: result for result in report["results"]}
    return [(w, results[w.name]) for w in workloads if w.name in results]


def _conditions(report: Mapping[str, Any], sizes: str) -> str:
    return f"(batch, heads, seqlen, head_dim) = {sizes},\n{_machine(report)}"


def _machine(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    name = machine["cpu"] or machine["architecture"]
    return f"{report['num_threads']} threads, {name}, {machine['kernels']}"


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left")


def _speeds(report: Mapping[str, Any], found: Sequence[tuple[Workload, Mapping[str, Any]]]) -> Any:
    results = [result for _, result in found]
    peaks = [result["peak_gflops"] for result in results]
    figure, axes = _canvas()
    lines = _lines(axes, report["versions"], results, _speed, "peak of the machine", peaks)
    _legend(figure, lines)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("useful GFLOP/s")
    _title(axes, f"Speed of attention\n{_conditions(report, _GROWTH_SIZES)}")
    return figure


def _memories(
    report: Mapping[str, Any], found: Sequence[tuple[Workload, Mapping[str, Any]]]
) -> Any:
    results = [result for _, result in found]
    outputs = [workload.output_bytes / 2**20 for workload, _ in found]
    figure, axes = _canvas()
    lines = _lines(axes, report["versions"], results, _memory, "the result alone", outputs)
    _legend(figure, lines)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("memory that one call adds, MiB")
    _title(axes, f"Memory of attention\n{_conditions(report, _GROWTH_SIZES)}")
    return figure


def _decoding(
    report: Mapping[str, Any],
    growth: Sequence[tuple[Workload, Mapping[str, Any]]],
    dtypes: Sequence[tuple[Workload, Mapping[str, Any]]],
) -> Any:
    """Left: the rate of reading against the number of keys; right: time in each storage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    results = [result for _, result in growth]
    limits = [result["read_gbytes_per_second"] for result in results]
    lines = _lines(left, report["versions"], results, _reading, "reading alone", limits)
    left.set_ylim(bottom=0)
    left.set_xlabel("keys L")
    left.set_ylabel("GB/s of keys and values")
    _title(left, "One query, (1, 32/8, 1xL, 128), float32: rate of reading")

    _bars(right, report["versions"], dtypes)
    keys = dtypes[0][0].seqlen_k
    _title(right, f"One query, (1, 32, 1x{keys}, 128): time by storage")
    figure.suptitle(
        f"Decoding: (batch, heads, seqlen, head_dim), {_machine(report)}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    _legend(figure, lines)
    return figure


def _bars(
    axes: Any, names: Mapping[str, str], found: Sequence[tuple[Workload, Mapping[str, Any]]]
) -> None:
    """Times, grouped by storage, the first on top; what there is no call for has no bar."""
    height = 0.8 / (len(names) + 1)
    for group, (_, result) in enumerate(found):
        at_least = result["kv_bytes"] / result["read_gbytes_per_second"] / 1e6
        bars = [(at_least, "#CCCCCC", " reading alone")]
        for name in names:
            if entry := result["contenders"].get(name):
                bars.append((entry["median"] * 1e3, _STYLES[name][0], ""))
        for place, (milliseconds, colour, remark) in enumerate(bars):
            y = group + (place + 0.5 - len(bars) / 2) * height
            axes.barh(y, milliseconds, height, color=colour)
            axes.annotate(
                f"{milliseconds:.3g}{remark}", (milliseconds, y), (3, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1)
    axes.set_yticks(range(len(found)), [w.cache_dtype or w.dtype for w, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("ms (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)


def _canvas() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    return figure, figure.add_subplot()


def _lines(
    axes: Any,
    names: Mapping[str, str],
    results: Sequence[Mapping[str, Any]],
    value: Callable[[str, Mapping[str, Any]], float | None],
    limit: str,
    limits: Sequence[float],
) -> list[Any]:
    """A line for each contender that has values, and a dashed one for what none can pass.

    Returns them in their order from top to bottom, where the shortest ends.
    """
    axes.set_xscale("log", base=2)
    lengths = [result["seqlen"] for result in results]
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("sequence length L")
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)

    # The values and the line of each.
    drawn = [(limits, *axes.plot(lengths, limits, color="#555555", linestyle="--", label=limit))]
    for name in names:
        points = [
            (result["seqlen"], y)
            for result in results
            if (entry := result["contenders"].get(name)) and (y := value(name, entry)) is not None
        ]
        if not points:
            continue
        ours = name == "fastattn"
        colour, marker = _STYLES[name]
        at, values = zip(*points, strict=True)
        lines = axes.plot(
            at, values,
            color=colour, marker=marker, linewidth=3 if ours else 1.5, zorder=3 if ours else 2,
            label=_NAMES.get(name, name),
        )  # fmt: skip
        drawn.append((values, *lines))
    last = min(len(values) for values, _ in drawn) - 1
    drawn.sort(key=lambda line: line[0][last], reverse=True)
    return [line for _, line in drawn]


def _legend(figure: Any, lines: Sequence[Any]) -> None:
    legend = figure.legend(handles=lines, loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text() == "fastattn" else "normal")
