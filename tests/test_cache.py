"""KVCache and PagedKVCache against plain lists of arrays."""

import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from narrow import operations_of_narrow_types

import fastattn as fa
from fastattn import _storage
from fastattn._rounding import round_once

FLOAT_DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
DTYPES = [*FLOAT_DTYPES, np.dtype(np.int8)]
NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V = 2, 6, 4
FLOAT32_MAX = float(np.finfo(np.float32).max)

EXAMPLES = int(os.environ.get("FASTATTN_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 150,
    stateful_step_count=40,
    derandomize=EXAMPLES == 0,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
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


def assert_same_tokens(cache, other):
    assert cache._parameters() == other._parameters()
    assert cache.lengths().tolist() == other.lengths().tolist()
    for b in range(cache.batch_size):
        assert cache.positions(b).tolist() == other.positions(b).tolist()
        live = np.s_[b, :, : len(cache.positions(b))]
        for array, same in zip(cache._arrays, other._arrays, strict=True):
            np.testing.assert_array_equal(array[live], same[live])


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


# --- windows ----------------------------------------------------------------------------------


def expected_window(q, history, window, sink_tokens, position):
    """One sequence's queries at `position` and on, over its whole history."""
    k, v = (np.concatenate(x, axis=1) for x in history)
    key, query = np.arange(k.shape[1]), position + np.arange(q.shape[1])[:, np.newaxis]
    mask = (key <= query) & ((key > query - window) | (key < sink_tokens))
    return fa.reference.attention(q, k, v, mask=mask, return_lse=True)


@pytest.mark.parametrize(
    ("window", "sink_tokens", "slack"),
    [
        (1, 0, 0),
        (1, 0, 3),
        (4, 0, 0),
        (4, 0, 1),
        (5, 0, 7),
        (1, 1, 0),
        (3, 2, 2),
        (4, 3, 9),
        (6, 1, 3),
    ],
)
def test_window_sees_what_the_whole_history_would_show(rng, window, sink_tokens, slack):
    cache = make_cache(
        2, window + sink_tokens + slack, window_tokens=window, sink_tokens=sink_tokens
    )
    history = [([], []), ([], [])]
    for _ in range(40):
        counts = rng.integers(0, slack + 2, 2)
        new = int(counts.max())
        k, v = make_tokens(rng, 2, new=new)
        q = make_queries(rng, 2, new=new)
        before = cache.lengths()
        cache.append(k, v, counts=counts)
        out, lse = cache.attention(q, q_offset=before, return_lse=True)
        for b, count in enumerate(counts):
            for parts, x in zip(history[b], (k, v), strict=True):
                parts.append(x[b, :, :count])
            live = np.s_[b, :, :count]
            expected, expected_lse = expected_window(
                q[live], history[b], window, sink_tokens, before[b]
            )
            np.testing.assert_allclose(out[live], expected, atol=2e-6)
            np.testing.assert_allclose(lse[live], expected_lse, atol=2e-6)
            # What is kept is what was appended.
            positions = cache.positions(b)
            for stored, parts in zip(cache.to_arrays(b), history[b], strict=True):
                np.testing.assert_array_equal(stored, np.concatenate(parts, axis=1)[:, positions])
    assert cache.lengths().min() > cache.max_seqlen  # and it went round


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_prompt_longer_than_a_window_cache(rng, sink_tokens):
    cache = make_cache(1, 10, window_tokens=4, sink_tokens=sink_tokens)
    k, v = make_tokens(rng, 1, new=25)
    q = make_queries(rng, 1, new=25)
    cache.append(k, v)
    kept = 10 - sink_tokens
    assert cache.positions(0).tolist() == [*range(sink_tokens), *range(25 - kept, 25)]
    most = kept - 4 + 1
    with pytest.raises(
        ValueError,
        match=f"`q` must have at most {most} queries for sequence 0, because earlier tokens have "
        "left the window, got 25",
    ):
        cache.attention(q)
    with pytest.raises(ValueError, match=f"`q_offset` must be at least {25 - most} for sequence 0"):
        cache.attention(q, q_offset=0)
    out = cache.attention(q[:, :, -most:])
    expected, _ = expected_window(q[0, :, -most:], ([k[0]], [v[0]]), 4, sink_tokens, 25 - most)
    np.testing.assert_allclose(out[0], expected, atol=2e-6)
    # One at a time, by position; rows after the last token are nobody's.
    for position in range(25 - most, 25):
        out = cache.attention(q[:, :, position : position + 1], q_offset=position)
        np.testing.assert_allclose(out[0, :, 0], expected[:, position - (25 - most)], atol=2e-6)
    assert cache.attention(q, q_offset=25).shape == (1, 4, 25, HEAD_DIM_V)
    assert cache.attention(q[:, :, :0], q_offset=0).shape == (1, 4, 0, HEAD_DIM_V)


@once
def test_window_refuses_what_it_cannot_mean(rng):
    q = make_queries(rng, 1, new=1)
    for sink_tokens in (0, 1):
        cache = make_cache(1, 4, window_tokens=3, sink_tokens=sink_tokens)
        cache.append(*make_tokens(rng, 1, new=3))
        for options, message in (
            ({"causal": False}, "`causal` must be True in a cache with a window, got False"),
            ({"softmax_axis": "queries"}, '`softmax_axis` must be "keys" in a cache with a window'),
            ({"window": (1, 0)}, "`window` must be None in a cache with a window"),
            ({"bias": np.zeros(3)}, "`bias` must be None in a cache with a window"),
            ({"mask": True}, "`mask` must be None in a cache with a window"),
            ({"segment_ids": ([0], [0, 0, 0])}, "`segment_ids` must be None"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                cache.attention(q, **options)
        with pytest.raises(TypeError, match="`causal` must be True or False, got 1"):
            cache.attention(q, causal=1)
        slopes = {"alibi_slopes": np.ones(4)}
        if sink_tokens:
            message = "`alibi_slopes` must be None in a cache with a window and sinks"
            with pytest.raises(ValueError, match=message):
                cache.attention(q, **slopes)
        else:
            k, v = cache.to_arrays(0)
            expected = fa.attention(q[0], k, v, **slopes)
            np.testing.assert_allclose(cache.attention(q, **slopes)[0], expected, atol=2e-6)


@once
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_last_append_to_a_window_can_be_undone(rng, sink_tokens):
    cache = make_cache(1, 9 + sink_tokens, window_tokens=4, sink_tokens=sink_tokens)
    history = make_tokens(rng, 1, new=100)
    length = 0
    for draft in itertools.islice(itertools.cycle([6, 1, 3, 6, 2]), 25):
        accepted = draft // 2
        cache.append(*make_tokens(rng, 1, new=draft))
        cache.truncate(length)
        cache.append(*(x[:, :, length : length + accepted] for x in history))
        length += accepted
        q = make_queries(rng, 1, new=1)
        if length:
            parts = [[x[0, :, :length]] for x in history]
            expected, _ = expected_window(q[0], parts, 4, sink_tokens, length - 1)
            np.testing.assert_allclose(cache.attention(q)[0], expected, atol=2e-6)
    before = snapshot(cache)
    shortest = cache.positions(0)[sink_tokens] + 3
    message = f"`lengths` must be at least {shortest} for sequence 0 (or at most sink_tokens"
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.truncate(shortest - 1)
    assert snapshot(cache) == before
    cache.truncate(shortest)
    cache.truncate(sink_tokens)
    assert cache.positions(0).tolist() == list(range(sink_tokens))


# --- what is stored ---------------------------------------------------------------------------


def rounded(x, significant_bits, smallest_exponent):
    """`x` to the nearest number of a binary format, ties to even, in exact arithmetic."""
    quantum = Fraction(2) ** max(int(np.frexp(x)[1]) - significant_bits, smallest_exponent)
    return float(round(Fraction(float(x)) / quantum) * quantum)


@once
@pytest.mark.parametrize(
    ("dtype", "bits", "smallest_exponent"),
    [(np.float16, 11, -24), (ml_dtypes.bfloat16, 8, -133), (np.float32, 24, -149)],
)
@pytest.mark.parametrize("source", [np.float64, np.float32])
def test_floats_are_rounded_once(rng, dtype, bits, smallest_exponent, source):
    # Ties and their neighbours in `source`, over the whole range of `dtype`.
    largest = float(ml_dtypes.finfo(dtype).max)
    exponents = rng.uniform(smallest_exponent - 2, np.log2(largest) - 1, 2000)
    values = 2.0**exponents * rng.choice([-1, 1], 2000)
    ties = np.array([rounded(x, bits + 1, smallest_exponent - 1) for x in values], source)
    x = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), [0.0, -0.0]])
    x = x.astype(source)
    x = x[np.abs(x) < largest]
    cache = fa.KVCache(1, 1, 1, len(x), dtype=dtype)
    cache.append(x.reshape(1, 1, 1, -1), x.reshape(1, 1, 1, -1))
    expected = [rounded(value, bits, smallest_exponent) for value in x]
    for stored in (cache.k, cache.v):
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored.ravel().astype(np.float64), expected)


