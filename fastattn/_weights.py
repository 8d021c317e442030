"""Attention weights made visible, without a matrix of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _core, _validate
from fastattn._options import given, set_named
from fastattn._problem import of_arrays
from fastattn._results import allocate

Array = NDArray[Any]
Indices = NDArray[np.int64]


def attention_weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    rows: ArrayLike | slice | None = None,
    heads: ArrayLike | slice | None = None,
    pool: Sequence[int] | None = None,
    reduce: Literal["keys"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    q_offset: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    segment_ids: Sequence[ArrayLike] | None = None,
    sinks: ArrayLike | None = None,
    softmax_axis: Literal["keys", "queries"] = "keys",
    num_threads: int | None = None,
) -> Array:
    """The weights that `attention` multiplies the values by: of chosen queries, pooled, or summed.

    Weights are computed block by block.  Beside the result and some work space for each thread, a
    call takes memory for a few numbers per query and key, so that a map of 100 000 x 100 000
    weights can be looked at through `pool`, and the keys that are looked at most can be found with
    ``reduce="keys"``.  The result has the same bits for any `num_threads`, any batch composition,
    and strided views or their copies.

    Parameters
    ----------
    q : array_like, (..., num_heads, seqlen_q, head_dim)
        Queries, float32, float64, float16 or bfloat16 (``ml_dtypes.bfloat16``).
    k : array_like, (..., num_kv_heads, seqlen_k, head_dim)
        Keys, of q's dtype.  ``num_kv_heads`` divides ``num_heads``, as in `attention`.
    rows : slice or array_like of int, one-dimensional, optional
        The queries whose weights are wanted, in this order; negative ones count from the end.  They
        ascend where `pool` is given.  Default: all.
    heads : slice or array_like of int, one-dimensional, optional
        The query heads whose weights are wanted, likewise.  None where q and k are 2-D.
    pool : pair of int, optional
        ``(r, c)``: means of blocks, r of the chosen queries by c of the keys.  Block i of n
        elements cut into m begins at ``i * n // m`` and ends where the next one begins; r is at
        most the number of chosen queries, and c at most seqlen_k, so that no block is empty.
    reduce : {"keys"}, optional
        A number for each key: the sum of its weights over the chosen queries.
    scale, softcap, bias, alibi_slopes, mask, causal, window, q_offset, kv_lengths, segment_ids, \
sinks, softmax_axis, num_threads : optional
        As in `attention`.  They are of all queries and heads, whichever are chosen.

    Returns
    -------
    weights : ndarray, (..., num_heads, seqlen_q, seqlen_k)
        With the chosen heads and queries in the place of all, or (..., num_heads, r, c) with
        `pool`, or (..., num_heads, seqlen_k) with `reduce`; without num_heads where q and k are
        2-D.  float64 for float64 input, else float32.  A key that takes no part weighs 0, and so
        do all keys of a query (over the queries: all queries of a key) with nothing left.

    Raises
    ------
    TypeError
        An argument has the wrong dtype or kind; the message names it.
    ValueError
        An argument has the wrong shape or value; the message names it.
    MemoryError
        The result or the workspace cannot be allocated.

    See Also
    --------
    attention : The weighted sum itself.

    Notes
    -----
    Scores are computed twice, first for the maximum and the sum of each softmax and then for the
    weights, and values not at all: it takes about as long as `attention` does.

    ``attention_weights(...) @ v`` is `attention` up to rounding.  With `sinks`, the weights of a
    query sum to less than one.

    References
    ----------
    Softmax in blocks: M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018,
    https://arxiv.org/abs/1805.02867.  Sums over the queries as a measure of which keys matter:
    Z. Zhang et al., "H2O: Heavy-Hitter Oracle", 2023, https://arxiv.org/abs/2306.14048.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 1000, 64), dtype=np.float32)
    >>> weights = fa.attention_weights(q, k, causal=True, rows=[-1], heads=[2, 5])
    >>> weights.shape
    (2, 1, 1000)
    >>> out = fa.attention(q, k, v, causal=True)
    >>> bool(np.allclose(weights @ v[[2, 5]], out[[2, 5], -1:], atol=1e-6))
    True

    The whole map in 20 x 20 blocks; under `causal` those above the diagonal are 0:

    >>> picture = fa.attention_weights(q, k, causal=True, pool=(20, 20))
    >>> picture.shape, bool(np.all(picture == np.tril(picture)))
    ((8, 20, 20), True)

    The three keys that head 0 looks at most:

    >>> np.argsort(fa.attention_weights(q, k, heads=[0], reduce="keys")[0])[-3:].shape
    (3,)
    """
    options = given(locals())
    k = _validate.as_array("k", k)
    problem = of_arrays(q, k, k[..., :0] if k.ndim > 0 else k)
    set_named(problem, options)
    num_heads, seqlen_q, seqlen_k = problem.num_heads, problem.seqlen_q, problem.seqlen_k
    single_head = problem.single_head
    if pool is not None and reduce is not None:
        raise ValueError(f"`reduce` must be None with `pool`, got {reduce!r}")
    if single_head and heads is not None:
        raise ValueError(f"`heads` must be None where `q` and `k` are 2-D, got {heads!r}")
    chosen_heads = _validate.indices("heads", heads, num_heads)
    chosen_rows = _validate.indices("rows", rows, seqlen_q)
    num_rows = seqlen_q if chosen_rows is None else chosen_rows.size
    places = None
    if chosen_rows is not None and np.any(chosen_rows[1:] < chosen_rows[:-1]):
        if pool is not None:
            raise ValueError(f"`rows` must ascend with `pool`, got {rows!r}")
        order = np.argsort(chosen_rows, kind="stable")
        chosen_rows = chosen_rows[order]
        places = None if reduce is not None else order
    shape: tuple[int, ...] = (num_rows, seqlen_k)
    if pool is not None:
        pool = shape = _pool(pool, num_rows, seqlen_k)
    elif reduce is not None:
        shape = (seqlen_k,)
        _check_reduce(reduce)
    if not single_head:
        num_chosen = num_heads if chosen_heads is None else chosen_heads.size
        shape = (*problem.batch_shape, num_chosen, *shape)
    weights = allocate(shape, _validate.lse_dtype(problem.dtype), np.zeros)
    _core.attention_weights(
        problem,
        weights,
        rows=chosen_rows,
        places=places,
        heads=chosen_heads,
        pool=pool,
        sums=reduce is not None,
    )
    return weights


def _pool(pool: Sequence[int], num_rows: int, seqlen_k: int) -> tuple[int, int]:
    """The numbers of blocks, none of which is empty."""
    if not isinstance(pool, tuple | list):
        raise TypeError(f"`pool` must be a pair (r, c), got a {type(pool).__name__}")
    if len(pool) != 2:
        raise ValueError(f"`pool` must be a pair (r, c), got {len(pool)} entries")
    r, c = (_validate.count("pool", blocks) for blocks in pool)
    for blocks, most, what in ((r, num_rows, "chosen queries"), (c, seqlen_k, "keys")):
        if blocks > most:
            raise ValueError(
                f"`pool` must have at most as many blocks as there are {what}, {most}, got {blocks}"
            )
    return r, c


def _check_reduce(reduce: object) -> None:
    if not isinstance(reduce, str):
        raise TypeError(f'`reduce` must be "keys" or None, got {reduce!r}')
    if reduce != "keys":
        raise ValueError(f'`reduce` must be "keys" or None, got "{reduce}"')
