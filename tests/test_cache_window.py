"""A KVCache with a window: what it shows, and what it forgets."""

import itertools
import re

import numpy as np
import pytest
from caches import (
    HEAD_DIM_V,
    expected_window,
    make_cache,
    make_queries,
    make_tokens,
    once,
    snapshot,
)

import fastattn as fa


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
