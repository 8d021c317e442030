"""fastattn beside torch and the machine's FMA peak, measured in one run.

    python bench/compare_torch.py                            # (1,12,2048,64), full and causal
    python bench/compare_torch.py 1,8,4096,128 1,32/8,1024,128:causal --rounds 40

A shape is batch,num_heads[/num_kv_heads],seqlen,head_dim with an optional ":causal".  Each
contender lives in a process of its own; they take turns, one call each, so that all see the same
machine.  The FMA peak is probed between the turns, one instance of fma_peak.c per thread.  GFLOP/s
count useful operations: 4 per score and feature, half of the square for causal.  fastattn writes to
a fresh array in every call, as torch does.
"""

import argparse
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Workload

CONTENDERS = ("fastattn", "torch")
PEAK_ITERATIONS = 4_000_000  # about 10 ms


def parse_shape(text: str) -> Workload:
    sizes, _, kind = text.partition(":")
    if kind not in ("", "causal"):
        raise argparse.ArgumentTypeError(f"only ':causal' may follow a shape, got {text!r}")
    try:
        batch, heads, seqlen, head_dim = sizes.split(",")
        num_heads, _, num_kv_heads = heads.partition("/")
        return Workload(
            int(batch), int(num_heads), int(num_kv_heads or num_heads), int(seqlen), int(seqlen),
            int(head_dim), kind == "causal",
        )  # fmt: skip
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a shape: {text!r}") from None


def make_call(contender: str, workload: Workload, num_threads: int) -> Callable[[], Any]:
    q, k, v = workload.arrays()
    if contender == "fastattn":
        import fastattn as fa

        return lambda: fa.attention(q, k, v, causal=workload.causal, num_threads=num_threads)
    import torch

    torch.set_num_threads(num_threads)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    grouped = workload.num_heads != workload.num_kv_heads

    def call() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors, is_causal=workload.causal, enable_gqa=grouped
            )

    return call


def serve(
    contender: str,
    workload: Workload,
    num_threads: int,
    pipe: multiprocessing.connection.Connection,
) -> None:
    """A contender's process: send a few result rows, then the seconds of one call per request."""
    call = make_call(contender, workload, num_threads)
    out = call()
    pipe.send(np.asarray(out)[-1, -1, :: max(workload.seqlen_q // 8, 1)].copy())
    while pipe.recv():
        start = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - start)


def expected_rows(workload: Workload) -> np.ndarray:
    """The rows that `serve` sends, from the reference: of the last head of the last batch entry."""
    import fastattn as fa

    q, k, v = (x[-1, -1] for x in workload.arrays())
    out: np.ndarray = fa.reference.attention(q, k, v, causal=workload.causal)
    return out[:: max(workload.seqlen_q // 8, 1)]


def load_probe(directory: str) -> Callable[[int], float]:
    library = Path(directory) / "fma_peak.so"
    source = Path(__file__).with_name("fma_peak.c")
    flags = ["-O2", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).fma_gflops
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
    return function


def probe_peak(function: Callable[[int], float], num_threads: int) -> float:
    """GFLOP/s of all threads together; ctypes releases the GIL."""
    with ThreadPoolExecutor(num_threads) as pool:
        return sum(pool.map(function, [PEAK_ITERATIONS] * num_threads))


def measure(
    workload: Workload, num_threads: int, rounds: int, peak: Callable[[int], float]
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every call of each contender, and the best peak seen between them."""
    context = multiprocessing.get_context("spawn")
    expected = expected_rows(workload)
    pipes, processes = {}, []
    for contender in CONTENDERS:
        pipes[contender], theirs = context.Pipe()
        arguments = (contender, workload, num_threads, theirs)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
        rows = pipes[contender].recv()
        np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-5, err_msg=contender)

    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    best_peak = 0.0
    for turn in range(rounds + 2):  # two to warm up
        best_peak = max(best_peak, probe_peak(peak, num_threads))
        for contender, pipe in pipes.items():
            pipe.send(True)
            elapsed = pipe.recv()
            if turn >= 2:
                seconds[contender].append(elapsed)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return seconds, best_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("shapes", nargs="*", type=parse_shape)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    shapes = options.shapes or [
        parse_shape("1,12,2048,64"),
        parse_shape("1,12,2048,64:causal"),
    ]

    # Workers of one process that spin for new work would take the cores from the other's turn.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    print(f"{options.threads} threads, {options.rounds} rounds, GFLOP/s (% of FMA peak)")
    print(f"{'shape':<26}{'':<10}{'median':>16}{'best':>16}{'median ms':>11}  beside torch")
    with tempfile.TemporaryDirectory() as directory:
        peak = load_probe(directory)
        for workload in shapes:
            seconds, best_peak = measure(workload, options.threads, options.rounds, peak)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            for name, times in seconds.items():
                rates = [workload.flops / t / 1e9 for t in (medians[name], min(times))]
                shown = [f"{r:9.1f} ({100 * r / best_peak:3.0f}%)" for r in rates]
                ratio = medians["torch"] / medians[name]
                label = str(workload) if name == CONTENDERS[0] else ""
                print(
                    f"{label:<26}{name:<10}{shown[0]:>16}{shown[1]:>16}"
                    f"{1e3 * medians[name]:>11.2f}  {ratio:.2f}x"
                )
            print(f"{'':<26}{'FMA peak':<10}{best_peak:9.1f}")


if __name__ == "__main__":
    main()
