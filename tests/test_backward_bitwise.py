"""What the bits of gradients do not depend on."""

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gradients import NAMES, gradients_of

import fastattn as fa

# (seqlen_q, seqlen_k, head_dim, head_dim_v)
SHAPES = [(1, 300, 64, 64), (100, 150, 40, 24), (5, 1100, 16, 20)]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
each_axis = pytest.mark.parametrize("axis", ["keys", "queries"])


def same(x: Any, y: Any) -> None:
    """Assert that two sets of gradients are the same bytes."""
    for name in NAMES:
        a, b = getattr(x, name), getattr(y, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype, name
            assert a.tobytes() == b.tobytes(), name


def make(shape: tuple[int, int, int, int], dtype: Any, batch: int = 2) -> list[np.ndarray]:
    seqlen_q, seqlen_k, head_dim, head_dim_v = shape
    rng = np.random.default_rng(sum(shape))
    shapes = [
        (batch, 4, seqlen_q, head_dim_v),
        (batch, 4, seqlen_q, head_dim),
        (batch, 2, seqlen_k, head_dim),
        (batch, 2, seqlen_k, head_dim_v),
    ]
    return [rng.standard_normal(x).astype(dtype) for x in shapes]


def option_sets(arrays: list[np.ndarray], axis: str) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(1)
    batch, num_heads, seqlen_q = arrays[1].shape[:3]
    seqlen_k = arrays[2].shape[-2]
    yield {}
    yield {"scale": 2.0}  # weights that lse is too short for
    yield {
        "causal": True,
        "softcap": 4.0,
        "bias": rng.standard_normal((batch, num_heads, seqlen_q, seqlen_k)).astype(np.float32),
    }
    options: dict[str, Any] = {
        "window": (100, 60),
        "kv_lengths": rng.integers(seqlen_k // 2, seqlen_k + 1, batch),
        "alibi_slopes": rng.random((batch, num_heads)),
        "mask": rng.random((batch, num_heads, seqlen_q, seqlen_k)) < 0.7,
        "bias": rng.standard_normal((1, seqlen_k)),
        "dropout_p": 0.2,
        "dropout_seed": 3,
    }
    if axis == "keys":
        options["sinks"] = rng.standard_normal(num_heads)
    yield options


@pytest.mark.slow_on_other_sets
@each_shape
@each_dtype
@each_axis
def test_threads_and_repeats(shape: Any, dtype: Any, axis: str) -> None:
    arrays = make(shape, dtype)
    for options in option_sets(arrays, axis):
        once = gradients_of(*arrays, softmax_axis=axis, num_threads=1, **options)
        for num_threads in (1, 2, 3, 7):
            same(gradients_of(*arrays, softmax_axis=axis, num_threads=num_threads, **options), once)


@pytest.mark.slow_on_other_sets
def test_repeats_while_threads_race_for_tasks() -> None:
    arrays = make((200, 200, 32, 32), np.float32, batch=4)
    bias = np.zeros((4, 1, 200))
    once = gradients_of(*arrays, causal=True, bias=bias, num_threads=1)
    for _ in range(20):
        same(gradients_of(*arrays, causal=True, bias=bias, num_threads=4), once)


def test_threads_share_no_element_of_a_bias_of_one_column() -> None:
    """Five heads read each element: their tasks are cut between tokens, not within one."""
    rng = np.random.default_rng(2)
    grad_out, q = rng.standard_normal((2, 5, 400, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 200, 16), dtype=np.float32)
    residual = np.zeros((5, 400, 16), np.float32)
    options: dict[str, Any] = {"bias": np.zeros((400, 1), np.float32), "residual": residual}
    once = gradients_of(grad_out, q, k, v, num_threads=1, **options)
    for _ in range(20):
        same(gradients_of(grad_out, q, k, v, num_threads=4, **options), once)


@pytest.mark.slow_on_other_sets
@each_shape
@each_dtype
@each_axis
def test_views_equal_copies(shape: Any, dtype: Any, axis: str) -> None:
    arrays = make(shape, dtype)
    for options in option_sets(arrays, axis):
        whole = gradients_of(*arrays, softmax_axis=axis, **options)
        views: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "heads inside": lambda x: x.swapaxes(1, 2).copy().swapaxes(1, 2),
            "features first": lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2),
            "backwards": lambda x: x[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
            "every third": lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
            "unaligned": _unaligned,
        }
        for view in views.values():
            grads = gradients_of(*map(view, arrays), softmax_axis=axis, **options)
            same(type(grads)(*(x if x is None else np.ascontiguousarray(x) for x in grads)), whole)


def _unaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.empty(x.nbytes + 1, np.uint8)
    view = buffer[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


@each_axis
def test_views_of_out_lse_and_their_gradients(axis: str) -> None:
    grad_out, q, k, v = make((100, 150, 40, 24), np.float32)
    residual = np.ones_like(grad_out)
    out, lse = fa.attention(q, k, v, residual=residual, return_lse=True, softmax_axis=axis)
    grad_lse = np.full_like(lse, 0.5)
    whole = fa.attention_backward(
        grad_out, q, k, v, out, lse, residual=residual, grad_lse=grad_lse, softmax_axis=axis
    )
    far = [x[..., ::-1].copy()[..., ::-1] for x in (grad_out, out, lse, residual, grad_lse)]
    grads = fa.attention_backward(
        far[0], q, k, v, *far[1:3], residual=far[3], grad_lse=far[4], softmax_axis=axis
    )
    same(grads, whole)
    one = np.broadcast_to(np.float32(1), residual.shape)
    half = np.broadcast_to(np.float32(0.5), lse.shape)
    grads = fa.attention_backward(
        grad_out, q, k, v, out, lse, residual=one, grad_lse=half, softmax_axis=axis
    )
    same(grads, whole)


@each_shape
@each_dtype
@each_axis
def test_any_batch_composition(shape: Any, dtype: Any, axis: str) -> None:
    arrays = make(shape, dtype, batch=3)
    for options in option_sets(arrays, axis):
        if "dropout_p" in options:  # draws by batch entry: the first one alone draws the same
            entry = 0
        else:
            entry = 1
        whole = gradients_of(*arrays, softmax_axis=axis, **options)
        alone = {
            name: x[entry : entry + 1]
            if np.ndim(x) > 0 and name not in ("sinks", "window") and np.shape(x)[0] == 3
            else x
            for name, x in options.items()
        }
        part = gradients_of(*(x[entry : entry + 1] for x in arrays), softmax_axis=axis, **alone)
        for name in "qkv":
            assert np.array_equal(getattr(part, name)[0], getattr(whole, name)[entry]), name
        if np.ndim(options.get("bias")) == 4:
            assert np.array_equal(part.bias[0], whole.bias[entry])


@each_shape
@each_dtype
@each_axis
def test_grouped_heads_equal_repeated_heads(shape: Any, dtype: Any, axis: str) -> None:
    """By q and bias; those of keys and values are sums over the heads that share them."""
    grad_out, q, k, v = make(shape, dtype)
    for options in option_sets([grad_out, q, k, v], axis):
        grouped = gradients_of(grad_out, q, k, v, softmax_axis=axis, **options)
        k_all, v_all = (np.repeat(x, 2, axis=1) for x in (k, v))
        repeated = gradients_of(grad_out, q, k_all, v_all, softmax_axis=axis, **options)
        assert np.array_equal(grouped.q, repeated.q)
        if np.ndim(options.get("bias")) == 4:
            assert np.array_equal(grouped.bias, repeated.bias)


@each_axis
def test_broadcast_arguments_equal_copies(axis: str) -> None:
    """Gradients of what was broadcast are sums; the others have the bits of a copy."""
    grad_out, q, k, v = make((100, 150, 40, 24), np.float32)
    views = [np.broadcast_to(x[:1], x.shape) for x in (q, k, v)]
    copies = [x.copy() for x in views]
    same(
        gradients_of(grad_out, *views, softmax_axis=axis),
        gradients_of(grad_out, *copies, softmax_axis=axis),
    )
    shared = gradients_of(grad_out, q, k[:1], v[:1], softmax_axis=axis)
    apart = gradients_of(grad_out, q, *copies[1:], softmax_axis=axis)
    assert shared.q.tobytes() == apart.q.tobytes()
