"""What the public functions accept, refuse, allocate and leave alone.

The numbers themselves are the matter of test_attention.py and test_accuracy.py; here results are
compared with the reference only to see that an argument arrives where it should.
"""

import inspect
import pickle
import pydoc
import re
from itertools import product
from math import inf, nan

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastattn as fa

once = pytest.mark.any_kernel_set

# float32 results of a few products of numbers near one.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

B, H, HK, LQ, LK, D, DV = 2, 4, 2, 5, 7, 8, 6


def operands(dtype=np.float32):
    """q, k, v of (B, H, LQ, D), (B, HK, LK, D), (B, HK, LK, DV)."""
    rng = np.random.default_rng(0)
    shapes = (B, H, LQ, D), (B, HK, LK, D), (B, HK, LK, DV)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def read_only(array):
    array.flags.writeable = False
    return array


# --- errors: one row per message -----------------------------------------------------------------

OUT = (B, H, LQ, DV)
SCORES = (B, H, LQ, LK)
FLOATS = "float16, bfloat16, float32 or float64"

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

REFUSED_OPTIONS = [
    # scale, softcap
    ({"scale": "big"}, TypeError, "`scale` must be a real number, got 'big'"),
    ({"scale": True}, TypeError, "`scale` must be a real number, got True"),
    ({"scale": 1j}, TypeError, "`scale` must be a real number, got 1j"),
    ({"scale": [0.5]}, TypeError, "`scale` must be a real number, got [0.5]"),
    ({"scale": nan}, ValueError, "`scale` must be finite, got nan"),
    ({"scale": -inf}, ValueError, "`scale` must be finite, got -inf"),
    ({"scale": 10**400}, ValueError, "`scale` must be finite, got 1000..."),
    ({"softcap": "50"}, TypeError, "`softcap` must be a real number, got '50'"),
    ({"softcap": False}, TypeError, "`softcap` must be a real number, got False"),
    (
        {"softcap": 0},
        ValueError,
        "`softcap` must be greater than 0 (None for no softcap), got 0",
    ),
    (
        {"softcap": -1.5},
        ValueError,
        "`softcap` must be greater than 0 (None for no softcap), got -1.5",
    ),
    ({"softcap": inf}, ValueError, "`softcap` must be finite, got inf"),
    ({"softcap": nan}, ValueError, "`softcap` must be finite, got nan"),
    # bias, mask
    (
        {"bias": np.ones(SCORES, int)},
        TypeError,
        f"`bias` must be {FLOATS}, got int64",
    ),
    (
        {"bias": np.ma.masked_array(zeros(LK))},
        TypeError,
        "`bias` must be a plain array, got a numpy.ma.MaskedArray (pass its data, and what takes "
        "part as `mask`)",
    ),
    (
        {"bias": zeros(LK, dtype=">f8")},
        TypeError,
        "`bias` must be in native byte order, got dtype >f8",
    ),
    (
        {"bias": zeros(LK + 1)},
        ValueError,
        "`bias` must broadcast to (2, 4, 5, 7), got shape (8,)",
    ),
    (
        {"bias": zeros(3, *SCORES)},
        ValueError,
        "`bias` must broadcast to (2, 4, 5, 7), got shape (3, 2, 4, 5, 7)",
    ),
    (
        {"mask": zeros(*SCORES)},
        TypeError,
        "`mask` must be bool, True = takes part (a float mask, which is added to the scores, goes "
        "to `bias`), got float32",
    ),
    (
        {"mask": np.ones(SCORES, np.uint8)},
        TypeError,
        "`mask` must be bool, True = takes part (a float mask, which is added to the scores, goes "
        "to `bias`), got uint8",
    ),
    (
        {"mask": np.ma.masked_array(np.ones(LK, bool))},
        TypeError,
        "`mask` must be a plain array, got a numpy.ma.MaskedArray (pass its data, and what takes "
        "part as `mask`)",
    ),
    (
        {"mask": np.ones((HK, 1, 1), bool)},
        ValueError,
        "`mask` must broadcast to (2, 4, 5, 7), got shape (2, 1, 1)",
    ),
    # alibi_slopes, sinks
    (
        {"alibi_slopes": ["a"] * H},
        TypeError,
        "`alibi_slopes` must be real numbers, got <U1",
    ),
    (
        {"alibi_slopes": np.ones(H, bool)},
        TypeError,
        "`alibi_slopes` must be real numbers, got bool",
    ),
    (
        {"alibi_slopes": np.ones(3)},
        ValueError,
        "`alibi_slopes` must broadcast to (2, 4), got shape (3,)",
    ),
    ({"sinks": np.ones(H, complex)}, TypeError, "`sinks` must be real numbers, got complex128"),
    (
        {"sinks": np.ones(HK)},
        ValueError,
        "`sinks` must have shape (4,), one per head, got (2,)",
    ),
    ({"sinks": 0.0}, ValueError, "`sinks` must have shape (4,), one per head, got ()"),
    (
        {"sinks": np.ones(H), "softmax_axis": "queries"},
        ValueError,
        '`sinks` must be None with softmax_axis="queries" (a sink joins the sum over the keys of '
        "a query), got shape (4,)",
    ),
    # causal, window, q_offset, kv_lengths, segment_ids
    ({"causal": 1}, TypeError, "`causal` must be True or False, got 1"),
    ({"causal": None}, TypeError, "`causal` must be True or False, got None"),
    ({"causal": "top_left"}, TypeError, "`causal` must be True or False, got 'top_left'"),
    ({"window": 3}, TypeError, "`window` must be a pair (left, right), got 3"),
    ({"window": (1,)}, ValueError, "`window` must be a pair (left, right), got 1 entries"),
    ({"window": (1, 2, 3)}, ValueError, "`window` must be a pair (left, right), got 3 entries"),
    (
        {"window": (1.0, 0)},
        TypeError,
        "`window` must be a pair of ints >= 0 or None, got 1.0",
    ),
    (
        {"window": (True, 0)},
        TypeError,
        "`window` must be a pair of ints >= 0 or None, got True",
    ),
    (
        {"window": (-1, 0)},
        ValueError,
        "`window` must hold ints >= 0, or None for an open side, got -1",
    ),
    (
        {"window": (3, -(10**30))},
        ValueError,
        "`window` must hold ints >= 0, or None for an open side, got -1000...",
    ),
    (
        {"q_offset": 1.0},
        TypeError,
        "`q_offset` must be integers of at most 64 bits, got float64",
    ),
    (
        {"q_offset": True},
        TypeError,
        "`q_offset` must be integers of at most 64 bits, got bool",
    ),
    (
        {"q_offset": [0, 1, 2]},
        ValueError,
        "`q_offset` must broadcast to (2,), got shape (3,)",
    ),
    (
        {"kv_lengths": [1.0, 2.0]},
        TypeError,
        "`kv_lengths` must be integers of at most 64 bits, got float64",
    ),
    (
        {"kv_lengths": False},
        TypeError,
        "`kv_lengths` must be integers of at most 64 bits, got bool",
    ),
    (
        {"kv_lengths": 10**30},
        TypeError,
        "`kv_lengths` must be integers of at most 64 bits, got int (dtype object)",
    ),
    ({"kv_lengths": -1}, ValueError, "`kv_lengths` must be 0 to seqlen_k 7, got -1"),
    ({"kv_lengths": [7, 8]}, ValueError, "`kv_lengths` must be 0 to seqlen_k 7, got 8"),
    (
        {"kv_lengths": np.array([2**64 - 1, 0], np.uint64)},
        ValueError,
        "`kv_lengths` must be 0 to seqlen_k 7, got 18446744073709551615",
    ),
    (
        {"kv_lengths": [[1, 2]]},
        ValueError,
        "`kv_lengths` must broadcast to (2,), got shape (1, 2)",
    ),
    (
        {"segment_ids": np.zeros((2, LQ), int)},
        TypeError,
        "`segment_ids` must be a pair (q_ids, k_ids), got a ndarray",
    ),
    (
        {"segment_ids": (np.zeros(LQ, int),)},
        ValueError,
        "`segment_ids` must be a pair (q_ids, k_ids), got 1 entries",
    ),
    (
        {"segment_ids": (np.zeros(LQ), np.zeros(LK, int))},
        TypeError,
        "`segment_ids[0]` must be integers of at most 64 bits, got float64",
    ),
    (
        {"segment_ids": (np.zeros(LQ, int), np.zeros(LK, bool))},
        TypeError,
        "`segment_ids[1]` must be integers of at most 64 bits, got bool",
    ),
    (
        {"segment_ids": (np.zeros(LQ, int), np.zeros(LQ, int))},
        ValueError,
        "`segment_ids[1]` must broadcast to (2, 7), got shape (5,)",
    ),
    (
        {"segment_ids": (np.full(LQ, 2**63, np.uint64), np.zeros(LK, int))},
        ValueError,
        "`segment_ids[0]` must be less than 2**63, got 9223372036854775808",
    ),
    # softmax_axis, return_lse, num_threads
    ({"softmax_axis": -1}, TypeError, '`softmax_axis` must be "keys" or "queries", got -1'),
    (
        {"softmax_axis": "rows"},
        ValueError,
        '`softmax_axis` must be "keys" or "queries", got "rows"',
    ),
    ({"return_lse": 1}, TypeError, "`return_lse` must be True or False, got 1"),
    ({"num_threads": 2.0}, TypeError, "`num_threads` must be an int >= 1, got 2.0"),
    ({"num_threads": True}, TypeError, "`num_threads` must be an int >= 1, got True"),
    ({"num_threads": 0}, ValueError, "`num_threads` must be at least 1, got 0"),
    ({"num_threads": -2}, ValueError, "`num_threads` must be at least 1, got -2"),
    # residual, out
    (
        {"residual": np.zeros(OUT)},
        TypeError,
        "`residual` must have dtype float32 to match `q`, got float64",
    ),
    (
        {"residual": zeros(DV)},
        ValueError,
        "`residual` must have the result's shape (2, 4, 5, 6), got shape (6,)",
    ),
    ({"out": [[0.0]]}, TypeError, "`out` must be a NumPy array, got a list"),
    (
        {"out": np.ma.masked_array(zeros(*OUT))},
        TypeError,
        "`out` must be a plain array, got a numpy.ma.MaskedArray (pass its data, and what takes "
        "part as `mask`)",
    ),
    ({"out": np.zeros(OUT)}, TypeError, "`out` must have dtype float32 like `q`, got <f8"),
    (
        {"out": zeros(*OUT, dtype=">f4")},
        TypeError,
        "`out` must have dtype float32 like `q`, got >f4",
    ),
    (
        {"out": zeros(B, H, LQ, D)},
        ValueError,
        "`out` must have the result's shape (2, 4, 5, 6), got shape (2, 4, 5, 8)",
    ),
    ({"out": read_only(zeros(*OUT))}, ValueError, "`out` must be writeable, got a read-only array"),
    (
        {"out": np.lib.stride_tricks.as_strided(zeros(*OUT[1:]), OUT, (0, 120, 24, 4))},
        ValueError,
        "`out` must not hold two elements in the same memory, got strides (0, 120, 24, 4)",
    ),
    (
        {"out": np.lib.stride_tricks.as_strided(zeros(*OUT), OUT, (480, 120, 20, 4))},
        ValueError,
        "`out` must not hold two elements in the same memory, got strides (480, 120, 20, 4)",
    ),
    # dropout
    ({"dropout_p": 1.5, "dropout_seed": 0}, ValueError, "`dropout_p` must be 0 to 1, got 1.5"),
    ({"dropout_p": -0.1, "dropout_seed": 0}, ValueError, "`dropout_p` must be 0 to 1, got -0.1"),
    ({"dropout_p": nan, "dropout_seed": 0}, ValueError, "`dropout_p` must be finite, got nan"),
    ({"dropout_p": "0.1"}, TypeError, "`dropout_p` must be a real number, got '0.1'"),
    (
        {"dropout_p": 0.1},
        ValueError,
        "`dropout_seed` must be an int where `dropout_p` is greater than 0, got None",
    ),
    (
        {"dropout_p": 0.1, "dropout_seed": 1.0},
        TypeError,
        "`dropout_seed` must be an int, got 1.0",
    ),
    (
        {"dropout_p": 0.1, "dropout_seed": -1},
        ValueError,
        "`dropout_seed` must be 0 to 2**64 - 1, got -1",
    ),
    (
        {"dropout_p": 0.0, "dropout_seed": 2**64},
        ValueError,
        "`dropout_seed` must be 0 to 2**64 - 1, got 18446744073709551616",
    ),
    # what no function has
    ({"dropout": 0.1}, TypeError, "got an unexpected keyword argument 'dropout'..."),
]


