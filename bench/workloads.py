"""The shapes that are measured, by name."""

from typing import Any, NamedTuple

import numpy as np


class Workload(NamedTuple):
    """Sizes of one forward call."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False

    def arrays(self, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v, the same on every call."""
        rng = np.random.default_rng(0)
        q = rng.standard_normal((self.batch, self.num_heads, self.seqlen_q, self.head_dim))
        kv_shape = (self.batch, self.num_kv_heads, self.seqlen_k, self.head_dim)
        k, v = (rng.standard_normal(kv_shape) for _ in range(2))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)

    @property
    def flops(self) -> float:
        """Useful operations: 4 per score and feature, half of the square for causal."""
        scores = self.batch * self.num_heads * self.seqlen_q * self.seqlen_k
        return 4.0 * scores * self.head_dim * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        heads = f"{self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        length = f"{self.seqlen_q}"
        if self.seqlen_q != self.seqlen_k:
            length += f"x{self.seqlen_k}"
        kind = " causal" if self.causal else ""
        return f"({self.batch},{heads},{length},{self.head_dim}){kind}"


WORKLOADS = {
    "prefill-2k": Workload(1, 12, 12, 2048, 2048, 64),
    "prefill-2k-causal": Workload(1, 12, 12, 2048, 2048, 64, causal=True),
    "prefill-4k-wide": Workload(1, 8, 8, 4096, 4096, 128),
    "grouped-1k-causal": Workload(1, 32, 8, 1024, 1024, 128, causal=True),
    "many-short": Workload(8, 12, 12, 128, 128, 64),
    "decode-4k": Workload(1, 32, 32, 1, 4096, 128),
    "decode-4k-grouped": Workload(1, 32, 8, 1, 4096, 128),
    "one-query": Workload(1, 1, 1, 1, 1, 64),
}
