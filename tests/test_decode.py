"""Few query rows: the same bits whatever computes them, pages and caches included."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn as fa
from fastattn._rounding import round_once

FLOAT_DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
STORED_DTYPES = [*FLOAT_DTYPES, np.dtype(np.int8)]
# (num_heads, num_kv_heads)
HEADS = [(1, 1), (4, 2), (6, 1), (8, 8)]
# Splits are 1024 keys, blocks 128 or 64: both sides of either, and a tail.
SEQLENS = [1, 40, 129, 1025, 3100]

each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
each_stored = pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)


def make(
    rng: np.random.Generator,
    dtype: Any,
    seqlen_q: int,
    seqlen_k: int,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    head_dim: int = 64,
    head_dim_v: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shapes = (
        (batch, heads[0], seqlen_q, head_dim),
        (batch, heads[1], seqlen_k, head_dim),
        (batch, heads[1], seqlen_k, head_dim_v),
    )
    q, k, v = (round_once(rng.standard_normal(shape), np.dtype(dtype)) for shape in shapes)
    return q, k, v


def same(got: Any, expected: Any) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


def option_sets(rng: np.random.Generator, q: np.ndarray, k: np.ndarray) -> Iterator[dict[str, Any]]:
    batch, num_heads, seqlen_q = q.shape[:3]
    seqlen_k = k.shape[-2]
    scores = (batch, num_heads, seqlen_q, seqlen_k)
    yield {}
    yield {"causal": True, "softcap": 4.0, "window": (2000, 0)}
    yield {"mask": rng.random(scores) < 0.5, "bias": rng.standard_normal(scores)}
    yield {
        "kv_lengths": rng.integers(0, seqlen_k + 1, batch),
        "alibi_slopes": rng.random((batch, num_heads)),
        "sinks": rng.standard_normal(num_heads),
        "residual": round_once(rng.standard_normal((*scores[:3], 64)), q.dtype),
    }


@pytest.mark.slow_on_other_sets
@each_dtype
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("seqlen_q", range(1, 9))
def test_rows_alone_and_in_a_block(
    rng: np.random.Generator, seqlen_q: int, heads: tuple[int, int], dtype: Any
) -> None:
    """The last rows of a long prefill, decoded: where keys lie, or packed for many rows."""
    for seqlen_k in SEQLENS:
        rows = min(50, seqlen_k)
        q, k, v = make(rng, dtype, rows, seqlen_k, heads)
        whole = fa.attention(q, k, v, causal=True, return_lse=True)
        few = min(seqlen_q, rows)
        got = fa.attention(q[:, :, -few:], k, v, causal=True, return_lse=True)
        same(got, [x[:, :, -few:] for x in whole])


@pytest.mark.slow_on_other_sets
@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 8])
def test_threads(rng: np.random.Generator, seqlen_q: int, dtype: Any) -> None:
    for heads, seqlen_k, batch in (((4, 2), 5000, 1), ((3, 1), 9000, 2), ((2, 2), 2049, 3)):
        q, k, v = make(rng, dtype, seqlen_q, seqlen_k, heads, batch)
        for options in option_sets(rng, q, k):
            once = fa.attention(q, k, v, return_lse=True, num_threads=1, **options)
            for num_threads in (2, 3, 7):
                same(
                    fa.attention(q, k, v, return_lse=True, num_threads=num_threads, **options),
                    once,
                )


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_against_the_reference(rng: np.random.Generator, seqlen_q: int, dtype: Any) -> None:
    tolerance = {"float16": 2e-3, "bfloat16": 1e-2}.get(dtype.name, 2e-6)
    for seqlen_k in SEQLENS:
        q, k, v = make(rng, dtype, seqlen_q, seqlen_k)
        for options in option_sets(rng, q, k):
            out, lse = fa.attention(q, k, v, return_lse=True, **options)
            expected = fa.reference.attention(q, k, v, return_lse=True, **options)
            np.testing.assert_allclose(
                out.astype(np.float64), expected[0], rtol=tolerance, atol=tolerance
            )
            np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_views(rng: np.random.Generator, seqlen_q: int, dtype: Any) -> None:
    plain = make(rng, dtype, seqlen_q, 1300)
    whole = fa.attention(*plain, return_lse=True)
    views = {
        "heads inside": [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in plain],
        "features first": [x.swapaxes(-1, -2).copy().swapaxes(-1, -2) for x in plain],
        "backwards": [x[..., ::-1, ::-1].copy()[..., ::-1, ::-1] for x in plain],
        "every third": [np.repeat(x, 3, axis=-1)[..., ::3] for x in plain],
        "every other key": [np.repeat(x, 2, axis=-2)[..., ::2, :] for x in plain],
    }
    for view in views.values():
        same(fa.attention(*view, return_lse=True), whole)
    q, k, v = plain
    one = [np.broadcast_to(x[:1], x.shape) for x in (k, v)]  # a prefix that is shared
    same(
        fa.attention(q, *one, return_lse=True),
        fa.attention(q, *(x.copy() for x in one), return_lse=True),
    )


@each_dtype
def test_batch_alone_and_together(rng: np.random.Generator, dtype: Any) -> None:
    q, k, v = make(rng, dtype, 1, 2500, (4, 2), batch=5)
    lengths = np.array([2500, 0, 3, 1024, 1900])
    together = fa.attention(q, k, v, kv_lengths=lengths, return_lse=True)
    for b, length in enumerate(lengths):
        alone = fa.attention(q[b], k[b, :, :length], v[b, :, :length], return_lse=True)
        same(alone, [x[b] for x in together])


@each_dtype
@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 8, 9])
def test_grouped_and_repeated_heads(rng: np.random.Generator, group_size: int, dtype: Any) -> None:
    q, k, v = make(rng, dtype, 1, 1200, (2 * group_size, 2))
    grouped = fa.attention(q, k, v, return_lse=True)
    repeated = fa.attention(q, *(np.repeat(x, group_size, axis=1) for x in (k, v)), return_lse=True)
    same(repeated, grouped)


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_masked_out_keys(
    rng: np.random.Generator, poison: float, seqlen_q: int, dtype: Any
) -> None:
    q, k, v = make(rng, dtype, seqlen_q, 1500)
    j = np.arange(1500)
    ways: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"mask": j % 5 != 2}, j % 5 == 2),
        ({"kv_lengths": 1111}, j >= 1111),
        ({"window": (300, 0)}, j < 1500 - seqlen_q - 300),
        ({"segment_ids": (np.ones(seqlen_q, int), j // 1000)}, j < 1000),
    ]
    for options, unseen in ways:
        clean = fa.attention(q, k, v, return_lse=True, **options)
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, :, unseen], dirty_v[:, :, unseen] = poison, poison
        same(fa.attention(q, dirty_k, dirty_v, return_lse=True, **options), clean)


@each_dtype
def test_nan_stays_in_rows_that_see_it(rng: np.random.Generator, dtype: Any) -> None:
    q, k, v = make(rng, dtype, 4, 1200)
    clean = fa.attention(q, k, v, causal=True)
    for x in (k, v):
        kept = x[:, :, -2].copy()
        x[:, :, -2] = np.nan
        out = fa.attention(q, k, v, causal=True)
        assert out[:, :, :2].tobytes() == clean[:, :, :2].tobytes()
        assert np.isnan(out[:, :, 2:]).all()
        x[:, :, -2] = kept


# --- storage ----------------------------------------------------------------------------------


def query_dtypes(dtype: Any) -> list[np.dtype[Any]]:
    if dtype == np.int8:
        return [FLOAT_DTYPES[0], *FLOAT_DTYPES[2:]]
    return [dtype] if dtype.itemsize >= 4 else [dtype, np.dtype(np.float32)]


@pytest.mark.slow_on_other_sets
@each_stored
@pytest.mark.parametrize("page_size", [1, 16, 37])
def test_pages_and_one_piece(rng: np.random.Generator, page_size: int, dtype: Any) -> None:
    """KVCache, PagedKVCache with its pages anywhere."""
    lengths = [1300, 3, 0, 700]
    _, k, v = make(rng, np.float32, 1, max(lengths), batch=4)
    cache = fa.KVCache(4, 2, max(lengths), 64, dtype=dtype)
    cache.append(k, v, counts=lengths)
    pages = sum(-(-n // page_size) for n in lengths)
    paged = fa.PagedKVCache(pages + 9, page_size, 2, 64, dtype=dtype)
    other = paged.add(k[0, :, : 4 * page_size], v[0, :, : 4 * page_size])
    seq_ids = [paged.add() for _ in lengths]
    start = 0
    while start < max(lengths):  # turn by turn, so that the pages of a sequence are apart
        stop = start + int(rng.integers(1, 400))
        for b, length in enumerate(lengths):
            part = np.s_[b : b + 1, :, start : min(stop, length)]
            if start < length:
                paged.append(k[part], v[part], [seq_ids[b]])
        start = stop
    paged.free(other)
    for q_dtype in query_dtypes(dtype):
        for seqlen_q in (1, 3, 20):
            q = round_once(rng.standard_normal((4, 4, seqlen_q, 64)), q_dtype)
            whole = cache.attention(q, return_lse=True, num_threads=1)
            for num_threads in (1, 2, 3, 7):
                same(cache.attention(q, return_lse=True, num_threads=num_threads), whole)
                same(paged.attention(q, seq_ids, return_lse=True, num_threads=num_threads), whole)
            for b, length in enumerate(lengths):
                alone = paged.attention(q[b : b + 1], [seq_ids[b]], return_lse=True)
                same([x[0] for x in alone], [x[b] for x in whole])
                if q_dtype == dtype:
                    stored = (round_once(x[b, :, :length], dtype) for x in (k, v))
                    plain = fa.attention(q[b], *stored, causal=True, return_lse=True)
                    same(plain, [x[b] for x in whole])


@each_stored
def test_storage_against_the_reference(rng: np.random.Generator, dtype: Any) -> None:
    """What is attended to is what `to_arrays` shows, to float32's rounding."""
    _, k, v = make(rng, np.float32, 1, 1500, batch=2)
    cache = fa.KVCache(2, 2, 1500, 64, dtype=dtype)
    cache.append(k, v, counts=[1500, 77])
    wide = np.float64 if dtype == np.float64 else np.float32
    for seqlen_q in (1, 30):
        for options in ({}, {"softcap": 3.0, "sinks": np.ones(4)}, {"window": (40, 0)}):
            q = rng.standard_normal((2, 4, seqlen_q, 64)).astype(wide)
            out, lse = cache.attention(q, return_lse=True, **options)
            for b in range(2):
                expected = fa.reference.attention(
                    q[b], *cache.to_arrays(b), causal=True, return_lse=True, **options
                )
                np.testing.assert_allclose(out[b], expected[0], atol=3e-6)
                np.testing.assert_allclose(lse[b], expected[1], atol=3e-6)