def refuse(function, arguments, options, error, message):
    """Expect the message, or its beginning where that ends in dots, and arrays left alone."""
    arrays = [x for x in [*arguments, *options.values()] if type(x) is np.ndarray]
    before = [array.tobytes() for array in arrays]
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    # Python's own messages begin with the function's name.
    text = text.removeprefix(f"{function.__name__}() ")
    beginning = message.removesuffix("...")
    assert (text if beginning == message else text[: len(beginning)]) == beginning
    assert [array.tobytes() for array in arrays] == before


@once
@pytest.mark.parametrize("function", [fa.attention, fa.explain])
@pytest.mark.parametrize(("changes", "error", "message"), REFUSED_OPERANDS)
def test_refused_operands(function, changes, error, message):
    arguments = dict(zip("qkv", operands(), strict=True)) | changes
    refuse(function, arguments.values(), {}, error, message)


@once
@pytest.mark.parametrize("function", [fa.attention, fa.explain])
@pytest.mark.parametrize(("options", "error", "message"), REFUSED_OPTIONS)
def test_refused_options(function, options, error, message):
    refuse(function, operands(), options, error, message)


@once
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (np.ones((3, 4), int), {}, TypeError, f"`x` must be {FLOATS}, got int64"),
        (
            np.ma.masked_array(np.ones((3, 4))),
            {},
            TypeError,
            "`x` must be a plain array, got a numpy.ma.MaskedArray (pass its data, and what takes "
            "part as `mask`)",
        ),
        (
            zeros(4),
            {},
            ValueError,
            "`x` must have at least 2 dimensions, (..., seqlen, embed_dim), got shape (4,)",
        ),
        (
            zeros(3, 4),
            {"num_heads": 3},
            ValueError,
            "`num_heads` must divide embed_dim 4 of `x`, got 3",
        ),
        (zeros(3, 4), {"num_heads": 0}, ValueError, "`num_heads` must be at least 1, got 0"),
        (zeros(3, 4), {"num_heads": 2.0}, TypeError, "`num_heads` must be an int >= 1, got 2.0"),
        (zeros(3, 4), {"residual": 1}, TypeError, "`residual` must be True or False, got 1"),
        (
            zeros(3, 4),
            {"residual": zeros(3, 4)},
            TypeError,
            "`residual` must be True or False, got array(",
        ),
        (zeros(3, 4), {"causal": 1}, TypeError, "`causal` must be True or False, got 1"),
        (
            zeros(3, 4),
            {"num_heads": 2, "mask": np.ones((2, 2), bool)},
            ValueError,
            "`mask` must broadcast to (2, 3, 3), got shape (2, 2)",
        ),
        (
            zeros(3, 4),
            {"out": zeros(3, 4, dtype=np.float64)},
            TypeError,
            "`out` must have dtype float32 like `x`, got <f8",
        ),
        (
            zeros(3, 4),
            {"out": zeros(1, 3, 4)},
            ValueError,
            "`out` must have the result's shape (3, 4), got shape (1, 3, 4)",
        ),
        (zeros(3, 4), {"k": zeros(3, 4)}, TypeError, "unexpected keyword argument 'k'"),
        (zeros(3, 4), {"heads": 2}, TypeError, "unexpected keyword argument 'heads'"),
    ],
)
def test_refused_by_self_attention(x, options, error, message):
    arrays = [x, *options.values()]
    before = [a.tobytes() for a in arrays if isinstance(a, np.ndarray)]
    with pytest.raises(error, match=re.escape(message)):
        fa.self_attention(x, **options)
    assert [a.tobytes() for a in arrays if isinstance(a, np.ndarray)] == before


