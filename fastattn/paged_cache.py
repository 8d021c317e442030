"""A cache of keys and values in pages, for sequences that come, fork and go.

The storage itself, its dtypes and the attention over it are in ``_storage.py``; this module knows
which pages hold which tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastattn._storage import Lengths, TokenStore, at_slots, attend, copy_tokens, own_options
from fastattn._validate import Array, _integer, count


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


@dataclasses.dataclass(slots=True)
class _Sequence:
    pages: list[int]  # always ceil(length / page_size) of them
    length: int


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

    Notes
    -----
    A sequence of n tokens holds ``ceil(n / page_size)`` pages.  `fork` shares them; the pages count
    their sequences and return to the pool when the last of these is freed.  A shared page that is
    not full is copied when one of its sequences appends, and only then.

    Sequences are ints, which are not used again.  One that is unknown or freed is a ValueError.
    Appending is all or nothing: with too few pages nothing changes.

    A cache does not lock: change it from one thread at a time.

    See Also
    --------
    KVCache : A fixed batch, contiguous.

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
    >>> cache.append([a, b], k, v)
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
        super().__init__(self.num_pages, self.page_size, num_kv_heads, head_dim, head_dim_v, dtype)
        self._ids = itertools.count()
        self._sequences: dict[int, _Sequence] = {}
        self._forget_all()

    def _forget_all(self) -> None:
        self._sequences.clear()
        self._num_users = [0] * self.num_pages  # sequences that hold each page
        self._free_pages = list(reversed(range(self.num_pages)))  # the next one is the last

    def __repr__(self) -> str:
        return f"{self._call()}: {len(self._sequences)} sequences, {self.num_free_pages} free pages"

    # --- what is there ---

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free_pages)

    @property
    def seq_ids(self) -> list[int]:
        """The sequences, oldest first."""
        return list(self._sequences)

    def length(self, seq_id: int) -> int:
        """Tokens of one sequence.

        Parameters
        ----------
        seq_id : int
            A sequence.

        Returns
        -------
        int
        """
        return self._sequence("seq_id", seq_id).length

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
        return _lengths_of(self._lookup(seq_ids))

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
        return _table_of(self._lookup(seq_ids))

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
        sequence = self._sequence("seq_id", seq_id)
        k, v = (
            pages.swapaxes(0, 1).reshape(self.num_kv_heads, -1, width)[:, : sequence.length]
            for pages, width in zip(
                self._decode(sequence.pages), (self.head_dim, self.head_dim_v), strict=True
            )
        )
        return k, v

    def _sequence(self, name: str, seq_id: int) -> _Sequence:
        sequence = self._sequences.get(_integer(name, seq_id, "the int that `add` returned"))
        if sequence is None:
            raise ValueError(f"`{name}` must be a sequence of this cache, got {seq_id}")
        return sequence

    def _lookup(self, seq_ids: Iterable[int]) -> list[_Sequence]:
        try:
            ids = list(seq_ids)
        except TypeError:
            raise TypeError(f"`seq_ids` must be a sequence of ints, got {seq_ids!r}") from None
        return [self._sequence(f"seq_ids[{i}]", seq_id) for i, seq_id in enumerate(ids)]

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
        sequence = _Sequence([], 0)
        if k is not None and v is not None:
            tokens, taken = self._encode(k, v, ())
            self._extend([sequence], tuple(x[np.newaxis] for x in tokens), taken)
        elif k is not None or v is not None:
            given = "v" if k is None else "k"
            raise ValueError(f"`k` and `v` must be given together, got only `{given}`")
        seq_id = next(self._ids)
        self._sequences[seq_id] = sequence
        return seq_id

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
        source = self._sequence("seq_id", seq_id)
        for page in source.pages:
            self._num_users[page] += 1
        new_id = next(self._ids)
        self._sequences[new_id] = _Sequence(list(source.pages), source.length)
        return new_id

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
        self._shorten(self._sequence("seq_id", seq_id), 0)
        del self._sequences[seq_id]

    def truncate(self, seq_id: int, length: int) -> None:
        """Forget the last tokens of a sequence.

        Parameters
        ----------
        seq_id : int
            The sequence.
        length : int
            Its new length, 0 to the present one.

        Raises
        ------
        TypeError, ValueError
            `seq_id` is no sequence of this cache, or `length` is not in this range.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.PagedKVCache(4, 2, 1, 1)
        >>> a = cache.add(np.ones((1, 5, 1)), np.ones((1, 5, 1)))
        >>> cache.truncate(a, 2)
        >>> cache.length(a), cache.num_free_pages
        (2, 3)
        """
        sequence = self._sequence("seq_id", seq_id)
        length = _integer("length", length, "an int >= 0")
        if not 0 <= length <= sequence.length:
            raise ValueError(f"`length` must be 0 to {sequence.length}, got {length}")
        self._shorten(sequence, length)

    def reset(self) -> None:
        """End every sequence."""
        self._forget_all()

    def append(
        self,
        seq_ids: Iterable[int],
        k: ArrayLike,
        v: ArrayLike,
        *,
        counts: ArrayLike | None = None,
    ) -> None:
        """Append tokens to several sequences, in place.

        Parameters
        ----------
        seq_ids : sequence of int
            Sequences, each at most once.
        k : array_like, (len(seq_ids), num_kv_heads, new, head_dim)
            Keys in float16, bfloat16, float32 or float64, whatever the cache stores.
        v : array_like, (len(seq_ids), num_kv_heads, new, head_dim_v)
            Values, likewise.
        counts : array_like of int, (len(seq_ids),), optional
            How many of the `new` tokens, from the first on, each sequence takes.  Default: all.

        Raises
        ------
        TypeError, ValueError
            As in `KVCache.append`, or `seq_ids` has an unknown or a repeated one.
        OutOfPagesError
            There are too few free pages.  Nothing has changed: no sequence has any of the tokens.
        """
        sequences = self._lookup(seq_ids)
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise ValueError("`seq_ids` must not repeat a sequence in `append`, got one twice")
        self._extend(sequences, *self._encode(k, v, (len(sequences),), counts))

    def attention(
        self, q: ArrayLike, seq_ids: Iterable[int], **options: Any
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
        sequences = self._lookup(seq_ids)
        q = self._queries(q, len(sequences))
        options = own_options("PagedKVCache.attention", options)
        table, lengths = _table_of(sequences), _lengths_of(sequences)
        return attend(q, self._arrays, lengths, options, page_table=table)

    # --- pages ---

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _shorten(self, sequence: _Sequence, length: int) -> None:
        keep = self._pages_for(length)
        released = sequence.pages[keep:]
        del sequence.pages[keep:]
        sequence.length = length
        for page in reversed(released):
            self._num_users[page] -= 1
            if self._num_users[page] == 0:
                self._free_pages.append(page)

    def _extend(
        self, sequences: Sequence[_Sequence], tokens: tuple[Array, ...], counts: Lengths
    ) -> None:
        """Append ``counts[i]`` tokens to sequence i, if there are pages for all of them."""
        given = enumerate(zip(sequences, counts.tolist(), strict=True))
        growing = [(i, sequence, new) for i, (sequence, new) in given if new]
        # Of the sequences that share a page and write to it now, the last one may keep it.
        leaving: Counter[int] = Counter()
        needed = 0
        for _, sequence, new in growing:
            needed += self._pages_for(sequence.length + new) - len(sequence.pages)
            if sequence.length % self.page_size:
                page = sequence.pages[-1]
                if self._num_users[page] - leaving[page] > 1:
                    leaving[page] += 1
                    needed += 1
        if needed > self.num_free_pages:
            raise OutOfPagesError(
                f"the cache must have {needed} free pages for `k`, got {self.num_free_pages} "
                "(free or truncate sequences)"
            )
        for i, sequence, new in growing:
            self._own_last_page(sequence)
            stop = sequence.length + new
            while len(sequence.pages) < self._pages_for(stop):
                sequence.pages.append(self._take_page())
            done = 0
            while done < new:
                block, slot = divmod(sequence.length + done, self.page_size)
                size = min(new - done, self.page_size - slot)
                copy_tokens(
                    self._arrays,
                    at_slots(sequence.pages[block], slot, slot + size),
                    tokens,
                    at_slots(i, done, done + size),
                )
                done += size
            sequence.length = stop

    def _take_page(self) -> int:
        page = self._free_pages.pop()
        self._num_users[page] = 1
        return page

    def _own_last_page(self, sequence: _Sequence) -> None:
        """Copy on write: give a sequence a last page of its own, if that page is not full."""
        used = sequence.length % self.page_size
        if used and self._num_users[sequence.pages[-1]] > 1:
            shared, own = sequence.pages[-1], self._take_page()
            copy_tokens(
                self._arrays, at_slots(own, 0, used), self._arrays, at_slots(shared, 0, used)
            )
            self._num_users[shared] -= 1
            sequence.pages[-1] = own


def _lengths_of(sequences: Sequence[_Sequence]) -> Lengths:
    return np.array([sequence.length for sequence in sequences], np.int64)


def _table_of(sequences: Sequence[_Sequence]) -> NDArray[np.int64]:
    most = max((len(sequence.pages) for sequence in sequences), default=0)
    table = np.full((len(sequences), most), -1, np.int64)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence.pages)] = sequence.pages
    return table
