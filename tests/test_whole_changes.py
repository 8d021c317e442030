"""Whatever raises inside a change of a cache, the cache is as it was before or as it is after."""

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process import output_of
from support import compile_c

import fastattn as fa
from fastattn import _cache, _options, _paged_cache, _problem, _results, _storage, _validate

pytestmark = pytest.mark.any_kernel_set

TRACED = {
    module.__file__
    for module in (_options, _problem, _results, _storage, _validate, _cache, _paged_cache)
}


def observe(cache: Any) -> list[Any]:
    """All that can be asked of a cache."""
    if isinstance(cache, fa.KVCache):
        parts = [
            (cache.positions(b).tolist(), [x.tobytes() for x in cache.to_arrays(b)])
            for b in range(cache.batch_size)
        ]
        return [cache.lengths().tolist(), parts]
    parts = [[x.tobytes() for x in cache.to_arrays(i)] for i in cache.seq_ids]
    return [cache.num_free_pages, parts]


def check_pages(cache: Any) -> None:
    """Every page is free or held, and counted as often as it is held."""
    if isinstance(cache, fa.KVCache):
        return
    held = Counter(page for i in cache.seq_ids for page in cache.page_table([i]).ravel().tolist())
    assert -1 not in held
    assert cache._num_users == [held[page] for page in range(cache.num_pages)]
    free = cache._free_pages[: cache._num_free]
    assert sorted([*free, *held]) == list(range(cache.num_pages))


@functools.cache  # so that a change allocates nothing of the test's own
def tokens(*lead: int, new: int, start: float = 0.0) -> list[np.ndarray]:
    shape = (*lead, 2, new, 3)
    k = start + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 7
    return [k, -k]


def make_cache(dtype: Any = np.float32, **options: Any) -> fa.KVCache:
    made = fa.KVCache(3, 2, 8, 3, dtype=dtype, **options)
    made.append(*tokens(3, new=8), counts=[8, 5, 0])
    return made


def make_pages(dtype: Any = np.float32) -> fa.PagedKVCache:
    made = fa.PagedKVCache(12, 2, 2, 3, dtype=dtype)
    first = made.add(*tokens(new=5))
    second = made.fork(first)
    made.append(*tokens(1, new=2, start=9.0), [second])
    made.fork(second)
    made.add()
    return made


Make, Change = Callable[[], Any], Callable[[Any], object]
WINDOW = {"window_tokens": 4, "sink_tokens": 1}
INT8 = {"dtype": np.int8}
CHANGES: dict[str, tuple[Make, Change]] = {
    "append": (make_cache, lambda c: c.append(*tokens(3, new=3, start=5.0), counts=[0, 3, 1])),
    "append int8": (
        lambda: make_cache(**INT8),
        lambda c: c.append(*tokens(3, new=3, start=5.0), counts=[0, 3, 1]),
    ),
    "append to a window": (
        lambda: make_cache(**WINDOW),
        lambda c: c.append(*tokens(3, new=3, start=5.0)),
    ),
    "append to a window, int8": (
        lambda: make_cache(**WINDOW, **INT8),
        lambda c: c.append(*tokens(3, new=3, start=5.0)),
    ),
    "append more than a window": (
        lambda: make_cache(**WINDOW),
        lambda c: c.append(*tokens(3, new=20, start=5.0)),
    ),
    "truncate": (make_cache, lambda c: c.truncate([7, 0, 0])),
    "truncate a window": (lambda: make_cache(**WINDOW), lambda c: c.truncate([7, 1, 0])),
    "reset": (make_cache, lambda c: c.reset()),
    "reorder": (make_cache, lambda c: c.reorder([1, 0, 0])),
    "reorder a window, int8": (
        lambda: make_cache(**WINDOW, **INT8),
        lambda c: c.reorder([2, 0, 1]),
    ),
    "append to pages": (
        make_pages,
        lambda c: c.append(*tokens(4, new=3, start=5.0), [0, 1, 2, 3], counts=[2, 1, 3, 0]),
    ),
    "append to pages, int8": (
        lambda: make_pages(np.int8),
        lambda c: c.append(*tokens(2, new=3, start=5.0), [1, 2]),
    ),
    "add to pages": (make_pages, lambda c: c.add(*tokens(new=5, start=5.0))),
    "add a sequence": (make_pages, lambda c: c.add()),
    "fork": (make_pages, lambda c: c.fork(1)),
    "free": (make_pages, lambda c: c.free(1)),
    "truncate pages": (make_pages, lambda c: c.truncate(1, [2])),
    "reset pages": (make_pages, lambda c: c.reset()),
}