@once
@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "`outs` must have at least one part, got none"),
        (zeros(0, 3, 4), zeros(0, 3), ValueError, "`outs` must have at least one part, got none"),
        (zeros(2, 3, 4), zeros(3, 3), ValueError, "`lses` must have 2 parts like `outs`, got 3"),
        (
            np.ones((2, 3, 4), int),
            zeros(2, 3),
            TypeError,
            f"`outs[0]` must be {FLOATS}, got int64",
        ),
        (
            [zeros(3, 4), zeros(3, 4, dtype=np.float64)],
            zeros(2, 3),
            TypeError,
            "`outs[1]` must have dtype float32 like `outs[0]`, got float64",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 3, dtype=np.float64),
            TypeError,
            "`lses[0]` must have dtype float32 to match `outs[0]`, got float64",
        ),
        (
            [zeros(3, 4), zeros(2, 4)],
            [zeros(3), zeros(2)],
            ValueError,
            "`outs[1]` must have shape (3, 4) to match `outs[0]`, got shape (2, 4)",
        ),
        (
            zeros(2, 3, 4),
            zeros(2, 4),
            ValueError,
            "`lses[0]` must have shape (3,) to match `outs[0]`, got shape (4,)",
        ),
        (
            zeros(2, 3),
            zeros(2),
            ValueError,
            "`outs[0]` must have at least 2 dimensions, (..., seqlen_q, head_dim_v), "
            "got shape (3,)",
        ),
        (
            [np.ma.masked_array(zeros(3, 4))],
            zeros(1, 3),
            TypeError,
            "`outs[0]` must be a plain array, got a numpy.ma.MaskedArray",
        ),
    ],
)
def test_refused_by_merge_attention(outs, lses, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fa.merge_attention(outs, lses)


@once
def test_a_result_too_large_for_any_memory():
    q = np.broadcast_to(np.float32(1), (2**40, 1))
    v = np.broadcast_to(np.float32(1), (1, 2**40))
    with pytest.raises(MemoryError):
        fa.attention(q, zeros(1, 1), v)


# --- overlap of out ------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_out_must_not_overlap_an_input(name):
    shape = (2, 4, 4)
    arrays = {x: np.ones(shape, np.float32) for x in ("q", "k", "v", "bias")}
    packed = np.ones((2, 5, 4), np.float32)
    arrays[name], out = packed[:, :4], packed[:, 1:]
    q, k, v, bias = arrays.values()
    with pytest.raises(ValueError, match=f"`out` must not overlap `{name}`"):
        fa.attention(q, k, v, bias=bias, out=out)
    with pytest.raises(ValueError, match=f"`out` must not overlap `{name}`"):
        fa.attention(q, k, v, bias=bias, out=arrays[name])
    assert np.all(packed == 1)


@once
def test_out_must_not_overlap_mask_or_segment_ids():
    q, k, v = (zeros(1, 8, 8) for _ in range(3))
    out = zeros(1, 8, 8)
    mask = out.view(bool)[..., :8]
    with pytest.raises(ValueError, match="`out` must not overlap `mask`"):
        fa.attention(q, k, v, mask=mask, out=out)
    ids = out.view(np.int64)[0, 0, :1]
    other = np.zeros(8, np.int64)
    for segment_ids in ((ids, other), (other, ids)):
        with pytest.raises(ValueError, match="`out` must not overlap `segment_ids`"):
            fa.attention(q, k, v, segment_ids=segment_ids, out=out)


@once
def test_out_must_not_overlap_the_x_of_self_attention():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="`out` must not overlap `x`"):
        fa.self_attention(x, out=x)
    assert np.all(x == 1)


