"""Small caches, and tokens for them."""

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa
from fastattn._rounding import round_once

FLOAT_DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
DTYPES = [*FLOAT_DTYPES, np.dtype(np.int8)]
NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V = 2, 6, 4
once = pytest.mark.any_kernel_set


def make_cache(batch_size=2, max_seqlen=16, **options):
    return fa.KVCache(
        batch_size, NUM_KV_HEADS, max_seqlen, HEAD_DIM, head_dim_v=HEAD_DIM_V, **options
    )


def make_paged(num_pages=16, page_size=4, **options):
    return fa.PagedKVCache(
        num_pages, page_size, NUM_KV_HEADS, HEAD_DIM, head_dim_v=HEAD_DIM_V, **options
    )


def make_tokens(rng, *lead, new, dtype=np.float32):
    """Keys and values of `new` tokens."""
    shapes = ((*lead, NUM_KV_HEADS, new, width) for width in (HEAD_DIM, HEAD_DIM_V))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def make_queries(rng, *lead, new, dtype=np.float32):
    return rng.standard_normal((*lead, 2 * NUM_KV_HEADS, new, HEAD_DIM)).astype(dtype)


def snapshot(cache):
    """Everything that a cache holds, for comparison."""
    state = [array.tobytes() for array in cache._arrays]
    if isinstance(cache, fa.KVCache):
        return [*state, cache._counts.tolist()]
    sequences = {i: (list(s.pages), s.length) for i, s in cache._sequences.items()}
    free = cache._free_pages[: cache._num_free]
    return [*state, sequences, free, list(cache._num_users)]


def expected_window(q, history, window, sink_tokens, position):
    """One sequence's queries at `position` and on, over its whole history."""
    k, v = (np.concatenate(x, axis=1) for x in history)
    key, query = np.arange(k.shape[1]), position + np.arange(q.shape[1])[:, np.newaxis]
    mask = (key <= query) & ((key > query - window) | (key < sink_tokens))
    return fa.reference.attention(q, k, v, mask=mask, return_lse=True)


def stored(x, dtype):
    """What a cache of this dtype makes of the float32 array x; int8 decoded to float32."""
    if dtype != np.int8:
        return round_once(x, dtype)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale
