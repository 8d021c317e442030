"""fastattn: exact attention on multicore CPUs, from plain NumPy arrays.

>>> import numpy as np
>>> import fastattn as fa
>>> q = k = v = np.ones((1, 4, 128, 64), dtype=np.float32)
>>> fa.attention(q, k, v, causal=True).shape
(1, 4, 128, 64)

`fastattn.reference` is the specification: the same functions in readable float64 NumPy.
"""

from typing import TYPE_CHECKING

from fastattn import reference
from fastattn.attention import Explanation, attention, explain, merge_attention, self_attention
from fastattn.backward import attention_backward
from fastattn.cache import KVCache
from fastattn.config import show_config
from fastattn.layers import MultiHeadAttention
from fastattn.paged_cache import OutOfPagesError, PagedKVCache
from fastattn.reference import Gradients
from fastattn.varlen import attention_varlen, attention_varlen_backward
from fastattn.weights import attention_weights

__all__ = [
    "Explanation",
    "Gradients",
    "KVCache",
    "MultiHeadAttention",
    "OutOfPagesError",
    "PagedKVCache",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_weights",
    "explain",
    "merge_attention",
    "reference",
    "self_attention",
    "show_config",
]

__version__: str

if not TYPE_CHECKING:  # for a type checker, any name would be an attribute

    def __getattr__(name):
        if name == "__version__":
            # Not at import: importlib.metadata takes longer to import than fastattn.
            from importlib.metadata import version

            globals()["__version__"] = version("fastattn")
            return globals()["__version__"]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