@once
def test_out_must_not_overlap_a_part_of_residual():
    q, k, v = (zeros(2, 4, 4) for _ in range(3))
    packed = zeros(2, 5, 4)
    for residual in (packed[:, :4], packed[:, 1:][:, ::-1]):
        with pytest.raises(ValueError, match="`out` must not overlap `residual` unless"):
            fa.attention(q, k, v, residual=residual, out=packed[:, 1:])


def test_out_between_inputs_in_memory_is_no_overlap():
    rng = np.random.default_rng(1)
    packed = rng.standard_normal((B, LQ, 4, H, D)).astype(np.float32)
    q, k, v, out = (packed[:, :, part].swapaxes(1, 2) for part in range(4))
    expected = fa.reference.attention(q, k, v)
    inputs = packed[:, :, :3].copy()
    assert fa.attention(q, k, v, out=out) is out
    assert_allclose(out, expected, **CLOSE)
    assert_array_equal(packed[:, :, :3], inputs)
    # Every second column, too.
    packed = rng.standard_normal((LQ, 2 * D)).astype(np.float32)
    x, out = packed[:, ::2], packed[:, 1::2]
    expected = fa.reference.attention(x, x, x)
    fa.attention(x, x, x, out=out)
    assert_allclose(out, expected, **CLOSE)


# --- out and residual ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_out_is_written_and_returned(dtype):
    q, k, v = operands(dtype)
    expected = fa.attention(q, k, v)
    buffer = np.full((LQ, 2 * DV, B, H), nan, dtype)
    for out in (
        np.full(OUT, nan, dtype),
        np.full(OUT, nan, dtype, order="F"),
        np.full(OUT, nan, dtype)[::-1, :, ::-1],
        buffer.transpose(2, 3, 0, 1)[..., ::2],
    ):
        assert fa.attention(q, k, v, out=out) is out
        assert_array_equal(out, expected)
    assert np.all(np.isnan(buffer[:, 1::2]))  # between the elements of out
    out, lse = fa.attention(q, k, v, out=np.full(OUT, nan, dtype), return_lse=True)
    assert_array_equal(out, expected)
    assert lse.shape == (B, H, LQ)


def test_out_of_interleaved_axes():
    # Distinct places, though no axis steps over the whole of another.
    out = np.lib.stride_tricks.as_strided(np.full(13, nan, np.float32), (1, 3, 2), (0, 8, 12))
    x = np.ones((1, 3, 2), np.float32)
    fa.attention(x, x, x, out=out)
    assert_array_equal(out, x)


def test_two_dimensional_out():
    q, k, v = (x[0, 0] for x in operands())
    out = np.full((LQ, DV), nan, np.float32)
    assert fa.attention(q, k, v, out=out) is out
    assert_array_equal(out, fa.attention(q, k, v))


def test_out_subclass_is_returned_itself(tmp_path):
    q, k, v = operands()
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=OUT)
    assert fa.attention(q, k, v, out=out) is out
    assert_array_equal(np.asarray(out), fa.attention(q, k, v))


@pytest.mark.parametrize("softmax_axis", ["keys", "queries"])
def test_residual_may_be_out(softmax_axis):
    q, k, v = operands()
    residual = np.random.default_rng(2).standard_normal(OUT).astype(np.float32)
    options = {"softmax_axis": softmax_axis}
    expected = fa.attention(q, k, v, residual=residual, **options)
    assert_allclose(
        expected, fa.reference.attention(q, k, v, residual=residual, **options), **CLOSE
    )
    stream = residual.copy()
    assert fa.attention(q, k, v, residual=stream, out=stream, **options) is stream
    assert_array_equal(stream, expected)
    transposed = residual.swapaxes(1, 2).copy().swapaxes(1, 2)
    fa.attention(q, k, v, residual=transposed, out=transposed[:], **options)
    assert_array_equal(transposed, expected)


def test_residual_may_be_an_input():
    x = operands()[0]
    assert_array_equal(fa.attention(x, x, x, residual=x), fa.attention(x, x, x, residual=x.copy()))