@once
@pytest.mark.parametrize("source", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_float_dtype_goes_into_every_other(source, dtype):
    x = np.array([1.5, -0.25, np.inf, -np.inf, np.nan, 0.0], source).reshape(1, 1, 1, 6)
    cache = fa.KVCache(1, 1, 2, 6, dtype=dtype)
    with np.errstate(all="raise"):
        cache.append(x, x)
    np.testing.assert_array_equal(cache.k.astype(np.float64), x.astype(np.float64))


@once
@pytest.mark.parametrize(
    ("dtype", "source", "value"),
    [
        (np.float16, np.float32, 65520.0),
        (np.float16, ml_dtypes.bfloat16, -1e30),
        (ml_dtypes.bfloat16, np.float64, 3.4e38),
        (np.float32, np.float64, 1e39),
    ],
)
def test_floats_out_of_range_are_refused(dtype, source, value):
    cache = fa.KVCache(1, 1, 2, 1, dtype=dtype)
    wrong, right = (np.full((1, 1, 1, 1), x).astype(source) for x in (value, 1.0))
    for name, k, v in (("k", wrong, right), ("v", right, wrong)):
        message = f"`{name}` must be within the range of {np.dtype(dtype)}, got "
        with np.errstate(all="raise"), pytest.raises(ValueError, match=message):
            cache.append(k, v)
        cache.append(k, v, counts=[0])  # padding is not looked at
    assert cache.lengths().tolist() == [0]


@once
@pytest.mark.parametrize("source", FLOAT_DTYPES, ids=str)
def test_int8_keeps_within_half_a_scale(rng, source):
    x = rng.standard_normal((2, NUM_KV_HEADS, 50, HEAD_DIM))
    x *= 10.0 ** rng.uniform(-3, 3, (2, NUM_KV_HEADS, 50, 1))
    x[0, :, 3] = 0.0
    x[1, 0, 4, 1:] = 0.0
    x = x.astype(source)
    cache = fa.KVCache(2, NUM_KV_HEADS, 50, HEAD_DIM, dtype=np.int8)
    with np.errstate(all="raise"):
        cache.append(x, -x)
    exact = x.astype(np.float64)
    largest = np.abs(exact).max(axis=-1)
    for codes, scale, sign in zip(cache._arrays[:2], cache._arrays[2:], (1, -1), strict=True):
        assert codes.dtype == np.int8
        assert scale.dtype == np.float32
        np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
        assert scale[0, 0, 3] == 0.0
        assert not codes[0, :, 3].any()
        assert np.abs(codes.astype(int)).max() == 127
        error = np.abs(codes * scale[..., np.newaxis].astype(np.float64) - sign * exact)
        # The quotient is rounded before it is made an integer.
        assert np.all(error <= scale[..., np.newaxis] * 0.5 * (1 + 1e-4))
        error = np.abs(codes * scale[..., np.newaxis] - sign * exact)
        assert np.all(error <= 0.004 * largest[..., np.newaxis])
    k, v = cache.to_arrays(1)
    assert k.dtype == np.float32
    np.testing.assert_array_equal(k, cache._arrays[0][1] * cache._arrays[2][1][..., np.newaxis])
    np.testing.assert_array_equal(v, -k)


@once
@pytest.mark.parametrize(
    ("source", "value"),
    [
        (np.float32, 1e-45),
        (np.float32, 1e-43),
        (np.float32, 1e-40),
        (np.float32, 1.5e-36),
        (np.float32, 3e38),
        (np.float32, FLOAT32_MAX),
        (np.float32, np.nextafter(np.float32(FLOAT32_MAX), np.float32(0))),
        (np.float64, FLOAT32_MAX),
        (np.float64, 1e-40),
        (np.float64, 1e-300),
        (np.float64, 5e-324),
        (np.float16, 65504.0),
        (np.float16, 6e-8),
    ],
)
def test_int8_at_the_ends_of_the_range(source, value):
    row = [value, value / 3, -value, -value / 7, 0.0]
    x = np.array(row, source).reshape(1, 1, 1, 5)
    cache = fa.KVCache(1, 1, 1, 5, dtype=np.int8)
    with np.errstate(all="raise", under="ignore"):
        cache.append(x, x)
        decoded = cache.to_arrays(0)[0]
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    scale = float(cache._arrays[2][0, 0, 0])
    # As fine as float32 allows: its smallest number bounds the scale of what is smaller.
    assert scale <= max(float(value) / 127 * (1 + 2**-23), float(value) / 127 + 2**-149)
    # The quotient, and the product with the scale, are rounded.
    exact = x[0].astype(np.float64)
    assert np.all(np.abs(cache._arrays[0][0] * scale - exact) <= scale * (0.5 + 1e-4))
    np.testing.assert_allclose(decoded, exact, rtol=0, atol=scale * (0.5 + 1e-4))
    q = np.zeros((1, 1, 1, 5), np.float32)
    np.testing.assert_array_equal(cache.attention(q)[0], decoded)


@once
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_int8_refuses_what_is_not_finite(value):
    cache = fa.KVCache(1, 1, 2, 2, dtype=np.int8)
    wrong, right = np.array([1.0, value]).reshape(1, 1, 1, 2), np.ones((1, 1, 1, 2))
    for name, k, v in (("k", wrong, right), ("v", right, wrong)):
        message = (
            f"`{name}` must be finite and within the range of float32 for int8, got {value:.6g}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            cache.append(k, v)
    assert cache.lengths().tolist() == [0]
    assert not cache._arrays[0].any()


@once
def test_storage_dtype_is_named():
    for dtype in ("float8_e4m3fn", "int16", "nonsense", ">f4", None, [("k", "f4")]):
        given = ml_dtypes.float8_e4m3fn if dtype == "float8_e4m3fn" else dtype
        for make in (make_cache, make_paged):
            with pytest.raises(
                TypeError, match="`dtype` must be float32, float64, float16, bfloat"
            ):
                make(dtype=given)


@once
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"batch_size": 1.0}, TypeError, "`batch_size` must be an int >= 1, got 1.0"),
        ({"num_kv_heads": -1}, ValueError, "`num_kv_heads` must be at least 1"),
        ({"max_seqlen": 0}, ValueError, "`max_seqlen` must be at least 1"),
        ({"head_dim": True}, TypeError, "`head_dim` must be an int >= 1, got True"),
        ({"head_dim_v": 0}, ValueError, "`head_dim_v` must be at least 1, got 0"),
        ({"window_tokens": 0}, ValueError, "`window_tokens` must be at least 1, got 0"),
        (
            {"window_tokens": 3, "sink_tokens": -1},
            ValueError,
            "`sink_tokens` must be at least 0, got -1",
        ),
        (
            {"window_tokens": 3, "sink_tokens": 0.5},
            TypeError,
            "`sink_tokens` must be an int >= 0, got 0.5",
        ),
        ({"sink_tokens": 1}, ValueError, "`sink_tokens` must be 0 without `window_tokens`, got 1"),
        (
            {"window_tokens": 7, "sink_tokens": 2},
            ValueError,
            "`max_seqlen` must be at least sink_tokens 2 + window_tokens 7, got 8",
        ),
        ({"max_seqlen": 2**62}, MemoryError, "a cache of shape"),
    ],
)
def test_wrong_sizes(options, error, message):
    sizes = {"batch_size": 1, "num_kv_heads": 1, "max_seqlen": 8, "head_dim": 4}
    with pytest.raises(error, match=re.escape(message)):
        fa.KVCache(**{**sizes, **options})


