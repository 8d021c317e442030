"""Threads that write while others call: nothing outside the arrays is read or written.

Each test races for about a second; a fault shows as a crash, at the latest under ``make asan``,
and where a result has one right value, as a wrong one.
"""

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import fastattn as fa
from fastattn import _core
from fastattn._options import set_named
from fastattn._problem import of_arrays
from fastattn._results import place_results

pytestmark = pytest.mark.any_kernel_set

SECONDS = 0.7
CHANGED = "must keep its shape and dtype during the call"


@contextlib.contextmanager
def meanwhile(*changes: Callable[[], object]) -> Iterator[None]:
    """Each of `changes`, again and again, in a thread of its own."""
    done, errors = threading.Event(), []

    def repeat(change: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                change()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=repeat, args=(change,)) for change in changes]
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not errors, errors


def race(call: Callable[[], object], *changes: Callable[[], object]) -> set[str]:
    """Call until the time is over; the errors that came, which refuse an argument."""
    refusals, end, succeeded = set(), time.monotonic() + SECONDS, 0
    with meanwhile(*changes):
        while time.monotonic() < end:
            try:
                call()
                succeeded += 1
            except (ValueError, TypeError) as error:
                refusals.add(str(error))
    assert succeeded
    return refusals


def flip(array: np.ndarray, one: object, two: object) -> Callable[[], None]:
    def change() -> None:
        array[...] = two if np.array_equal(array, one) else one

    return change


FAR = 2**40


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_starts_of_packed_sequences(which):
    q = np.zeros((64, 1, 8), np.float32)
    good = np.arange(65)
    bad = good.copy()
    bad[1:-1] = FAR
    given = good.copy()
    starts = {"cu_seqlens_q": good, "cu_seqlens_k": good, which: given}

    def call():
        out, lse = fa.attention_varlen(q, q, q, **starts, return_lse=True, num_threads=1)
        grads = fa.attention_varlen_backward(q, q, q, q, out, lse, **starts, num_threads=1)
        assert not out.any()
        assert not grads.v.any()

    for error in race(call, flip(given, good, bad)):
        assert error.startswith(f"`{which}` must ")


@pytest.mark.parametrize("name", ["kv_lengths", "q_offset", "segment_ids"])
def test_numbers_that_say_which_keys(name):
    q = np.zeros((8, 1, 4, 8), np.float32)
    given = np.full(8, 2)
    if name == "segment_ids":
        given = np.zeros((8, 4), np.int64)
    value = (given, given.copy()) if name == "segment_ids" else given
    for error in race(
        lambda: fa.attention(q, q, q, causal=True, num_threads=1, **{name: value}),
        flip(given, np.full_like(given, 1), np.full_like(given, FAR)),
        flip(given, np.full_like(given, -FAR), np.full_like(given, 3)),
    ):
        assert error.startswith(f"`{name}` must ")


def test_counts_and_indices_of_a_cache():
    cache = fa.KVCache(4, 1, 8, 4)
    tokens = np.ones((4, 1, 2, 4), np.float32)
    counts, indices = np.ones(4, int), np.arange(4)

    def call():
        cache.append(tokens, tokens, counts=counts)
        cache.reorder(indices)
        cache.truncate(counts)
        assert 0 <= cache.lengths().min() <= cache.lengths().max() <= 8
        cache.reset()

    def recover():
        try:
            call()
        except ValueError:
            cache.reset()
            raise

    race(
        recover,
        flip(counts, np.full(4, 1), np.full(4, FAR)),
        flip(indices, np.arange(4)[::-1], np.full(4, -FAR)),
    )


def set_attribute(array: np.ndarray, name: str, values: list[object]) -> Callable[[], None]:
    turn = iter(range(10**9))

    def change() -> None:
        setattr(array, name, values[next(turn) % len(values)])

    return change


