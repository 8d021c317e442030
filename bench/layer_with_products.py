"""A layer with its products, beside plain NumPy attention: python bench/layer_with_products.py

Both are `fastattn.MultiHeadAttention` with biases and a residual, and so have the same products by
NumPy's BLAS; one computes the attention between them in NumPy, as a good user writes it.  They take
turns in one process.  A first argument is the number of turns.  Below a size stands where the time
of fastattn's layer goes: `attend`, the matrix products, and the rest, which is biases, residual and
Python.
"""

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

import fastattn as fa
from fastattn import _layers

NUM_HEADS = 12
SIZES = [(rows, width) for width in (384, 768) for rows in ((32, 32), (8, 128), (1, 512))]
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 40

Seconds = defaultdict[str, list[float]]


class PlainLayer(fa.MultiHeadAttention):
    """The layer with NumPy attention, which scales q and divides the result, not the scores."""

    def attend(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        out = options["out"]
        scores = (q * q.dtype.type(1 / math.sqrt(q.shape[-1]))) @ k.swapaxes(-1, -2)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        np.matmul(scores, v, out=out)
        out /= scores.sum(axis=-1, keepdims=True)
        return out


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **options)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def measure(batch: int, seqlen: int, width: int) -> None:
    rng = np.random.default_rng(0)
    w_q, w_k, w_v, w_o = (rng.standard_normal((4, width, width)) * width**-0.5).astype(np.float32)
    biases = dict(zip(("w_q_bias", "w_k_bias", "w_v_bias", "w_o_bias"), w_q, strict=False))
    x = rng.standard_normal((batch, seqlen, width), dtype=np.float32)
    layers = {
        name: kind(w_q, w_k, w_v, w_o, num_heads=NUM_HEADS, **biases)
        for name, kind in (("fastattn", fa.MultiHeadAttention), ("plain", PlainLayer))
    }
    difference = np.abs(layers["fastattn"](x) - layers["plain"](x)).max()
    assert difference < 1e-4, difference

    seconds: Seconds = defaultdict(list)
    calls = {name: timed(layer, seconds[name]) for name, layer in layers.items()}
    for _ in range(ROUNDS):
        for call in calls.values():
            call(x, residual=True)
    plain, ours = (statistics.median(seconds[name]) for name in ("plain", "fastattn"))
    pairs = zip(seconds["plain"], seconds["fastattn"], strict=True)
    ratio = statistics.median(theirs / own for theirs, own in pairs)
    best = min(seconds["plain"]) / min(seconds["fastattn"])
    print(
        f"({batch},{seqlen}) embed {width}: plain NumPy {plain * 1e3:.2f} ms, "
        f"fastattn {ours * 1e3:.2f} ms, {ratio:.2f} times as fast (of the best {best:.2f})"
    )

    parts: Seconds = defaultdict(list)
    project = _layers._project
    _layers._project = timed(project, parts["products"])
    layers["fastattn"].attend = timed(layers["fastattn"].attend, parts["attention"])
    for _ in range(ROUNDS):
        timed(layers["fastattn"], parts["whole"])(x, residual=True)
        # The two products of a call are one part.
        parts["products"][-2:] = [sum(parts["products"][-2:])]
    _layers._project = project
    shares = {name: statistics.median(values) for name, values in parts.items()}
    shares["rest"] = shares["whole"] - shares["products"] - shares["attention"]
    print("    " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in shares.items()))


def main() -> None:
    for (batch, seqlen), width in SIZES:
        measure(batch, seqlen, width)


if __name__ == "__main__":
    main()
