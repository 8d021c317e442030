"""pytest-benchmark cases: fastattn, naive NumPy, and torch where it is installed.

    pytest bench/bench_attention.py --benchmark-group-by=param:name

Every contender's result is checked against fastattn.reference before it is timed.  All run in this
one process, one after the other; for figures to quote, use ``python -m fastattn bench``.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import fastattn as fa
from fastattn.bench.workloads import DECODE, GRID, Workload

Call = Callable[[], np.ndarray]

NAMES = ("prefill-2k", "prefill-2k-causal", "prefill-4k-wide", "grouped-1k-causal", "many-short")
WORKLOADS = {w.name: w for w in (*GRID, *DECODE) if w.name in NAMES or w in DECODE}

# A score matrix above this many elements is left out of the NumPy cases: it is a test of swap.
NUMPY_MAX_SCORES = 2**28


def fastattn_call(workload: Workload) -> Call:
    q, k, v = workload.arrays()
    out = np.empty_like(q)
    return lambda: fa.attention(q, k, v, causal=workload.causal, out=out)


def numpy_call(workload: Workload) -> Call:
    q, k, v = workload.arrays()
    scale = np.float32(workload.head_dim**-0.5)
    group_size = workload.num_heads // workload.num_kv_heads
    offset = workload.seqlen_k - workload.seqlen_q
    keep = np.tri(workload.seqlen_q, workload.seqlen_k, offset, dtype=bool)

    def call() -> np.ndarray:
        k_all, v_all = (np.repeat(x, group_size, axis=1) if group_size > 1 else x for x in (k, v))
        scores = (q * scale) @ k_all.swapaxes(-1, -2)
        if workload.causal:
            scores = np.where(keep, scores, np.float32(-np.inf))
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        result: np.ndarray = scores @ v_all
        return result

    return call


def torch_call(workload: Workload) -> Call:
    import torch

    q, k, v = (torch.from_numpy(x) for x in workload.arrays())
    attention = torch.nn.functional.scaled_dot_product_attention
    grouped = workload.num_heads != workload.num_kv_heads
    # torch aligns causal top-left; the workloads that are causal have as many keys as queries.
    assert not workload.causal or workload.seqlen_q == workload.seqlen_k

    def call() -> np.ndarray:
        with torch.inference_mode():
            out = attention(q, k, v, is_causal=workload.causal, enable_gqa=grouped)
        result: np.ndarray = out.numpy()
        return result

    return call


CONTENDERS = {"fastattn": fastattn_call, "numpy": numpy_call, "torch": torch_call}


def check(out: np.ndarray, workload: Workload) -> None:
    """Compare a few rows of the first and the last head with the reference."""
    q, k, v = workload.arrays()
    rows = np.unique(np.linspace(0, workload.seqlen_q - 1, 5).astype(int))
    group_size = workload.num_heads // workload.num_kv_heads
    for b, h in ((0, 0), (workload.batch - 1, workload.num_heads - 1)):
        for i in rows:
            expected: Any = fa.reference.attention(
                q[b, h, i : i + 1],
                k[b, h // group_size],
                v[b, h // group_size],
                causal=workload.causal,
                q_offset=i + workload.seqlen_k - workload.seqlen_q,
            )
            np.testing.assert_allclose(out[b, h, i], expected[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_forward(benchmark: Any, name: str, contender: str) -> None:
    workload = WORKLOADS[name]
    if contender == "torch" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    scores = workload.batch * workload.num_heads * workload.seqlen_q * workload.seqlen_k
    if contender == "numpy" and scores > NUMPY_MAX_SCORES:
        pytest.skip("the score matrix is too large")
    call = CONTENDERS[contender](workload)
    check(call(), workload)
    benchmark(call)
    if benchmark.stats:
        gflops = workload.flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["gflops"] = round(gflops, 1)
