"""Masks that are key ranges, beside the same masks read tile by tile: python bench/mask_speed.py

A byte of a mask that is neither 0 nor 1 is read as it comes, so the second way has bytes of 2.  The
two ways and the call without a mask take turns on one thread; the least processor time of all
counts, which says something on a busy machine, too.
"""

import os
import time
from collections.abc import Callable

import numpy as np

import fastattn as fa

TURNS = int(os.environ.get("TURNS", "12"))


def keep_lengths(batch: int, seqlen: int) -> np.ndarray:
    """Padding on the right, half of all tokens; (batch, 1, 1, seqlen)."""
    lengths = np.random.default_rng(0).permutation(np.linspace(1, seqlen, batch).astype(int))
    return (np.arange(seqlen) < lengths[:, None])[:, None, None]


def cases() -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    of_keys, i = keep_lengths(8, 512), np.arange(2048)
    causal = i[:, None] >= i
    random = np.random.default_rng(0).random((2048, 2048))
    return {
        "padded to half": ((8, 12, 512, 64), of_keys),
        "padded to half, for each query": ((8, 12, 512, 64), np.repeat(of_keys, 512, axis=2)),
        "causal": ((1, 12, 2048, 64), causal),
        "window of 256": ((1, 12, 2048, 64), causal & (i[:, None] < i + 256)),
        "8 packed documents": ((1, 12, 2048, 64), i[:, None] // 256 == i // 256),
        "random, no key ranges": ((1, 12, 2048, 64), random < 0.5),
        "short, padded to half": ((32, 12, 32, 32), keep_lengths(32, 32)),
    }


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> None:
    fa.attention(q, k, v, mask=mask, num_threads=1)


def both_passes(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> None:
    out, lse = fa.attention(q, k, v, mask=mask, return_lse=True, num_threads=1)
    fa.attention_backward(q, q, k, v, out, lse, mask=mask, num_threads=1)


def best_times(
    run: Callable[..., None], arrays: np.ndarray, masks: list[np.ndarray | None]
) -> list[float]:
    """Milliseconds with each mask."""
    best = [float("inf")] * len(masks)
    for _ in range(TURNS):
        for i, mask in enumerate(masks):
            start = time.process_time()
            run(*arrays, mask)
            best[i] = min(best[i], 1e3 * (time.process_time() - start))
    return best


def main() -> None:
    for name, (shape, mask) in cases().items():
        arrays = np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)
        masks = [None, (2 * mask.astype(np.uint8)).view(bool), mask]
        for run in (forward, both_passes):
            plain, read, ranges = best_times(run, arrays, masks)
            print(
                f"{shape!s:17}{name:31}{run.__name__:12}no mask {plain:8.2f} ms, "
                f"read {read:8.2f} ms, key ranges {ranges:8.2f} ms, ratio {ranges / read:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
