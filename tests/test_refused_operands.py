"""q, k and v that are refused, one row per message."""

import ml_dtypes
import numpy as np
import pytest
from operands import DV, FLOATS, HK, LK, LQ, B, D, H, once, operands, refuse, zeros

import fastattn as fa

REFUSED_OPERANDS = [
    # dtype and kind
    ({"q": np.ones((B, H, LQ, D), int)}, TypeError, f"`q` must be {FLOATS}, got int64"),
    ({"q": np.ones((B, H, LQ, D), bool)}, TypeError, f"`q` must be {FLOATS}, got bool"),
    (
        {"k": np.ones((B, HK, LK, D), np.complex64)},
        TypeError,
        f"`k` must be {FLOATS}, got complex64",
    ),
    (
        {"v": np.ones((B, HK, LK, DV), object)},
        TypeError,
        f"`v` must be {FLOATS}, got ndarray (dtype object)",
    ),
    ({"q": None}, TypeError, f"`q` must be {FLOATS}, got NoneType (dtype object)"),
    ({"q": "scores"}, TypeError, f"`q` must be {FLOATS}, got <U6"),
    (
        {"q": zeros(B, H, LQ, D, dtype=np.longdouble)},
        TypeError,
        f"`q` must be {FLOATS}, got {np.dtype(np.longdouble)}",
    ),
    (
        {"q": zeros(B, H, LQ, D, dtype=np.float16)},
        TypeError,
        "`k` must have dtype float16 like `q`, got float32",
    ),
    (
        {"k": zeros(B, HK, LK, D, dtype=ml_dtypes.bfloat16)},
        TypeError,
        "`k` must have dtype float32 like `q`, got bfloat16",
    ),
    (
        {"q": zeros(B, H, LQ, D, dtype=ml_dtypes.float8_e4m3fn)},
        TypeError,
        f"`q` must be {FLOATS}, got float8_e4m3fn",
    ),
    (
        {"q": zeros(B, H, LQ, D, dtype=">f4")},
        TypeError,
        "`q` must be in native byte order, got dtype >f4",
    ),
    (
        {"v": np.ma.masked_array(zeros(B, HK, LK, DV))},
        TypeError,
        "`v` must be a plain array, got a numpy.ma.MaskedArray (pass its data, and what takes part "
        "as `mask`)",
    ),
    (
        {"k": zeros(B, HK, LK, D, dtype=np.float64)},
        TypeError,
        "`k` must have dtype float32 like `q`, got float64",
    ),
    (
        {"v": zeros(B, HK, LK, DV, dtype=np.float64)},
        TypeError,
        "`v` must have dtype float32 like `q`, got float64",
    ),
    (
        {"q": [[1.0, 2.0], [3.0]]},
        ValueError,
        "`q` must be an array or a regular nested sequence of numbers, got a list: ...",
    ),
    # shapes
    (
        {"q": zeros(D)},
        ValueError,
        "`q` must have at least 2 dimensions, (..., num_heads, seqlen_q, head_dim) or one head "
        "alone, got shape (8,)",
    ),
    (
        {"k": np.float32(1)},
        ValueError,
        "`k` must have at least 2 dimensions, (..., num_kv_heads, seqlen_k, head_dim) or one head "
        "alone, got shape ()",
    ),
    (
        {"v": zeros(0)},
        ValueError,
        "`v` must have at least 2 dimensions, (..., num_kv_heads, seqlen_k, head_dim_v) or one "
        "head alone, got shape (0,)",
    ),
    ({"k": zeros(B, HK, LK, 9)}, ValueError, "`k` must have head_dim 8 like `q`, got 9"),
    ({"v": zeros(B, HK, 6, DV)}, ValueError, "`v` must have seqlen_k 7 like `k`, got 6"),
    ({"v": zeros(B, 4, LK, DV)}, ValueError, "`v` must have num_kv_heads 2 like `k`, got 4"),
    ({"v": zeros(B, 1, LK, DV)}, ValueError, "`v` must have num_kv_heads 2 like `k`, got 1"),
    (
        {"k": zeros(B, 3, LK, D), "v": zeros(B, 3, LK, DV)},
        ValueError,
        "`k` must have a num_kv_heads that divides num_heads 4 of `q`, got 3",
    ),
    (
        {"k": zeros(B, 8, LK, D), "v": zeros(B, 8, LK, DV)},
        ValueError,
        "`k` must have a num_kv_heads that divides num_heads 4 of `q`, got 8",
    ),
    (
        {"k": zeros(B, 0, LK, D), "v": zeros(B, 0, LK, DV)},
        ValueError,
        "`k` must have a num_kv_heads that divides num_heads 4 of `q`, got 0",
    ),
    (
        {"k": zeros(3, HK, LK, D)},
        ValueError,
        "`k` must have leading dimensions that broadcast with (2,) of `q`, got (3,)",
    ),
    (
        {"v": zeros(5, 3, HK, LK, DV)},
        ValueError,
        "`v` must have leading dimensions that broadcast with (2,) of `q` and `k`, got (5, 3)",
    ),
]


@once
@pytest.mark.parametrize("function", [fa.attention, fa.explain])
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED_OPERANDS)
def test_refused_operands(function, changes, error, message):
    arguments = dict(zip("qkv", operands(), strict=True)) | changes
    refuse(function, arguments.values(), {}, error, message)


@once
def test_a_result_too_large_for_any_memory():
    q = np.broadcast_to(np.float32(1), (2**40, 1))
    v = np.broadcast_to(np.float32(1), (1, 2**40))
    with pytest.raises(MemoryError):
        fa.attention(q, zeros(1, 1), v)
