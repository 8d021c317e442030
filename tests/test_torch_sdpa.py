"""`fastattn.torch.scaled_dot_product_attention` against PyTorch's own."""

import math

import pytest
from torch_cases import DTYPES, assert_close, double, leaf, leaves, marks, sdpa, torch

import fastattn as fa
import fastattn.torch as ft
from fastattn.torch import _ops

pytestmark = marks


def assert_same_as_torch(*args, **options):
    """Result and gradients of every input, against PyTorch's in float64."""
    dtype = args[0].dtype
    exact_args = [double(x) for x in args]
    out = ft.scaled_dot_product_attention(*args, **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = sdpa(*exact_args, **options)
    assert out.dtype == dtype
    assert_close(out, expected, dtype)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected.backward(grad_out.double())
    for x, exact in zip(args, exact_args, strict=True):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            assert x.grad.dtype == x.dtype
            assert_close(x.grad, exact.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["", "causal", "bool", "float", "learned"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa(dtype, masked, scale, kv_heads):
    options = {"scale": scale, "enable_gqa": kv_heads != 4, "is_causal": masked == "causal"}
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, 7, 9) < 0.7
        mask[0, 0, 2] = False
    elif masked in ("float", "learned"):
        mask = torch.randn(4, 7, 9, dtype=dtype, requires_grad=masked == "learned")
    assert_same_as_torch(*leaves(dtype, kv_heads=kv_heads), mask, **options)


@pytest.mark.parametrize("lengths", [(7, 9), (9, 7), (1, 5), (5, 1), (300, 200)])
def test_sdpa_is_causal_from_the_top_left(lengths):
    assert_same_as_torch(*leaves(lengths=lengths), is_causal=True)


@pytest.mark.parametrize(
    "shapes",
    [
        [(7, 8), (9, 8), (9, 6)],
        [(4, 7, 8), (4, 9, 8), (4, 9, 6)],
        [(2, 3, 4, 7, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 6)],
        [(1, 7, 8), (4, 9, 8), (4, 9, 6)],
        [(7, 8), (4, 9, 8), (4, 9, 6)],
        [(7, 8), (9, 8), (4, 9, 6)],
        [(4, 7, 8), (9, 8), (9, 6)],
        [(2, 1, 7, 8), (1, 4, 9, 8), (2, 1, 9, 6)],
        [(3, 1, 4, 7, 8), (2, 4, 9, 8), (4, 9, 6)],
        [(2, 4, 0, 8), (2, 4, 9, 8), (2, 4, 9, 6)],
        [(0, 4, 7, 8), (0, 4, 9, 8), (0, 4, 9, 6)],
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_shapes(shapes, is_causal):
    assert_same_as_torch(*(leaf(*shape) for shape in shapes), is_causal=is_causal)


def test_sdpa_groups_of_keys_and_of_values_may_differ():
    q, k, v = leaf(2, 4, 7, 8), leaf(2, 2, 9, 8), leaf(2, 1, 9, 6)
    assert_same_as_torch(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    "shape", [(7, 9), (1, 9), (7, 1), (4, 7, 9), (2, 1, 7, 9), (2, 4, 1, 1), (1, 1, 1, 9)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sdpa_gradient_of_a_broadcast_mask(shape, dtype):
    assert_same_as_torch(*leaves(dtype), leaf(*shape, dtype=dtype))


def test_sdpa_float32_mask_beside_another_dtype():
    q, k, v = leaves(torch.bfloat16)
    mask = leaf(7, 9, dtype=torch.float32)
    out = ft.scaled_dot_product_attention(q, k, v, mask)
    out.sum().backward()
    exact = [double(x) for x in (q, k, v, mask)]
    sdpa(*exact).sum().backward()
    assert mask.grad.dtype == torch.float32
    assert_close(mask.grad, exact[3].grad, torch.bfloat16)


@pytest.mark.parametrize("variant", ["causal_upper_left", "causal_lower_right"])
def test_sdpa_causal_bias(variant):
    bias = getattr(torch.nn.attention.bias, variant)(7, 9)
    q, k, v = (x.detach() for x in leaves())
    takes_part = torch.ones(7, 9).tril(0 if variant == "causal_upper_left" else 2).bool()
    expected = sdpa(q, k, v, takes_part)
    assert_close(ft.scaled_dot_product_attention(q, k, v, bias), expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_read_in_place(dtype):
    packed = torch.randn(2, 7, 3, 4, 16, dtype=dtype)[..., ::2]
    packed.requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    out = ft.scaled_dot_product_attention(q, k, v)
    copies = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    expected = ft.scaled_dot_product_attention(*copies)
    assert torch.equal(out, expected)
    # As PyTorch's is, the result of (batch, seqlen, heads, head_dim) in memory is so too.
    assert out.transpose(1, 2).is_contiguous() and expected.is_contiguous()
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected.backward(grad_out)
    for index, x in enumerate(copies):
        assert torch.equal(packed.grad[:, :, index].transpose(1, 2), x.grad)


def test_nothing_is_copied(monkeypatch):
    q = leaves(torch.bfloat16)[0].detach().transpose(-1, -2)
    seen = []

    def recording(*arrays, **options):
        seen.extend(arrays)
        return fa.attention(*arrays, **options)

    monkeypatch.setattr(_ops, "attention", recording)
    ft.attention(q, q, q)
    assert [x.__array_interface__["data"][0] for x in seen] == [q.data_ptr()] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_keys_is_zero_and_has_zero_gradients(dtype):
    q, k, v = leaves(dtype)
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    mask[:, 5] = False
    with torch.no_grad():
        k[..., 5, :], v[..., 5, :] = math.nan, math.inf
    out = ft.scaled_dot_product_attention(q, k, v, mask)
    out.sum().backward()
    assert torch.all(out[..., 3, :] == 0) and torch.all(q.grad[..., 3, :] == 0)
    assert torch.all(k.grad[..., 5, :] == 0) and torch.all(v.grad[..., 5, :] == 0)
    for x in (out, q.grad, k.grad, v.grad):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("shape", [(7, 9), (2, 1, 7, 9), (4, 1, 9)], ids=str)
@pytest.mark.parametrize("masked", ["bool", "float", "learned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sdpa_applies_both_a_mask_and_is_causal(untouched, shape, masked, dtype):
    q, k, v = leaves(dtype, width_v=8)
    mask = torch.rand(shape) < 0.7
    if masked != "bool":
        mask = torch.randn(shape, dtype=dtype, requires_grad=masked == "learned")
    causal = torch.ones(7, 9).tril().bool()
    exact_inputs = [double(x) for x in (q, k, v)]
    exact_mask = double(mask)
    joint = mask & causal if masked == "bool" else exact_mask.masked_fill(~causal, -math.inf)
    expected = sdpa(*exact_inputs, joint.expand(2, 4, 7, 9))
    expected.sum().backward()
    out = ft.scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    out.sum().backward()
    assert_close(out, expected, dtype)
    for x, exact in zip((q, k, v), exact_inputs, strict=True):
        assert_close(x.grad, exact.grad, dtype)
    if masked == "learned":
        assert_close(mask.grad, exact_mask.grad, dtype)
    with ft.enable():
        assert torch.equal(sdpa(q, k, v, mask, is_causal=True), out)
    if masked != "learned" and len(shape) in (2, 4):  # for which PyTorch takes its fused kernel
        assert_close(sdpa(q, k, v, mask, is_causal=True), expected, dtype)
