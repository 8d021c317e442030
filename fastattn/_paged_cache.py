"""A cache of keys and values in pages, for sequences that come, fork and go.

The storage itself, its dtypes and the attention over it are in ``_storage.py``; this module knows
which pages hold which tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn._explain import Explanation
from fastattn._options import CacheOptions
from fastattn._storage import (
    Changes,
    Lengths,
    TokenStore,
    at_slots,
    attend,
    copy_tokens,
    explain,
    new_lengths,
    own_options,
)
from fastattn._validate import Array, count, integer


class OutOfPagesError(MemoryError):
    """A `PagedKVCache` has too few free pages for what was asked; nothing was changed.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> cache = fa.PagedKVCache(num_pages=1, page_size=4, num_kv_heads=1, head_dim=2)
    >>> tokens = np.ones((1, 5, 2), np.float32)
    >>> try:
    ...     cache.add(tokens, tokens)
    ... except fa.OutOfPagesError as error:
    ...     print(error)
    the cache must have 2 free pages for `k`, got 1 (free or truncate sequences)
    """


class _Sequence(NamedTuple):
    pages: tuple[int, ...]  # always ceil(length / page_size) of them
    length: int


class _View(NamedTuple):
    """What a cache holds of some sequences at one moment."""

    arrays: tuple[Array, ...]
    table: NDArray[np.int64]
    lengths: Lengths


class PagedKVCache(TokenStore):
    """Keys and values of sequences that come, fork and go, in pages of one pool.

    Parameters
    ----------
    num_pages : int
        Pages in the pool.
    page_size : int
        Tokens in a page, any number; a power of two from 16 on suits the kernels.
    num_kv_heads : int
        Heads of the keys and values.
    head_dim : int
        Width of a key.
    head_dim_v : int, optional
        Width of a value.  Default: `head_dim`.
    dtype : dtype_like, optional
        Of the storage, as in `KVCache`, with the same precision.

    Raises
    ------
    TypeError
        An argument has the wrong kind, or `dtype` is none of these.
    ValueError
        A size is less than 1.
    MemoryError
        The storage cannot be allocated.

    See Also
    --------
    KVCache : A fixed batch, contiguous.

    Notes
    -----
    A sequence of n tokens holds ``ceil(n / page_size)`` pages.  `fork` shares them; the pages count
    their sequences and return to the pool when the last of these is freed.  A shared page that is
    not full is copied when one of its sequences appends, and only then.

    A method that `KVCache` has too takes the same arguments, then the sequences that they are of:
    ``append(k, v, seq_ids)``, ``attention(q, seq_ids)``, ``truncate(lengths, seq_ids)``.

    Sequences are ints, which are not used again.  One that is unknown or freed is a ValueError.
    Appending is all or nothing: with too few pages nothing changes.

    **Threads.**  Changes and reads from several threads are safe: changes wait for each other, and
    `attention` computes with what its sequences held at one moment, whatever is appended, truncated
    or freed meanwhile.  Pages that it reads are free again when it is done; until then an append
    may find too few.  A method that fails, or is interrupted by Ctrl-C, leaves the cache as it was
    before or as it is after the change, every page accounted for.

    References
    ----------
    W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", 2023, https://arxiv.org/abs/2309.06180.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> cache = fa.PagedKVCache(num_pages=8, page_size=4, num_kv_heads=2, head_dim=8)

    A prompt of six tokens takes two pages; a fork takes none until it writes:

    >>> k, v = rng.standard_normal((2, 2, 6, 8), dtype=np.float32)
    >>> a = cache.add(k, v)
    >>> b = cache.fork(a)
    >>> cache.num_free_pages
    6
    >>> k, v = rng.standard_normal((2, 2, 2, 1, 8), dtype=np.float32)
    >>> cache.append(k, v, [a, b])
    >>> cache
    PagedKVCache(num_pages=8, page_size=4, num_kv_heads=2, head_dim=8, dtype=float32): \
