"""`attention_backward` of rows without keys, infinities, NaN and large scores."""

from typing import Any

import numpy as np
import pytest
from gradients import (
    check,
    each_axis,
    gradients_of,
    make,
)


@each_axis
def test_rows_without_keys_have_gradient_0(axis: str) -> None:
    arrays = make(40, 70, 8, 6)
    mask = np.random.default_rng(1).random((40, 70)) < 0.5
    mask[::5] = False
    mask[:, ::7] = False
    grads = check(arrays, mask=mask, softmax_axis=axis, bias=np.zeros((40, 70)))
    assert not grads.q[..., ::5, :].any() and not grads.bias[::5].any()
    for x in (grads.k[..., ::7, :], grads.v[..., ::7, :], grads.bias[:, ::7]):
        assert not x.any()


@each_axis
def test_nothing_takes_part(axis: str) -> None:
    arrays = make(40, 70, 8, 6)
    lse_length = 40 if axis == "keys" else 70
    options: dict[str, Any] = {"mask": np.False_, "softmax_axis": axis, "bias": np.ones((1, 70))}
    if axis == "keys":
        options["sinks"] = np.ones(4)
    grads = check(arrays, grad_lse=np.ones((2, 4, lse_length)), **options)
    assert not any(np.any(x) for x in (grads.q, grads.k, grads.v, grads.bias))
    if axis == "keys":  # lse is the sink of each of 2 * 40 rows
        np.testing.assert_array_equal(grads.sinks, np.full(4, 80.0))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@each_axis
def test_masked_keys_leak_into_nothing(axis: str, poison: float) -> None:
    grad_out, q, k, v = make(40, 150, 8, 6)
    hidden = np.arange(150) % 3 == 1
    ids = np.where(hidden, 9, 0)
    options: list[dict[str, Any]] = [
        {"mask": ~hidden},
        {"mask": np.broadcast_to(~hidden, (2, 4, 40, 150)), "softcap": 2.0},
        {"segment_ids": (np.zeros(40, int), ids), "dropout_p": 0.3, "dropout_seed": 1},
    ]
    for option in options:
        clean = gradients_of(grad_out, q, k, v, softmax_axis=axis, **option)
        bad_k, bad_v = (np.where(hidden[:, None], poison, x) for x in (k, v))
        grads = gradients_of(grad_out, q, bad_k, bad_v, softmax_axis=axis, **option)
        for name in "qkv":
            x = getattr(grads, name)
            assert np.array_equal(x, getattr(clean, name)), (name, list(option))
        assert not grads.k[..., hidden, :].any() and not grads.v[..., hidden, :].any()
    lengths = {"kv_lengths": np.array([90, 0])}
    beyond = np.arange(150) >= lengths["kv_lengths"][:, None, None, None]
    clean = gradients_of(grad_out, q, k, v, softmax_axis=axis, **lengths)
    bad = (np.where(beyond.swapaxes(-1, -2), poison, x) for x in (k, v))
    grads = gradients_of(grad_out, q, *bad, softmax_axis=axis, **lengths)
    assert all(np.array_equal(getattr(grads, name), getattr(clean, name)) for name in "qkv")


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "grad_out"])
def test_poisoned_query_reaches_the_keys_that_it_sees_alone(where: str, poison: float) -> None:
    arrays = make(40, 150, 8, 6, heads=(1, 1))
    clean = gradients_of(*arrays, causal=True, q_offset=0)
    arrays[0 if where == "grad_out" else 1][..., 20, :] = poison
    grads = gradients_of(*arrays, causal=True, q_offset=0)
    others = np.arange(40) != 20
    assert np.array_equal(grads.q[..., others, :], clean.q[..., others, :])
    assert np.array_equal(grads.k[..., 21:, :], clean.k[..., 21:, :])
    assert np.array_equal(grads.v[..., 21:, :], clean.v[..., 21:, :])
    assert not np.isfinite(grads.q[..., 20, :]).any()


@pytest.mark.parametrize("where", ["k", "v"])
def test_poisoned_key_reaches_the_queries_that_see_it_alone(where: str) -> None:
    """Softmax over the queries: each key's weights are its own."""
    arrays = make(40, 150, 8, 6, heads=(1, 1))
    options: dict[str, Any] = {"causal": True, "q_offset": 60, "softmax_axis": "queries"}
    clean = gradients_of(*arrays, **options)
    arrays["qkv".index(where) + 1][..., 80, :] = np.nan
    grads = gradients_of(*arrays, **options)
    others = np.arange(150) != 80
    assert np.array_equal(grads.q[..., :20, :], clean.q[..., :20, :])
    assert np.isnan(grads.q[..., 20:, :]).all()
    for name in "kv":
        x, y = getattr(grads, name), getattr(clean, name)
        assert np.array_equal(x[..., others, :], y[..., others, :])
    assert np.isnan(grads.k[..., 80, :]).all()


def test_future_keys_leak_into_nothing() -> None:
    """Causal: what the keys from t on hold changes no gradient of the rows before."""
    grad_out, q, k, v = make(100, 100, 8, 6, heads=(2, 1))
    t = 61
    grad_out[..., t:, :] = 0
    clean = gradients_of(grad_out, q, k, v, causal=True)
    for x in (k, v):
        x[..., t:, :] = np.nan
    grads = gradients_of(grad_out, q, k, v, causal=True)
    assert np.array_equal(grads.q[..., :t, :], clean.q[..., :t, :])


def test_large_scores() -> None:
    """Weights that are all but 0 and 1, and scores past the range of exp."""
    arrays = make(20, 70, 8, 6)
    arrays[1] *= 100
    check(arrays)
    check(arrays, scale=-3.0)


@each_axis
def test_zero_scale(axis: str) -> None:
    grads = check(make(20, 70, 8, 6), scale=0.0, softmax_axis=axis)
    assert not grads.q.any() and not grads.k.any() and grads.v.any()