class interrupting:
    """Raises KeyboardInterrupt at the n-th line that runs in the modules of the caches."""

    def __init__(self, n: int) -> None:
        self.left = n

    def _trace(self, frame: Any, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> "interrupting":
        self.former = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.former)


@pytest.mark.parametrize("being_read", [False, True], ids=["", "while it is read"])
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_at_every_line(name: str, being_read: bool) -> None:
    make, change = CHANGES[name]

    def as_read(change: Change, subject: Any) -> None:
        """`change`, while a view of all that there is, is out."""
        if not being_read:
            change(subject)
        elif isinstance(subject, fa.KVCache):
            subject._gate.read(subject._look, lambda view: change(subject))
        else:
            subject._gate.read(lambda: subject._look(subject.seq_ids), lambda view: change(subject))

    subject = make()
    before = observe(subject)
    change(subject)
    after = observe(subject)
    check_pages(subject)
    assert after != before

    seen = Counter()
    for n in itertools.count(1):
        subject = make()
        interrupted = False
        try:
            with interrupting(n):
                as_read(change, subject)
        except KeyboardInterrupt:
            interrupted = True
        now = observe(subject)
        check_pages(subject)
        assert now in (before, after), n
        seen[now == after] += 1
        assert not subject._gate.being_read()
        if not interrupted:
            assert now == after
            break
        # It can be used on, and every page is still there.
        if isinstance(subject, fa.PagedKVCache):
            subject.reset()
            assert subject.num_free_pages == 12
        elif now == before:
            change(subject)
            assert observe(subject) == after
    assert seen[False] > 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD")
@pytest.mark.parametrize("min_bytes", [1, 256])
def test_every_allocation_fails(tmp_path: Path, min_bytes: int) -> None:
    """The k-th allocation fails, k = 1, 2, ... until none does, in every change of either cache."""
    here = Path(__file__).parent
    shim = compile_c(here / "c" / "failing_malloc.c", tmp_path / "shim.so", "-shared", "-fPIC")
    script = """
import ctypes
sys.path.insert(0, sys.argv[2])
from test_whole_changes import CHANGES, check_pages, observe
shim = ctypes.CDLL(sys.argv[1])
shim.fail_arm.argtypes = [ctypes.c_long, ctypes.c_size_t, ctypes.c_int]
shim.fail_disarm.restype = ctypes.c_long
failures, outcomes = 0, set()
for name, (make, change) in CHANGES.items():
    subject = make()
    before = observe(subject)
    change(subject)
    after = observe(subject)
    for nth in range(1, 3000):
        subject = make()
        shim.fail_arm(nth, int(sys.argv[3]), 0)
        try:
            change(subject)
            raised = False
        except (MemoryError, SystemError):  # which some of NumPy's functions raise instead
            raised = True
        failed = shim.fail_disarm()
        now = observe(subject)
        check_pages(subject)
        assert now == after or (raised and now == before), (name, nth, raised)
        outcomes.add((raised, now == after))
        failures += failed
        if not failed:
            break
    else:
        raise AssertionError(name)
print(failures)
"""
    environment = {"LD_PRELOAD": str(shim), "PYTHONMALLOC": "malloc"}
    output = output_of(
        "-c", "import sys\n" + script, str(shim), str(here), str(min_bytes), **environment
    )
    assert int(output) > len(CHANGES)