SHAPES = [(1, 2, 64, 16), (1, 2, 16, 64), (1, 32, 4, 16), (2048,), (1, 2, 64, 16)]


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "residual", "out"])
def test_shapes_that_change(rng, name):
    operands = {x: rng.standard_normal(SHAPES[0], dtype=np.float32) for x in ("q", "k", "v")}
    options = {
        "bias": np.zeros((1, 2, 64, 64), np.float32),
        "mask": np.ones((1, 2, 64, 64), bool),
        "residual": np.zeros(SHAPES[0], np.float32),
        "out": np.zeros(SHAPES[0], np.float32),
    }
    given = {**operands, **{x: options[x] for x in (name,) if x in options}}
    expected = fa.attention(**operands)
    shapes = SHAPES if given[name].size == 2048 else [(1, 2, 64, 64), (1, 128, 8, 8), (8192,)]

    def call():
        out = fa.attention(**given, num_threads=1)
        if name != "out" and out.shape == expected.shape:
            # The arrays' memory is the same whatever shape they had.
            assert np.isfinite(out).all()

    for error in race(call, set_attribute(given[name], "shape", shapes)):
        assert "`" in error
    given[name].shape = shapes[0]
    np.testing.assert_array_equal(fa.attention(**given), expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out", "out", "lse"])
def test_shapes_that_change_in_the_backward_pass(rng, name):
    q, k, v, grad_out = (rng.standard_normal(SHAPES[0], dtype=np.float32) for _ in range(4))
    out, lse = fa.attention(q, k, v, return_lse=True)
    given = {"grad_out": grad_out, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    shapes = SHAPES if name != "lse" else [(1, 2, 64), (1, 64, 2), (128,)]
    race(
        lambda: fa.attention_backward(**given, num_threads=1),
        set_attribute(given[name], "shape", shapes),
    )


def test_dtypes_that_change():
    q = np.ones((1, 2, 64, 16), np.float32)
    k = q.copy()
    for error in race(
        lambda: fa.attention(q, k, k, num_threads=1),
        set_attribute(k, "dtype", [np.float32, np.int32, np.float32, np.uint32]),
    ):
        # The one array is both `k` and `v`: either name may be the one that was looked at.
        assert CHANGED in error or re.match("`[kv]` must be float16", error), error


def test_the_door_compares_with_the_plan():
    """The check behind the races, without one."""
    q = np.zeros((1, 2, 6, 4), np.float32)
    k = np.zeros((1, 2, 5, 4), np.float32)
    options = {"bias": np.zeros((6, 5)), "mask": True, "residual": np.zeros_like(q)}
    problem = of_arrays(q, k, k)
    set_named(problem, {**options, "num_threads": 1, "kv_lengths": [3]})
    place_results(problem, None, True)
    _core.attention(problem)
    names = ("q", "k", "v", "out", "lse", "residual", "bias", "mask", "kv_lengths")
    for name in names:
        array = getattr(problem, name)
        for other in (array.reshape(-1), array[..., :0], array[np.newaxis], array[..., ::-1][1:]):
            if other.shape != array.shape:
                setattr(problem, name, other)
                with pytest.raises(ValueError, match=f"`{name}` {CHANGED}, but has"):
                    _core.attention(problem)
        setattr(problem, name, array.astype(np.complex128))
        with pytest.raises(ValueError, match=f"`{name}` {CHANGED}, but has elements"):
            _core.attention(problem)
        setattr(problem, name, array)


class Shrinks:
    """An array-like that is not the same twice."""

    def __init__(self, *arrays):
        self.arrays = list(arrays)

    def __array__(self, dtype=None, copy=None):
        return self.arrays.pop(0) if len(self.arrays) > 1 else self.arrays[0]


def test_arrays_that_are_not_the_same_twice(rng):
    """Each argument is converted once, so the second answer is never asked for."""
    q, k, v, grad_out = rng.standard_normal((4, 3, 40, 8), dtype=np.float32)
    sinks, slopes = np.zeros(3), np.ones(3)
    options = {"sinks": sinks, "alibi_slopes": slopes, "bias": np.zeros((3, 40, 40))}
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    expected = fa.attention_backward(grad_out, q, k, v, out, lse, grad_lse=lse, **options)
    small = np.zeros((1, 1, 1), np.float32)

    def shrinking(**arrays):
        return {name: Shrinks(x, small) for name, x in arrays.items()}

    once = shrinking(q=q, k=k, v=v, **options)
    np.testing.assert_array_equal(fa.attention(**once), out)
    once = shrinking(grad_out=grad_out, q=q, k=k, v=v, out=out, lse=lse, grad_lse=lse, **options)
    for got, same in zip(fa.attention_backward(**once), expected, strict=True):
        np.testing.assert_array_equal(got, same)

    starts, other = np.array([0, 3, 40]), np.array([0])
    packed = {"q": q, "k": k, "v": v, "grad_out": grad_out}
    packed = {name: np.ascontiguousarray(x.swapaxes(0, 1)) for name, x in packed.items()}
    options = {"sinks": sinks, "alibi_slopes": slopes}
    grad_out = packed.pop("grad_out")
    out, lse = fa.attention_varlen(**packed, **options, cu_seqlens_q=starts, cu_seqlens_k=starts,
                                   return_lse=True)  # fmt: skip
    expected = fa.attention_varlen_backward(
        grad_out, **packed, out=out, lse=lse, cu_seqlens_q=starts, cu_seqlens_k=starts, **options
    )
    once = shrinking(**packed, **options, grad_out=grad_out, out=out, lse=lse)
    once |= {name: Shrinks(starts, other) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    for got, same in zip(fa.attention_varlen_backward(**once), expected, strict=True):
        np.testing.assert_array_equal(got, same)

    layer = fa.MultiHeadAttention(*np.eye(8)[np.newaxis].repeat(4, 0), num_heads=2)
    x = rng.standard_normal((2, 5, 8))
    y = layer(x, residual=True)
    np.testing.assert_array_equal(layer(Shrinks(x, small), residual=True), y)
    np.testing.assert_array_equal(
        fa.self_attention(Shrinks(x, small), num_heads=2), fa.self_attention(x, num_heads=2)
    )
    for make in (kv_cache, paged_cache):
        cache, args = make()
        k = rng.standard_normal((2, 1, 3, 4))
        cache.append(
            Shrinks(k, small), Shrinks(-k, small), *args, counts=Shrinks(np.array([3, 2]), other)
        )
        stored_k, stored_v = cache.to_arrays(0)
        np.testing.assert_array_equal(stored_k, k[0].astype(np.float32))
        np.testing.assert_array_equal(stored_v, -stored_k)
        got = cache.attention(Shrinks(np.zeros((2, 1, 1, 4), np.float32), small), *args)
        np.testing.assert_allclose(got[0, 0, 0], stored_v[0].mean(axis=0), rtol=1e-5)


class Liar(np.ndarray):
    """A subclass with a shape of its own."""

    shape = (3, 40, 8)
    dtype = np.dtype(np.float32)


def test_subclasses_that_lie(rng):
    q = rng.standard_normal((3, 40, 8), dtype=np.float32)
    out = np.empty((3, 4, 8), np.float32).view(Liar)
    with pytest.raises(ValueError, match=r"`out` must have the result's shape \(3, 40, 8\), got"):
        fa.attention(q, q, q, out=out)
    short = q[:, :4].view(Liar)
    assert fa.attention(short, q, q).shape == (3, 4, 8)


# --- caches -----------------------------------------------------------------------------------


def kv_cache(max_seqlen=64, **options):
    return fa.KVCache(2, 1, max_seqlen, 4, **options), ()


def paged_cache():
    cache = fa.PagedKVCache(64, 4, 1, 4)
    return cache, ([cache.add(), cache.add()],)


def tokens_of(value, new=1):
    """Keys of zeros, so that weights are equal, and values that are all one number."""
    k = np.zeros((2, 1, new, 4), np.float32)
    return k, np.full_like(k, value)


@pytest.mark.parametrize("options", [{}, {"window_tokens": 8, "sink_tokens": 2}])
def test_attention_while_a_cache_changes(options):
    """Every token ever appended has value 1, so the average is 1, whatever the lengths."""
    cache, _ = kv_cache(16, **options)
    ones = tokens_of(1.0)
    cache.append(*ones)
    q = np.zeros((2, 1, 1, 4), np.float32)

    def change():
        for _ in range(12):
            cache.append(*ones)
        cache.reorder([1, 0])
        cache.truncate(1)

    def call():
        np.testing.assert_allclose(cache.attention(q, num_threads=1), 1.0, rtol=1e-6)
        for b in range(2):
            k, v = cache.to_arrays(b)
            assert k.shape == v.shape
            assert (v == 1.0).all()
            assert len(cache.copy().positions(b))

    assert not race(call, change)


def test_what_a_running_attention_sees_is_not_overwritten():
    """Values of one length are one number: an average of two numbers is of two moments."""
    cache, _ = kv_cache(4096)
    q = np.zeros((2, 1, 8, 4), np.float32)
    parts = [tokens_of(float(value), 4000) for value in (1, 2, 4)]
    cache.append(*parts[0])

    def change():
        for part in parts:
            cache.truncate(0)
            cache.append(*part)

    def call():
        out = cache.attention(q, causal=False, num_threads=1)
        assert len(np.unique(out)) == 1
        assert out[0, 0, 0, 0] in (0, 1, 2, 4)

    assert not race(call, change)


def test_attention_while_pages_change():
    cache = fa.PagedKVCache(4096, 1, 1, 4)
    (k, v) = (x[:1] for x in tokens_of(1.0))
    sequence = cache.add(k[0], v[0])
    q = np.zeros((1, 1, 1, 4), np.float32)
    other = tokens_of(2.0, 40)

    def append():
        cache.append(k, v, [sequence])
        if cache.lengths([sequence])[0] > 400:
            cache.truncate(5, [sequence])

    def others():
        forks = [cache.fork(sequence), cache.add(other[0][0], other[1][0])]
        cache.append(other[0][:1], other[1][:1], forks[:1])
        for fork in forks:
            cache.free(fork)

    def call():
        out = cache.attention(q, [sequence], num_threads=1)
        np.testing.assert_allclose(out, 1.0, rtol=1e-6)
        assert cache.to_arrays(sequence)[1].min() == 1.0

    assert not race(call, append, others)
    cache.free(sequence)
    assert cache.num_free_pages == 4096
    assert sorted(cache._free_pages) == list(range(4096))


def test_pages_that_are_read_are_not_taken():
    """The same without a race: a change comes while a view is out, by way of an option that is
    converted then."""
    cache = fa.PagedKVCache(4, 2, 1, 4)
    k, v = tokens_of(1.0, 3)
    a = cache.add(k[0], v[0])
    q = np.zeros((1, 1, 1, 4), np.float32)

    class Bias:
        def __array__(self, dtype=None, copy=None):
            two = tokens_of(2.0, 5)
            cache.truncate(1, [a])
            assert cache.num_free_pages == 3
            with pytest.raises(fa.OutOfPagesError, match=r"got 2 \(1 more are being read; free"):
                cache.append(two[0][:1], two[1][:1], [a])
            cache.append(two[0][:1, :, :1], two[1][:1, :, :1], [a])
            cache.free(a)
            assert cache.num_free_pages == 4
            return np.zeros(3, np.float32)

    np.testing.assert_array_equal(cache.attention(q, [a], bias=Bias()), 1.0)
    whole = tokens_of(3.0, 8)
    cache.add(whole[0][0], whole[1][0])
    assert cache.num_free_pages == 0


def test_slots_that_are_read_are_not_written():
    for options in ({}, {"window_tokens": 3}):
        cache, _ = kv_cache(4, **options)
        cache.append(*tokens_of(1.0, 3))
        q = np.zeros((2, 1, 1, 4), np.float32)

        class Slopes:
            def __array__(self, dtype=None, copy=None, cache=cache):
                cache.reorder([1, 1])
                cache.truncate(0)
                cache.append(*tokens_of(2.0, 4))
                if cache.window_tokens is not None:
                    cache.append(*tokens_of(4.0, 4))
                return np.zeros(1)

        np.testing.assert_array_equal(cache.attention(q, alibi_slopes=Slopes()), 1.0)
        expected = 2.0 if cache.window_tokens is None else 4.0
        np.testing.assert_array_equal(cache.attention(q), expected)


def test_two_threads_append():
    """Changes wait for each other: no token is lost."""
    cache, _ = kv_cache(10**5)
    ones = tokens_of(1.0)
    appended = [0, 0]

    def append(i):
        def change():
            if appended[i] < 40_000:
                cache.append(*ones)
                appended[i] += 1

        return change

    race(lambda: cache.lengths().sum(), append(0), append(1))
    assert cache.lengths().tolist() == [sum(appended)] * 2
    assert all((cache.to_arrays(b)[1] == 1.0).all() for b in range(2))


def test_rows_and_heads_of_weights():
    q = np.zeros((4, 40, 8), np.float32)
    rows, heads = np.arange(40), np.arange(4)

    def call():
        weights = fa.attention_weights(q, q, rows=rows, heads=heads, num_threads=1)
        assert np.all(weights == np.float32(1 / 40))
        fa.attention_weights(q, q, rows=rows, reduce="keys", num_threads=1)

    for error in race(
        call,
        flip(rows, np.arange(40)[::-1], np.full(40, FAR)),
        flip(heads, np.full(4, 3), np.full(4, -FAR)),
    ):
        assert error.startswith(("`rows` must ", "`heads` must "))
