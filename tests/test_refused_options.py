"""Options that are refused, one row per message."""

from math import inf, nan

import numpy as np
import pytest
from operands import (
    DV,
    FLOATS,
    HK,
    LK,
    LQ,
    OUT,
    SCORES,
    B,
    D,
    H,
    once,
    operands,
    read_only,
    refuse,
    zeros,
)

import fastattn as fa

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


@once
@pytest.mark.parametrize("function", [fa.attention, fa.explain])
@pytest.mark.parametrize(("options", "error", "message"), REFUSED_OPTIONS)
def test_refused_options(function, options, error, message):
    refuse(function, operands(), options, error, message)