@pytest.mark.parametrize("q_dtype", query_dtypes(np.dtype(np.int8)), ids=str)
@pytest.mark.parametrize("axis", ["keys", "queries"])
def test_int8_chunks(rng: np.random.Generator, axis: str, q_dtype: Any) -> None:
    """Integers with their scales: packed for many rows, read where they lie for few."""
    _, k, v = make(rng, np.float32, 1, 1200, batch=1)
    k *= 10.0 ** rng.uniform(-3, 1, (1, 2, 1200, 1)).astype(np.float32)
    cache = fa.KVCache(1, 2, 1200, 64, dtype=np.int8)
    cache.append(k, v)
    q = round_once(rng.standard_normal((1, 4, 40, 64)), q_dtype)
    if axis == "queries":
        whole = cache.attention(q, softmax_axis=axis)
        expected = fa.reference.attention(q[0], *cache.to_arrays(0), causal=True, softmax_axis=axis)
        tolerance = {"float16": 2e-3, "bfloat16": 1e-2}.get(q_dtype.name, 2e-5)
        np.testing.assert_allclose(
            whole[0].astype(np.float64), expected, rtol=tolerance, atol=tolerance
        )
        return
    whole = cache.attention(q, return_lse=True)
    for rows in (1, 3, 8, 23):
        parts = [
            cache.attention(q[:, :, i : i + rows], q_offset=1160 + i, return_lse=True)
            for i in range(0, 40, rows)
        ]
        same([np.concatenate([p[x] for p in parts], axis=2) for x in (0, 1)], whole)


def test_int8_scale_of_an_unused_slot(rng: np.random.Generator) -> None:
    """Slots past the length, and keys that are masked out, may hold anything."""
    _, k, v = make(rng, np.float32, 1, 200, batch=1)
    cache = fa.KVCache(1, 2, 300, 64, dtype=np.int8)
    cache.append(k, v)
    for seqlen_q in (1, 50):
        q = rng.standard_normal((1, 4, seqlen_q, 64)).astype(np.float32)
        mask = np.arange(200) % 9 != 4
        clean = cache.attention(q, return_lse=True, mask=mask)
        arrays = [x.copy() for x in cache._arrays]
        for scale in cache._arrays[2:]:
            scale[:, :, 200:] = np.nan
            scale[:, :, :200][:, :, ~mask] = np.nan
        same(cache.attention(q, return_lse=True, mask=mask), clean)
        for x, kept in zip(cache._arrays, arrays, strict=True):
            x[...] = kept
