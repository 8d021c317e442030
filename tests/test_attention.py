"""Every option of fastattn.attention against fastattn.reference, over shapes that are a multiple
of no block.  The tolerance is that of fastattn._gauge: four times the rounding error that the
formulas themselves allow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gauge import assert_close, naive_attention

import fastattn as fa

BATCH, NUM_HEADS, NUM_KV_HEADS = 2, 4, 2
DTYPES = [np.float32, np.float64]
AXES = ["keys", "queries"]
HEAD_DIMS = [0, 1, 3, 17, 64, 80, 128, 192, 256, 1024]
HEAD_DIMS_V = [0, 1, 5, 16, 64, 72, 100, 129, 256, 1031]
SEQLENS = [1, 5, 6, 7, 23, 24, 25, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300]

# (seqlen_q, seqlen_k, head_dim, head_dim_v): each side longer, tails of every block in sight.
SHAPES = [
    (1, 1, 8, 8),
    (1, 193, 64, 64),
    (7, 5, 3, 17),
    (25, 129, 17, 33),
    (129, 65, 64, 80),
    (70, 300, 40, 24),
]

# float64 results are compared with a float64 reference, which has rounding errors of its own.
MAX_GAUGE = {np.float32: 4.0, np.float64: 8.0}

Options = dict[str, Any]


def random_qkv(
    rng: np.random.Generator,
    dtype: Any,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    batch: tuple[int, ...] = (BATCH,),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = rng.standard_normal((*batch, num_heads, seqlen_q, head_dim))
    k = rng.standard_normal((*batch, num_kv_heads, seqlen_k, head_dim))
    v = rng.standard_normal((*batch, num_kv_heads, seqlen_k, head_dim_v))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> None:
    """Compare out and lse with the reference; the inputs must come back untouched."""
    before = [x.copy() for x in (q, k, v)]
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    expected = fa.reference.attention(q, k, v, return_lse=True, **options)
    assert out.dtype == lse.dtype == q.dtype
    exact = naive_attention(q, k, v, **options)
    assert_close(out, lse, expected, exact, MAX_GAUGE[q.dtype.type])
    for x, copy in zip((q, k, v), before, strict=True):
        assert x.tobytes() == copy.tobytes()


def _random_mask(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.random(shape) < 0.7


def _empty_rows_mask(rng: np.random.Generator, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    mask = _random_mask(rng, BATCH, NUM_HEADS, seqlen_q, seqlen_k)
    mask[..., ::3, :] = False
    mask[..., -1:] = False
    return mask


def _holed_bias(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    bias = rng.standard_normal(shape).astype(dtype)
    bias[rng.random(shape) < 0.3] = -np.inf
    return bias


def _segments(rng: np.random.Generator, seqlen_q: int, seqlen_k: int) -> Options:
    q_ids = np.sort(rng.integers(0, 4, (BATCH, seqlen_q)))
    k_ids = np.sort(rng.integers(0, 4, (BATCH, seqlen_k)))
    return {"segment_ids": (q_ids, k_ids)}


# Option name -> (rng, seqlen_q, seqlen_k) -> keyword arguments.
OPTIONS: dict[str, Callable[[np.random.Generator, int, int], Options]] = {
    "plain": lambda rng, lq, lk: {},
    "scale": lambda rng, lq, lk: {"scale": 0.37},
    "scale-negative": lambda rng, lq, lk: {"scale": -0.8},
    "scale-zero": lambda rng, lq, lk: {"scale": 0.0},
    "scale-large": lambda rng, lq, lk: {"scale": 40.0},
    "softcap": lambda rng, lq, lk: {"softcap": 1.5},
    "softcap-tight": lambda rng, lq, lk: {"softcap": 0.01, "scale": 3.0},
    "softcap-wide": lambda rng, lq, lk: {"softcap": 1e4},
    "bias": lambda rng, lq, lk: {
        "bias": rng.standard_normal((BATCH, NUM_HEADS, lq, lk)).astype(np.float32)
    },
    "bias-float64": lambda rng, lq, lk: {"bias": 3 * rng.standard_normal((NUM_HEADS, lq, lk))},
    "bias-per-key": lambda rng, lq, lk: {"bias": rng.standard_normal((BATCH, 1, 1, lk))},
    "bias-per-query": lambda rng, lq, lk: {"bias": rng.standard_normal((lq, 1)).astype(np.float32)},
    "bias-minus-inf": lambda rng, lq, lk: {"bias": _holed_bias(rng, np.float32, 1, lq, lk)},
    "bias-transposed": lambda rng, lq, lk: {"bias": rng.standard_normal((lk, lq)).T},
    "alibi": lambda rng, lq, lk: {"alibi_slopes": 2.0 ** -np.arange(1, NUM_HEADS + 1)},
    "alibi-batch": lambda rng, lq, lk: {
        "alibi_slopes": rng.random((BATCH, NUM_HEADS)).astype(np.float32),
        "q_offset": 3,
    },
    "mask": lambda rng, lq, lk: {"mask": _random_mask(rng, BATCH, NUM_HEADS, lq, lk)},
    "mask-empty-rows": lambda rng, lq, lk: {"mask": _empty_rows_mask(rng, lq, lk)},
    "mask-per-key": lambda rng, lq, lk: {"mask": _random_mask(rng, BATCH, 1, 1, lk)},
    "mask-per-query": lambda rng, lq, lk: {"mask": _random_mask(rng, lq, 1)},
    "mask-all-false": lambda rng, lq, lk: {"mask": np.zeros((lq, lk), bool)},
    "mask-block-sparse": lambda rng, lq, lk: {
        "mask": np.kron(
            _random_mask(rng, NUM_HEADS, -(-lq // 32), -(-lk // 64)),
            np.ones((32, 64), bool),
        )[:, :lq, :lk]
    },
    "mask-transposed": lambda rng, lq, lk: {"mask": _random_mask(rng, lk, lq).T},
    "causal": lambda rng, lq, lk: {"causal": True},
    "causal-top-left": lambda rng, lq, lk: {"causal": True, "q_offset": 0},
    "causal-behind": lambda rng, lq, lk: {"causal": True, "q_offset": -4},
    "causal-ahead": lambda rng, lq, lk: {"causal": True, "q_offset": 10**15},
    "causal-per-batch": lambda rng, lq, lk: {"causal": True, "q_offset": np.array([2, -3])},
    "window": lambda rng, lq, lk: {"window": (3, 5)},
    "window-left": lambda rng, lq, lk: {"window": (20, None)},
    "window-right": lambda rng, lq, lk: {"window": (None, 2), "q_offset": 1},
    "window-point": lambda rng, lq, lk: {"window": (0, 0)},
    "window-open": lambda rng, lq, lk: {"window": (None, None)},
    "window-causal": lambda rng, lq, lk: {"window": (66, 4), "causal": True},
    "window-outside": lambda rng, lq, lk: {"window": (1, 1), "q_offset": -10_000},
    "kv_lengths": lambda rng, lq, lk: {"kv_lengths": max(lk - 3, 0)},
    "kv_lengths-per-batch": lambda rng, lq, lk: {"kv_lengths": np.array([lk, lk // 2])},
    "kv_lengths-empty": lambda rng, lq, lk: {"kv_lengths": np.array([0, lk])},
    "kv_lengths-causal": lambda rng, lq, lk: {
        "kv_lengths": np.array([lk // 3, lk]),
        "causal": True,
    },
    "segment_ids": lambda rng, lq, lk: _segments(rng, lq, lk),
    "segment_ids-causal": lambda rng, lq, lk: {**_segments(rng, lq, lk), "causal": True},
    "residual": lambda rng, lq, lk: {"residual": True},
    "sinks": lambda rng, lq, lk: {"sinks": rng.standard_normal(NUM_HEADS).astype(np.float32)},
    "sinks-high": lambda rng, lq, lk: {"sinks": np.array([-50.0, 0.0, 50.0, 500.0])},
    "sinks-empty-rows": lambda rng, lq, lk: {
        "sinks": rng.standard_normal(NUM_HEADS),
        "mask": _empty_rows_mask(rng, lq, lk),
    },
    "everything": lambda rng, lq, lk: {
        **_segments(rng, lq, lk),
        "scale": 1.7,
        "softcap": 3.0,
        "bias": rng.standard_normal((NUM_HEADS, lq, lk)).astype(np.float32),
        "alibi_slopes": np.full(NUM_HEADS, 0.1),
        "mask": _random_mask(rng, BATCH, 1, lq, lk),
        "causal": True,
        "window": (90, 70),
        "kv_lengths": np.array([lk, max(lk - 1, 0)]),
        "q_offset": np.array([lk - lq + 2, 40]),
        "residual": True,
        "sinks": np.zeros(NUM_HEADS),
    },
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, dtype: Any, axis: str) -> None:
    rng = np.random.default_rng(sum(map(ord, name)))
    for seqlen_q, seqlen_k, head_dim, head_dim_v in SHAPES:
        q, k, v = random_qkv(rng, dtype, seqlen_q, seqlen_k, head_dim, head_dim_v)
        options = OPTIONS[name](rng, seqlen_q, seqlen_k)
        if axis == "queries":  # where sinks have no place
            options.pop("sinks", None)
        if options.get("residual"):
            shape = (BATCH, NUM_HEADS, seqlen_q, head_dim_v)
            options["residual"] = rng.standard_normal(shape).astype(dtype)
        check(q, k, v, softmax_axis=axis, **options)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("seqlen_q", SEQLENS)
def test_seqlens(seqlen_q: int, dtype: Any, axis: str) -> None:
    rng = np.random.default_rng(seqlen_q)
    for seqlen_k in SEQLENS:
        q, k, v = random_qkv(rng, dtype, seqlen_q, seqlen_k, 19, 21, 1, 1, ())
        if (seqlen_q + seqlen_k) % 2:
            check(q, k, v, softmax_axis=axis)
        else:
            check(q, k, v, softmax_axis=axis, causal=True, q_offset=max(seqlen_k - seqlen_q, 0))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, dtype: Any, axis: str) -> None:
    rng = np.random.default_rng(head_dim)
    for head_dim_v in {*HEAD_DIMS_V, head_dim}:
        q, k, v = random_qkv(rng, dtype, 27, 71, head_dim, head_dim_v, 2, 1, ())
        bias = rng.standard_normal((27, 71)).astype(np.float32)
        check(q, k, v, softmax_axis=axis, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("axis", AXES)
def test_wide_head_over_long_rows(axis: str, dtype: Any) -> None:
    """head_dim and head_dim_v past 1024 with more rows and keys than any block of them."""
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, dtype, 130, 270, 1025, 1100, 1, 1, ())
    check(q, k, v, softmax_axis=axis, causal=True)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(1, 1), (6, 3), (8, 1), (7, 7), (16, 2)])
@pytest.mark.parametrize("axis", AXES)
def test_grouped_heads(num_heads: int, num_kv_heads: int, axis: str) -> None:
    rng = np.random.default_rng(num_heads)
    for seqlen_q in (1, 3, 40):
        q, k, v = random_qkv(rng, np.float32, seqlen_q, 150, 48, 56, num_heads, num_kv_heads)
        check(q, k, v, softmax_axis=axis, causal=True)


BROADCASTS = [
    ((3, 2), (3, 2), (3, 2)),
    ((3, 2), (), (2,)),
    ((), (5,), (5,)),
    ((2, 1, 3), (4, 1), (1, 1, 1)),
    ((1,), (3,), (1,)),
]


@pytest.mark.parametrize("q_batch, k_batch, v_batch", BROADCASTS)
@pytest.mark.parametrize("axis", AXES)
def test_batch_broadcast(
    q_batch: tuple[int, ...], k_batch: tuple[int, ...], v_batch: tuple[int, ...], axis: str
) -> None:
    rng = np.random.default_rng(len(q_batch))
    q = rng.standard_normal((*q_batch, 4, 9, 16)).astype(np.float32)
    k = rng.standard_normal((*k_batch, 2, 30, 16)).astype(np.float32)
    v = rng.standard_normal((*v_batch, 2, 30, 20)).astype(np.float32)
    check(q, k, v, softmax_axis=axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_two_dimensional(dtype: Any) -> None:
    """2-D arrays are one head; the result is 2-D when all three are."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((9, 8), (21, 8), (21, 5)))
    mask = rng.random((9, 21)) < 0.5
    check(q, k, v)
    check(q, k, v, mask=mask, bias=rng.standard_normal(21), causal=True)
    check(q, k, v, segment_ids=(np.arange(9) // 3, np.arange(21) // 7), alibi_slopes=np.ones(1))
    out, lse = fa.attention(q, k, v, return_lse=True)
    assert out.shape == (9, 5) and lse.shape == (9,)
    mixed = fa.attention(np.stack([q, q]), k, v)
    assert mixed.shape == (2, 9, 5)
    assert mixed[0].tobytes() == mixed[1].tobytes() == out.tobytes()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "batch, num_heads, seqlen_q, seqlen_k, head_dim, head_dim_v",
    [
        ((0,), 2, 3, 4, 5, 6),
        ((2, 0, 3), 2, 3, 4, 5, 6),
        ((2,), 0, 3, 4, 5, 6),
        ((2,), 2, 0, 4, 5, 6),
        ((2,), 2, 3, 0, 5, 6),
        ((2,), 2, 3, 4, 0, 6),
        ((2,), 2, 3, 4, 5, 0),
        ((2,), 2, 0, 0, 0, 0),
    ],
)
def test_empty(
    batch: tuple[int, ...],
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
    axis: str,
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(
        rng, np.float32, seqlen_q, seqlen_k, head_dim, head_dim_v, num_heads, num_heads, batch
    )
    check(q, k, v, softmax_axis=axis)
    check(q, k, v, softmax_axis=axis, causal=True, window=(1, 1))


def test_no_keys_leave_the_residual() -> None:
    q = np.ones((2, 3, 4), np.float32)
    k = np.ones((2, 0, 4), np.float32)
    residual = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    out, lse = fa.attention(q, k, k, residual=residual, return_lse=True)
    assert np.array_equal(out, residual)
    assert np.array_equal(lse, np.full((2, 3), -np.inf, np.float32))


@pytest.mark.parametrize("sink", [0.5, -1.0, 1e5, -np.inf])
def test_a_row_without_keys_has_its_sink_as_lse(sink: float) -> None:
    q = np.ones((2, 3, 4), np.float32)
    k = np.ones((2, 5, 4), np.float32)
    nothing: dict[str, Options] = {
        "kv_lengths": {"kv_lengths": 0},
        "mask": {"mask": np.zeros((3, 5), bool)},
        "bias": {"bias": np.full((3, 5), -np.inf)},
        "causal": {"causal": True, "q_offset": -3},
    }
    for name, options in nothing.items():
        sinks = np.array([sink, 2.0])
        out, lse = fa.attention(q, k, k, sinks=sinks, return_lse=True, **options)
        assert not out.any(), name
        np.testing.assert_allclose(lse, np.repeat(sinks[:, None], 3, 1), rtol=1e-7, err_msg=name)
        grads = fa.attention_backward(
            q, q, k, k, out, lse, sinks=sinks, grad_lse=np.ones((2, 3), np.float32), **options
        )
        for gradient in (grads.q, grads.k, grads.v):
            assert not gradient.any(), name
        np.testing.assert_allclose(grads.sinks, [0.0 if sink == -np.inf else 3.0, 3.0], rtol=1e-5)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("bias_dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_key_whose_bias_is_minus_infinity_takes_no_part(
    dtype: Any, bias_dtype: Any, axis: str
) -> None:
    """The bits of the same call with that key masked and finite, for few rows and many."""
    rng = np.random.default_rng(0)
    for seqlen_q in (1, 3, 40):
        q, grad = (rng.standard_normal((2, seqlen_q, 24)).astype(dtype) for _ in range(2))
        k, v = (rng.standard_normal((2, 200, 24)).astype(dtype) for _ in range(2))
        out_of = np.arange(200) % 7 == 3
        bias = rng.standard_normal((seqlen_q, 200)).astype(bias_dtype)
        plain = np.where(out_of, bias_dtype(0), bias)
        bias[:, out_of] = -np.inf
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[:, out_of] = rng.choice([np.nan, np.inf, -np.inf], (2, out_of.sum(), 24))
        bad_v[:, out_of] = rng.choice([np.nan, np.inf, -np.inf], (2, out_of.sum(), 24))
        options: Options = {"softcap": 4.0, "softmax_axis": axis}
        masked = {"mask": ~out_of, "bias": plain}
        wanted = fa.attention(q, k, v, return_lse=True, **masked, **options)
        out, lse = fa.attention(q, bad_k, bad_v, bias=bias, return_lse=True, **options)
        assert out.tobytes() == wanted[0].tobytes()
        assert lse.tobytes() == wanted[1].tobytes()
        desired = fa.attention_backward(grad, q, k, v, *wanted, **masked, **options)
        grads = fa.attention_backward(grad, q, bad_k, bad_v, out, lse, bias=bias, **options)
        for name in ("q", "k", "v", "bias"):
            got, want = getattr(grads, name), getattr(desired, name)
            np.testing.assert_array_equal(got, want, err_msg=f"{name}, {seqlen_q} queries")


def test_a_bias_of_nan_reaches_its_row() -> None:
    ones = np.ones((3, 4), np.float32)
    bias = np.zeros((3, 3), np.float32)
    bias[1] = [-np.inf, np.nan, 0.0]
    out = fa.attention(ones, ones, ones, bias=bias)
    assert np.isnan(out[1]).all()
    assert np.array_equal(out[[0, 2]], ones[:2])


def test_head_dim_zero_takes_its_scores_from_the_bias() -> None:
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, np.float64, 5, 9, 0, 4)
    bias = rng.standard_normal((5, 9))
    weights = np.exp(bias) / np.exp(bias).sum(-1, keepdims=True)
    expected = weights @ np.repeat(v, NUM_HEADS // NUM_KV_HEADS, axis=1)
    np.testing.assert_allclose(fa.attention(q, k, v, bias=bias), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_out(dtype: Any, axis: str) -> None:
    """`out` of any strides gets the bits of the plain call and nothing beside it is written."""
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, dtype, 37, 70, 24, 41)
    plain = fa.attention(q, k, v, softmax_axis=axis)
    big = np.full((41 * 2, 3, NUM_HEADS + 1, BATCH, 39), 7, dtype)
    out = big[::2, 1, 1:, ::-1, 2:].transpose(2, 1, 3, 0)
    assert out.shape == plain.shape
    result = fa.attention(q, k, v, softmax_axis=axis, out=out)
    assert result is out
    assert np.array_equal(out, plain)
    out[...] = 7
    assert np.all(big == 7)


@pytest.mark.parametrize("axis", AXES)
def test_residual_may_be_out(axis: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, np.float32, 37, 70, 24, 41)
    residual = rng.standard_normal((BATCH, NUM_HEADS, 37, 41)).astype(np.float32)
    apart = fa.attention(q, k, v, softmax_axis=axis, residual=residual)
    result = fa.attention(q, k, v, softmax_axis=axis, residual=residual, out=residual)
    assert result is residual
    assert np.array_equal(apart, residual)


def test_result_follows_the_memory_order_of_q() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 10, 3, 8)).astype(np.float32)
    q = x.swapaxes(1, 2)
    out = fa.attention(q, q, q)
    assert out.shape == q.shape and out.strides == q.strides
    assert out.swapaxes(1, 2).flags.c_contiguous
    assert np.array_equal(out, fa.attention(*[q.copy()] * 3))


def test_nan_prefilled_out_and_read_only_inputs() -> None:
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng, np.float32, 37, 70, 24, 41)
    for x in (q, k, v):
        x.flags.writeable = False
    out = np.full((BATCH, NUM_HEADS, 37, 41), np.nan, np.float32)
    fa.attention(q, k, v, causal=True, out=out)
    assert np.array_equal(out, fa.attention(q, k, v, causal=True))
    assert np.all(np.isfinite(out))
