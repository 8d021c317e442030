"""The specification's gradients: by hand, and against differences of its forward pass."""

from typing import Any

import numpy as np
import pytest

from fastattn import reference

pytestmark = pytest.mark.any_kernel_set


def test_two_keys_by_hand() -> None:
    """Scores 0 and ln 3: weights 1/4 and 3/4, out 25, delta 25."""
    grads = reference.attention_backward([[1.0]], [[1.0]], [[0.0], [np.log(3)]], [[10.0], [30.0]])
    assert np.allclose(grads.v, [[0.25], [0.75]])
    # dS = P (dP - delta) = 1/4 (10 - 25), 3/4 (30 - 25)
    assert np.allclose(grads.k, [[-3.75], [3.75]])
    assert np.allclose(grads.q, [[3.75 * np.log(3)]])
    assert grads.bias is None and grads.sinks is None


def test_bias_and_sink_by_hand() -> None:
    """Two equal scores and an equal sink: weights 1/3 each, out = 10/3 + 20/3 = 10."""
    grads = reference.attention_backward(
        [[3.0]], [[0.0]], [[1.0], [1.0]], [[10.0], [20.0]], bias=[[0.0, 0.0]], sinks=[0.0]
    )
    assert np.allclose(grads.v, [[1.0], [1.0]])
    assert np.allclose(grads.bias, [[0.0, 10.0]])  # 1/3 (30 - 30), 1/3 (60 - 30)
    assert np.allclose(grads.sinks, [-10.0])  # the value of a sink is 0: 1/3 (0 - 30)
    assert np.allclose(grads.q, [[10.0]])
    assert np.allclose(grads.k, [[0.0], [0.0]])


def test_lse_by_hand() -> None:
    """The gradient of lse by the scores is the weights."""
    grads = reference.attention_backward(
        [[0.0]], [[1.0]], [[0.0], [np.log(3)]], [[1.0], [1.0]], grad_lse=[[2.0]]
    )
    assert np.allclose(grads.k, [[0.5], [1.5]])
    assert np.allclose(grads.v, 0)


def test_softmax_over_queries_by_hand() -> None:
    """One key, scores 0 and ln 3: its weights are 1/4 and 3/4, delta = 4/4 + 3 * 8/4 = 7."""
    grads = reference.attention_backward(
        [[1.0], [2.0]], [[0.0], [np.log(3)]], [[1.0]], [[4.0]], softmax_axis="queries"
    )
    assert np.allclose(grads.v, [[0.25 + 1.5]])
    assert np.allclose(grads.q, [[-0.75], [0.75]])  # 1/4 (4 - 7), 3/4 (8 - 7)
    assert np.allclose(grads.k, [[0.75 * np.log(3)]])


def test_softcap_by_hand() -> None:
    """A cap of 1 on products 0 and x: scores 0 and tanh(x), slopes 1 and 1 - tanh(x)^2."""
    x = np.arctanh(0.5)
    grads = reference.attention_backward(
        [[1.0]], [[1.0]], [[0.0], [x]], [[0.0], [1.0]], softcap=1.0
    )
    weight = np.exp(0.5) / (1 + np.exp(0.5))
    score = weight * (1 - weight)
    assert np.allclose(grads.v.ravel(), [1 - weight, weight])
    assert np.allclose(grads.k.ravel(), [-score, 0.75 * score])


@pytest.mark.parametrize("x", [5.0, 25.0, 300.0])
def test_slope_of_a_saturated_softcap(x: float) -> None:
    """1 - tanh(x)^2 is 4 / (e^x + e^-x)^2, also where tanh is 1 but for less than a rounding."""
    grads = reference.attention_backward(
        [[1.0]], [[1.0]], [[0.0], [x]], [[0.0], [np.exp(x)]], softcap=1.0, bias=[[1.0, 0.0]]
    )
    weight = 1 / (1 + np.exp(1 - np.tanh(x)))
    slope = (2 / (np.exp(x) + np.exp(-x))) ** 2
    expected = weight * (1 - weight) * np.exp(x) * slope * x
    np.testing.assert_allclose(grads.q, [[expected]], rtol=1e-13)


def test_sums_over_what_is_shared() -> None:
    rng = np.random.default_rng(0)
    grad_out, q = rng.standard_normal((2, 3, 4, 5, 6))
    k, v = rng.standard_normal((2, 1, 2, 7, 6))
    bias = rng.standard_normal((4, 1, 7))
    shared = reference.attention_backward(grad_out, q, k, v, bias=bias)
    everywhere = np.repeat(np.broadcast_to(k, (3, 2, 7, 6)), 2, axis=1)
    values = np.repeat(np.broadcast_to(v, (3, 2, 7, 6)), 2, axis=1)
    full = np.broadcast_to(bias, (3, 4, 5, 7))
    apart = reference.attention_backward(grad_out, q, everywhere, values, bias=full)
    assert np.allclose(shared.q, apart.q)
    for name in ("k", "v"):
        summed = getattr(apart, name).reshape(3, 2, 2, 7, 6).sum(axis=(0, 2))[None]
        assert np.allclose(getattr(shared, name), summed)
    assert np.allclose(shared.bias, apart.bias.sum(axis=(0, 2))[:, None])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 0.8},
    "causal": {"causal": True, "q_offset": -1},
    "window": {"window": (2, 1)},
    "alibi": {"alibi_slopes": np.array([0.3, 0.1])},
    "mask": {"mask": np.arange(24).reshape(4, 6) % 3 > 0},
    "lengths": {"kv_lengths": np.array([4])},
    "segments": {"segment_ids": (np.arange(4) // 2, np.arange(6) // 3)},
    "bias": {"bias": np.linspace(-1, 1, 6)},
    "bias of heads": {"bias": np.linspace(-1, 1, 48).reshape(2, 4, 6), "softcap": 0.8},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 5},
}


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("name", OPTIONS)
def test_finite_differences(name: str, axis: str) -> None:
    rng = np.random.default_rng(0)
    given = {
        "q": rng.standard_normal((1, 2, 4, 3)),
        "k": rng.standard_normal((1, 1, 6, 3)),
        "v": rng.standard_normal((1, 1, 6, 2)),
    }
    options = dict(OPTIONS[name], softmax_axis=axis)
    if "bias" in options:
        given["bias"] = options.pop("bias")
    if axis == "keys":
        given["sinks"] = rng.standard_normal(2)
    grad_out = rng.standard_normal((1, 2, 4, 2))
    grad_lse = rng.standard_normal((1, 2, 4 if axis == "keys" else 6))

    def loss() -> float:
        out, lse = reference.attention(**given, return_lse=True, **options)
        of_lse = np.where(lse == -np.inf, 0.0, lse * grad_lse)
        return float((out * grad_out).sum() + of_lse.sum())

    grads = reference.attention_backward(grad_out, grad_lse=grad_lse, **given, **options)
    step = 1e-6
    for argument, x in given.items():
        numeric = np.empty_like(x)
        for at in np.ndindex(x.shape):
            before = x[at]
            x[at] = before + step
            above = loss()
            x[at] = before - step
            numeric[at] = (above - loss()) / (2 * step)
            x[at] = before
        np.testing.assert_allclose(getattr(grads, argument), numeric, atol=2e-8, err_msg=argument)


def test_philox_known_answers() -> None:
    """Test vectors of Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    vectors = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, ones << 32 | ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0 << 32 | 0xA4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, seed, expected in vectors:
        words = reference._philox(tuple(np.uint64(c) for c in counter), seed)
        assert tuple(int(word) for word in words) == expected
