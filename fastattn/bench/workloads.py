"""What is measured: sizes and options of attention calls, by name."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: What `Workload.option` may be.
OPTIONS = ("", "mask", "bias", "alibi", "softcap", "sinks", "window", "segments", "queries")

WINDOW = 256  # keys that a query sees
SEGMENTS = 8  # documents packed into one sequence, all of one length
SOFTCAP = 30.0


class Workload(NamedTuple):
    """One forward call."""

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool = False
    option: str = ""
    dtype: str = "float32"
    num_threads: int | None = None  # None: those of the run
    # Whose time fastattn's is compared with, measured in the same rounds.
    baseline: "Workload | None" = None

    @property
    def shape(self) -> str:
        """The sizes as (batch, heads[/key heads], queries[xkeys], head_dim)."""
        heads = f"{self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        length = f"{self.seqlen_q}"
        if self.seqlen_q != self.seqlen_k:
            length += f"x{self.seqlen_k}"
        return f"({self.batch},{heads},{length},{self.head_dim})"

    @property
    def label(self) -> str:
        """Everything that tells this workload from others, for people."""
        parts = [self.shape, "causal" if self.causal else "", self.option]
        parts.append("" if self.dtype == "float32" else self.dtype)
        return " ".join(part for part in parts if part)

    @property
    def group_size(self) -> int:
        """Query heads per key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_scores(self) -> int:
        """Elements of the full score matrices."""
        return self.batch * self.num_heads * self.seqlen_q * self.seqlen_k

    @property
    def output_bytes(self) -> int:
        """Size of the result."""
        num_elements = self.batch * self.num_heads * self.seqlen_q * self.head_dim
        return num_elements * np.dtype(self.dtype).itemsize

    @property
    def flops(self) -> float:
        """Useful operations: 4 per score and feature, scores of keys that take part by position
        only; half of the square for causal."""
        share = 0.5 if self.causal else 1.0
        if self.option == "segments":
            share /= SEGMENTS
        if self.option == "window":
            left_out = self.seqlen_q - WINDOW  # the first queries see fewer keys
            share = WINDOW * (left_out + (WINDOW + 1) / 2) / (self.seqlen_q * self.seqlen_k)
        return 4.0 * self.num_scores * self.head_dim * share

    def arrays(self) -> tuple[Array, Array, Array]:
        """q, k and v, the same on every call."""
        rng = np.random.default_rng(0)
        q_shape = (self.batch, self.num_heads, self.seqlen_q, self.head_dim)
        kv_shape = (self.batch, self.num_kv_heads, self.seqlen_k, self.head_dim)
        q, k, v = (rng.standard_normal(shape) for shape in (q_shape, kv_shape, kv_shape))
        return q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype)

    def options(self) -> dict[str, Any]:
        """The other arguments of `fastattn.attention`, the same on every call."""
        rng = np.random.default_rng(1)
        made: dict[str, Any] = {"causal": self.causal} if self.causal else {}
        if self.option == "mask":
            made["mask"] = rng.random((self.seqlen_q, self.seqlen_k)) < 0.9
        elif self.option == "bias":
            bias = rng.standard_normal((self.num_heads, self.seqlen_q, self.seqlen_k))
            made["bias"] = bias.astype(self.dtype)
        elif self.option == "alibi":
            made["alibi_slopes"] = 2.0 ** -np.linspace(1, 8, self.num_heads)
        elif self.option == "softcap":
            made["softcap"] = SOFTCAP
        elif self.option == "sinks":
            made["sinks"] = rng.standard_normal(self.num_heads)
        elif self.option == "window":
            made["window"] = (WINDOW - 1, 0)
        elif self.option == "segments":
            ids = np.arange(self.seqlen_k) * SEGMENTS // self.seqlen_k
            made["segment_ids"] = (ids[: self.seqlen_q], ids)
        elif self.option == "queries":
            made["softmax_axis"] = "queries"
        return made


def prefill(
    name: str,
    batch: int,
    num_heads: int,
    seqlen: int,
    head_dim: int,
    *,
    num_kv_heads: int | None = None,
    **rest: Any,
) -> Workload:
    """A workload with as many queries as keys."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    return Workload(name, batch, num_heads, kv_heads, seqlen, seqlen, head_dim, **rest)


def _growth(seqlen: int, **rest: Any) -> Workload:
    return prefill(f"growth-{seqlen}", 1, 1, seqlen, 64, **rest)


#: Doubling lengths, each beside its half: time is to grow with the square, memory with the length.
GROWTH = (
    _growth(1024),
    *(_growth(2 * n, baseline=_growth(n)) for n in (1024, 2048, 4096, 8192, 16384)),
)

_PLAIN = prefill("prefill-2k", 1, 12, 2048, 64)

#: Everything that is measured unless less is asked for.
GRID = (
    prefill("prefill-512", 1, 12, 512, 64),
    prefill("prefill-512-causal", 1, 12, 512, 64, causal=True),
    _PLAIN,
    prefill("prefill-2k-causal", 1, 12, 2048, 64, causal=True),
    prefill("prefill-4k-wide", 1, 8, 4096, 128),
    prefill("prefill-4k-wide-causal", 1, 8, 4096, 128, causal=True),
    prefill("grouped-1k-causal", 1, 32, 1024, 128, num_kv_heads=8, causal=True),
    prefill("many-short", 8, 12, 128, 64),
    prefill("head-dim-32", 1, 12, 2048, 32),
    prefill("head-dim-80", 1, 12, 2048, 80),
    prefill("head-dim-256", 1, 4, 2048, 256),
    *(
        _PLAIN._replace(name=f"{option}-2k", option=option, baseline=_PLAIN)
        for option in ("mask", "bias", "alibi", "softcap", "sinks", "segments", "queries")
    ),
    prefill(
        "window-8k", 1, 4, 8192, 64, option="window", baseline=prefill("prefill-8k", 1, 4, 8192, 64)
    ),
    prefill("double-2k", 1, 12, 2048, 64, dtype="float64"),
    prefill("one-query", 1, 1, 1, 64, num_threads=1),
    *GROWTH,
)

#: A minute's look at the machine.
QUICK = ("prefill-512", "prefill-2k", "prefill-2k-causal", "many-short", "one-query")

#: Memory-bound shapes of generation, one query per sequence.
DECODE = (
    Workload("decode-4k", 1, 32, 32, 1, 4096, 128),
    Workload("decode-4k-grouped", 1, 32, 8, 1, 4096, 128),
)
