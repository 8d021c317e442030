"""Pictures: speed and memory against sequence length."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastattn.bench.workloads import GROWTH

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
# A logarithmic axis has no 0, and a page or two are noise.
_LEAST_BYTES = 2**17


def _speed(name: str, entry: Mapping[str, Any]) -> float | None:
    gflops: float = entry["gflops"]
    return gflops


def _memory(name: str, entry: Mapping[str, Any]) -> float | None:
    """MiB; None where it is not known, or, for ``"blas"``, there before the call."""
    used: int | None = entry["memory_bytes"]
    return None if used is None or name == "blas" else max(used, _LEAST_BYTES) / 2**20


def plot(report: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw speed.png and memory.png over the lengths of `GROWTH` that the report has.

    Parameters
    ----------
    report : mapping
        What `fastattn.bench.runner.run` returns.
    directory : Path
        Where to; made if it is not there.

    Returns
    -------
    list of Path
        The files written.
    """
    workloads = {workload.name: workload for workload in GROWTH}
    results = [result for result in report["results"] if result["workload"] in workloads]
    results.sort(key=lambda result: int(result["seqlen"]))
    first = GROWTH[0]
    conditions = (
        f"(batch, heads, seqlen, head_dim) = ({first.batch}, {first.num_heads}, L, "
        f"{first.head_dim}), {first.dtype}, {report['num_threads']} threads, "
        f"{report['machine']['cpu'] or report['machine']['architecture']}"
    )

    peaks = [result["peak_gflops"] for result in results]
    outputs = [workloads[result["workload"]].output_bytes / 2**20 for result in results]
    directory.mkdir(parents=True, exist_ok=True)
    speed = _figure(report["versions"], results, _speed, "peak of the machine", peaks)
    axes = speed.axes[0]
    axes.set_ylim(bottom=0)
    axes.set_ylabel("useful GFLOP/s")
    axes.set_title(f"Speed of attention\n{conditions}", fontsize=10, loc="left")

    memory = _figure(report["versions"], results, _memory, "the result alone", outputs)
    axes = memory.axes[0]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("memory that one call adds, MiB")
    axes.set_title(f"Memory of attention\n{conditions}", fontsize=10, loc="left")

    written = [directory / "speed.png", directory / "memory.png"]
    for figure, path in zip((speed, memory), written, strict=True):
        figure.savefig(path, dpi=150)
    return written


def _figure(
    names: Mapping[str, str],
    results: Sequence[Mapping[str, Any]],
    value: Callable[[str, Mapping[str, Any]], float | None],
    limit: str,
    limits: Sequence[float],
) -> Any:
    """A line for each contender that has values, and a dashed one for what none can pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    lengths = [result["seqlen"] for result in results]
    axes.set_xticks(lengths, [str(length) for length in lengths])
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
    # In the order of the lines, from top to bottom, where the shortest ends.
    last = min(len(values) for values, _ in drawn) - 1
    drawn.sort(key=lambda line: line[0][last], reverse=True)
    handles = [line for _, line in drawn]
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text() == "fastattn" else "normal")
    return figure
