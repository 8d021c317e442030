"""Problems without a result to compute, in every place for a 0, whatever the other sizes are."""

from typing import Any

import numpy as np
import pytest

import fastattn as fa

# More than any memory holds: one number, told from no array of the size by its strides alone.
H = 2**40

# Shapes of q, k and v; the result has no element.
EMPTY = {
    "no batch": ((0, H, 4, 8), (0, H, 4, 8), (0, H, 4, 8)),
    "no heads": ((H, 0, 4, 8), (H, 0, 4, 8), (H, 0, 4, 8)),
    "no heads, long": ((2, 0, H, 8), (2, 0, H, 8), (2, 0, H, 8)),
    "no heads that read three": ((2, 0, H, 8), (2, 3, 4, 8), (2, 3, 4, 8)),
    "no queries": ((2, H, 0, 8), (2, H, 4, 8), (2, H, 4, 8)),
    "no queries, many keys": ((2, 2, 0, 8), (2, 2, H, 8), (2, 2, H, 8)),
    "no queries, wide": ((2, 2, 0, H), (2, 2, 4, H), (2, 2, 4, H)),
    "no columns": ((2, H, 4, 8), (2, H, 4, 8), (2, H, 4, 0)),
    "no columns, long": ((2, 2, H, 8), (2, 2, 4, 8), (2, 2, 4, 0)),
    "no columns, many keys": ((2, 2, 4, 8), (2, 2, H, 8), (2, 2, H, 0)),
    "nothing but rows": ((2, H, 4, 0), (2, H, 4, 0), (2, H, 4, 0)),
    "no keys, no columns": ((2, 2, H, 8), (2, 2, 0, 8), (2, 2, 0, 0)),
    "one head": ((0, 8), (H, 8), (H, 8)),
}
EVERY_OPTION: dict[str, Any] = {
    "scale": 2.0,
    "softcap": 3.0,
    "alibi_slopes": 0.5,
    "causal": True,
    "window": (3, None),
    "q_offset": 7,
    "kv_lengths": 0,
    "dropout_p": 0.5,
    "dropout_seed": 1,
    "num_threads": 2,
}
each_empty = pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])


def array(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """One NaN everywhere."""
    return np.lib.stride_tricks.as_strided(np.full((), np.nan, dtype), shape, (0,) * len(shape))


def operands(shapes: tuple[tuple[int, ...], ...], dtype: Any = np.float32) -> list[np.ndarray]:
    return [array(shape, dtype) for shape in shapes]


@each_empty
@each_dtype
@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "options"])
def test_empty_results(
    options: dict[str, Any], axis: Any, dtype: Any, shapes: tuple[tuple[int, ...], ...]
) -> None:
    q, k, v = operands(shapes, dtype)
    out = fa.attention(q, k, v, softmax_axis=axis, **options)
    assert (out.shape, out.dtype) == ((*q.shape[:-1], v.shape[-1]), dtype)
    plan = fa.explain(q, k, v, softmax_axis=axis, **options)
    assert (plan.num_tasks, plan.tiles_total, plan.workspace_bytes) == (0, 0, 0)
    assert plan.num_threads == 1 and str(plan)


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("form", ["no heads, long", "no queries", "no queries, many keys"])
def test_masks_and_biases_of_no_scores(form: str, name: str) -> None:
    q, k, v = operands(EMPTY[form])
    for shape in [(), (1,), k.shape[-2:-1], (1, 1, 1, k.shape[-2]), (*q.shape[:-1], 1)]:
        given = array(shape, bool if name == "mask" else np.float32)
        assert fa.attention(q, k, v, **{name: given}).shape == (*q.shape[:-1], 8)
    for shape in [(3,), (2, 1, 1, 1, 1)]:
        given = np.ones(shape, bool if name == "mask" else np.float32)
        with pytest.raises(ValueError, match=f"`{name}` must broadcast to"):
            fa.attention(q, k, v, **{name: given})