@once
def test_wrong_page_sizes():
    for name in ("num_pages", "page_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            make_paged(**{name: 0})


@once
@pytest.mark.parametrize("make", [make_cache, make_paged])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_tokens_change_nothing(rng, make, dtype):
    cache = make(dtype=dtype)
    args = () if make is make_cache else ([cache.add(), cache.add()],)
    k, v = make_tokens(rng, 2, new=3)
    cache.append(k, v, *args)
    before = snapshot(cache)
    for wrong_k, wrong_v, options, error, message in (
        (
            k.astype(int),
            v,
            {},
            TypeError,
            "`k` must be float16, bfloat16, float32 or float64, got int64",
        ),
        (k, v > 0, {}, TypeError, "`v` must be float16, bfloat16, float32 or float64, got bool"),
        (k.astype(">f4"), v, {}, TypeError, "`k` must be in native byte order"),
        (k[:1], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (1, 2, 3, 6)"),
        (k[:, :1], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (2, 1, 3, 6)"),
        (k[..., :5], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (2, 2, 3, 5)"),
        (k[0], v, {}, ValueError, "`k` must have shape (2, 2, new, 6), got (2, 3, 6)"),
        (
            k,
            v[:, :, :2],
            {},
            ValueError,
            "`v` must have shape (2, 2, 3, 4) to match `k`, got (2, 2, 2,",
        ),
        (
            k,
            v[..., :3],
            {},
            ValueError,
            "`v` must have shape (2, 2, 3, 4) to match `k`, got (2, 2, 3, 3",
        ),
        (k, v, {"counts": [1.0, 2.0]}, TypeError, "`counts` must be integers"),
        (k, v, {"counts": [1]}, ValueError, "`counts` must have shape (2,), got shape (1,)"),
        (
            k,
            v,
            {"counts": [1, 4]},
            ValueError,
            "`counts` must be 0 to the 3 new tokens of `k`, got 4",
        ),
        (
            k,
            v,
            {"counts": [-1, 1]},
            ValueError,
            "`counts` must be 0 to the 3 new tokens of `k`, got -1",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            cache.append(wrong_k, wrong_v, *args, **options)
        assert snapshot(cache) == before


@once
def test_more_than_fits_changes_nothing(rng):
    cache = make_cache(2, 5)
    cache.append(*make_tokens(rng, 2, new=4), counts=[4, 1])
    before = snapshot(cache)
    message = (
        "`k` must have at most 1 new tokens for sequence 0, which has 4 of max_seqlen 5, got 2"
    )
    with pytest.raises(ValueError, match=message):
        cache.append(*make_tokens(rng, 2, new=2))
    assert snapshot(cache) == before
    cache.append(*make_tokens(rng, 2, new=4), counts=[1, 4])
    assert cache.lengths().tolist() == [5, 5]


@once
def test_padding_and_any_strides(rng):
    k, v = make_tokens(rng, 2, new=4)
    expected, cache = make_cache(), make_cache()
    expected.append(k, v, counts=[2, 4])
    k[0, :, 2:] = np.nan
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v)]
    for x in swapped:
        x.flags.writeable = False
    cache.append(*swapped, counts=np.array([2, 4], np.uint8))
    assert snapshot(cache) == snapshot(expected)


@once
@pytest.mark.parametrize("window", [None, 5])
def test_tokens_from_the_cache_itself(rng, window):
    cache = fa.KVCache(1, 1, 8, 3, window_tokens=window)
    x = rng.standard_normal((1, 1, 6, 3), dtype=np.float32)
    cache.append(x, x)
    if window is None:
        cache.append(cache.k[:, :, 4:], cache.v[:, :, 4:])
        expected = np.concatenate([x, x[:, :, 4:]], axis=2)
    else:
        cache.append(cache.k[:, :, ::-1], cache.v[:, :, ::-1])
        expected = np.concatenate([x[:, :, 4:], x[:, :, ::-1]], axis=2)
    np.testing.assert_array_equal(cache.k, expected)


@once
def test_views_cannot_be_written(rng):
    cache = make_cache()
    cache.append(*make_tokens(rng, 2, new=2))
    assert cache.k.shape == (2, NUM_KV_HEADS, 2, HEAD_DIM)
    assert cache.v.shape == (2, NUM_KV_HEADS, 2, HEAD_DIM_V)
    for view in (cache.k, cache.v):
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
    lengths = cache.lengths()
    cache.truncate(1)
    assert lengths.tolist() == [2, 2]  # those of its moment
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"`index` must be 0 to 1, got {index}"):
            cache.to_arrays(index)
    with pytest.raises(TypeError, match=r"`index` must be an int from 0 to 1, got 0\.5"):
        cache.positions(0.5)


@once
def test_sizes_and_repr():
    cache = fa.KVCache(3, 2, 10, 8, dtype=np.int8, window_tokens=4, sink_tokens=1)
    assert cache.nbytes == 3 * 2 * 10 * (8 + 8 + 4 + 4)
    assert repr(cache) == (
        "KVCache(batch_size=3, num_kv_heads=2, max_seqlen=10, head_dim=8, dtype=int8, "
        "window_tokens=4, sink_tokens=1): 0 tokens"
    )
    paged = fa.PagedKVCache(5, 2, 3, 8, head_dim_v=4, dtype=ml_dtypes.bfloat16)
    assert paged.nbytes == 5 * 2 * 3 * (8 + 4) * 2
    assert repr(paged) == (
        "PagedKVCache(num_pages=5, page_size=2, num_kv_heads=3, head_dim=8, head_dim_v=4, "
        "dtype=bfloat16): 0 sequences, 5 free pages"
    )


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


def filled(rng, dtype=np.float32, **options):
    cache = make_cache(3, 7, dtype=dtype, **options)
    for counts in ([5, 0, 7], [2, 0, 0]):
        cache.append(*make_tokens(rng, 3, new=7), counts=counts)
    if options:
        cache.append(*make_tokens(rng, 3, new=7), counts=[7, 0, 2])
    return cache


@once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window_tokens": 3}, {"window_tokens": 2, "sink_tokens": 2}]
)
def test_copy_and_file_are_the_same_cache(rng, tmp_path, dtype, options):
    cache = filled(rng, dtype, **options)
    path = tmp_path / "a cache"
    cache.save(path)
    with np.load(path, allow_pickle=False) as members:
        for name in ("k", "v"):  # live tokens only
            assert len(members[name]) == sum(len(cache.positions(b)) for b in range(3))
    for other in (fa.KVCache.load(path), fa.KVCache.load(str(path)), cache.copy()):
        assert_same_tokens(cache, other)
        before = snapshot(cache)
        if options:
            other.append(*make_tokens(rng, 3, new=3))
        other.truncate([0, 0, other.lengths()[2] - 1])
        other.reorder([2, 1, 0])
        assert snapshot(cache) == before


@once
def test_empty_cache_in_a_file(tmp_path):
    cache = make_cache()
    cache.save(tmp_path / "cache.npz")
    assert_same_tokens(cache, fa.KVCache.load(tmp_path / "cache.npz"))


@once
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_damaged_files(rng, tmp_path, dtype):
    cache = filled(rng, dtype, window_tokens=3)
    path = tmp_path / "cache.npz"
    cache.save(path)
    whole = path.read_bytes()

    def check(damaged):
        path.write_bytes(damaged)
        try:
            other = fa.KVCache.load(path)
        except ValueError as error:
            assert str(error).startswith("`path` must be a file that KVCache.save wrote, got ")
            return True
        assert_same_tokens(cache, other)  # a date, for example
        return False

    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        assert check(whole[:size])
    refused = 0
    for place in range(0, len(whole), 13):
        refused += check(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
    assert refused > len(whole) / 13 / 2


@once
def test_foreign_files(rng, tmp_path):
    cache = filled(rng)
    cache.save(tmp_path / "cache.npz")
    with np.load(tmp_path / "cache.npz") as archive:
        members = dict(archive)
    header = str(members["header"])

    def changed(**changes):
        return {name: x for name, x in {**members, **changes}.items() if x is not None}

    def with_header(old, new):
        assert old in header
        return changed(header=np.array(header.replace(old, new)))

    path = tmp_path / "other.npz"
    for other, message in (
        ({"x": np.zeros(3)}, "it lacks 'header'"),
        (changed(header=np.array("{")), "Expecting"),
        (changed(header=np.array("[]")), ""),
        (with_header("KVCache 2", "KVCache 1"), "its format is 'fastattn.KVCache 1', not"),
        (with_header('"float32"', '"float8_e4m3fn"'), "`dtype` must be"),
        (with_header('"batch_size": 3', '"batch_size": 0'), "`batch_size` must be at least 1"),
        (with_header('"batch_size": 3', '"batch_size": 2'), "its 'lengths' is int64 of shape (3,)"),
        (with_header('"sink_tokens": 0', '"sinks": 0'), "unexpected keyword argument"),
        (changed(lengths=np.array([7, 0, 8])), "its lengths are not those of a cache"),
        (changed(evicted=np.array([1, 0, 1])), "its lengths are not those of a cache"),
        (changed(evicted=np.array([0, 1, 0])), "its lengths are not those of a cache"),
        (changed(evicted=np.array([0, -1, 0])), "its lengths are not those of a cache"),
        (changed(lengths=np.array([7.0, 0.0, 7.0])), "its 'lengths' is float64 of shape (3,)"),
        (changed(evicted=np.array([0])), "its 'evicted' is int64 of shape (1,)"),
        (changed(k=members["k"][:-1]), "its 'k' is float32 of shape"),
        (changed(v=members["v"].astype(np.float64)), "its 'v' is float64 of shape"),
        (changed(v=members["v"].astype(object)), "its 'v' is object of shape"),
        (changed(v=None), "it lacks 'v'"),
        (changed(k_scale=members["k"]), "it holds 'k_scale', which is no part of this cache"),
        (changed(header=np.array([header])), "its 'header' is <U"),
        (changed(header=np.array(header + " " * 5000)), "its 'header' is <U"),
    ):
        np.savez(path, **other)
        with pytest.raises(ValueError, match="`path` must be a file that ") as caught:
            fa.KVCache.load(path)
        assert message in str(caught.value)
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "text").write_text("a cache")
    for name in ("x.npy", "text"):
        with pytest.raises(ValueError, match=r"`path` must be a file that KVCache\.save wrote"):
            fa.KVCache.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fa.KVCache.load(tmp_path / "absent")


@once
def test_small_files_take_little_memory(rng, tmp_path):
    """Sizes are compared before anything is read: none of these files' claims is believed."""
    cache = filled(rng)
    path = tmp_path / "cache.npz"
    cache.save(path)
    with np.load(path) as archive:
        members = dict(archive)

    def refused(message):
        tracemalloc.start()
        with pytest.raises(ValueError, match="`path` must be a file that ") as caught:
            fa.KVCache.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message in str(caught.value)
        assert peak < 2**20

    np.savez_compressed(path, **{**members, "k": np.zeros((2**22, NUM_KV_HEADS, HEAD_DIM))})
    assert path.stat().st_size < 2**20
    refused("is compressed, or larger than the file")

    def written(name, content, size=None):
        """The file with one more member, or with this content of one that it has."""
        with zipfile.ZipFile(path, "w") as archive:
            for other, array in members.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                mine = content if other == name else buffer.getvalue()
                archive.writestr(f"{other}.npy", mine)
            if name not in members:
                archive.writestr(name, content)
            if size is not None:
                info = archive.getinfo(f"{name}.npy")
                info.file_size = info.compress_size = size

    def header_of(shape):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        return buffer.getvalue()

    shape = members["k"].shape
    written("k", header_of(shape))
    refused(f"its 'k' of shape {shape} has 0 bytes")
    written("k", header_of((2**40, *shape[1:])))
    refused("its 'k' is float32 of shape (1099511627776, ")
    written("k", header_of(shape) + members["k"].tobytes(), size=2**33)
    refused("its 'k' is compressed, or larger than the file")
    written("readme", b"hello")
    refused("it holds 'readme', which is no part of this cache")
    with pytest.warns(UserWarning, match="Duplicate name"):
        written("k.npy", header_of(shape))
    refused("it holds 'k' twice")
    written("v", b"not an array")
    refused("magic string is not correct")
    header = str(members["header"])
    huge = header.replace('"batch_size": 3', f'"batch_size": {2**40}')
    np.savez(path, **{**members, "header": np.array(huge)})
    refused("its 'lengths' is int64 of shape (3,)")


@once
def test_bfloat16_is_not_needed_until_it_is(rng, tmp_path):
    filled(rng, ml_dtypes.bfloat16).save(tmp_path / "cache.npz")
    program = (
        "import sys, fastattn as fa\n"
        "try:\n    fa.KVCache.load(sys.argv[1])\n"
        "except ImportError as error:\n    print(error)\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "import ml_dtypes\n"
        "print(fa.KVCache.load(sys.argv[1]).dtype)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "`path` holds bfloat16: import ml_dtypes before loading\nbfloat16\n"


# --- pages ------------------------------------------------------------------------------------


@once
def test_fork_shares_and_copies_on_write(rng):
    cache = make_paged(num_pages=4, page_size=4)
    k, v = make_tokens(rng, new=6)
    a = cache.add(k, v)
    b = cache.fork(a)
    assert cache.page_table([a, b]).tolist() == [[0, 1], [0, 1]]
    assert cache.num_free_pages == 2

    one, two = (make_tokens(rng, 1, new=1) for _ in range(2))
    cache.append(*one, [b])  # a copies nothing, b gets a page of its own
    assert cache.page_table([a, b]).tolist() == [[0, 1], [0, 2]]
    cache.append(*two, [a])  # a is alone on its page now
    assert cache.page_table([a, b]).tolist() == [[0, 1], [0, 2]]
    for seq_id, new in ((a, two), (b, one)):
        for stored, old, x in zip(cache.to_arrays(seq_id), (k, v), new, strict=True):
            np.testing.assert_array_equal(stored, np.concatenate([old, x[0]], axis=1))

    cache.free(a)
    assert (cache.num_free_pages, cache.page_table([b]).tolist()) == (2, [[0, 2]])
    cache.free(b)
    assert (cache.num_free_pages, cache.seq_ids) == (4, [])


@once
def test_full_pages_stay_shared(rng):
    cache = make_paged(page_size=2)
    a = cache.add(*make_tokens(rng, new=4))
    b = cache.fork(a)
    cache.append(*make_tokens(rng, 2, new=1), [a, b])
    assert cache.page_table([a, b]).tolist() == [[0, 1, 2], [0, 1, 3]]
    # b is cut back into a page that both hold, and writes there.
    cache.truncate(3, [b])
    assert cache.page_table([a, b]).tolist() == [[0, 1, 2], [0, 1, -1]]
    k_before = cache.to_arrays(a)[0]
    cache.append(*make_tokens(rng, 1, new=2), [b])
    assert cache.page_table([a, b]).tolist() == [[0, 1, 2], [0, 3, 4]]
    np.testing.assert_array_equal(cache.to_arrays(a)[0], k_before)


@once
def test_pages_are_counted_before_anything_changes(rng):
    cache = make_paged(num_pages=3, page_size=4)
    a = cache.add(*make_tokens(rng, new=2))
    b, c = cache.fork(a), cache.fork(a)
    before = snapshot(cache)
    with pytest.raises(fa.OutOfPagesError) as caught:
        cache.append(*make_tokens(rng, 3, new=3), [a, b, c])
    assert str(caught.value) == (
        "the cache must have 5 free pages for `k`, got 2 (free or truncate sequences)"
    )
    assert isinstance(caught.value, MemoryError)
    assert snapshot(cache) == before
    with pytest.raises(fa.OutOfPagesError):
        cache.add(*make_tokens(rng, new=9))
    assert snapshot(cache) == before
    # Three sequences on one page: the last one to write keeps it, so two pages are enough.
    cache.append(*make_tokens(rng, 3, new=2), [a, b, c])
    assert cache.num_free_pages == 0
    assert sorted(cache.page_table([a, b, c]).ravel().tolist()) == [0, 1, 2]
    cache.append(*make_tokens(rng, 2, new=1), [a, b], counts=[0, 0])
    cache.reset()
    assert (cache.num_free_pages, cache.seq_ids) == (3, [])
    assert cache.add() == 3  # not the name of an earlier sequence


@once
def test_ids_that_are_no_sequences(rng):
    cache = make_paged()
    a, b = cache.add(), cache.add()
    cache.free(b)
    k, v = make_tokens(rng, 1, new=1)
    q = make_queries(rng, 1, new=1)
    for wrong, error, got in (
        (b, ValueError, "a sequence of this cache, got 1"),
        (7, ValueError, "a sequence of this cache, got 7"),
        (-1, ValueError, "a sequence of this cache, got -1"),
        (0.0, TypeError, "the int that `add` returned, got 0.0"),
        (None, TypeError, "the int that `add` returned, got None"),
    ):
        for call, name in (
            (lambda seq_id: cache.fork(seq_id), "seq_id"),
            (lambda seq_id: cache.free(seq_id), "seq_id"),
            (lambda seq_id: cache.truncate(0, [seq_id]), "seq_ids[0]"),
            (lambda seq_id: cache.to_arrays(seq_id), "seq_id"),
            (lambda seq_id: cache.lengths([a, seq_id]), "seq_ids[1]"),
            (lambda seq_id: cache.page_table([seq_id]), "seq_ids[0]"),
            (lambda seq_id: cache.append(k, v, [seq_id]), "seq_ids[0]"),
            (lambda seq_id: cache.attention(q, [seq_id]), "seq_ids[0]"),
        ):
            with pytest.raises(error, match=re.escape(f"`{name}` must be {got}")):
                call(wrong)
    with pytest.raises(TypeError, match="`seq_ids` must be a sequence of ints, got 0"):
        cache.lengths(0)
    with pytest.raises(ValueError, match="`seq_ids` must not repeat a sequence in `append`"):
        cache.append(*make_tokens(rng, 2, new=1), [a, a])
    with pytest.raises(ValueError, match="`seq_ids` must not repeat a sequence in `truncate`"):
        cache.truncate(0, [a, a])
    with pytest.raises(ValueError, match=r"`lengths` must be an int or have shape \(1,\)"):
        cache.truncate([0, 0], [a])
    for length in (-1, 1):
        message = f"`lengths` must be 0 to 0 for sequence 0, got {length}"
        with pytest.raises(ValueError, match=message):
            cache.truncate(length, [a])
    with pytest.raises(ValueError, match="`k` and `v` must be given together, got only `v`"):
        cache.add(v=v[0])
    with pytest.raises(
        ValueError, match=re.escape("`k` must have shape (2, new, 6), got (1, 2, 1")
    ):
        cache.add(k, v)
    assert cache.seq_ids == [a]
    assert cache.lengths(np.array([a, a])).tolist() == [0, 0]


@once
def test_pages_that_are_not_in_the_table_are_not_read(rng):
    cache = make_paged(num_pages=6, page_size=2)
    other = cache.add(*make_tokens(rng, new=4))
    seq_id = cache.add(*make_tokens(rng, new=3))
    long = cache.add(*make_tokens(rng, new=3))
    for array in cache._arrays:
        array[list(cache._sequences[other].pages)] = np.nan
        array[cache._sequences[seq_id].pages[-1], :, 1] = np.nan  # after its last token
    q = make_queries(rng, 2, new=1)
    assert np.isfinite(cache.attention(q, [seq_id, long])).all()

    # Nor are the entries that pad the table.
    table, lengths = cache.page_table([seq_id, long, long]), cache.lengths([seq_id, long, long])
    lengths[2], table[2, 1:] = 1, 2**40
    out = _storage.attend(q[[0, 1, 1]], cache._arrays, lengths, {}, page_table=table)
    expected = fa.attention(q[1], *(x[:, :1] for x in cache.to_arrays(long)))
    np.testing.assert_array_equal(out[2], expected)


# --- fuzzing ----------------------------------------------------------------------------------

# Token n is recognised wherever it is: every element of its key and value is its own.
_PATTERN_K = np.arange(NUM_KV_HEADS * HEAD_DIM).reshape(NUM_KV_HEADS, 1, HEAD_DIM)
_PATTERN_V = -1 - np.arange(NUM_KV_HEADS * HEAD_DIM_V).reshape(NUM_KV_HEADS, 1, HEAD_DIM_V)


def numbered(tokens):
    """Keys and values (num_kv_heads, len(tokens), width) of tokens given by their numbers."""
    column = np.array(tokens, np.float64).reshape(1, -1, 1)
    # Fractions, so that attention over them is not all one token's.
    return tuple(
        np.sin(column * 1.7 + pattern).astype(np.float32) for pattern in (_PATTERN_K, _PATTERN_V)
    )


def numbered_batch(sequences):
    """Keys and values of ragged sequences, NaN after their ends."""
    new = max((len(tokens) for tokens in sequences), default=0)
    k, v = (
        np.full((len(sequences), NUM_KV_HEADS, new, width), np.nan, np.float32)
        for width in (HEAD_DIM, HEAD_DIM_V)
    )
    for b, tokens in enumerate(sequences):
        k[b, :, : len(tokens)], v[b, :, : len(tokens)] = numbered(tokens)
    return k, v


def stored(x, dtype):
    """What a cache of this dtype makes of the float32 array x; int8 decoded to float32."""
    if dtype != np.int8:
        return round_once(x, dtype)
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(x / scale) * scale


def attend_alone(q, k, v, dtype, **options):
    """Attention over stored tokens as plain float32 (or float64) arrays."""
    k, v = (stored(x, dtype).astype(q.dtype) for x in (k, v))
    with operations_of_narrow_types() if dtype != q.dtype else nullcontext():
        return fa.attention(q, k, v, causal=True, **options)


def assert_attends_alike(out, expected, dtype):
    """The same bits, but for int8: its scales stay outside the products."""
    if dtype == np.int8:
        np.testing.assert_allclose(out, expected, atol=2e-6)
    else:
        np.testing.assert_array_equal(out, expected)


class CacheMachine(RuleBasedStateMachine):
    """Random calls of KVCache beside lists of token numbers."""

    @initialize(
        batch_size=st.integers(1, 4),
        window=st.one_of(st.none(), st.integers(1, 5)),
        sink_tokens=st.integers(0, 3),
        slack=st.integers(0, 6),
        dtype=st.sampled_from(DTYPES),
    )
    def begin(self, batch_size, window, sink_tokens, slack, dtype):
        self.dtype, self.wide = dtype, np.float64 if dtype == np.float64 else np.float32
        self.window, self.sink_tokens = window, sink_tokens if window else 0
        self.max_seqlen = (window + sink_tokens if window else 6) + slack
        self.cache = make_cache(
            batch_size,
            self.max_seqlen,
            window_tokens=window,
            sink_tokens=self.sink_tokens,
            dtype=dtype,
        )
        self.model = [[] for _ in range(batch_size)]
        self.numbers = itertools.count()
        self.rng = np.random.default_rng(0)

    @rule(data=st.data())
    def append(self, data):
        most = self.max_seqlen + 2
        counts = [data.draw(st.integers(0, most)) for _ in self.model]
        new = [list(itertools.islice(self.numbers, n)) for n in counts]
        k, v = numbered_batch(new)
        lengths = [len(old) + len(tokens) for old, tokens in zip(self.model, new, strict=True)]
        if self.window is None and max(lengths) > self.max_seqlen:
            before = snapshot(self.cache)
            with pytest.raises(ValueError, match="`k` must have at most"):
                self.cache.append(k, v, counts=counts)
            assert snapshot(self.cache) == before
            return
        self.cache.append(k, v, counts=counts)
        for old, tokens in zip(self.model, new, strict=True):
            old += tokens

    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(tokens))) for tokens in self.model]
        before = snapshot(self.cache)
        try:
            self.cache.truncate(lengths)
        except ValueError:
            assert self.window is not None
            assert snapshot(self.cache) == before
        else:
            for tokens, length in zip(self.model, lengths, strict=True):
                del tokens[length:]

    @rule(data=st.data())
    def reorder(self, data):
        indices = [data.draw(st.integers(0, len(self.model) - 1)) for _ in self.model]
        self.cache.reorder(indices)
        self.model = [list(self.model[i]) for i in indices]

    @rule()
    def reset(self):
        self.cache.reset()
        self.model = [[] for _ in self.model]

    @rule()
    def copy(self):
        self.cache = self.cache.copy()

    @rule(seqlen_q=st.integers(0, 4))
    def attention(self, seqlen_q):
        q = make_queries(self.rng, len(self.model), new=seqlen_q, dtype=self.wide)
        try:
            out = self.cache.attention(q)
        except ValueError as error:
            assert "left the window" in str(error)
            assert self.window is not None
            positions = [self.cache.positions(b) for b in range(len(self.model))]
            assert any(
                len(p) > self.sink_tokens
                and p[self.sink_tokens]
                > max(self.sink_tokens, len(tokens) - seqlen_q - self.window + 1)
                for p, tokens in zip(positions, self.model, strict=True)
            )
            return
        for b, tokens in enumerate(self.model):
            parts = [[stored(x, self.dtype)] for x in numbered(tokens)]
            window = self.window or self.max_seqlen
            position = len(tokens) - seqlen_q
            expected, _ = expected_window(q[b], parts, window, self.sink_tokens, position)
            np.testing.assert_allclose(out[b], expected, atol=5e-6)

    @invariant()
    def same_tokens(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths().tolist() == [len(tokens) for tokens in self.model]
        for b, tokens in enumerate(self.model):
            positions = self.cache.positions(b)
            for kept, expected in zip(self.cache.to_arrays(b), numbered(tokens), strict=True):
                expected = stored(expected, self.dtype)
                np.testing.assert_array_equal(kept, expected[:, positions])
            # What the next query will see is there.
            window = self.window or self.max_seqlen
            needed = {*range(self.sink_tokens), *range(len(tokens) - window + 1, len(tokens))}
            assert needed & set(range(len(tokens))) <= set(positions.tolist())


class PagedMachine(RuleBasedStateMachine):
    """Random calls of PagedKVCache beside lists of token numbers."""

    sequences = Bundle("sequences")

    @initialize(
        num_pages=st.integers(1, 12),
        page_size=st.sampled_from([1, 2, 3, 4, 8]),
        dtype=st.sampled_from(DTYPES),
    )
    def begin(self, num_pages, page_size, dtype):
        self.dtype, self.wide = dtype, np.float64 if dtype == np.float64 else np.float32
        self.cache = make_paged(num_pages, page_size, dtype=dtype)
        self.model = {}
        self.numbers = itertools.count()
        self.rng = np.random.default_rng(0)

    def expect_out_of_pages(self, error, new):
        """The pool really is too small: pages needed, from the model alone."""
        cache, needed = self.cache, 0
        writers = {}
        for seq_id, count in new.items():
            length = len(self.model.get(seq_id, []))
            needed += -(-(length + count) // cache.page_size) - -(-length // cache.page_size)
            if count and length % cache.page_size:
                writers.setdefault(cache._sequences[seq_id].pages[-1], []).append(seq_id)
        for page, writing in writers.items():
            holders = sum(page in s.pages for s in cache._sequences.values())
            needed += len(writing) - (holders == len(writing))
        assert needed > cache.num_free_pages
        assert f"{needed} free pages" in str(error)

    @rule(target=sequences, new=st.integers(0, 9))
    def add(self, new):
        tokens = list(itertools.islice(self.numbers, new))
        before = snapshot(self.cache)
        try:
            seq_id = self.cache.add(*numbered(tokens)) if new else self.cache.add()
        except fa.OutOfPagesError as error:
            assert snapshot(self.cache) == before
            self.expect_out_of_pages(error, {None: new})
            return multiple()
        assert seq_id not in self.model
        self.model[seq_id] = tokens
        return seq_id

    @rule(target=sequences, seq_id=sequences)
    def fork(self, seq_id):
        free = self.cache.num_free_pages
        new_id = self.cache.fork(seq_id)
        assert self.cache.num_free_pages == free
        self.model[new_id] = list(self.model[seq_id])
        return new_id

    @rule(seq_id=consumes(sequences))
    def free(self, seq_id):
        self.cache.free(seq_id)
        del self.model[seq_id]
        with pytest.raises(ValueError, match="`seq_id` must be a sequence of this cache"):
            self.cache.free(seq_id)

    @rule(data=st.data())
    def append(self, data):
        seq_ids = data.draw(st.permutations(sorted(self.model)))
        counts = np.array([data.draw(st.integers(0, 6)) for _ in seq_ids], np.int64)
        new = [list(itertools.islice(self.numbers, int(n))) for n in counts]
        before = snapshot(self.cache)
        try:
            self.cache.append(*numbered_batch(new), seq_ids, counts=counts)
        except fa.OutOfPagesError as error:
            assert snapshot(self.cache) == before
            self.expect_out_of_pages(error, dict(zip(seq_ids, counts.tolist(), strict=True)))
        else:
            for seq_id, tokens in zip(seq_ids, new, strict=True):
                self.model[seq_id] += tokens

    @rule(seq_id=sequences, data=st.data())
    def truncate(self, seq_id, data):
        length = data.draw(st.integers(0, len(self.model[seq_id])))
        self.cache.truncate(length, [seq_id])
        del self.model[seq_id][length:]

    @rule(data=st.data(), seqlen_q=st.integers(1, 3))
    def attention(self, data, seqlen_q):
        choices = st.lists(st.sampled_from(sorted(self.model)), max_size=4)
        seq_ids = data.draw(choices) if self.model else []
        q = make_queries(self.rng, len(seq_ids), new=seqlen_q, dtype=self.wide)
        out = self.cache.attention(q, seq_ids)
        for row, seq_id in enumerate(seq_ids):
            expected = attend_alone(q[row], *numbered(self.model[seq_id]), self.dtype)
            assert_attends_alike(out[row], expected, self.dtype)

    @invariant()
    def same_tokens_and_no_page_lost(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert cache.seq_ids == sorted(self.model)
        users = [0] * cache.num_pages
        for seq_id, tokens in self.model.items():
            for kept, expected in zip(cache.to_arrays(seq_id), numbered(tokens), strict=True):
                np.testing.assert_array_equal(kept, stored(expected, self.dtype))
            [table] = cache.page_table([seq_id]).tolist()
            assert len(table) == -(-len(tokens) // cache.page_size)
            for page in table:
                users[page] += 1
        assert users == cache._num_users
        free = cache._free_pages[: cache._num_free]
        assert sorted(free) == [p for p, n in enumerate(users) if n == 0]

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for seq_id in self.cache.seq_ids:
            self.cache.free(seq_id)
        assert self.cache.num_free_pages == self.cache.num_pages
        assert not any(self.cache._num_users)


TestCacheFuzzing = once(CacheMachine.TestCase)
TestCacheFuzzing.settings = fuzzed
TestPagedFuzzing = once(PagedMachine.TestCase)
TestPagedFuzzing.settings = fuzzed


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