# --- what is accepted ----------------------------------------------------------------------------


def test_inputs_are_left_alone():
    q, k, v = operands()
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "bias": np.ones(SCORES),
        "alibi_slopes": np.ones((B, H), np.float32),
        "mask": np.arange(LK) != 2,
        "q_offset": np.array([1, 2], np.int8),
        "kv_lengths": np.array([7, 3], np.uint16),
        "q_ids": np.zeros(LQ, np.int64),
        "k_ids": np.zeros((B, LK), np.int32),
        "sinks": np.zeros(H, np.float32),
        "residual": np.ones(OUT, np.float32),
    }
    before = {name: array.tobytes() for name, array in arrays.items()}
    for array in arrays.values():
        read_only(array)
    options = {name: array for name, array in arrays.items() if name not in "qkv"}
    options["segment_ids"] = (options.pop("q_ids"), options.pop("k_ids"))
    options |= {"causal": True, "window": (3, None), "softcap": 5.0}
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    expected = fa.reference.attention(q, k, v, return_lse=True, **options)
    assert_allclose(out, expected[0], **CLOSE)
    assert_allclose(lse, expected[1], **CLOSE)
    assert {name: array.tobytes() for name, array in arrays.items()} == before


def test_array_likes():
    q, k, v = operands(np.float64)
    expected = fa.attention(q, k, v, mask=np.arange(LK) > 1, bias=np.ones(LK))
    for convert in (np.ndarray.tolist, list, tuple):
        out = fa.attention(
            convert(q), convert(k), convert(v), mask=[False] * 2 + [True] * 5, bias=[1.0] * LK
        )
        assert out.dtype == np.float64
        assert_array_equal(out, expected)
    out = fa.attention(*(pickle.loads(pickle.dumps(x)) for x in (q, k, v)))
    assert_array_equal(out, fa.attention(q, k, v))


def test_subclasses_give_base_class_results():
    class Labelled(np.ndarray):
        pass

    q, k, v = operands()
    out, lse = fa.attention(*(x.view(Labelled) for x in (q, k, v)), return_lse=True)
    assert type(out) is type(lse) is np.ndarray
    assert_array_equal(out, fa.attention(q, k, v))
    assert type(fa.self_attention(q.view(Labelled))) is np.ndarray


def test_numpy_scalars_as_options():
    q, k, v = operands()
    out = fa.attention(
        q,
        k,
        v,
        scale=np.float32(0.5),
        softcap=np.float64(3),
        causal=np.True_,
        window=np.array([2, 1]),
        q_offset=np.int8(1),
        kv_lengths=np.uint8(6),
        return_lse=np.False_,
        num_threads=np.int64(1),
    )
    expected = fa.attention(
        q, k, v, scale=0.5, softcap=3, causal=True, window=(2, 1), q_offset=1, kv_lengths=6
    )
    assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bias_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("softmax_axis", ["keys", "queries"])
def test_result_dtypes(dtype, bias_dtype, softmax_axis):
    q, k, v = operands(dtype)
    bias = np.ones(LK, bias_dtype)
    out, lse = fa.attention(q, k, v, bias=bias, softmax_axis=softmax_axis, return_lse=True)
    assert out.dtype == lse.dtype == dtype
    assert out.shape == OUT
    assert lse.shape == (B, H, LQ if softmax_axis == "keys" else LK)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("q_offset", [3, np.int32(3), [3, 3], np.array([3], np.uint64)]),
        ("q_offset", [10**30, 2**60, np.uint64(2**64 - 1), np.int64(2**63 - 1)]),
        ("q_offset", [-(10**30), -(2**60), np.int64(-(2**63))]),
        ("kv_lengths", [3, np.uint64(3), [3, 3], np.array([3], np.int8)]),
        ("window", [(2, 1), [2, 1], np.array([2, 1])]),
        ("window", [(10**30, 1), (2**60, 1), (None, 1)]),
        ("alibi_slopes", [[1.0, 2, 3, 4], np.arange(1, 5), np.array([[1, 2, 3, 4]], np.float16)]),
        ("mask", [True, np.ones(1, bool), np.ones(SCORES, bool), None]),
        ("bias", [[0.0], 0.0, np.zeros((H, 1, 1)), None]),
    ],
)
def test_values_with_one_meaning(name, values):
    q, k, v = operands()
    options = {"causal": name == "q_offset"}
    expected = fa.reference.attention(q, k, v, **{name: values[0]}, **options)
    first = fa.attention(q, k, v, **{name: values[0]}, **options)
    assert_allclose(first, expected, **CLOSE)
    for value in values[1:]:
        assert_array_equal(fa.attention(q, k, v, **{name: value}, **options), first)


