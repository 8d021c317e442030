"""A cache of keys and values for decoding a batch of sequences, contiguous or with a window.

The storage itself, its dtypes and the attention over it are in ``_storage.py``; this module knows
lengths, positions and files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, Unpack, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike

from fastattn._explain import Explanation
from fastattn._options import CacheOptions, read_positions
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
    zeros,
)
from fastattn._validate import (
    MAX_POSITION,
    Array,
    broadcast,
    count,
    flag,
    integer,
    integer_array,
)

if TYPE_CHECKING:
    import zipfile

# What a file of KVCache.save says that it is, and the names of its arrays.
FILE_FORMAT = "fastattn.KVCache 2"
ARRAY_NAMES = ("k", "v", "k_scale", "v_scale")
# Characters of a file's header.  The eight parameters of a cache take some 200.
MAX_HEADER = 4096


class _View(NamedTuple):
    """What a cache holds at one moment."""

    arrays: tuple[Array, ...]
    lengths: Lengths
    evicted: Lengths

    @property
    def stored(self) -> Lengths:
        return self.lengths - self.evicted


class _Piece(NamedTuple):
    """Tokens that are to lie in the slots of sequence `block` from `slot` on."""

    block: int
    slot: int
    source: tuple[Array, ...]
    index: Any
    size: int


class KVCache(TokenStore):
    """Keys and values of a batch of sequences, appended in place.

    Parameters
    ----------
    batch_size : int
        Number of sequences, each of a length of its own.
    num_kv_heads : int
        Heads of the keys and values.
    max_seqlen : int
        Tokens that there is room for in each sequence.  With `window_tokens`, which forgets,
        sequences may grow longer than that; it is then at least ``sink_tokens + window_tokens``.
    head_dim : int
        Width of a key.
    head_dim_v : int, optional
        Width of a value.  Default: `head_dim`.
    dtype : dtype_like, optional
        Of the storage: float32, float64, float16, bfloat16 (``ml_dtypes.bfloat16``) or int8.
    window_tokens : int, optional
        Every query sees this many last tokens only, its own included, and the first `sink_tokens`
        tokens of its sequence; what no later query may see is forgotten.  Default: all tokens.
    sink_tokens : int, optional
        First tokens of each sequence that a cache with a window keeps forever.

    Raises
    ------
    TypeError
        An argument has the wrong kind, or `dtype` is none of these.
    ValueError
        A size is less than 1, or `max_seqlen` has no room for the window.
    MemoryError
        The storage cannot be allocated.

    See Also
    --------
    PagedKVCache : Sequences that come and go, and share prefixes.

    Notes
    -----
    **Precision.**  Appended floats are converted to the storage's dtype with one rounding.  int8
    stores ``rint(x / scale)`` with one float32 scale per token and head, ``max(abs(x)) / 127``, for
    keys and values each: every element is kept to within half a scale, 0.4 % of the largest element
    of its row.  A row of zeros has scale 0.  Where all are as small as 127 times float32's smallest
    number, that bounds the scale.  Whatever is stored comes back finite.

    **Window.**  Storage is the sinks, the window and slack:
    ``max_seqlen - sink_tokens - window_tokens`` slots.  When a sequence is full, `append` moves
    its last ``window_tokens - 1`` tokens to the front, once in ``slack + 1`` tokens: with slack as
    large as the window, a token is moved about once in its life.  Tokens stay in the order of time
    and keep their absolute positions, which `lengths`, `positions` and `q_offset` speak of; keys
    keep the rotation (RoPE) that they were appended with.  After an append of up to slack + 1
    tokens all
    of the new queries find their whole window; queries whose window is not there any more are
    refused, never computed from what is left.

    **Threads.**  Changes and reads from several threads are safe: changes wait for each other, and
    `attention` computes with what the cache held at one moment, whatever is appended, truncated or
    reordered meanwhile.  A change that would overwrite what a running `attention` reads goes to new
    storage.  A method that fails, or is interrupted by Ctrl-C, leaves the cache as it was before or
    as it is after the change, nothing between.

    References
    ----------
    Windows: A. Q. Jiang et al., "Mistral 7B", 2023, https://arxiv.org/abs/2310.06825.  Sinks:
    G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
    https://arxiv.org/abs/2309.17453.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 4, 6, 8), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 1, 2, 6, 8), dtype=np.float32)
    >>> cache = fa.KVCache(batch_size=1, num_kv_heads=2, max_seqlen=100, head_dim=8)

    A prompt of five tokens, then one more:

    >>> cache.append(k[:, :, :5], v[:, :, :5])
    >>> prompt = cache.attention(q[:, :, :5])
    >>> cache.append(k[:, :, 5:], v[:, :, 5:])
    >>> last = cache.attention(q[:, :, 5:])
    >>> cache
    KVCache(batch_size=1, num_kv_heads=2, max_seqlen=100, head_dim=8, dtype=float32): 6 tokens

    The same as all at once:

    >>> out = fa.attention(q, k, v, causal=True)
    >>> bool(np.array_equal(out, np.concatenate([prompt, last], axis=2)))
    True
    """

    _PARAMETERS = (
        "batch_size", "num_kv_heads", "max_seqlen", "head_dim", "head_dim_v", "dtype",
        "window_tokens", "sink_tokens",
    )  # fmt: skip

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_seqlen: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
        window_tokens: int | None = None,
        sink_tokens: int = 0,
    ) -> None:
        self._configure(
            batch_size,
            num_kv_heads,
            max_seqlen,
            head_dim,
            head_dim_v,
            dtype,
            window_tokens,
            sink_tokens,
        )
        self._arrays = self._new_storage()

    def _configure(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_seqlen: int,
        head_dim: int,
        head_dim_v: int | None,
        dtype: DTypeLike,
        window_tokens: int | None,
        sink_tokens: int,
    ) -> None:
        self.batch_size = count("batch_size", batch_size)
        self.max_seqlen = count("max_seqlen", max_seqlen)
        if window_tokens is not None:
            window_tokens = count("window_tokens", window_tokens)
        self.window_tokens = window_tokens
        self.sink_tokens = integer("sink_tokens", sink_tokens, "an int >= 0")
        if self.sink_tokens < 0:
            raise ValueError(f"`sink_tokens` must be at least 0, got {self.sink_tokens}")
        if self.window_tokens is None and self.sink_tokens:
            raise ValueError(
                f"`sink_tokens` must be 0 without `window_tokens`, got {self.sink_tokens}"
            )
        if window_tokens is not None and self.max_seqlen < self.sink_tokens + window_tokens:
            raise ValueError(
                f"`max_seqlen` must be at least sink_tokens {self.sink_tokens} + window_tokens "
                f"{window_tokens}, got {self.max_seqlen}"
            )
        self._configure_store(
            self.batch_size, self.max_seqlen, num_kv_heads, head_dim, head_dim_v, dtype
        )
        # Two rows: lengths, and how many tokens are gone.  The token at position p is in slot p if
        # it is a sink, and else in slot p - evicted: the tokens that are gone are always the first
        # ones after the sinks.
        self._counts: Lengths = zeros((2, self.batch_size), np.dtype(np.int64))

    def __repr__(self) -> str:
        return f"{self._call()}: {self._counts[0].sum():,} tokens"

    def _look(self) -> _View:
        return _View(self._arrays, *self._counts.copy())

    # --- what is there ---

    def lengths(self) -> Lengths:
        """Tokens appended to each sequence so far: the positions of the next ones.

        Returns
        -------
        ndarray of int64, (batch_size,)
            With a window, the tokens that are forgotten count too.
        """
        return self._gate.read(self._look, lambda view: view.lengths)

    @property
    def k(self) -> Array:
        """Stored keys, (batch_size, num_kv_heads, longest, head_dim): a read-only view.

        Of sequence b the first ``len(cache.positions(b))`` are alive.
        """
        return self._gate.read(self._look, _stored_view, 0)

    @property
    def v(self) -> Array:
        """Stored values, (batch_size, num_kv_heads, longest, head_dim_v): a read-only view."""
        return self._gate.read(self._look, _stored_view, 1)

    def positions(self, index: int) -> Lengths:
        """Positions of the tokens of one sequence that are stored, in the order of storage.

        Parameters
        ----------
        index : int
            Which sequence, 0 to batch_size - 1.

        Returns
        -------
        ndarray of int64
            0 to length - 1; with a window, without those that are forgotten.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 1, max_seqlen=4, head_dim=2, window_tokens=2, sink_tokens=1)
        >>> tokens = np.ones((1, 1, 9, 2), np.float32)
        >>> cache.append(tokens, tokens)
        >>> print(cache.positions(0))
        [0 6 7 8]
        """
        return self._gate.read(self._look, self._positions, self._index(index))

    def _positions(self, view: _View, index: int) -> Lengths:
        slots = np.arange(view.stored[index])
        return slots + np.where(slots < self.sink_tokens, 0, view.evicted[index])

    def to_arrays(self, index: int) -> tuple[Array, Array]:
        """Copies of the stored keys and values of one sequence.

        Parameters
        ----------
        index : int
            Which sequence, 0 to batch_size - 1.

        Returns
        -------
        k : ndarray, (num_kv_heads, stored, head_dim)
            In the storage's dtype; float32 for int8, codes times scales.
        v : ndarray, (num_kv_heads, stored, head_dim_v)

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 1, max_seqlen=4, head_dim=2, dtype=np.int8)
        >>> cache.append(np.array([[[[1.0, 0.3]]]]), np.zeros((1, 1, 1, 2)))
        >>> cache.to_arrays(0)[0]
        array([[[1.       , 0.2992126]]], dtype=float32)
        """
        index = self._index(index)
        return self._gate.read(
            self._look,
            lambda view: self._decode(view.arrays, at_slots(index, 0, view.stored[index])),
        )

    def _index(self, index: int) -> int:
        value = integer("index", index, f"an int from 0 to {self.batch_size - 1}")
        if not 0 <= value < self.batch_size:
            raise ValueError(f"`index` must be 0 to {self.batch_size - 1}, got {value}")
        return value

    # --- changes ---

    def append(self, k: ArrayLike, v: ArrayLike, *, counts: ArrayLike | None = None) -> None:
        """Append tokens to the sequences, in place.

        Parameters
        ----------
        k : array_like, (batch_size, num_kv_heads, new, head_dim)
            Keys in float16, bfloat16, float32 or float64, whatever the cache stores.
        v : array_like, (batch_size, num_kv_heads, new, head_dim_v)
            Values, likewise.
        counts : array_like of int, (batch_size,), optional
            How many of the `new` tokens, from the first on, each sequence takes; the others are not
            looked at.  Default: all.

        Raises
        ------
        TypeError
            An argument has the wrong dtype.
        ValueError
            An argument has the wrong shape; a number is too large for the cache's dtype, or not
            finite where it is int8; or, without a window, the tokens do not fit in `max_seqlen`.
            The cache is unchanged then.

        Notes
        -----
        A cache with a window takes any number of tokens, and keeps at least the sinks and the last
        window.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(2, 1, max_seqlen=4, head_dim=2)
        >>> tokens = np.ones((2, 1, 3, 2), np.float32)
        >>> cache.append(tokens, tokens, counts=[3, 1])
        >>> print(cache.lengths())
        [3 1]
        """
        tokens, taken = self._encode(k, v, (self.batch_size,), counts)
        self._gate.change(self._appended, tokens, taken)

    def _appended(self, tokens: tuple[Array, ...], taken: Lengths) -> tuple[None, Changes]:
        starts, gone = self._counts.tolist()
        pieces: list[_Piece] = []
        for b, new in enumerate(taken.tolist()):
            start = starts[b]
            if start - gone[b] + new > self.max_seqlen:
                if self.window_tokens is None:
                    raise ValueError(
                        f"`k` must have at most {self.max_seqlen - start} new tokens for sequence "
                        f"{b}, which has {start} of max_seqlen {self.max_seqlen}, got {new}"
                    )
                kept, gone[b] = self._evict(b, start, gone[b], new)
                pieces.append(kept)
            if new:
                pieces += self._new_pieces(b, tokens, start, gone[b], new)
        after = self._counts + taken
        after[1] = gone
        return None, [*self._write(pieces), (self._counts, ..., after)]

    def _new_pieces(
        self, b: int, tokens: tuple[Array, ...], start: int, evicted: int, new: int
    ) -> list[_Piece]:
        stop = start + new
        # A long chunk may itself be sinks and what is still in the window, with a gap between.
        sinks = (start, min(stop, self.sink_tokens), 0)
        others = (max(start, self.sink_tokens + evicted), stop, evicted)
        return [
            _Piece(b, first - shift, tokens, at_slots(b, first - start, last - start), last - first)
            for first, last, shift in (sinks, others)
            if first < last
        ]

    def _evict(self, b: int, length: int, before: int, new: int) -> tuple[_Piece, int]:
        """The window of sequence b, to be moved to the front to make room for `new` tokens, and
        how many tokens are gone then."""
        assert self.window_tokens is not None
        # The first of the new queries sees window_tokens - 1 tokens from before.  If even that
        # leaves no room, as many of the last tokens as possible stay.
        evicted = max(
            before,
            length - (self.window_tokens - 1) - self.sink_tokens,
            length + new - self.max_seqlen,
        )
        kept = max(length - self.sink_tokens - evicted, 0)
        source = self.sink_tokens + evicted - before
        index = at_slots(b, source, source + kept)
        return _Piece(b, self.sink_tokens, self._arrays, index, kept), evicted

    def _write(self, pieces: list[_Piece]) -> Changes:
        """Write tokens to slots that hold none, and return the assignments that write the others.

        Where a running call reads those slots, all goes to new storage, which one assignment puts
        in the place of the old.
        """
        arrays, live = self._arrays, (self._counts[0] - self._counts[1]).tolist()
        changes: Changes = []
        views = [view for view in self._gate.being_read() if view.arrays is arrays]
        if any(piece.slot < view.stored[piece.block] for view in views for piece in pieces):
            arrays = self._new_storage()
            for b, stored in enumerate(live):
                copy_tokens(arrays, at_slots(b, 0, stored), self._arrays, at_slots(b, 0, stored))
            live = [0] * self.batch_size
            changes.append((self.__dict__, "_arrays", arrays))
        for block, slot, source, index, size in pieces:
            to = at_slots(block, slot, slot + size)
            if slot >= live[block]:
                copy_tokens(arrays, to, source, index)
            else:
                changes += [
                    (array[to], ..., tokens[index].copy())
                    for array, tokens in zip(arrays, source, strict=True)
                ]
        return changes

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the last tokens, for example those of a rejected draft.

        Parameters
        ----------
        lengths : int or array_like of int, (batch_size,)
            The new length of every sequence, 0 to its present one.

        Raises
        ------
        TypeError
            `lengths` is not of integers.
        ValueError
            `lengths` has the wrong shape, is negative or more than there is; or tokens that the
            next query would see are gone from a window.  The last append (of up to slack + 1
            tokens) can always be undone.  The cache is unchanged.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 1, max_seqlen=4, head_dim=2)
        >>> cache.append(np.ones((1, 1, 3, 2)), np.ones((1, 1, 3, 2)))
        >>> cache.truncate(1)
        >>> print(cache.lengths())
        [1]
        """
        self._gate.change(self._truncated, new_lengths(lengths, self.batch_size))

    def _truncated(self, new: Array) -> tuple[None, Changes]:
        lengths, evicted = self._counts
        wrong = np.flatnonzero((new < 0) | (new > lengths))
        if wrong.size:
            b = wrong[0]
            raise ValueError(f"`lengths` must be 0 to {lengths[b]} for sequence {b}, got {new[b]}")
        new = new.astype(np.int64)
        # Sinks are never gone, so a sequence of sinks alone is whole.
        evicted = np.where(new > self.sink_tokens, evicted, 0)
        shortest = self._first_exact(evicted)
        wrong = np.flatnonzero(new < shortest)
        if wrong.size:
            b = wrong[0]
            raise ValueError(
                f"`lengths` must be at least {shortest[b]} for sequence {b} (or at most "
                f"sink_tokens {self.sink_tokens}), whose earlier tokens have left the window, "
                f"got {new[b]}"
            )
        return None, [(self._counts, ..., np.stack([new, evicted]))]

    def _first_exact(self, evicted: Lengths) -> Lengths:
        """The first position whose window, or whole past, is stored."""
        if self.window_tokens is None:
            return np.zeros_like(evicted)
        return np.where(evicted > 0, evicted + self.sink_tokens + self.window_tokens - 1, 0)

    def reset(self) -> None:
        """Forget every token.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 1, max_seqlen=4, head_dim=2)
        >>> cache.append(np.ones((1, 1, 3, 2)), np.ones((1, 1, 3, 2)))
        >>> cache.reset()
        >>> print(cache.lengths())
        [0]
        """
        self.truncate(0)

    def reorder(self, indices: ArrayLike) -> None:
        """Replace sequence b by what was sequence ``indices[b]``, as beam search does, in place.

        Parameters
        ----------
        indices : array_like of int, (batch_size,)
            Any mapping; sequences may be repeated or dropped.

        Raises
        ------
        TypeError
            `indices` is not of integers.
        ValueError
            `indices` has the wrong shape, or an entry that is no sequence.

        Notes
        -----
        Beside the storage this takes the memory of one head of the sequences that move; while
        another thread's `attention` reads the cache, that of a second storage.
        `PagedKVCache.fork` shares tokens instead of copying them.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(3, 1, max_seqlen=4, head_dim=1)
        >>> tokens = np.arange(3.0).reshape(3, 1, 1, 1)
        >>> cache.append(tokens, tokens)
        >>> cache.reorder([2, 0, 0])
        >>> print(cache.k.ravel())
        [2. 0. 0.]
        """
        array = integer_array("indices", indices)
        if array.shape != (self.batch_size,):
            raise ValueError(
                f"`indices` must have shape ({self.batch_size},), got shape {array.shape}"
            )
        wrong = array[(array < 0) | (array >= self.batch_size)]
        if wrong.size:
            raise ValueError(f"`indices` must be 0 to {self.batch_size - 1}, got {wrong[0]}")
        self._gate.change(self._reordered, array.astype(np.int64, copy=False))

    def _reordered(self, source: Lengths) -> tuple[None, Changes]:
        stored = self._counts[0] - self._counts[1]
        moved = np.flatnonzero(source != np.arange(self.batch_size))
        sizes = stored[source[moved]]
        after = (self._counts, ..., self._counts[:, source])
        if self._gate.being_read():
            pieces = [
                _Piece(b, 0, self._arrays, at_slots(int(source[b]), 0, n), n)
                for b, n in zip(moved.tolist(), sizes.tolist(), strict=True)
            ]
            return None, [*self._write(pieces), after]
        # In place, head by head: read all of a head, then write it.
        longest = int(sizes.max(initial=0))
        changes: Changes = []
        for array in self._arrays:
            buffer = np.empty((len(moved), longest, *array.shape[3:]), array.dtype)
            for head in range(self.num_kv_heads):
                rows = array[:, head, :longest]
                changes += [(buffer[i], ..., rows[b]) for i, b in enumerate(source[moved])]
                changes += [(rows[b], ..., buffer[i]) for i, b in enumerate(moved)]
        return None, [*changes, after]

    # --- attention ---

    @overload
    def attention(
        self,
        q: ArrayLike,
        *,
        return_lse: Literal[False] = ...,
        **options: Unpack[CacheOptions],
    ) -> Array: ...
    @overload
    def attention(
        self,
        q: ArrayLike,
        *,
        return_lse: Literal[True],
        **options: Unpack[CacheOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def attention(
        self,
        q: ArrayLike,
        *,
        return_lse: bool,
        **options: Unpack[CacheOptions],
    ) -> Array | tuple[Array, Array]: ...
    def attention(
        self, q: ArrayLike, *, return_lse: bool = False, **options: Unpack[CacheOptions]
    ) -> Array | tuple[Array, Array]:
        """Attention of new queries over all that the cache holds, their own tokens included.

        Append the keys and values of the new tokens first.

        Parameters
        ----------
        q : array_like, (batch_size, num_heads, seqlen_q, head_dim)
            Queries of the last `seqlen_q` tokens of each sequence, in the cache's dtype, or float32
            where that is smaller.  `num_heads` is a multiple of `num_kv_heads`.
        return_lse : bool, optional
            Whether to return `lse` too.
        **options
            As in `fastattn.attention`, except:

            causal : bool, optional
                Default: True, unlike there, so that a chunk of several tokens does not see its own
                future.  With one query, the last token, it makes no difference.
            q_offset : int or array_like of int, (batch_size,), optional
                Position of query 0.  Default: ``lengths - seqlen_q``.  After a ragged append it is
                what `lengths` were before; the rows after ``counts[b]`` are then of no use.
            bias, mask, segment_ids
                Their seqlen_k is ``lengths.max()``.  A mask of (batch_size, seqlen_k) is
                ``mask[:, None, None, :]``.
            kv_lengths
                Is the cache's.

            In a cache with a window, `causal` must be True, and `bias`, `mask`, `segment_ids`,
            `window` and ``softmax_axis="queries"`` are refused, as is `alibi_slopes` with sinks.

        Returns
        -------
        out : ndarray, (batch_size, num_heads, seqlen_q, head_dim_v)
            In q's dtype.
        lse : ndarray, (batch_size, num_heads, seqlen_q)
            With ``return_lse=True``.

        Raises
        ------
        TypeError
            An argument has the wrong dtype or kind, or there is no such option.
        ValueError
            An argument has the wrong shape or value, or part of a query's window is forgotten.

        Notes
        -----
        With a window and sinks, a mask of ``batch_size * seqlen_q * stored`` bytes says which of
        the slack a query no longer sees.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 1, max_seqlen=4, head_dim=2)
        >>> tokens = np.array([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=np.float32)
        >>> cache.append(tokens, tokens)
        >>> cache.attention(np.zeros((1, 3, 2, 2), np.float32))[0, 2]
        array([[1. , 0. ],
               [0.5, 0.5]], dtype=float32)
        """
        q = self._queries(q, self.batch_size)
        given = own_options("KVCache.attention", options)
        result: Array | tuple[Array, Array] = self._gate.read(
            self._look, self._over, attend, q, given, return_lse
        )
        return result

    def explain(
        self, q: ArrayLike, *, return_lse: bool = False, **options: Unpack[CacheOptions]
    ) -> Explanation:
        """Say what `attention` would run with the same arguments, without running it.

        Parameters
        ----------
        q, return_lse, **options
            As in `attention`, and validated the same way.  `out` is not written.

        Returns
        -------
        Explanation
            See `fastattn.explain`.  What a window leaves out counts as skipped by ``window``, or
            with sinks by ``mask``.

        Raises
        ------
        TypeError, ValueError, MemoryError
            As `attention` would.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 2, max_seqlen=100, head_dim=8, dtype=np.float16)
        >>> cache.append(np.ones((1, 2, 30, 8)), np.ones((1, 2, 30, 8)))
        >>> plan = cache.explain(np.ones((1, 4, 1, 8), np.float16))
        >>> plan.form, plan.seqlen_k
        ('cache of float16', 30)
        """
        q = self._queries(q, self.batch_size)
        given = own_options("KVCache.explain", options)
        plan: Explanation = self._gate.read(self._look, self._over, explain, q, given, return_lse)
        return plan

    def _over(
        self,
        view: _View,
        function: Callable[..., Any],
        q: Array,
        options: dict[str, Any],
        return_lse: bool,
    ) -> Any:
        """`function`, which is `attend` or `explain`, of what the cache holds."""
        if self.window_tokens is not None:
            options = self._window_options(view, q.shape[2], self.window_tokens, options)
        stored = view.stored
        longest = int(stored.max())
        arrays = tuple(array[:, :, :longest] for array in view.arrays)
        return function(q, arrays, stored, options, return_lse)

    def _window_options(
        self, view: _View, seqlen_q: int, window_tokens: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Options that make `attention` see, in slots, what the queries see in positions."""
        if not flag("causal", options["causal"]):
            raise ValueError("`causal` must be True in a cache with a window, got False")
        if options.get("softmax_axis", "keys") != "keys":
            raise ValueError(
                '`softmax_axis` must be "keys" in a cache with a window, '
                f"got {options['softmax_axis']!r}"
            )
        # Their keys are positions, which slots are not; ALiBi's distances to sinks are not either.
        by_position = ("window", "bias", "mask", "segment_ids", "alibi_slopes")
        for name in by_position if self.sink_tokens else by_position[:-1]:
            if options.get(name) is not None:
                sinks = " and sinks" if name == "alibi_slopes" else ""
                raise ValueError(f"`{name}` must be None in a cache with a window{sinks}")

        given = options.get("q_offset")
        if given is None:
            offset = view.lengths - seqlen_q
        else:
            offset = read_positions("q_offset", given)
            offset = broadcast("q_offset", offset, (self.batch_size,))
        first = np.maximum(offset, 0)
        earliest = self._first_exact(view.evicted)
        # Rows before the first token or after the last one are nobody's queries.
        is_query = (offset + seqlen_q > 0) & (first < view.lengths) & (seqlen_q > 0)
        wrong = np.flatnonzero(is_query & (first < earliest))
        if wrong.size:
            b = wrong[0]
            rule = (
                f"`q` must have at most {view.lengths[b] - earliest[b]} queries"
                if given is None
                else f"`q_offset` must be at least {earliest[b]}"
            )
            raise ValueError(
                f"{rule} for sequence {b}, because earlier tokens have left the window, "
                f"got {seqlen_q if given is None else offset[b]}"
            )

        options = {**options, "q_offset": offset - view.evicted}
        if not self.sink_tokens:
            return {**options, "window": (window_tokens - 1, 0)}
        before_window = offset[:, np.newaxis] + np.arange(seqlen_q) - window_tokens
        if np.any(before_window >= (self.sink_tokens + view.evicted)[:, np.newaxis]):
            slots = np.arange(view.stored.max())
            is_sink = slots < self.sink_tokens
            positions = slots + np.where(is_sink, 0, view.evicted[:, np.newaxis])
            seen = is_sink | (positions[:, np.newaxis] > before_window[..., np.newaxis])
            options["mask"] = seen[:, np.newaxis]
        return options

    # --- copies and files ---

    def copy(self) -> Self:
        """A cache of its own with the same tokens.

        Returns
        -------
        KVCache

        Examples
        --------
        >>> import fastattn as fa
        >>> fa.KVCache(1, 1, max_seqlen=4, head_dim=2).copy()
        KVCache(batch_size=1, num_kv_heads=1, max_seqlen=4, head_dim=2, dtype=float32): 0 tokens
        """
        other = type(self)(**self._parameters())
        self._gate.read(self._look, other._fill)
        return other

    def _fill(self, view: _View) -> None:
        """Take over what another cache holds."""
        for b, stored in enumerate(view.stored.tolist()):
            live = at_slots(b, 0, stored)  # the rest of the storage stays untouched
            copy_tokens(self._arrays, live, view.arrays, live)
        self._counts[...] = view.lengths, view.evicted

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file, which holds its live tokens only.

        Parameters
        ----------
        path : str or path
            The file, in the format of `numpy.savez`, without pickle: ``header`` (JSON),
            ``lengths``, ``evicted``, ``k`` and ``v`` (tokens, num_kv_heads, width), the sequences
            one after the other, and for int8 ``k_scale`` and ``v_scale``.  bfloat16 is uint16.

        Raises
        ------
        OSError
            The file cannot be written.

        Examples
        --------
        >>> import os, tempfile
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(1, 1, max_seqlen=4, head_dim=2)
        >>> cache.append(np.ones((1, 1, 3, 2)), np.ones((1, 1, 3, 2)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "cache.npz")
        ...     cache.save(path)
        ...     fa.KVCache.load(path)
        KVCache(batch_size=1, num_kv_heads=1, max_seqlen=4, head_dim=2, dtype=float32): 3 tokens
        """
        self._gate.read(self._look, self._save, path)

    def _save(self, view: _View, path: str | PathLike[str]) -> None:
        import json  # not with the package: few processes write or read a file

        stored = view.stored.tolist()
        header = {"format": FILE_FORMAT, **self._parameters(), "dtype": self.dtype.name}
        members: dict[str, Any] = {
            "header": np.array(json.dumps(header)),
            "lengths": view.lengths,
            "evicted": view.evicted,
        }
        for name, array in zip(ARRAY_NAMES, view.arrays, strict=False):
            live = [array[b, :, :n].swapaxes(0, 1) for b, n in enumerate(stored)]
            members[name] = _as_plain(np.concatenate(live))
        with open(path, "wb") as file:
            np.savez(file, **members)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a cache that `save` wrote.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        KVCache
            Equal to the one that was saved.

        Raises
        ------
        OSError
            The file cannot be opened.
        ValueError
            The file is damaged, or of another kind.  Its members' sizes, dtypes and shapes are
            compared with its header before memory is taken for any: reading takes, besides the
            storage of the cache that the header describes, no more than the file's own size.
        ImportError
            It holds bfloat16, and ``ml_dtypes``, which defines that, has not been imported.
        MemoryError
            The storage cannot be allocated.
        """
        import zipfile

        with open(path, "rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    return cls._restore(_Members(archive, os.fstat(file.fileno()).st_size))
            except (ImportError, MemoryError):
                raise
            except Exception as error:  # whatever zipfile, json and NumPy find
                raise ValueError(
                    f"`path` must be a file that KVCache.save wrote, got {str(path)!r}: {error}"
                ) from error

    @classmethod
    def _restore(cls, members: _Members) -> Self:
        import json

        header = json.loads(str(members.header()))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}")
        file_format = header.pop("format", None)
        if file_format != FILE_FORMAT:
            raise ValueError(f"its format is {file_format!r}, not {FILE_FORMAT!r}")
        if header.get("dtype") == "bfloat16":
            try:
                np.dtype("bfloat16")
            except TypeError:
                raise ImportError(
                    "`path` holds bfloat16: import ml_dtypes before loading"
                ) from None
        # Lengths are the first thing whose size the header gives.
        batch_size = header.get("batch_size")
        if type(batch_size) is int and batch_size > 0:
            members.expect("lengths", np.dtype(np.int64), (batch_size,))
            members.expect("evicted", np.dtype(np.int64), (batch_size,))
        cache = cls.__new__(cls)
        cache._configure(**header)
        names = ARRAY_NAMES if cache.dtype == np.int8 else ARRAY_NAMES[:2]
        members.expect_names("header", "lengths", "evicted", *names)

        lengths, evicted = members.read("lengths"), members.read("evicted")
        stored = lengths - evicted
        if not (
            np.all((evicted >= 0) & (lengths < MAX_POSITION) & (stored <= cache.max_seqlen))
            and np.all(lengths >= cache._first_exact(evicted))
            and (cache.window_tokens is not None or not evicted.any())
        ):
            raise ValueError("its lengths are not those of a cache")
        ends = np.cumsum(stored)
        rows = (int(ends[-1]), cache.num_kv_heads)
        plain = _plain_dtype(cache.dtype)
        members.expect("k", plain, (*rows, cache.head_dim))
        members.expect("v", plain, (*rows, cache.head_dim_v))
        for name in names[2:]:
            members.expect(name, np.dtype(np.float32), rows)

        cache._arrays = cache._new_storage()
        for name, array in zip(names, cache._arrays, strict=True):
            packed = members.read(name)
            for b, (end, n) in enumerate(zip(ends.tolist(), stored.tolist(), strict=True)):
                array[b, :, :n] = packed[end - n : end].view(array.dtype).swapaxes(0, 1)
        cache._counts[...] = lengths, evicted
        return cache


class _Members:
    """The arrays in a file of `KVCache.save`, each of which is looked at before it is read."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int) -> None:
        self.archive = archive
        self.info: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in self.info:
                raise ValueError(f"it holds {name!r} twice")
            # `save` does not compress: what is read is no larger than what is there.
            if info.compress_type != 0 or not info.compress_size == info.file_size < file_size:
                raise ValueError(f"its {name!r} is compressed, or larger than the file")
            self.info[name] = info

    def expect_names(self, *names: str) -> None:
        unknown = sorted(self.info.keys() - set(names))
        if unknown:
            raise ValueError(f"it holds {unknown[0]!r}, which is no part of this cache")

    def _look(self, name: str) -> tuple[Any, tuple[int, ...], bool, np.dtype[Any]]:
        if name not in self.info:
            raise ValueError(f"it lacks {name!r}")
        stream = self.archive.open(self.info[name])
        if npy.read_magic(stream) != (1, 0):
            raise ValueError(f"its {name!r} is of another version of NumPy's format")
        return stream, *npy.read_array_header_1_0(stream)

    def expect(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        stream, found_shape, _, found_dtype = self._look(name)
        if found_dtype != dtype or found_shape != shape:
            raise ValueError(
                f"its {name!r} is {found_dtype} of shape {found_shape}, not {dtype} of {shape}"
            )
        size = self.info[name].file_size - stream.tell()
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its {name!r} of shape {shape} has {size} bytes")

    def header(self) -> Array:
        _, shape, _, dtype = self._look("header")
        if shape != () or dtype.kind != "U" or dtype.itemsize > 4 * MAX_HEADER:
            raise ValueError(f"its 'header' is {dtype} of shape {shape}")
        self.expect("header", dtype, ())
        return self.read("header")

    def read(self, name: str) -> Array:
        """An array that is as expected."""
        stream, shape, fortran_order, dtype = self._look(name)
        array = np.frombuffer(stream.read(), dtype)
        return array.reshape(shape, order="F" if fortran_order else "C")


def _stored_view(view: _View, which: int) -> Array:
    return _read_only(view.arrays[which][:, :, : view.stored.max()])


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _plain_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A dtype of NumPy's own for the same bits."""
    return np.dtype(np.uint16) if dtype.name == "bfloat16" else dtype


def _as_plain(array: Array) -> Array:
    return array.view(_plain_dtype(array.dtype))
