"""PagedKVCache: pages that are shared, copied on write and counted."""

import re

import numpy as np
import pytest
from caches import make_paged, make_queries, make_tokens, once, snapshot

import fastattn as fa
from fastattn import _storage


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