def test_segment_ids_of_any_integer_type():
    q, k, v = operands()
    q_ids, k_ids = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 0, 2, 2, 1])
    expected = fa.reference.attention(q, k, v, segment_ids=(q_ids, k_ids))
    for q_type, k_type in product((np.int8, np.uint64), (np.int64, np.uint16)):
        ids = q_ids.astype(q_type), np.broadcast_to(k_ids.astype(k_type), (B, LK))
        assert_allclose(fa.attention(q, k, v, segment_ids=ids), expected, **CLOSE)
    assert_array_equal(
        fa.attention(q, k, v, segment_ids=[q_ids.tolist(), k_ids.tolist()]),
        fa.attention(q, k, v, segment_ids=(q_ids, k_ids)),
    )


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "v", "out", "lse"),
    [
        ((3, 4), (5, 4), (5, 6), (3, 6), (3,)),
        ((2, 3, 4), (5, 4), (5, 6), (2, 3, 6), (2, 3)),
        ((3, 4), (1, 5, 4), (5, 6), (1, 3, 6), (1, 3)),
        ((3, 4), (7, 1, 5, 4), (5, 6), (7, 1, 3, 6), (7, 1, 3)),
        ((7, 2, 3, 4), (2, 5, 4), (2, 5, 6), (7, 2, 3, 6), (7, 2, 3)),
        ((2, 3, 4), (7, 2, 5, 4), (2, 5, 6), (7, 2, 3, 6), (7, 2, 3)),
        ((2, 3, 4), (2, 5, 4), (7, 2, 5, 6), (7, 2, 3, 6), (7, 2, 3)),
        ((8, 1, 4, 3, 4), (7, 2, 5, 4), (1, 2, 5, 6), (8, 7, 4, 3, 6), (8, 7, 4, 3)),
        ((1,) * 8 + (2, 3, 4), (3, 1, 2, 5, 4), (2, 5, 6), (1,) * 6 + (3, 1, 2, 3, 6), None),
        # zero sizes
        ((0, 4), (5, 4), (5, 6), (0, 6), (0,)),
        ((3, 4), (0, 4), (0, 6), (3, 6), (3,)),
        ((3, 0), (5, 0), (5, 6), (3, 6), (3,)),
        ((3, 4), (5, 4), (5, 0), (3, 0), (3,)),
        ((0, 3, 4), (0, 5, 4), (0, 5, 6), (0, 3, 6), (0, 3)),
        ((0, 3, 4), (2, 5, 4), (2, 5, 6), (0, 3, 6), (0, 3)),
        ((0, 2, 3, 4), (2, 5, 4), (1, 2, 5, 6), (0, 2, 3, 6), (0, 2, 3)),
        ((7, 0, 2, 3, 4), (1, 2, 5, 4), (2, 5, 6), (7, 0, 2, 3, 6), (7, 0, 2, 3)),
        ((0, 0), (0, 0), (0, 0), (0, 0), (0,)),
    ],
)
@pytest.mark.parametrize("softmax_axis", ["keys", "queries"])
def test_shapes(rng, q, k, v, out, lse, softmax_axis):
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in (q, k, v)]
    options = {"softmax_axis": softmax_axis, "return_lse": True}
    got_out, got_lse = fa.attention(*arrays, **options)
    lse = out[:-1] if lse is None else lse
    assert got_out.shape == out
    assert got_lse.shape == (lse if softmax_axis == "keys" else (*lse[:-1], k[-2]))
    expected_out, expected_lse = fa.reference.attention(*arrays, **options)
    assert_allclose(got_out, expected_out, **CLOSE)
    assert_allclose(got_lse, expected_lse, **CLOSE)
    residual = np.ones(out, np.float32)
    got = fa.attention(*arrays, residual=residual, softmax_axis=softmax_axis)
    assert_allclose(got, expected_out + 1, **CLOSE)


def test_as_many_dimensions_as_numpy_has():
    q, k, v = operands()
    lead = (1,) * 60
    out, lse = fa.attention(
        q.reshape(*lead, *q.shape),
        k.reshape(*lead, *k.shape),
        v.reshape(*lead, *v.shape),
        return_lse=True,
        mask=np.arange(LK) > 1,
    )
    expected, expected_lse = fa.attention(q, k, v, return_lse=True, mask=np.arange(LK) > 1)
    assert out.shape == (*lead, *OUT)
    assert_array_equal(out.reshape(OUT), expected)
    assert_array_equal(lse.reshape(B, H, LQ), expected_lse)


def test_options_of_a_two_dimensional_call(rng):
    q, k, v = (x[0, 0].copy() for x in operands())
    options = {
        "bias": rng.standard_normal((LQ, LK)),
        "mask": rng.random((LQ, LK)) < 0.8,
        "alibi_slopes": [0.5],
        "sinks": [0.25],
        "kv_lengths": 6,
        "q_offset": 1,
        "causal": True,
        "segment_ids": (np.zeros(LQ, int), np.zeros(LK, int)),
        "residual": rng.standard_normal((LQ, DV)).astype(np.float32),
        "return_lse": True,
    }
    out, lse = fa.attention(q, k, v, **options)
    expected_out, expected_lse = fa.reference.attention(q, k, v, **options)
    assert_allclose(out, expected_out, **CLOSE)
    assert_allclose(lse, expected_lse, **CLOSE)
    with pytest.raises(ValueError, match=re.escape("`bias` must broadcast to (5, 7)")):
        fa.attention(q, k, v, bias=np.zeros((1, LQ, LK)))
    with pytest.raises(ValueError, match=re.escape("`residual` must have the result's shape (5,")):
        fa.attention(q, k, v, residual=zeros(1, LQ, DV))


# --- memory order --------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("head_dim_v", [D, DV])
def test_result_follows_the_memory_order_of_q(head_dim_v):
    shape = (B, H, LQ, D)
    v = zeros(B, H, LK, head_dim_v)
    k = zeros(B, H, LK, D)
    for axes in ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        q = np.empty([shape[axis] for axis in axes], np.float32)
        q = q.transpose(np.argsort(axes))
        out = fa.attention(q, k, v)
        assert out.shape == (*shape[:-1], head_dim_v)
        assert out.transpose(axes).flags.c_contiguous
    # Broadcast axes have no order of their own and come first.
    q = np.broadcast_to(zeros(LQ, H, D).swapaxes(0, 1), shape)
    assert fa.attention(q, k, v).transpose(0, 2, 1, 3).flags.c_contiguous
    q = zeros(B, LQ, H, D)[:, ::-1, ::2].swapaxes(1, 2)
    assert fa.attention(q, k[:, :2], v[:, :2]).transpose(0, 2, 1, 3).flags.c_contiguous
    # With other dimensions than the result's, q sets no order.
    q = zeros(D, LQ).T
    assert fa.attention(q, k[:, :1], v[:, :1]).flags.c_contiguous
    # One head.
    q = np.asfortranarray(zeros(LQ, D))
    assert fa.attention(q, k[0, 0], v[0, 0]).flags.f_contiguous


