"""Both caches: attention over a batch, truncate and reorder."""

import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from caches import (
    DTYPES,
    FLOAT_DTYPES,
    HEAD_DIM_V,
    NUM_KV_HEADS,
    make_cache,
    make_paged,
    make_queries,
    make_tokens,
    once,
    snapshot,
)

import fastattn as fa

# --- attention over a batch -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:2], ids=str)
@pytest.mark.parametrize("chunks", [[7, 1, 1, 1, 1], [1] * 11, [3, 8], [11]])
def test_chunks_give_the_bits_of_one_call(rng, dtype, chunks):
    k, v = make_tokens(rng, 2, new=11, dtype=dtype)
    q = make_queries(rng, 2, new=11, dtype=dtype)
    expected, expected_lse = fa.attention(q, k, v, causal=True, return_lse=True)
    cache, paged = make_cache(dtype=dtype), make_paged(page_size=3, dtype=dtype)
    seq_ids = [paged.add(), paged.add()]
    start = 0
    for new in chunks:
        part = np.s_[:, :, start : start + new]
        cache.append(k[part], v[part])
        paged.append(k[part], v[part], seq_ids)
        for out, lse in (
            cache.attention(q[part], return_lse=True),
            paged.attention(q[part], seq_ids, return_lse=True),
        ):
            assert out.dtype == dtype
            np.testing.assert_array_equal(out, expected[part])
            np.testing.assert_array_equal(lse, expected_lse[part])
        start += new


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_batch(rng, dtype):
    cache, paged = make_cache(3, dtype=dtype), make_paged(dtype=dtype)
    seq_ids = [paged.add() for _ in range(3)]
    wide = np.float64 if dtype == np.float64 else np.float32
    for counts in ([5, 0, 2], [1, 1, 1], [0, 4, 3]):
        k, v = make_tokens(rng, 3, new=5, dtype=wide)
        q = make_queries(rng, 3, new=5, dtype=wide)
        before = cache.lengths()
        cache.append(k, v, counts=counts)
        paged.append(k, v, seq_ids, counts=counts)
        outs = (cache.attention(q, q_offset=before), paged.attention(q, seq_ids, q_offset=before))
        for b, count in enumerate(counts):
            whole_k, whole_v = cache.to_arrays(b)
            expected = fa.reference.attention(q[b, :, :count], whole_k, whole_v, causal=True)
            for out in outs:
                np.testing.assert_allclose(out[b, :, :count], expected, atol=2e-6)


def test_any_list_of_sequences(rng):
    paged = make_paged(page_size=3)
    lengths = [7, 0, 3, 1]
    seq_ids = [paged.add(*make_tokens(rng, new=n)) for n in lengths]
    chosen = [2, 0, 0, 1, 3, 2]
    q = make_queries(rng, len(chosen), new=2)
    out = paged.attention(q, [seq_ids[i] for i in chosen])
    for row, i in enumerate(chosen):
        k, v = paged.to_arrays(seq_ids[i])
        expected = fa.attention(q[row], k, v, causal=True)
        np.testing.assert_array_equal(out[row], expected)
    assert paged.attention(q[:0], []).shape == (0, 2 * NUM_KV_HEADS, 2, HEAD_DIM_V)