@pytest.mark.parametrize(
    "form", [form for form in EMPTY if form not in ("no queries, wide", "one head")]
)
def test_no_rows_have_gradients_of_zero(form: str) -> None:
    q, k, v = operands(EMPTY[form])
    out, lse = array((*q.shape[:-1], v.shape[-1])), array(q.shape[:-1])
    # Gradients of more numbers than there is memory for are not empty.
    needs = [name for name, x in zip("qkv", (q, k, v), strict=True) if x.size < 2**20]
    if 0 not in q.shape[:-1]:
        needs = [name for name, x in zip("qkv", (q, k, v), strict=True) if x.size == 0]
    grads = fa.attention_backward(out, q, k, v, out, lse, needs=needs)
    for name, x in zip("qkv", (q, k, v), strict=True):
        found = getattr(grads, name)
        if name in needs:
            assert (found.shape, found.dtype) == (x.shape, x.dtype)
            assert not np.any(found)
        else:
            assert found is None


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)])
def test_no_rows_leave_gradients_of_zero_elsewhere(shape: tuple[int, ...]) -> None:
    q, out, lse = array(shape), array(shape), array(shape[:-1])
    k = np.ones((shape[0], 3, 5, 8), np.float32)
    bias, sinks = np.ones((1, 5), np.float16), np.ones(shape[1], np.float32)
    grads = fa.attention_backward(out, q, k, k, out, lse, bias=bias, sinks=sinks)
    for found, x in zip(grads, (q, k, k, bias, sinks), strict=True):
        assert found is not None
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(found, np.zeros_like(x))


def test_lse_is_no_empty_result() -> None:
    # No columns: the sums are there all the same.
    q, k = np.zeros((2, 3, 5, 8), np.float32), np.zeros((2, 3, 7, 8), np.float32)
    out, lse = fa.attention(q, k, k[..., :0], return_lse=True)
    assert out.shape == (2, 3, 5, 0)
    np.testing.assert_allclose(lse, np.full((2, 3, 5), np.log(7)), rtol=1e-6)
    # No queries: a key that nobody looks at.
    out, lse = fa.attention(q[..., :0, :], k, k, softmax_axis="queries", return_lse=True)
    np.testing.assert_array_equal(lse, np.full((2, 3, 7), -np.inf))
    assert fa.explain(q, k, k[..., :0], return_lse=True).num_tasks > 0
    # No keys: rows of zeros.
    out, lse = fa.attention(q, k[..., :0, :], k[..., :0, :], return_lse=True)
    np.testing.assert_array_equal(out, np.zeros((2, 3, 5, 8)))
    np.testing.assert_array_equal(lse, np.full((2, 3, 5), -np.inf))


@pytest.mark.parametrize("num_heads", [0, H])
def test_packed_sequences_without_tokens(num_heads: int) -> None:
    x, starts = array((0, num_heads, 8)), np.zeros(4, np.int64)
    out, lse = fa.attention_varlen(x, x, x, starts, starts, return_lse=True, causal=True)
    assert (out.shape, lse.shape) == ((0, num_heads, 8), (num_heads, 0))
    grads = fa.attention_varlen_backward(x, x, x, x, out, lse, starts, starts, causal=True)
    for found in (grads.q, grads.k, grads.v):
        assert found is not None and found.shape == x.shape


def test_packed_sequences_without_queries() -> None:
    q, k = array((0, 2, 8)), np.ones((5, 2, 8), np.float32)
    starts, k_starts = np.zeros(3, np.int64), np.array([0, 2, 5])
    sinks = np.ones(2, np.float32)
    out, lse = fa.attention_varlen(q, k, k, starts, k_starts, sinks=sinks, return_lse=True)
    assert out.shape == (0, 2, 8)
    grads = fa.attention_varlen_backward(q, q, k, k, out, lse, starts, k_starts, sinks=sinks)
    for found, x in ((grads.k, k), (grads.v, k), (grads.sinks, sinks)):
        np.testing.assert_array_equal(found, np.zeros_like(x))


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_caches_without_queries(dtype: Any) -> None:
    cache = fa.KVCache(2, 2, 4, 8, dtype=dtype)
    pages = fa.PagedKVCache(4, 2, 2, 8, dtype=dtype)
    ids = [pages.add() for _ in range(2)]
    for tokens in (0, 3):
        new = np.ones((2, 2, tokens, 8), np.float32)
        cache.append(new, new)
        pages.append(new, new, ids)
        for shape in ((2, 2, 0, 8), (2, 0, 3, 8), (2, H, 0, 8)):
            q = array(shape)
            assert cache.attention(q).shape == shape
            assert pages.attention(q, ids).shape == shape
    assert pages.attention(array((0, 2, 3, 8)), []).shape == (0, 2, 3, 8)


def test_layers_and_parts_without_rows() -> None:
    assert fa.self_attention(array((0, H, 8)), num_heads=2).shape == (0, H, 8)
    assert fa.self_attention(array((H, 0, 8)), num_heads=2).shape == (H, 0, 8)
    eye = np.eye(8, dtype=np.float32)
    layer = fa.MultiHeadAttention(eye, eye, eye, eye, num_heads=2)
    assert layer(np.zeros((3, 0, 8), np.float32)).shape == (3, 0, 8)
    out, lse = fa.merge_attention([array((0, H, 8))] * 2, [array((0, H))] * 2)
    assert (out.shape, lse.shape) == ((0, H, 8), (0, H))
