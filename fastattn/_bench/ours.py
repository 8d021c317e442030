"""The calls of fastattn."""

from typing import Any

import numpy as np

from fastattn._attention import attention
from fastattn._bench import models, program
from fastattn._bench.forms import Call, pack, starts
from fastattn._bench.workloads import Workload, real_dtype
from fastattn._cache import KVCache
from fastattn._layers import MultiHeadAttention
from fastattn._paged_cache import PagedKVCache
from fastattn._varlen import attention_varlen

# Tokens of a page: the usual size of serving systems (vLLM's default).
PAGE_SIZE = 16


def make(workload: Workload, num_threads: int) -> Call:
    """The call of a workload, whatever it takes."""
    if workload.model:
        import fastattn.torch

        fastattn.torch.enable()
        return models.make(workload, num_threads, "sdpa")
    if workload.product_of:
        settings: dict[str, Any] = workload.options() | {"num_threads": num_threads}
        if workload.product_of == "numpy":
            return program.of_numpy(workload, attention, **settings)
        import fastattn.torch

        return program.of_torch(workload, fastattn.torch.attention, **settings)
    if workload.layer:
        return _layer(workload, num_threads)
    if workload.gradients:
        return _both_passes(workload, num_threads)
    if workload.packed:
        return _packed(workload, num_threads)
    if workload.cache == "KVCache":
        return _cached(workload, num_threads)
    if workload.cache == "PagedKVCache":
        return _paged(workload, num_threads)
    q, k, v = workload.arrays()
    options = workload.options()
    return Call(lambda: attention(q, k, v, num_threads=num_threads, **options), np.asarray)


def _layer(workload: Workload, num_threads: int) -> Call:
    x = workload.layer_input()
    layer = MultiHeadAttention(*workload.layer_weights(), num_heads=workload.num_heads)
    options: dict[str, Any] = workload.options() | {"num_threads": num_threads}
    return Call(lambda: layer(x, **options), np.asarray)


def _both_passes(workload: Workload, num_threads: int) -> Call:
    from fastattn import attention_backward

    q, k, v = workload.arrays()
    grad_out = workload.grad_out()
    options: dict[str, Any] = workload.options() | {"num_threads": num_threads}

    def call() -> Any:
        out, lse = attention(q, k, v, return_lse=True, **options)
        return attention_backward(grad_out, q, k, v, out, lse, needs=("q", "k", "v"), **options)

    return Call(call, lambda grads: (grads.q, grads.k, grads.v))


def _packed(workload: Workload, num_threads: int) -> Call:
    q, k, v = (pack(workload, x) for x in workload.arrays())
    begins = starts(workload)
    options: dict[str, Any] = workload.options() | {"num_threads": num_threads}
    return Call(
        lambda: attention_varlen(q, k, v, begins, begins, **options),
        lambda out: [part.swapaxes(0, 1) for part in np.split(out, begins[1:-1])],
    )


def _cached(workload: Workload, num_threads: int) -> Call:
    q, k, v = workload.arrays()
    cache = KVCache(
        workload.batch, workload.num_kv_heads, workload.seqlen_k, workload.head_dim,
        dtype=real_dtype(workload.cache_dtype or workload.dtype),
    )  # fmt: skip
    cache.append(k, v, counts=np.array(workload.key_lengths))
    return Call(lambda: cache.attention(q, num_threads=num_threads), np.asarray)


def _paged(workload: Workload, num_threads: int) -> Call:
    """The sequences grow page by page in turns, as they do when they are served together: the pages
    of each lie scattered."""
    q, k, v = workload.arrays()
    lengths = workload.key_lengths
    cache = PagedKVCache(
        sum(-(-n // PAGE_SIZE) for n in lengths), PAGE_SIZE, workload.num_kv_heads,
        workload.head_dim, dtype=real_dtype(workload.cache_dtype or workload.dtype),
    )  # fmt: skip
    ids = [cache.add() for _ in lengths]
    for at in range(0, max(lengths), PAGE_SIZE):
        for b, n in enumerate(lengths):
            if at < n:
                new = np.s_[b : b + 1, :, at : min(at + PAGE_SIZE, n)]
                cache.append(k[new], v[new], ids[b : b + 1])
    return Call(lambda: cache.attention(q, ids, num_threads=num_threads), np.asarray)
