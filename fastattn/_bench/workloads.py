"""What a benchmark computes: sizes, dtype and options of one call, and its arrays."""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

WINDOW = 256  # keys that a query sees
SEGMENTS = 8  # documents packed into one sequence, all of one length
# Rows, sum and columns of the product of a program: 1,024 tokens of MiniLM into its wide layer.
PRODUCT_SIZES = (1024, 384, 1536)
# Products of the forward pass and both passes: q k^T and p v; q k^T again, and four for gradients.
FORWARD_PRODUCTS, BOTH_PRODUCTS = 2, 7
# int8 storage has one float32 scale per token and head, for keys and values each.
SCALE_BYTES = 4

_SHORT = {"float32": "", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}


class Workload(NamedTuple):
    """One forward call, or with `gradients` a forward and a backward call together, or with `layer`
    a call of a layer, with `product_of` a call and a product in turns, with `model` a call of a
    whole model."""

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
    kind: str = "prefill"  # what it is listed under
    # Real lengths of the sequences of a batch that differ; seqlen_k is the longest.  With as many
    # queries as keys they are packed, with seqlen_q == 1 they are in a cache.
    lengths: tuple[int, ...] = ()
    cache: str = ""  # "KVCache" or "PagedKVCache": where keys and values are, if not in arrays
    cache_dtype: str = ""  # of its storage; "": `dtype`
    gradients: bool = False
    # Self-attention with four projections; its features are those of all heads side by side.
    layer: bool = False
    # The library, "numpy" or "torch", whose product of two matrices takes turns with attention.
    product_of: str = ""
    model: str = ""  # a key of models.MODELS
    num_layers: int = 0  # of the model
    alone: bool = False  # measured with fastattn only

    @property
    def shape(self) -> str:
        """The sizes as (batch, heads[/key heads], queries[xkeys], head_dim)."""
        heads = f"{self.num_heads}"
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        keys = f"{min(self.lengths)}..{max(self.lengths)}" if self.lengths else f"{self.seqlen_k}"
        length = keys if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{keys}"
        return f"({self.batch},{heads},{length},{self.head_dim})"

    @property
    def label(self) -> str:
        """Everything that tells this workload from others, for people."""
        parts = [
            self.shape,
            "causal" if self.causal else "",
            self.option,
            _SHORT[self.dtype],
            self.cache_dtype,
            self.cache,
            "forward+backward" if self.gradients else "",
            "MultiHeadAttention" if self.layer else "",
            f"and a product of {self.product_of}" if self.product_of else "",
            f"{self.num_layers} layers of {self.model}" if self.model else "",
        ]
        return " ".join(part for part in parts if part)

    @property
    def what(self) -> str:
        """What is called: one of those that a contender `does`."""
        if self.model:
            return "model"
        return "program" if self.product_of else "attention"

    @property
    def group_size(self) -> int:
        """Query heads per key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def packed(self) -> bool:
        """Whether the sequences are packed one after another."""
        return bool(self.lengths) and self.seqlen_q > 1

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return self.lengths or (self.seqlen_k,) * self.batch

    @property
    def query_lengths(self) -> tuple[int, ...]:
        """Queries of each sequence."""
        return self.lengths if self.packed else (self.seqlen_q,) * self.batch

    @property
    def num_scores(self) -> int:
        """Elements of the full score matrices."""
        pairs = zip(self.query_lengths, self.key_lengths, strict=True)
        return self.num_heads * sum(rows * keys for rows, keys in pairs)

    @property
    def output_bytes(self) -> int:
        """Size of the result of the forward pass."""
        num_elements = self.num_heads * sum(self.query_lengths) * self.head_dim
        return num_elements * _itemsize(self.dtype)

    @property
    def kv_bytes(self) -> int:
        """Size of the keys and values that take part, as they are stored."""
        dtype = self.cache_dtype or self.dtype
        row = self.head_dim * _itemsize(dtype) + (SCALE_BYTES if dtype == "int8" else 0)
        return 2 * row * self.num_kv_heads * sum(self.key_lengths)

    @property
    def reads(self) -> bool:
        """Whether reading keys and values bounds the time: each is of use to one query only."""
        return self.seqlen_q == 1 and self.seqlen_k > 1 and not self.model

    @property
    def flops(self) -> float:
        """Useful operations: 4 per score and feature, scores of keys that take part by position
        only, half of the square for causal; with gradients 7 products instead of 2; of a layer
        also its projections, 2 per weight and row.  Those of a model are not counted: 0."""
        if self.model:
            return 0.0
        share = 0.5 if self.causal else 1.0
        if self.option == "segments":
            share /= SEGMENTS
        if self.option == "window":
            left_out = self.seqlen_q - WINDOW  # the first queries see fewer keys
            share = WINDOW * (left_out + (WINDOW + 1) / 2) / (self.seqlen_q * self.seqlen_k)
        products = BOTH_PRODUCTS if self.gradients else FORWARD_PRODUCTS
        attention = 2.0 * products * self.num_scores * self.head_dim * share
        if self.product_of:
            return attention + 2.0 * math.prod(PRODUCT_SIZES)
        if not self.layer:
            return attention
        features = self.num_heads * self.head_dim
        weights = 2 * features * (features + features // self.group_size)
        return attention + 2.0 * self.batch * self.seqlen_q * weights

    def arrays(self) -> tuple[Array, Array, Array]:
        """q, k and v, the same on every call; sequences of unequal lengths are padded."""
        kv_shape = (self.batch, self.num_kv_heads, self.seqlen_k, self.head_dim)
        return _normal_arrays((self.q_shape, kv_shape, kv_shape), self.dtype)

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """Shape of q, and of the result."""
        return (self.batch, self.num_heads, self.seqlen_q, self.head_dim)

    def layer_input(self) -> Array:
        """The input of a layer, (batch, seqlen, features), the same on every call."""
        q = self.arrays()[0]
        return q.swapaxes(1, 2).reshape(self.batch, self.seqlen_q, -1)

    def layer_weights(self) -> tuple[Array, Array, Array, Array]:
        """``w_q, w_k, w_v, w_o`` of a layer, the same on every call, which keep the size of what
        they multiply."""
        features = self.num_heads * self.head_dim
        narrow = features // self.group_size
        rng = np.random.default_rng(3)
        w_q, w_k, w_v, w_o = (
            (rng.standard_normal((features, n)) * features**-0.5).astype(self.dtype)
            for n in (features, narrow, narrow, features)
        )
        return w_q, w_k, w_v, w_o

    def product_input(self) -> tuple[Array, Array]:
        """The operands of the product of a program, the same on every call."""
        rows, inner, columns = PRODUCT_SIZES
        rng = np.random.default_rng(4)
        x, w = (_normal_array(rng, s, "float32") for s in ((rows, inner), (inner, columns)))
        return x, w

    def grad_out(self) -> Array:
        """The gradient of the result, the same on every call."""
        return _normal_array(np.random.default_rng(2), self.q_shape, self.dtype)

    def options(self) -> dict[str, Any]:
        """The other arguments of `fastattn.attention`, the same on every call."""
        made = {"causal": self.causal} if self.causal else {}
        return made | OPTIONS[self.option](self, np.random.default_rng(1))

    def shortened(self, length: int) -> "Workload":
        """The same call with sequences of at most `length`."""
        return self._replace(
            seqlen_q=min(length, self.seqlen_q),
            seqlen_k=min(length, self.seqlen_k),
            lengths=tuple(min(length, n) for n in self.lengths),
        )

    def small(self, length: int) -> "Workload":
        """The same kind of call with sequences of at most `length`, no option: a first call that
        loads what a library loads lazily."""
        return self.shortened(length)._replace(option="", causal=False)


def _segment_ids(workload: Workload) -> tuple[Array, Array]:
    ids = np.arange(workload.seqlen_k) * SEGMENTS // workload.seqlen_k
    return ids[: workload.seqlen_q], ids


#: What `Workload.option` may be, and the arguments that it stands for.
OPTIONS: dict[str, Callable[[Workload, np.random.Generator], dict[str, Any]]] = {
    "": lambda w, rng: {},
    "mask": lambda w, rng: {"mask": rng.random((w.seqlen_q, w.seqlen_k)) < 0.9},
    "bias": lambda w, rng: {
        "bias": rng.standard_normal((w.num_heads, w.seqlen_q, w.seqlen_k)).astype(w.dtype)
    },
    "alibi": lambda w, rng: {"alibi_slopes": 2.0 ** -np.linspace(1, 8, w.num_heads)},
    "softcap": lambda w, rng: {"softcap": 30.0},
    "sinks": lambda w, rng: {"sinks": rng.standard_normal(w.num_heads)},
    "window": lambda w, rng: {"window": (WINDOW - 1, 0)},
    "segments": lambda w, rng: {"segment_ids": _segment_ids(w)},
    "queries": lambda w, rng: {"softmax_axis": "queries"},
}


# The last ones are kept: a contender needs them again, and 1 GiB of random numbers takes seconds.
@functools.lru_cache(maxsize=1)
def _normal_arrays(shapes: tuple[tuple[int, ...], ...], dtype: str) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    q, k, v = (_normal_array(rng, shape, dtype) for shape in shapes)
    return q, k, v


def _normal_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype == "float64":
        return rng.standard_normal(shape)
    made: Array = rng.standard_normal(shape, np.float32)
    return made.astype(real_dtype(dtype), copy=False)


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def real_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name; bfloat16 is that of ``ml_dtypes``, which defines it for NumPy."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    made: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return made


def lacks(workload: Workload) -> str | None:
    """Why nobody can compute a workload here, or None.

    Parameters
    ----------
    workload : Workload
        Any.

    Returns
    -------
    str or None
        The reason.

    Examples
    --------
    >>> from fastattn._bench.workloads import lacks, prefill
    >>> lacks(prefill("small", 1, 2, 128, 64)) is None
    True
    """
    dtypes = {workload.dtype, workload.cache_dtype}
    if workload.baseline:
        dtypes.add(workload.baseline.dtype)
    if "bfloat16" in dtypes and importlib.util.find_spec("ml_dtypes") is None:
        return "bfloat16 needs ml_dtypes installed"
    return None


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


def decode(
    name: str, batch: int, num_heads: int, num_kv_heads: int, seqlen_k: int, **rest: Any
) -> Workload:
    """A workload with one query per sequence and head_dim 128."""
    rest.setdefault("kind", "decode")
    return Workload(name, batch, num_heads, num_kv_heads, 1, seqlen_k, 128, **rest)
