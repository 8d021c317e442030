"""What the public functions accept, allocate and leave alone.

The numbers themselves are the matter of test_attention.py and test_accuracy.py; here results are
compared with the reference only to see that an argument arrives where it should.
"""

import inspect
import pickle
import pydoc
import re
from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from operands import CLOSE, DV, LK, LQ, OUT, SCORES, B, D, H, once, operands, read_only, zeros

import fastattn as fa

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
