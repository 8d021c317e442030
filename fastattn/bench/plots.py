"""Pictures: speed and memory against sequence length."""

from collections.abc import Mapping
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
    "jax": ("#E69F00", "X"),
}
_NAMES = {
    "numpy": "NumPy",
    "blas": "two bare products",
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "jax": "JAX",
}


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
    from matplotlib.figure import Figure

    names = {workload.name for workload in GROWTH}
    results = sorted(
        (r for r in report["results"] if r["workload"] in names), key=lambda r: r["seqlen"]
    )
    first = GROWTH[0]
    sizes = f"{first.num_heads} heads, head_dim {first.head_dim}, {first.dtype}"
    title = f"{sizes}, {report['num_threads']} threads, {report['machine']['cpu']}"
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, label in (
        ("speed", "useful GFLOP/s"),
        ("memory", "peak memory growth in one call, MiB"),
    ):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        for name in report["versions"]:
            points = []
            for result in results:
                entry = result["contenders"].get(name)
                if entry is None or (kind == "memory" and entry["memory_bytes"] is None):
                    continue
                # A logarithmic axis has no 0, and a page or two are noise.
                value = max(entry["memory_bytes"] or 0, 2**17) / 2**20
                points.append((result["seqlen"], entry["gflops"] if kind == "speed" else value))
            if not points or (kind == "memory" and name == "blas"):  # whose memory is there before
                continue
            colour, marker = _STYLES[name]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                marker=marker,
                linewidth=2.5 if name == "fastattn" else 1.5,
                zorder=3 if name == "fastattn" else 2,
                label=_NAMES.get(name, name),
            )
        if kind == "speed":
            axes.plot(
                [r["seqlen"] for r in results],
                [r["peak_gflops"] for r in results],
                color="#555555",
                linestyle="--",
                label="peak of the machine",
            )
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        lengths = [r["seqlen"] for r in results]
        axes.set_xticks(lengths, [str(x) for x in lengths])
        axes.set_xlabel("sequence length")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=10)
        axes.grid(True, alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        path = directory / f"{kind}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
