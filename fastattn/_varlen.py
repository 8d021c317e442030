"""Attention over sequences of different lengths, packed one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from numpy.typing import ArrayLike, NDArray

from fastattn import _core, _validate
from fastattn._backward import as_arrays, compute_gradients
from fastattn._options import PackedOptions, Window, given, set_named
from fastattn._problem import of_packed
from fastattn._results import place_results, read_results
from fastattn.reference import Gradients

Array = NDArray[Any]


@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[PackedOptions],
) -> Array: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Array, Array]: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[PackedOptions],
) -> Array | tuple[Array, Array]: ...
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
    window: Window | None = None,
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
    options = given(locals())
    problem = of_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    set_named(problem, options)
    result, made_lse = place_results(problem, out, return_lse)
    _core.attention(problem)
    return result if made_lse is None else (result, made_lse)


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
    window: Window | None = None,
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
    scale, softcap, alibi_slopes, causal, window, q_offset, sinks, dropout_p, dropout_seed, \
residual : optional
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
    options = as_arrays(given(locals()))
    # Converted here, once: the gradients are of these very arrays' shapes and dtypes.
    operands = {name: _validate.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    problem = of_packed(**operands, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    set_named(problem, options)
    read_results(problem, out, lse)
    heads_first = {name: x.swapaxes(0, 1) for name, x in operands.items()}
    grads = compute_gradients(problem, heads_first, grad_out, grad_lse, needs, options)
    return grads._replace(**{name: _swapped(getattr(grads, name)) for name in operands})


def _swapped(array: Array | None) -> Array | None:
    return None if array is None else array.swapaxes(0, 1)
