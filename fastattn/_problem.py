"""The problem of a call: what is computed, of which sizes, whatever form the caller gave it in.

There is one front end for each form: arrays, packed sequences, a cache, and a cache of pages.  Each
checks the operands, makes views of them at their full shapes without a copy, and says so as a
`Problem`, which the options (_options.py) and the places of results (_results.py) are added to.
`_core` takes it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray

from fastattn import _config, _validate
from fastattn._core import Problem, plain_problem
from fastattn._validate import BFLOAT16_BITS, FLOAT16, FLOAT32, FLOAT64, Array, Shape

Int64s = NDArray[np.int64]

# Those that the core's buffers know by these very objects, which callers' arrays have too.
_PLAIN_DTYPES = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16_BITS)


# --- front ends -------------------------------------------------------------------------------


def of_arrays(q: Any, k: Any, v: Any) -> Problem:
    """The problem of `attention`."""
    problem = plain_problem(_config.ISA, q, k, v, ndarray, _PLAIN_DTYPES)
    if problem is not None:
        return problem
    q, k, v, like, single_head = _operands(q, k, v)
    return _problem(q, k, v, q.shape, v.shape, like, single_head)


def of_packed(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike
) -> Problem:
    """The problem of `attention_varlen`: (total, heads, width), one sequence after another."""
    q, k, v = _packed("q", q), _packed("k", k), _packed("v", v)
    heads_first = _operands(*(x.swapaxes(0, 1) for x in (q, k, v)))
    q_starts = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    k_starts = _starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")
    if len(q_starts) != len(k_starts):
        raise ValueError(
            f"`cu_seqlens_k` must have {len(q_starts)} entries like `cu_seqlens_q`, "
            f"got {len(k_starts)}"
        )
    core_q, core_k, core_v, _, _ = heads_first
    problem = _problem(core_q, core_k, core_v, core_q.shape, core_v.shape, q, single_head=False)
    problem.q_starts, problem.k_starts = q_starts, k_starts
    return problem


def of_cache(q: Array, arrays: Sequence[Array], kv_lengths: Int64s) -> Problem:
    """The problem of a cache: q (n, num_heads, seqlen_q, head_dim) over n sequences in storage.

    `arrays` are `_storage.TokenStore`'s, which are not q's dtype where they are smaller.
    """
    return _stored(q, arrays, kv_lengths, arrays[0].shape[2])


def of_pages(q: Array, arrays: Sequence[Array], kv_lengths: Int64s, page_table: Int64s) -> Problem:
    """The same of a paged cache: row i of `page_table` names the pages of sequence i, of which the
    first ``ceil(kv_lengths[i] / page_size)`` are read."""
    problem = _stored(q, arrays, kv_lengths, int(kv_lengths.max(initial=0)))
    problem.page_table = page_table
    return problem


def _stored(q: Array, arrays: Sequence[Array], kv_lengths: Int64s, seqlen_k: int) -> Problem:
    k, v, *scales = map(_validate.core_view, arrays)
    _, num_kv_heads, _, head_dim_v = v.shape
    problem = _problem(q, k, v, q.shape, (num_kv_heads, seqlen_k, head_dim_v), q, single_head=False)
    problem.kv_lengths = kv_lengths
    if scales:
        problem.k_scale, problem.v_scale = scales
    return problem


def _problem(
    q: Array, k: Array, v: Array, q_shape: Shape, v_shape: Shape, like: Array, single_head: bool
) -> Problem:
    num_kv_heads, seqlen_k, head_dim_v = v_shape[-3:]
    q, k, v = map(_validate.core_view, (q, k, v))
    return Problem(
        _config.ISA, q, k, v, q_shape, num_kv_heads, seqlen_k, head_dim_v, like, single_head
    )


# --- operands ---------------------------------------------------------------------------------


def _operands(
    given_q: ArrayLike, given_k: ArrayLike, given_v: ArrayLike
) -> tuple[Array, Array, Array, Array, bool]:
    """q, k and v at their full shapes, q as an array of its own shape, and whether all are 2-D."""
    q = plain_q = _operand("q", given_q, "num_heads, seqlen_q, head_dim")
    k = _operand("k", given_k, "num_kv_heads, seqlen_k, head_dim")
    v = _operand("v", given_v, "num_kv_heads, seqlen_k, head_dim_v")
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(f"`{name}` must have dtype {q.dtype} like `q`, got {array.dtype}")
    single_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (q, k, v))
    num_heads, _, head_dim = q.shape[-3:]
    num_kv_heads, seqlen_k, _ = k.shape[-3:]
    if k.shape[-1] != head_dim:
        raise ValueError(f"`k` must have head_dim {head_dim} like `q`, got {k.shape[-1]}")
    if v.shape[-2] != seqlen_k:
        raise ValueError(f"`v` must have seqlen_k {seqlen_k} like `k`, got {v.shape[-2]}")
    if v.shape[-3] != num_kv_heads:
        raise ValueError(f"`v` must have num_kv_heads {num_kv_heads} like `k`, got {v.shape[-3]}")
    if num_heads != 0 and (num_kv_heads == 0 or num_heads % num_kv_heads != 0):
        raise ValueError(
            f"`k` must have a num_kv_heads that divides num_heads {num_heads} of `q`, "
            f"got {num_kv_heads}"
        )
    batch_shape = q.shape[:-3]
    for name, array, others in (("k", k, "`q`"), ("v", v, "`q` and `k`")):
        joint = _validate.joint_shape(batch_shape, array.shape[:-3])
        if joint is None:
            raise ValueError(
                f"`{name}` must have leading dimensions that broadcast with {batch_shape} "
                f"of {others}, got {array.shape[:-3]}"
            )
        batch_shape = joint
    q = _validate.broadcast("q", q, batch_shape + q.shape[-3:])
    k = _validate.broadcast("k", k, batch_shape + k.shape[-3:])
    v = _validate.broadcast("v", v, batch_shape + v.shape[-3:])
    return q, k, v, plain_q, single_head


def _operand(name: str, x: ArrayLike, axes: str) -> Array:
    array = _validate.float_array(name, x)
    if array.ndim < 2:
        raise ValueError(
            f"`{name}` must have at least 2 dimensions, (..., {axes}) or one head alone, "
            f"got shape {array.shape}"
        )
    return array


def _packed(name: str, x: ArrayLike) -> Array:
    array = _validate.float_array(name, x)
    if array.ndim != 3:
        raise ValueError(
            f"`{name}` must have 3 dimensions, (total, heads, width), got shape {array.shape}"
        )
    return array


def _starts(name: str, cu_seqlens: ArrayLike, total: int, of: str) -> Int64s:
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