def test_options_are_those_of_attention(rng):
    cache, paged = make_cache(), make_paged()
    k, v = make_tokens(rng, 2, new=9)
    cache.append(k, v)
    seq_ids = [paged.add(k[b], v[b]) for b in range(2)]
    q = make_queries(rng, 2, new=3)
    shape = (2, 2 * NUM_KV_HEADS, 3)
    for options in (
        {"causal": False},
        {"causal": False, "softmax_axis": "queries", "return_lse": True},
        {"scale": 0.3, "softcap": 2.0, "sinks": np.zeros(4), "num_threads": 1},
        {"bias": rng.standard_normal((*shape, 9)), "mask": rng.random((3, 9)) < 0.7},
        {"window": (2, 0), "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]), "q_offset": 4},
        {"segment_ids": (np.zeros(3, int), np.arange(9) % 2), "kv_lengths": None},
        {"residual": np.ones((*shape, HEAD_DIM_V), np.float32), "return_lse": True},
    ):
        expected = fa.attention(q, k, v, **{"causal": True, **options})
        for got in (cache.attention(q, **options), paged.attention(q, seq_ids, **options)):
            pairs = [(got, expected)]
            if options.get("return_lse"):
                pairs = list(zip(got, expected, strict=True))
            for result, same in pairs:
                np.testing.assert_array_equal(result, same)
    out = np.empty((*shape, HEAD_DIM_V), np.float32)
    assert cache.attention(q, out=out) is out
    np.testing.assert_array_equal(out, fa.attention(q, k, v, causal=True))


@once
@pytest.mark.parametrize("make", [make_cache, make_paged])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_queries_and_options(rng, make, dtype):
    cache = make(dtype=dtype)
    args = () if make is make_cache else ([cache.add(), cache.add()],)
    wide = np.float64 if dtype == np.float64 else np.float32
    q = make_queries(rng, 2, new=1, dtype=wide)
    wrong = np.float32 if dtype == np.float64 else np.float64
    with pytest.raises(
        TypeError, match=f"`q` must be .* with a cache of {dtype}, got {wrong().dtype}"
    ):
        cache.attention(q.astype(wrong), *args)
    for shape in ((1, 4, 1, 6), (2, 3, 1, 6), (2, 4, 1, 5), (4, 1, 6)):
        message = "`q` must have shape (2, a multiple of 2 heads, seqlen_q, 6), got "
        with pytest.raises(ValueError, match=re.escape(f"{message}{shape}")):
            cache.attention(np.zeros(shape, wide), *args)
    with pytest.raises(ValueError, match="`kv_lengths` must be None: the cache knows"):
        cache.attention(q, *args, kv_lengths=[0, 0])
    for name in ("casual", "k_scale", "k"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            cache.attention(q, *args, **{name: True})


# --- truncate, reorder, copy, files -----------------------------------------------------------


@once
def test_truncate(rng):
    cache = make_cache()
    k, v = make_tokens(rng, 2, new=5)
    cache.append(k, v)
    before = snapshot(cache)
    for lengths, error, message in (
        ([5, 6], ValueError, "`lengths` must be 0 to 5 for sequence 1, got 6"),
        ([-1, 5], ValueError, "`lengths` must be 0 to 5 for sequence 0, got -1"),
        ([1], ValueError, "`lengths` must be an int or have shape (2,), got shape (1,)"),
        (1.0, TypeError, "`lengths` must be integers"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            cache.truncate(lengths)
        assert snapshot(cache) == before
    cache.truncate([2, 5])
    new_k, new_v = make_tokens(rng, 2, new=1)
    cache.append(new_k, new_v)
    np.testing.assert_array_equal(
        cache.to_arrays(0)[0], np.concatenate([k[0, :, :2], new_k[0]], axis=1)
    )
    np.testing.assert_array_equal(cache.to_arrays(1)[1], np.concatenate([v[1], new_v[1]], axis=1))
    cache.reset()
    assert cache.lengths().tolist() == [0, 0]


@once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_reordering_of_three(rng, dtype):
    for window in (None, 3):
        cache = make_cache(3, 6, dtype=dtype, window_tokens=window)
        cache.append(*make_tokens(rng, 3, new=6), counts=[2, 6, 0])
        if window is not None:
            cache.append(*make_tokens(rng, 3, new=6), counts=[1, 3, 6])
        old = [cache.to_arrays(b) for b in range(3)]
        lengths, positions = cache.lengths().tolist(), [cache.positions(b) for b in range(3)]
        for indices in itertools.product(range(3), repeat=3):
            other = cache.copy()
            other.reorder(indices)
            for b, source in enumerate(indices):
                assert other.lengths()[b] == lengths[source]
                np.testing.assert_array_equal(other.positions(b), positions[source])
                for array, expected in zip(other.to_arrays(b), old[source], strict=True):
                    np.testing.assert_array_equal(array, expected)


@once
def test_wrong_reordering_changes_nothing(rng):
    cache = make_cache()
    cache.append(*make_tokens(rng, 2, new=2))
    before = snapshot(cache)
    for indices, error, message in (
        ([0, 2], ValueError, "`indices` must be 0 to 1, got 2"),
        ([-1, 0], ValueError, "`indices` must be 0 to 1, got -1"),
        ([0], ValueError, "`indices` must have shape (2,), got shape (1,)"),
        ([0.0, 1.0], TypeError, "`indices` must be integers"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            cache.reorder(indices)
        assert snapshot(cache) == before


# --- one grammar ------------------------------------------------------------------------------


def public(cache):
    return {name: value for name, value in inspect.getmembers(cache) if not name.startswith("_")}


@once
def test_both_caches_have_one_grammar():
    batch, paged = public(fa.KVCache), public(fa.PagedKVCache)
    assert batch.keys() & paged.keys() == {
        "append", "attention", "explain", "lengths", "nbytes", "reset", "to_arrays", "truncate",
    }  # fmt: skip
    for name in ("append", "attention", "explain", "lengths", "truncate"):
        ours, theirs = (list(inspect.signature(x[name]).parameters) for x in (batch, paged))
        assert [x for x in theirs if x != "seq_ids"] == ours, name
    # What only one has is told, with the reason.
    text = (Path(__file__).parent.parent / "docs/caches.md").read_text(encoding="utf-8")
    table = text[: text.index("## A batch")]
    for name in batch.keys() | paged.keys():
        assert name == "nbytes" or f"`{name}" in table, name