2 sequences, 5 free pages

    One call for sequences of any lengths:

    >>> q = rng.standard_normal((2, 4, 1, 8), dtype=np.float32)
    >>> cache.attention(q, [a, b]).shape
    (2, 4, 1, 8)
    >>> cache.free(a)
    >>> cache.free(b)
    >>> cache.num_free_pages
    8
    """

    _PARAMETERS = ("num_pages", "page_size", "num_kv_heads", "head_dim", "head_dim_v", "dtype")

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_pages = count("num_pages", num_pages)
        self.page_size = count("page_size", page_size)
        self._configure_store(
            self.num_pages, self.page_size, num_kv_heads, head_dim, head_dim_v, dtype
        )
        self._arrays = self._new_storage()
        self._ids = itertools.count()
        self._sequences: dict[int, _Sequence] = {}
        self._num_users = [0] * self.num_pages  # sequences that hold each page
        # The first `_num_free` entries are free pages, the last of these the next to be taken.
        self._free_pages = list(reversed(range(self.num_pages)))
        self._num_free = self.num_pages

    def __repr__(self) -> str:
        return f"{self._call()}: {len(self._sequences)} sequences, {self.num_free_pages} free pages"

    # --- what is there ---

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._num_free

    @property
    def seq_ids(self) -> list[int]:
        """The sequences, oldest first."""
        return list(self._sequences)

    def lengths(self, seq_ids: Iterable[int]) -> Lengths:
        """Tokens of several sequences.

        Parameters
        ----------
        seq_ids : sequence of int
            Sequences, repeated ones too.

        Returns
        -------
        ndarray of int64, (len(seq_ids),)

        Examples
        --------
        >>> import fastattn as fa
        >>> cache = fa.PagedKVCache(2, 4, 1, 2)
        >>> cache.lengths([cache.add(), cache.add()])
        array([0, 0])
        """
        ids = _seq_ids(seq_ids)
        return self._gate.read(lambda: self._look(ids), lambda view: view.lengths)

    def page_table(self, seq_ids: Iterable[int]) -> NDArray[np.int64]:
        """The pages of several sequences, in the order of their tokens.

        Parameters
        ----------
        seq_ids : sequence of int
            Sequences, repeated ones too.

        Returns
        -------
        ndarray of int64, (len(seq_ids), most pages of any of them)
            Rows of sequences with fewer pages end in -1.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.PagedKVCache(4, 2, 1, 1)
        >>> a, b = (cache.add(np.ones((1, n, 1)), np.ones((1, n, 1))) for n in (3, 2))
        >>> cache.page_table([a, b])
        array([[ 0,  1],
               [ 2, -1]])
        """
        ids = _seq_ids(seq_ids)
        return self._gate.read(lambda: self._look(ids), lambda view: view.table)

    def to_arrays(self, seq_id: int) -> tuple[Array, Array]:
        """Copies of the keys and values of one sequence.

        Parameters
        ----------
        seq_id : int
            A sequence.

        Returns
        -------
        k : ndarray, (num_kv_heads, length, head_dim)
            In the storage's dtype; float32 for int8, codes times scales.
        v : ndarray, (num_kv_heads, length, head_dim_v)
        """
        seq_id = _seq_id("seq_id", seq_id)
        return self._gate.read(lambda: self._look([seq_id], "seq_id"), self._decode_sequence)

    def _decode_sequence(self, view: _View) -> tuple[Array, Array]:
        k, v = (
            pages.swapaxes(0, 1).reshape(self.num_kv_heads, -1, width)[:, : view.lengths[0]]
            for pages, width in zip(
                self._decode(view.arrays, view.table[0]),
                (self.head_dim, self.head_dim_v),
                strict=True,
            )
        )
        return k, v

    def _sequence(self, name: str, seq_id: int) -> _Sequence:
        return self._lookup([seq_id], name)[0]

    def _lookup(self, seq_ids: Sequence[int], name: str | None = None) -> list[_Sequence]:
        try:
            return [self._sequences[seq_id] for seq_id in seq_ids]
        except KeyError as error:
            [unknown] = error.args
            name = name or f"seq_ids[{list(seq_ids).index(unknown)}]"
            raise ValueError(f"`{name}` must be a sequence of this cache, got {unknown}") from None

    def _look(self, seq_ids: Sequence[int], name: str | None = None) -> _View:
        sequences = self._lookup(seq_ids, name)
        lengths = np.array([sequence.length for sequence in sequences], np.int64)
        most = max((len(sequence.pages) for sequence in sequences), default=0)
        table = np.full((len(sequences), most), -1, np.int64)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        return _View(self._arrays, table, lengths)

    # --- sequences ---

    def add(self, k: ArrayLike | None = None, v: ArrayLike | None = None) -> int:
        """Begin a sequence.

        Parameters
        ----------
        k : array_like, (num_kv_heads, new, head_dim), optional
            Its first keys.  Default: none yet.
        v : array_like, (num_kv_heads, new, head_dim_v), optional
            Its first values.

        Returns
        -------
        int
            The sequence, for the other methods.

        Raises
        ------
        TypeError, ValueError
            As in `KVCache.append`.
        OutOfPagesError
            There are too few free pages.  Nothing has changed.
        """
        if k is None and v is None:
            return self._gate.change(self._added)
        if k is None or v is None:
            given = "v" if k is None else "k"
            raise ValueError(f"`k` and `v` must be given together, got only `{given}`")
        tokens, taken = self._encode(k, v, ())
        return self._gate.change(self._added, tuple(x[np.newaxis] for x in tokens), taken)

    def _added(
        self, tokens: tuple[Array, ...] = (), taken: Lengths | None = None
    ) -> tuple[int, Changes]:
        sequence, pages = _Sequence((), 0), _Pages(self)
        if taken is not None:
            (sequence,) = self._extended([sequence], tokens, taken, pages)
        seq_id = next(self._ids)
        return seq_id, [(self._sequences, seq_id, sequence), *pages.changes()]

    def fork(self, seq_id: int) -> int:
        """Begin a sequence with all tokens of another one, sharing its pages.

        Parameters
        ----------
        seq_id : int
            The other one, which stays as it is.

        Returns
        -------
        int
            The new sequence.

        Raises
        ------
        TypeError, ValueError
            `seq_id` is no sequence of this cache.

        Examples
        --------
        Beam search keeps the beams that `indices` names, one of them twice:

        >>> import fastattn as fa
        >>> cache = fa.PagedKVCache(8, 4, 1, 2)
        >>> beams = [cache.add() for _ in range(3)]
        >>> old, beams = beams, [cache.fork(beams[i]) for i in (2, 0, 0)]
        >>> for beam in old:
        ...     cache.free(beam)
        >>> cache.seq_ids
        [3, 4, 5]
        """
        return self._gate.change(self._forked, _seq_id("seq_id", seq_id))

    def _forked(self, seq_id: int) -> tuple[int, Changes]:
        sequence, pages = self._sequence("seq_id", seq_id), _Pages(self)
        for page in sequence.pages:
            pages.share(page)
        new_id = next(self._ids)
        return new_id, [(self._sequences, new_id, sequence), *pages.changes()]

    def free(self, seq_id: int) -> None:
        """End a sequence; pages that no other one holds return to the pool.

        Parameters
        ----------
        seq_id : int
            The sequence.

        Raises
        ------
        TypeError, ValueError
            `seq_id` is no sequence of this cache.
        """
        self._gate.change(self._freed, _seq_id("seq_id", seq_id))

    def _freed(self, seq_id: int) -> tuple[None, Changes]:
        pages = _Pages(self)
        for page in reversed(self._sequence("seq_id", seq_id).pages):
            pages.release(page)
        return None, [(self._sequences, seq_id, None), *pages.changes()]

    def truncate(self, lengths: ArrayLike, seq_ids: Iterable[int]) -> None:
        """Forget the last tokens of several sequences.

        Parameters
        ----------
        lengths : int or array_like of int, (len(seq_ids),)
            The new length of each sequence, 0 to its present one.
        seq_ids : sequence of int
            Sequences, each at most once.

        Raises
        ------
        TypeError, ValueError
            As in `KVCache.truncate`, or `seq_ids` has an unknown or a repeated one.  The cache is
            unchanged.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.PagedKVCache(4, 2, 1, 1)
        >>> a = cache.add(np.ones((1, 5, 1)), np.ones((1, 5, 1)))
        >>> cache.truncate(2, [a])
        >>> cache.lengths([a]), cache.num_free_pages
        (array([2]), 3)
        """
        ids = _distinct("truncate", _seq_ids(seq_ids))
        self._gate.change(self._truncated, ids, new_lengths(lengths, len(ids)).tolist())

    def _truncated(self, seq_ids: list[int], lengths: list[int]) -> tuple[None, Changes]:
        pages, changes = _Pages(self), []
        for seq_id, sequence, length in zip(seq_ids, self._lookup(seq_ids), lengths, strict=True):
            if not 0 <= length <= sequence.length:
                raise ValueError(
                    f"`lengths` must be 0 to {sequence.length} for sequence {seq_id}, got {length}"
                )
            keep = self._pages_for(length)
            for page in reversed(sequence.pages[keep:]):
                pages.release(page)
            changes.append((self._sequences, seq_id, _Sequence(sequence.pages[:keep], length)))
        return None, [*changes, *pages.changes()]

    def reset(self) -> None:
        """End every sequence."""
        self._gate.change(self._emptied)

    def _emptied(self) -> tuple[None, Changes]:
        new = {
            "_sequences": {},
            "_num_users": [0] * self.num_pages,
            "_free_pages": list(reversed(range(self.num_pages))),
            "_num_free": self.num_pages,
        }
        return None, [(self.__dict__, name, value) for name, value in new.items()]

    def append(
        self,
        k: ArrayLike,
        v: ArrayLike,
        seq_ids: Iterable[int],
        *,
        counts: ArrayLike | None = None,
    ) -> None:
        """Append tokens to several sequences, in place.

        Parameters
        ----------
        k : array_like, (len(seq_ids), num_kv_heads, new, head_dim)
            Keys in float16, bfloat16, float32 or float64, whatever the cache stores.
        v : array_like, (len(seq_ids), num_kv_heads, new, head_dim_v)
            Values, likewise.
        seq_ids : sequence of int
            Sequences, each at most once.
        counts : array_like of int, (len(seq_ids),), optional
            How many of the `new` tokens, from the first on, each sequence takes.  Default: all.

        Raises
        ------
        TypeError, ValueError
            As in `KVCache.append`, or `seq_ids` has an unknown or a repeated one.
        OutOfPagesError
            There are too few free pages.  Nothing has changed: no sequence has any of the tokens.
        """
        ids = _distinct("append", _seq_ids(seq_ids))
        self._gate.change(self._appended, ids, *self._encode(k, v, (len(ids),), counts))

    def _appended(
        self, seq_ids: list[int], tokens: tuple[Array, ...], taken: Lengths
    ) -> tuple[None, Changes]:
        pages = _Pages(self)
        longer = self._extended(self._lookup(seq_ids), tokens, taken, pages)
        changes = zip(itertools.repeat(self._sequences), seq_ids, longer)
        return None, [*changes, *pages.changes()]

    @overload
    def attention(
        self,
        q: ArrayLike,
        seq_ids: Iterable[int],
        *,
        return_lse: Literal[False] = ...,
        **options: Unpack[CacheOptions],
    ) -> Array: ...
    @overload
    def attention(
        self,
        q: ArrayLike,
        seq_ids: Iterable[int],
        *,
        return_lse: Literal[True],
        **options: Unpack[CacheOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def attention(
        self,
        q: ArrayLike,
        seq_ids: Iterable[int],
        *,
        return_lse: bool,
        **options: Unpack[CacheOptions],
    ) -> Array | tuple[Array, Array]: ...
    def attention(
        self,
        q: ArrayLike,
        seq_ids: Iterable[int],
        *,
        return_lse: bool = False,
        **options: Unpack[CacheOptions],
    ) -> Array | tuple[Array, Array]:
        """Attention of new queries over all tokens of their sequences.

        Append the keys and values of the new tokens first.

        Parameters
        ----------
        q : array_like, (len(seq_ids), num_heads, seqlen_q, head_dim)
            Queries of the last `seqlen_q` tokens of each sequence, in the cache's dtype, or float32
            where that is smaller.  `num_heads` is a multiple of `num_kv_heads`.
        seq_ids : sequence of int
            Sequences of any lengths, repeated ones too.
        return_lse : bool, optional
            Whether to return `lse` too.
        **options
            As in `KVCache.attention` without a window: `causal` is True by default, `kv_lengths` is
            the cache's, and seqlen_k of `bias`, `mask` and `segment_ids` is the longest length
            among `seq_ids`.

        Returns
        -------
        out : ndarray, (len(seq_ids), num_heads, seqlen_q, head_dim_v)
            In q's dtype.
        lse : ndarray, (len(seq_ids), num_heads, seqlen_q)
            With ``return_lse=True``.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong dtype, kind, shape or value, or there is no such option.
        """
        ids = _seq_ids(seq_ids)
        q = self._queries(q, len(ids))
        given = own_options("PagedKVCache.attention", options)
        result: Array | tuple[Array, Array] = self._gate.read(
            lambda: self._look(ids), _over, attend, q, given, return_lse
        )
        return result

    def explain(
        self,
        q: ArrayLike,
        seq_ids: Iterable[int],
        *,
        return_lse: bool = False,
        **options: Unpack[CacheOptions],
    ) -> Explanation:
        """Say what `attention` would run with the same arguments, without running it.

        Parameters
        ----------
        q, seq_ids, return_lse, **options
            As in `attention`, and validated the same way.  `out` is not written.

        Returns
        -------
        Explanation
            See `fastattn.explain`.

        Raises
        ------
        TypeError, ValueError, MemoryError
            As `attention` would.
        """
        ids = _seq_ids(seq_ids)
        q = self._queries(q, len(ids))
        given = own_options("PagedKVCache.explain", options)
        plan: Explanation = self._gate.read(
            lambda: self._look(ids), _over, explain, q, given, return_lse
        )
        return plan

    # --- pages ---

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _extended(
        self,
        sequences: list[_Sequence],
        tokens: tuple[Array, ...],
        counts: Lengths,
        pages: _Pages,
    ) -> list[_Sequence]:
        """The sequences with ``counts[i]`` more tokens in sequence i, if there are pages for all.

        Tokens are written to pages that are free, or behind the last token of one that no other
        sequence holds: nobody looks there yet.
        """
        given = enumerate(zip(sequences, counts.tolist(), strict=True))
        growing = [(i, sequence, new) for i, (sequence, new) in given if new]
        # Of the sequences that share a page and write to it now, the last one may keep it.
        leaving: Counter[int] = Counter()
        needed = 0
        for _, sequence, new in growing:
            needed += self._pages_for(sequence.length + new) - len(sequence.pages)
            used = sequence.length % self.page_size
            if used and pages.is_shared(sequence.pages[-1], used, leaving):
                leaving[sequence.pages[-1]] += 1
                needed += 1
        if needed > pages.num_available:
            busy = pages.num_busy
            raise OutOfPagesError(
                f"the cache must have {needed} free pages for `k`, got {pages.num_available} "
                f"({f'{busy} more are being read; ' if busy else ''}free or truncate sequences)"
            )
        longer = list(sequences)
        for i, sequence, new in growing:
            length, stop = sequence.length, sequence.length + new
            held = sequence.pages
            used = length % self.page_size
            if used and pages.is_shared(held[-1], used):
                # Copy on write: the sequence gets a last page of its own.
                own = pages.take()
                live = at_slots(own, 0, used), self._arrays, at_slots(held[-1], 0, used)
                copy_tokens(self._arrays, *live)
                pages.release(held[-1])
                held = (*held[:-1], own)
            missing = self._pages_for(stop) - len(held)
            if missing:
                held = (*held, *(pages.take() for _ in range(missing)))
            done = 0
            while done < new:
                block, slot = divmod(length + done, self.page_size)
                size = min(new - done, self.page_size - slot)
                copy_tokens(
                    self._arrays,
                    at_slots(held[block], slot, slot + size),
                    tokens,
                    at_slots(i, done, done + size),
                )
                done += size
            longer[i] = _Sequence(held, stop)
        return longer


def _over(
    view: _View,
    function: Callable[..., Any],
    q: Array,
    options: dict[str, Any],
    return_lse: bool,
) -> Any:
    """`function`, which is `attend` or `explain`, of what the sequences hold."""
    return function(q, view.arrays, view.lengths, options, return_lse, page_table=view.table)


class _Pages:
    """The pages of a cache as a change will leave them: which are free, who holds the others.

    Pages that a running call reads are not taken, nor written where it looks.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.users: dict[int, int] = {}  # where they differ from the cache's
        self.moved: dict[int, int] = {}  # entries of the free pages, likewise
        self.released: list[int] = []
        self.num_available = cache._num_free
        self.num_busy = 0
        self.seen: NDArray[np.int64] | None = None  # slots of each page that running calls read
        views = cache._gate.being_read()
        if views:
            self.seen = self._seen(views)
            free = cache._free_pages[: cache._num_free]
            busy = [page for page in free if self.seen[page]]
            if busy:
                self.num_busy = len(busy)
                self.num_available -= self.num_busy
                free = busy + [page for page in free if not self.seen[page]]
                self.moved = dict(enumerate(free))

    def _seen(self, views: list[_View]) -> NDArray[np.int64]:
        size = self.cache.page_size
        seen = np.zeros(self.cache.num_pages, np.int64)
        for view in views:
            first = np.arange(view.table.shape[1]) * size
            slots = np.clip(view.lengths[:, np.newaxis] - first, 0, size)
            np.maximum.at(seen, view.table[slots > 0], slots[slots > 0])
        return seen

    def is_shared(self, page: int, used: int, leaving: Counter[int] | None = None) -> bool:
        """Whether who holds the first `used` slots of a page may not write the next ones."""
        users = self._users(page) - (leaving[page] if leaving is not None else 0)
        return users > 1 or (self.seen is not None and bool(self.seen[page] > used))

    def _users(self, page: int) -> int:
        return self.users.get(page, self.cache._num_users[page])

    def share(self, page: int) -> None:
        self.users[page] = self._users(page) + 1

    def take(self) -> int:
        self.num_available -= 1
        place = self.num_available + self.num_busy
        page = self.moved.get(place, self.cache._free_pages[place])
        self.users[page] = 1
        return page

    def release(self, page: int) -> None:
        self.users[page] = self._users(page) - 1
        if self.users[page] == 0:
            self.released.append(page)

    def changes(self) -> Changes:
        cache = self.cache
        num_free = self.num_available + self.num_busy
        free = self.moved | dict(enumerate(self.released, num_free))
        return [
            *((cache._num_users, page, users) for page, users in self.users.items()),
            *((cache._free_pages, place, page) for place, page in free.items()),
            (cache.__dict__, "_num_free", num_free + len(self.released)),
        ]


def _seq_id(name: str, seq_id: int) -> int:
    return integer(name, seq_id, "the int that `add` returned")


def _seq_ids(seq_ids: Iterable[int]) -> list[int]:
    try:
        ids = list(seq_ids)
    except TypeError:
        raise TypeError(f"`seq_ids` must be a sequence of ints, got {seq_ids!r}") from None
    return [x if type(x) is int else _seq_id(f"seq_ids[{i}]", x) for i, x in enumerate(ids)]


def _distinct(method: str, seq_ids: list[int]) -> list[int]:
    if len(set(seq_ids)) < len(seq_ids):
        raise ValueError(f"`seq_ids` must not repeat a sequence in `{method}`, got one twice")
    return seq_ids
