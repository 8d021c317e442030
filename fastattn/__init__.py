"""fastattn: exact attention on multicore CPUs, from plain NumPy arrays.

>>> import numpy as np
>>> import fastattn as fa
>>> q = k = v = np.ones((1, 4, 128, 64), dtype=np.float32)
>>> fa.attention(q, k, v, causal=True).shape
(1, 4, 128, 64)

`fastattn.reference` is the specification: the same functions in readable float64 NumPy.
"""

# Under another name, so that `dir` shows the public names alone.
import typing as _typing

from fastattn import reference
from fastattn._attention import attention, merge_attention, self_attention
from fastattn._backward import attention_backward
from fastattn._cache import KVCache
from fastattn._config import show_config
from fastattn._explain import Explanation, explain
from fastattn._layers import MultiHeadAttention
from fastattn._paged_cache import OutOfPagesError, PagedKVCache
from fastattn._varlen import attention_varlen, attention_varlen_backward
from fastattn._weights import attention_weights
from fastattn.reference import Gradients

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

if not _typing.TYPE_CHECKING:  # for a type checker, any name would be an attribute

    def __getattr__(name):
        if name == "__version__":
            # Not at import: importlib.metadata takes longer to import than fastattn.
            from importlib.metadata import version

            globals()["__version__"] = version("fastattn")
            return globals()["__version__"]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