# --- self_attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_heads", [1, 2, 6])
def test_self_attention(rng, dtype, num_heads):
    for shape in ((5, 6), (2, 5, 6), (3, 2, 5, 6), (0, 5, 6), (2, 0, 6), (5, 0)):
        x = rng.standard_normal(shape).astype(dtype)
        before = x.tobytes()
        y, lse = fa.self_attention(read_only(x), num_heads=num_heads, return_lse=True)
        expected, expected_lse = fa.reference.self_attention(
            x, num_heads=num_heads, return_lse=True
        )
        assert y.shape == shape and lse.shape == (*shape[:-2], num_heads, shape[-2])
        assert y.dtype == lse.dtype == dtype
        assert_allclose(y, expected, **CLOSE)
        assert_allclose(lse, expected_lse, **CLOSE)
        alone = fa.self_attention(x, num_heads=num_heads, residual=False)
        assert_allclose(alone + x, expected, **CLOSE)
        assert x.tobytes() == before


def test_self_attention_options(rng):
    x = rng.standard_normal((2, 5, 6)).astype(np.float32)
    options = {
        "scale": 0.7,
        "softcap": 2.0,
        "bias": rng.standard_normal((3, 5, 5)),
        "alibi_slopes": [1.0, 0.5, 0.25],
        "mask": rng.random((2, 1, 5, 5)) < 0.9,
        "causal": True,
        "window": (3, None),
        "q_offset": [0, 1],
        "kv_lengths": [5, 4],
        "segment_ids": ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1]),
        "sinks": [0.0, 1.0, -1.0],
    }
    expected = fa.reference.self_attention(x, num_heads=3, **options)
    out = np.full_like(x, nan)
    assert fa.self_attention(x, num_heads=3, out=out, num_threads=1, **options) is out
    assert_allclose(out, expected, **CLOSE)
    expected = fa.reference.self_attention(x, softmax_axis="queries")
    assert_allclose(fa.self_attention(x, softmax_axis="queries"), expected, **CLOSE)


def test_self_attention_takes_any_layout(rng):
    x = rng.standard_normal((4, 5, 6)).astype(np.float32)
    expected = fa.self_attention(x, num_heads=2)
    for view in (
        np.asfortranarray(x),
        x.transpose(1, 2, 0).copy().transpose(2, 0, 1),
        x[::-1].copy()[::-1],
        np.repeat(x, 2, axis=-1)[..., ::2],
        x[..., ::-1].copy()[..., ::-1],
    ):
        y = fa.self_attention(view, num_heads=2)
        assert_array_equal(y, expected)
    assert fa.self_attention(np.asfortranarray(x)).flags.f_contiguous
    row = np.broadcast_to(x[0], (3, 5, 6))
    assert_array_equal(fa.self_attention(row), np.broadcast_to(fa.self_attention(x[0]), (3, 5, 6)))
    assert_array_equal(fa.self_attention(x[0].tolist()).shape, (5, 6))


# --- merge_attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merge_attention_of_parts_of_the_keys(dtype):
    q, k, v = operands(dtype)
    parts = [
        fa.attention(q, k[..., part, :], v[..., part, :], return_lse=True)
        for part in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, LK))
    ]
    outs, lses = zip(*parts, strict=True)
    out, lse = fa.merge_attention(outs, lses)
    assert out.dtype == lse.dtype == dtype
    expected_out, expected_lse = fa.reference.attention(q, k, v, return_lse=True)
    assert_allclose(out, expected_out, **CLOSE)
    assert_allclose(lse, expected_lse, **CLOSE)
    for stacked in (
        fa.merge_attention(np.stack(outs), np.stack(lses)),
        fa.merge_attention([x.tolist() for x in outs], [x.tolist() for x in lses])
        if dtype == np.float64
        else fa.merge_attention(list(outs), list(lses)),
    ):
        assert_array_equal(stacked[0], out)
        assert_array_equal(stacked[1], lse)


@once
def test_merge_attention_keeps_the_bits_of_a_single_part(rng):
    out = rng.standard_normal((2, 5, 3)).astype(np.float32)
    lse = (100 * rng.standard_normal((2, 5))).astype(np.float32)
    out[0, 0], lse[0, 0] = 0.0, -inf
    empty_out, empty_lse = np.full_like(out, nan), np.full_like(lse, -inf)
    for parts in ([(out, lse)], [(empty_out, empty_lse), (out, lse), (empty_out, empty_lse)]):
        merged_out, merged_lse = fa.merge_attention(*zip(*parts, strict=True))
        assert merged_out.tobytes() == out.tobytes()
        assert merged_lse.tobytes() == lse.tobytes()


@once
def test_merge_attention_against_the_reference(rng):
    outs = rng.standard_normal((5, 2, 4, 3))
    lses = 1000 * rng.standard_normal((5, 2, 4))
    lses[1, 0] = -inf
    lses[:, 1, 2] = -inf
    lses[2:, 1, 3] = lses[2, 1, 3]
    copies = outs.tobytes(), lses.tobytes()
    out, lse = fa.merge_attention(read_only(outs), read_only(lses))
    expected_out, expected_lse = fa.reference.merge_attention(outs, lses)
    assert_allclose(out, expected_out, rtol=1e-12, atol=1e-15)
    assert_allclose(lse, expected_lse, rtol=1e-14)
    assert not out[1, 2].any() and lse[1, 2] == -inf
    assert (outs.tobytes(), lses.tobytes()) == copies


@once
def test_merge_attention_rounds_once():
    # In float32 the sum 1 + 2**-24 + 2**-24 would lose both small terms.
    outs = np.array([[[1.0]], [[2.0**-23]], [[2.0**-23]]], np.float32) * np.float32(3)
    out, lse = fa.merge_attention(outs, zeros(3, 1))
    assert out[0, 0] == np.float32(1 + 2.0**-22)
    assert lse[0] == np.float32(np.log(3))


@once
@pytest.mark.parametrize("special", [nan, inf])
def test_merge_attention_of_nan_and_inf_lses_stays_in_its_row(special):
    outs = np.ones((2, 3, 4), np.float32)
    lses = zeros(2, 3)
    lses[0, 1] = special
    out, lse = fa.merge_attention(outs, lses)
    assert_array_equal(np.isnan(out).all(axis=-1), [False, True, False])
    assert_array_equal(out[[0, 2]], np.ones((2, 4)))
    assert_array_equal(np.isnan(lse), [False, True, False])


