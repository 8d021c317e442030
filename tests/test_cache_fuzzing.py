"""Random calls of KVCache and PagedKVCache beside plain lists of arrays."""

import itertools
import os
from contextlib import nullcontext

import numpy as np
import pytest
from caches import (
    DTYPES,
    HEAD_DIM,
    HEAD_DIM_V,
    NUM_KV_HEADS,
    expected_window,
    make_cache,
    make_paged,
    make_queries,
    once,
    snapshot,
    stored,
)
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

EXAMPLES = int(os.environ.get("FASTATTN_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 150,
    stateful_step_count=40,
    derandomize=EXAMPLES == 0,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
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
