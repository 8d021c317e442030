"""Attention over sequences of different lengths, packed one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastattn import _core, _validate
from fastattn._backward import compute_gradients, wanted_gradients
from fastattn.reference import Gradients

Array = NDArray[Any]


def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    causal: bool = False,
    window: _validate.Window | None = None,
    q_offset: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    residual: ArrayLike | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array | tuple[Array, Array]:
    """`attention` of each sequence of a packed batch, without padding.

    Sequence ``b`` has the queries ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]`` and the keys and
    values ``k[cu_seqlens_k[b]:cu_seqlens_k[b + 1]]``; it sees no other's.  The cost is that of the
    real lengths, and the bits are those of one call per sequence.

    Parameters
    ----------
    q : array_like, (total_q, num_heads, head_dim)
        Queries of all sequences; float32, float64, float16 or bfloat16.
    k : array_like, (total_k, num_kv_heads, head_dim)
        Keys, of q's dtype; ``num_kv_heads`` divides ``num_heads``.
    v : array_like, (total_k, num_kv_heads, head_dim_v)
        Values, of q's dtype.
    cu_seqlens_q : array_like of int, (num_sequences + 1,)
        Where the queries of each sequence begin: 0, then the lengths summed up, total_q last.
        Sequences of length 0 are allowed.
    cu_seqlens_k : array_like of int, (num_sequences + 1,)
        The same of the keys.
    scale, softcap, causal, window, sinks, num_threads : optional
        As in `attention`.  `causal` and `window` count positions within each sequence; by default
        its last query stands at its last key.
    alibi_slopes : array_like, (num_heads,), optional
        As in `attention`.
    q_offset : int or array_like of int, (num_sequences,), optional
        Position of each sequence's first query among its keys.
    dropout_p, dropout_seed : optional
        As in `attention`; a sequence counts as a batch entry.
    residual : array_like of q's dtype and the result's shape, optional
        Added to the result; may be the same array as `out`.
    return_lse : bool, optional
        Whether to return `lse` too.
    out : ndarray of q's dtype and the result's shape, optional
        Where to write the result; see `attention`.

    Returns
    -------
    out : ndarray, (total_q, num_heads, head_dim_v)
        In q's dtype, its axes in memory in the order of q's; `out` itself if it was given.
    lse : ndarray, (num_heads, total_q)
        See `attention`; with `return_lse`.

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
    attention : One shape for all sequences, with `kv_lengths` or `segment_ids`.
    KVCache, PagedKVCache : Sequences that grow.

    References
    ----------
    The packed form is that of ``flash_attn_varlen_func``: T. Dao, "FlashAttention-2", 2023,
    https://arxiv.org/abs/2307.08691.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 10, 2, 8), dtype=np.float32)
    >>> starts = [0, 3, 3, 10]
    >>> out = fa.attention_varlen(q, k, v, starts, starts, causal=True)
    >>> out.shape
    (10, 2, 8)
    >>> first = fa.attention(*(x[:3].swapaxes(0, 1) for x in (q, k, v)), causal=True)
    >>> bool(np.array_equal(out[:3], first.swapaxes(0, 1)))
    True
    """
    call, result, lse = _packed_arguments(
        _heads_first("q", q),
        _heads_first("k", k),
        _heads_first("v", v),
        cu_seqlens_q,
        cu_seqlens_k,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal=causal,
        window=window,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        residual=residual,
        return_lse=return_lse,
        out=out,
        num_threads=num_threads,
    )
    _core.attention(**call)
    given = result.swapaxes(0, 1) if out is None else out
    return given if lse is None else (given, lse)


def attention_varlen_backward(
    grad_out: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    causal: bool = False,
    window: _validate.Window | None = None,
    q_offset: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    residual: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    needs: Sequence[str] = Gradients._fields,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `attention_varlen`: of each sequence of a packed batch.

    Parameters
    ----------
    grad_out : array_like, (total_q, num_heads, head_dim_v)
        Gradient of some loss by the result, of q's dtype.
    q, k, v, cu_seqlens_q, cu_seqlens_k : array_like
        The arguments of the forward call; see `attention_varlen`.
    out, lse : array_like
        What the forward call returned, with ``return_lse=True``.
    scale, softcap, alibi_slopes, causal, window, q_offset, sinks : optional
        As below.
    dropout_p, dropout_seed, residual : optional
        The options of the forward call; see `attention_varlen`.
    grad_lse, needs, num_threads : optional
        As in `attention_backward`.

    Returns
    -------
    Gradients
        See `attention_backward`; `bias` is None.

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
    attention_varlen : The forward pass.

    References
    ----------
    T. Dao et al., "FlashAttention", 2022, https://arxiv.org/abs/2205.14135, appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, grad_out = rng.standard_normal((4, 10, 2, 8), dtype=np.float32)
    >>> starts = [0, 3, 10]
    >>> out, lse = fa.attention_varlen(q, k, v, starts, starts, return_lse=True)
    >>> grads = fa.attention_varlen_backward(grad_out, q, k, v, out, lse, starts, starts)
    >>> grads.k.shape
    (10, 2, 8)
    """
    wanted = wanted_gradients(needs, bias=None, sinks=sinks)
    # Converted here, once: the gradients are of these very arrays' shapes and dtypes.
    given = {name: _heads_first(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    if sinks is not None:
        sinks = _validate.as_array("sinks", sinks)
    call, result, made_lse = _packed_arguments(
        given["q"],
        given["k"],
        given["v"],
        cu_seqlens_q,
        cu_seqlens_k,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        causal=causal,
        window=window,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        residual=residual,
        num_threads=num_threads,
        made=(out, lse),
    )
    grad = _result_like("grad_out", grad_out, result.swapaxes(0, 1).shape)
    sinks_dtype = None if sinks is None else sinks.dtype
    grads = compute_gradients(call, wanted, given, (result, made_lse), grad, grad_lse, sinks_dtype)
    q_k_v = {name: _swapped(getattr(grads, name)) for name in ("q", "k", "v")}
    return grads._replace(**q_k_v)


def _swapped(array: Array | None) -> Array | None:
    return None if array is None else array.swapaxes(0, 1)


def _packed_arguments(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    q_offset: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
    residual: ArrayLike | None,
    return_lse: bool = False,
    out: Array | None = None,
    made: tuple[ArrayLike, ArrayLike] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Array, Array | None]:
    """What ``_core.attention`` takes, by name; the result, heads first; lse.

    q, k and v are of `_heads_first`.
    `made` is the (out, lse) of an earlier call; see `_validate.core_arguments`.
    """
    if alibi_slopes is not None:
        alibi_slopes = _validate.as_array("alibi_slopes", alibi_slopes)
        if alibi_slopes.ndim != 1:
            raise ValueError(
                f"`alibi_slopes` must have one dimension, (num_heads,), got {alibi_slopes.ndim}"
            )
    q_starts = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[1], "q")
    k_starts = _starts("cu_seqlens_k", cu_seqlens_k, k.shape[1], "k")
    if len(q_starts) != len(k_starts):
        raise ValueError(
            f"`cu_seqlens_k` must have {len(q_starts)} entries like `cu_seqlens_q`, "
            f"got {len(k_starts)}"
        )
    shape = (q.shape[1], q.shape[0], v.shape[2])
    arguments, result, lse = _validate.core_arguments(
        q,
        k,
        v,
        bias=None,
        mask=None,
        kv_lengths=None,
        segment_ids=None,
        softmax_axis="keys",
        q_offset=None,
        alibi_slopes=alibi_slopes,
        residual=None if residual is None else _result_like("residual", residual, shape),
        return_lse=return_lse,
        out=None if out is None else _result_like("out", out, shape),
        made=None if made is None else (_result_like("out", made[0], shape), made[1]),
        **options,
    )
    call = dict(zip(_validate.CORE_ARGUMENTS, arguments, strict=True))
    if q_offset is not None:
        call["q_offset"] = _validate.q_offsets(q_offset, (len(q_starts) - 1,))
    return call | {"q_starts": q_starts, "k_starts": k_starts}, result, lse


def _heads_first(name: str, x: ArrayLike) -> Array:
    """A (total, heads, ...) array as (heads, total, ...), which the core knows."""
    array = _validate.float_array(name, x)
    if array.ndim != 3:
        raise ValueError(
            f"`{name}` must have 3 dimensions, (total, heads, width), got shape {array.shape}"
        )
    return array.swapaxes(0, 1)


def _result_like(name: str, x: ArrayLike, shape: tuple[int, ...]) -> Any:
    """The same of `residual` or `out`; whatever else is wrong with it is found out later."""
    array = x if isinstance(x, np.ndarray) else _validate.as_array(name, x)
    if array.shape != shape:
        raise ValueError(f"`{name}` must have the result's shape {shape}, got shape {array.shape}")
    return array.swapaxes(0, 1)


def _starts(name: str, cu_seqlens: ArrayLike, total: int, of: str) -> NDArray[np.int64]:
    array = _validate.integer_array(name, cu_seqlens)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must have shape (num_sequences + 1,), at least (1,), got {array.shape}"
        )
    if int(array[0]) != 0:
        raise ValueError(f"`{name}` must begin with 0, got {array[0]}")
    if int(array[-1]) != total:
        raise ValueError(f"`{name}` must end with the {total} rows of `{of}`, got {array[-1]}")
    falls = np.flatnonzero(array[1:] < array[:-1])
    if falls.size:
        at = int(falls[0])
        raise ValueError(f"`{name}` must not decrease, got {array[at]} before {array[at + 1]}")
    return array.astype(np.int64, copy=False)