@once
def test_merge_attention_of_zero_sizes():
    for shape in ((0, 4), (3, 0), (0, 3, 4)):
        out, lse = fa.merge_attention(zeros(2, *shape), zeros(2, *shape[:-1]))
        assert out.shape == shape and lse.shape == shape[:-1]


# --- explain -------------------------------------------------------------------------------------


def test_explain_describes_the_call(kernel_set):
    q, k, v = operands()
    plan = fa.explain(q, k, v, num_threads=1)
    assert plan.isa == kernel_set
    assert plan.dtype == "float32"
    assert plan.batch_shape == (B,)
    sizes = plan.num_heads, plan.num_kv_heads, plan.seqlen_q, plan.seqlen_k, plan.head_dim
    assert sizes == (H, HK, LQ, LK, D)
    assert plan.head_dim_v == DV
    assert plan.num_threads == plan.num_threads_allowed == 1
    assert plan.tile_q >= plan.mr > 0 and plan.block_k >= plan.nr >= plan.vl > 0 < plan.block_q
    assert plan.num_tasks > 0 and plan.workspace_bytes > 0
    assert plan.tiles_total == plan.tiles_computed > 0
    assert plan.skipped_by == {}
    assert "over the keys" in plan.softmax
    assert "over the queries" in fa.explain(q, k, v, softmax_axis="queries").softmax
    assert fa.explain(*operands(np.float64)).dtype == "float64"


@pytest.mark.parametrize(
    ("dtype", "options", "engine", "engine_of_amx"),
    [
        (np.float32, {}, "vector_f32", "amx_f32x3"),
        (np.float32, {"softmax_axis": "queries"}, "vector_f32", "vector_f32"),
        (np.float32, {"scale": 1e-200}, "vector_f64", "vector_f64"),
        (np.float16, {}, "vector_f32", "vector_f32"),
        (ml_dtypes.bfloat16, {}, "vector_f32", "amx_bf16"),
        (np.float64, {}, "vector_f64", "vector_f64"),
    ],
)
def test_explain_names_the_engine(kernel_set, dtype, options, engine, engine_of_amx):
    plan = fa.explain(*operands(dtype), **options)
    assert plan.engine == (engine_of_amx if kernel_set == "amx" else engine)
    assert f"{kernel_set}, engine {plan.engine}, " in str(plan)


def test_explain_counts_skipped_tiles():
    seqlen = 4096
    x = np.broadcast_to(np.float32(0), (1, 1, seqlen, 8))
    full = fa.explain(x, x, x)
    causal = fa.explain(x, x, x, causal=True)
    assert causal.tiles_total == full.tiles_total == full.tiles_computed
    assert causal.skipped_by == {"causal": causal.tiles_skipped}
    assert 0.4 < causal.tiles_skipped / causal.tiles_total < 0.5
    both = fa.explain(x, x, x, causal=True, window=(64, None), kv_lengths=seqlen)
    assert list(both.skipped_by) == ["causal", "window", "kv_lengths"]
    assert both.skipped_by["causal"] == causal.tiles_skipped
    assert both.tiles_skipped > max(both.skipped_by.values())
    assert both.skipped_by["kv_lengths"] == 0
    half = fa.explain(x, x, x, kv_lengths=seqlen // 2)
    assert half.skipped_by["kv_lengths"] == half.tiles_skipped == half.tiles_total // 2
    ids = np.arange(seqlen) // (seqlen // 4)
    segments = fa.explain(x, x, x, segment_ids=(ids, ids))
    assert segments.skipped_by["segment_ids"] == segments.tiles_skipped > 0
    nothing = fa.explain(x, x, x, mask=False)
    assert nothing.tiles_computed == 0
    assert nothing.skipped_by["mask"] == nothing.tiles_total
    open_window = fa.explain(x, x, x, window=(None, None))
    assert open_window.skipped_by == {} and open_window.tiles_skipped == 0


@once
def test_explain_says_why_that_many_threads(monkeypatch):
    x = zeros(1, 8, 256, 16)
    assert "num_threads" in fa.explain(x, x, x, num_threads=1).num_threads_reason
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "1")
    assert "FASTATTN_NUM_THREADS" in fa.explain(x, x, x).num_threads_reason
    row = zeros(1, 1, 1, 16)
    plan = fa.explain(row, row, row, num_threads=3)
    assert plan.num_threads == 1 and plan.num_threads_allowed == 3
    assert plan.num_threads_reason.startswith("3 allowed by num_threads, but ")


@once
def test_explain_prints():
    q, k, v = operands()
    text = str(fa.explain(q, k, v, causal=True))
    for part in ("kernel set", "softmax", "threads", "workspace", "score tiles", "causal"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 150
    assert "no option rules keys out" in str(fa.explain(q, k, v))
    empty = str(fa.explain(zeros(0, 4), zeros(5, 4), zeros(5, 4)))
    assert "score tiles" in empty


@once
def test_explain_writes_nothing_to_out():
    q, k, v = operands()
    out = np.full(OUT, nan, np.float32)
    fa.explain(q, k, v, out=out, return_lse=True)
    assert np.all(np.isnan(out))


# --- documentation -------------------------------------------------------------------------------


@once
def test_every_option_is_documented():
    for function in (fa.attention, fa.self_attention, fa.merge_attention):
        text = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert re.search(rf"^(\*\*)?{name}\b|, {name}\b", text, re.MULTILINE), name
    assert "default     q_offset=0" in pydoc.render_doc(fa.attention)


@once
def test_public_names():
    for name in fa.__all__:
        assert getattr(fa, name).__doc__
    public = inspect.signature(fa.attention).parameters
    specified = inspect.signature(fa.reference.attention).parameters
    assert [name for name in public if name not in ("out", "num_threads")] == list(specified)
    assert all(public[name].default == specified[name].default for name in specified)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fa.no_such_name
