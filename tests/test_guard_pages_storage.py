"""No access outside the arrays: 16-bit types, int8, pages and packed sequences.

What test_guard_pages.py does, for the other ways that keys and values lie in memory.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_guard_pages import HEAD_DIMS, LAYOUTS, TAILS, GuardedMemory, check, each_axis, each_layout

import fastattn as fa
from fastattn import _storage

SMALL_DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
STORED_DTYPES = [np.dtype(np.float32), np.dtype(np.float64), *SMALL_DTYPES, np.dtype(np.int8)]


@pytest.fixture(params=["end", "start"])
def memory(request: pytest.FixtureRequest) -> Any:
    memory = GuardedMemory(request.param)
    yield memory
    memory.close()


def draw(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


@each_layout
@pytest.mark.parametrize("dtype", SMALL_DTYPES, ids=str)
@each_axis
def test_16_bit(
    rng: np.random.Generator, memory: GuardedMemory, layout: str, dtype: Any, axis: str
) -> None:
    place = LAYOUTS[layout]
    for seqlen_q, seqlen_k in [*TAILS, (1, 1100), (4, 77)]:
        qkv = tuple(
            draw(rng, dtype, heads, seqlen, width)
            for heads, seqlen, width in ((2, seqlen_q, 24), (1, seqlen_k, 24), (1, seqlen_k, 40))
        )
        residual = draw(rng, dtype, 2, seqlen_q, 40)
        bias = draw(rng, dtype, 2, seqlen_q, seqlen_k)
        check(memory, place, qkv, softmax_axis=axis)
        check(memory, place, qkv, softmax_axis=axis, causal=True, residual=residual, bias=bias)
    for head_dim, head_dim_v in HEAD_DIMS:
        for seqlen_q in (1, 13):
            qkv = tuple(
                draw(rng, dtype, heads, seqlen, width)
                for heads, seqlen, width in (
                    (2, seqlen_q, head_dim),
                    (1, 70, head_dim),
                    (1, 70, head_dim_v),
                )
            )
            check(memory, place, qkv, softmax_axis=axis)


def guarded_store(
    rng: np.random.Generator,
    memory: GuardedMemory,
    dtype: Any,
    blocks: int,
    slots: int,
    width: int,
    width_v: int,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The arrays of a store of random tokens, plain and guarded."""
    arrays = [rng.standard_normal((blocks, 2, slots, w)) for w in (width, width_v)]
    if dtype == np.int8:
        arrays = [np.clip(np.rint(40 * x), -127, 127) for x in arrays]
    plain = [x.astype(dtype) for x in arrays]
    if dtype == np.int8:
        plain += [rng.random((blocks, 2, slots)).astype(np.float32) / 40 for _ in range(2)]
    return tuple(plain), tuple(memory.copy(x) for x in plain)


@pytest.mark.parametrize("dtype", STORED_DTYPES, ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["in one piece", "pages"])
def test_storage(rng: np.random.Generator, memory: GuardedMemory, dtype: Any, paged: bool) -> None:
    wide = np.float64 if dtype == np.float64 else np.float32
    for seqlen_q, seqlen_k, width, width_v in (
        (1, 1, 8, 8),
        (1, 70, 64, 40),
        (1, 1100, 128, 64),
        (2, 129, 17, 9),
        (5, 191, 130, 67),
        (40, 300, 64, 64),
    ):
        q = draw(rng, wide, 3, 4, seqlen_q, width)
        options = {"return_lse": True}
        if paged:
            page_size = 7
            columns = -(-seqlen_k // page_size)
            plain, guarded = guarded_store(
                rng, memory, dtype, 3 * columns, page_size, width, width_v
            )
            table = rng.permutation(3 * columns).reshape(3, columns).astype(np.int64)
            # The last page is full for one sequence, and not begun by another.
            lengths = np.array([seqlen_k, columns * page_size, (columns - 1) * page_size])
            tables = (table, memory.copy(table))
        else:
            plain, guarded = guarded_store(rng, memory, dtype, 3, seqlen_k, width, width_v)
            lengths = np.array([seqlen_k, seqlen_k // 2, 0])
            tables = (None, None)
        expected = _storage.attend(q, plain, lengths, dict(options), page_table=tables[0])
        result = _storage.attend(
            memory.copy(q), guarded, memory.copy(lengths), dict(options), page_table=tables[1]
        )
        for x, y in zip(result, expected, strict=True):
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", STORED_DTYPES[:4], ids=str)
def test_packed_sequences(rng: np.random.Generator, memory: GuardedMemory, dtype: Any) -> None:
    for lengths_q, lengths_k in (
        ([1], [1]),
        ([0, 5, 0, 1, 1], [3, 5, 0, 1100, 1]),
        ([67, 1, 23], [130, 65, 24]),
        ([1, 1, 0], [7, 300, 9]),
    ):
        starts = [np.concatenate([[0], np.cumsum(x)]) for x in (lengths_q, lengths_k)]
        shapes = ((lengths_q, 4, 24), (lengths_k, 2, 24), (lengths_k, 2, 40))
        plain = [draw(rng, dtype, sum(n), heads, width) for n, heads, width in shapes]
        expected = fa.attention_varlen(*plain, *starts, causal=True, return_lse=True)
        guarded = [memory.copy(x) for x in plain]
        out = memory.copy(np.full_like(expected[0], 7))
        result = fa.attention_varlen(
            *guarded, *(memory.copy(x) for x in starts), causal=True, return_lse=True, out=out
        )
        assert result[0] is out
        for x, y in zip(result, expected, strict=True):
            assert x.tobytes() == y.tobytes()
