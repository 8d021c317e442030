"""`fastattn.torch.attention_weights`."""

import numpy as np
import pytest
from torch_cases import DTYPES, marks, torch

import fastattn as fa
import fastattn.torch as ft

pytestmark = marks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", [{}, {"pool": (3, 4)}, {"reduce": "keys"}], ids=str)
def test_attention_weights(dtype, choice):
    q, k = torch.randn(2, 4, 10, 16).to(dtype), torch.randn(1, 2, 12, 16).to(dtype)
    options = {
        "bias": torch.randn(10, 12),
        "sinks": torch.ones(4, dtype=torch.bfloat16),
        "mask": torch.rand(2, 1, 10, 12) < 0.8,
        "kv_lengths": torch.tensor([12, 7]),
        "q_offset": torch.tensor([2, 3]),
        "segment_ids": (torch.arange(10) // 5, torch.arange(12) // 5),
        "window": (8, 3),
    }
    weights = ft.attention_weights(q, k, **options, **choice)
    arrays = {
        name: tuple(x.numpy() for x in value) if name == "segment_ids" else value
        for name, value in options.items()
    }
    arrays |= {name: arrays[name].float().numpy() for name in ("bias", "sinks")}
    arrays |= {name: arrays[name].numpy() for name in ("mask", "kv_lengths", "q_offset")}
    expected = fa.reference.attention_weights(
        q.double().numpy(), k.double().numpy(), **arrays, **choice
    )
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=2e-6, atol=1e-6)


def test_attention_weights_of_chosen_rows():
    q = torch.randn(3, 10, 16)
    every = ft.attention_weights(q, q, causal=True, scale=0.3, softcap=2.0, softmax_axis="queries")
    some = ft.attention_weights(
        q,
        q,
        causal=True,
        scale=0.3,
        softcap=2.0,
        softmax_axis="queries",
        rows=torch.tensor([-1, 4]),
        heads=torch.tensor([2]),
    )
    assert torch.equal(some, every[[2]][:, [9, 4]])


def test_attention_weights_have_no_gradient():
    q, bias = torch.randn(3, 10, 16, requires_grad=True), torch.zeros(10, 10, requires_grad=True)
    with pytest.raises(ValueError, match=r"^`q` must not require a gradient"):
        ft.attention_weights(q, q.detach())
    with pytest.raises(ValueError, match=r"^`bias` must not require a gradient"):
        ft.attention_weights(q.detach(), q.detach(), bias=bias)
    with torch.no_grad():
        weights = ft.attention_weights(q, q, bias=bias)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, ft.attention_weights(q.detach(), q.detach()))


def test_attention_weights_under_autocast():
    q = torch.randn(3, 10, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = ft.attention_weights(q, q)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, ft.attention_weights(q.bfloat16(), q.bfloat16()))


def test_attention_weights_refuse_what_they_cannot():
    q = torch.randn(3, 10, 16)
    with pytest.raises(TypeError, match=r"^`q` must be a torch.Tensor"):
        ft.attention_weights(q.numpy(), q)
    with pytest.raises(TypeError, match=r"^`k` must have dtype"):
        ft.attention_weights(q, q.double())
    with pytest.raises(TypeError, match=r"^`q` must be on the CPU"):
        ft.attention_weights(q.to("meta"), q.to("meta"))
    with pytest.raises(TypeError, match=r"^`k` must be on cpu"):
        ft.attention_weights(q, q.to("meta"))
    with pytest.raises(NotImplementedError, match="attention_weights"):
        torch.vmap(lambda x: ft.attention_weights(x, x))(q)
    with pytest.raises(ValueError, match=r"^`rows` must be"):
        ft.attention_weights(q, q, rows=torch.tensor([10]))


def test_attention_weights_beside_a_compiled_function(fresh_compiler):
    q = torch.randn(2, 10, 16)
    compiled = torch.compile(lambda x: ft.attention_weights(x * 2, x) + 1, backend="eager")
    torch.testing.assert_close(compiled(q), ft.attention_weights(q * 2, q) + 1)
