"""`fastattn.torch.enable`: which calls of PyTorch it takes, and how it leaves PyTorch."""

import math

import pytest
from torch_cases import DTYPES, OPERATOR, assert_close, leaf, leaves, marks, sdpa, torch

import fastattn.torch as ft
from fastattn.torch import _ops

pytestmark = marks


@pytest.fixture
def calls(monkeypatch):
    """What the CPU kernels were called with, call by call, whether or not gradients follow."""
    seen = []

    def record(name):
        function = getattr(_ops, name)

        def recording(*args, **options):
            seen.append(options)
            return function(*args, **options)

        monkeypatch.setattr(_ops, name, recording)

    record("attention")
    record("attention_and_kept")
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_routed(untouched, calls, dtype, is_causal):
    q, k, v = leaves(dtype)
    expected = sdpa(q, k, v, is_causal=is_causal)
    assert not calls
    with ft.enable():
        out = sdpa(q, k, v, is_causal=is_causal)
    assert len(calls) == 1
    assert torch.equal(out, ft.scaled_dot_product_attention(q, k, v, is_causal=is_causal))
    assert_close(out, expected.double(), dtype)
    out.sum().backward()
    calls.clear()
    sdpa(q, k, v)
    assert not calls


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference", "autocast"])
def test_routed_in_every_mode(untouched, calls, mode):
    context = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }[mode]
    x = torch.randn(2, 4, 10, 8)
    with ft.enable(), context():
        out = sdpa(x + 1, x, x, attn_mask=torch.ones(10, 10).bool(), dropout_p=0.1)
    assert len(calls) == 1
    assert out.dtype == (torch.bfloat16 if mode == "autocast" else torch.float32)


def layers():
    options = {"batch_first": True, "dropout": 0.0}
    encoder = torch.nn.TransformerEncoderLayer(32, 4, 64, **options)
    decoder = torch.nn.TransformerDecoderLayer(32, 4, 64, **options)
    mha = torch.nn.MultiheadAttention(32, 4, **options)

    class Attention(torch.nn.Module):
        def forward(self, x):
            return mha(x, x, x, need_weights=False)[0]

    class Decoder(torch.nn.Module):
        def forward(self, x):
            return decoder(x, x)

    attention, decoding = Attention(), Decoder()
    attention.inner, decoding.inner = mha, decoder
    return {
        "MultiheadAttention": (attention, 1),
        "TransformerEncoderLayer": (encoder, 1),
        "TransformerEncoder": (torch.nn.TransformerEncoder(encoder, 2), 2),
        "TransformerDecoderLayer": (decoding, 2),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("training", [True, False])
def test_layers_are_routed(untouched, calls, name, training):
    layer, attentions = layers()[name]
    layer.train(training)
    x = torch.randn(2, 10, 32)
    grads = []
    for enabled in (False, True):
        calls.clear()
        layer.zero_grad()
        if enabled:
            ft.enable()
        out = layer(x)
        assert len(calls) == (attentions if enabled else 0)
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
        with torch.inference_mode():
            calls.clear()
            torch.testing.assert_close(layer(x), out)
            assert len(calls) == (attentions if enabled else 0)
    ft.disable()
    for own, routed in zip(*grads, strict=True):
        torch.testing.assert_close(routed, own, rtol=1e-4, atol=1e-4)


def test_key_padding_of_an_encoder(untouched, calls):
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2
    ).eval()
    x, padding = torch.randn(2, 10, 32), torch.arange(10) >= torch.tensor([[10], [6]])
    with torch.no_grad():
        with ft.enable():
            out = encoder(x, src_key_padding_mask=padding)
        expected = encoder(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-4, atol=1e-4)


def test_routed_when_compiled(untouched, calls, fresh_compiler):
    def attend(x):
        return sdpa(x, x, x, is_causal=True) + 1

    x = leaf(2, 4, 10, 8)
    expected = attend(x)
    with ft.enable():
        out = torch.compile(attend, fullgraph=True)(x)
        out.sum().backward()
        assert len(calls) == 1
    torch.testing.assert_close(out, expected)
    # What the compiler keeps in files is not mixed up.
    torch._dynamo.reset()
    calls.clear()
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(x), expected)
    assert not calls


def test_enable_nests_and_survives_exceptions(untouched):
    ft.disable()
    ft.enable()
    ft.enable()
    with ft.enable():
        pass
    assert ft.is_enabled()
    ft.disable()
    assert not ft.is_enabled()
    with ft.enable():
        with ft.enable():
            pass
        assert ft.is_enabled()
        with pytest.raises(ZeroDivisionError), ft.enable():
            raise ZeroDivisionError
        assert ft.is_enabled()
    assert not ft.is_enabled()
    with ft.enable():
        ft.disable()
        assert not ft.is_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ft.enable():
        pass
    assert not torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)


def test_the_kernels_of_others_are_not_replaced(untouched):
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", lambda *args, **options: args[0], "AutogradCPU")
    try:
        with pytest.raises(RuntimeError, match="of another package"):
            ft.enable()
        assert not ft.is_enabled()
    finally:
        library._destroy()


class Subclass(torch.Tensor):
    pass


def test_what_stays_with_torch(untouched, calls):
    x = torch.randn(2, 4, 10, 8)
    wide = leaf(1, 1, 2, 1025)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with ft.enable():
        assert ft.explain(x, x, x).to == "fastattn"
        subclass = x.as_subclass(Subclass)
        for args, reason in [
            ((subclass, x, x), "`query` is a Subclass"),
            ((x, x, x.long()), "`value` is torch.int64"),
            ((x.to("meta"),) * 3, "not a dense CPU tensor"),
            ((wide,) * 3, "more than 1024"),
            ((x.to_sparse(), x, x), "not a dense CPU tensor"),
        ]:
            route = ft.explain(*args)
            assert route.to == "torch" and reason in route.reason and route.plan is None
        with math_only:
            assert "flash backend is off" in ft.explain(x, x, x).reason
            second = leaf(1, 2, 3, 4)
            out = sdpa(second, second, second)
            (grad,) = torch.autograd.grad(out.sum(), second, create_graph=True)
            grad.sum().backward()
        sdpa(wide, wide, wide).sum().backward()
        sdpa(subclass, x, x)
        sdpa(x.to("meta"), x.to("meta"), x.to("meta"))
        torch.vmap(lambda x: sdpa(x, x, x))(x)
        torch.func.grad(lambda x: sdpa(x, x, x).sum())(x)
        assert ft.explain(x, x, x, scale=math.inf).reason == "`scale` is inf"
        assert torch.isnan(sdpa(x, x, x, scale=math.inf)).all()
        forward_ad = torch.autograd.forward_ad
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x[0], torch.ones_like(x[0]))
            assert "forward-mode" in ft.explain(dual, x[0], x[0]).reason
            tangent = forward_ad.unpack_dual(sdpa(dual, x[0], x[0])).tangent
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, expected = torch.func.jvp(
                lambda y: sdpa(y, x[0], x[0]), (x[0],), (torch.ones_like(x[0]),)
            )
        torch.testing.assert_close(tangent, expected)
    assert not calls


def test_routed_errors_are_those_of_torch(untouched):
    x = torch.randn(2, 4, 10, 8)
    with ft.enable():
        with pytest.raises(RuntimeError, match="`key` must have E 8"):
            sdpa(x, x[..., :4], x)
        with pytest.raises(TypeError):
            sdpa([1], x, x)


def test_explain(untouched):
    q = torch.randn(1, 4, 300, 64, dtype=torch.bfloat16)
    k = torch.randn(1, 2, 300, 64, dtype=torch.bfloat16)
    state = torch.get_rng_state()
    route = ft.explain(q, k, k, is_causal=True, dropout_p=0.1, enable_gqa=True)
    assert route.to == "torch" and "enable() is not in effect" in route.reason
    assert (route.plan.num_heads, route.plan.num_kv_heads) == (4, 2)
    assert list(route.plan.skipped_by) == ["causal"]
    with ft.enable():
        text = str(ft.explain(q, k, k, is_causal=True, dropout_p=0.1, enable_gqa=True))
    assert text.startswith("route       fastattn: fastattn.torch.enable() is in effect\nproblem")
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="`key` must have 4 heads"):
        ft.explain(q, k, k)


def test_explain_reads_lazy_signs_and_refuses_what_has_no_values(untouched):
    lazy = torch.randn(1, 2, 5, 8, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    copy = lazy.resolve_neg()
    assert ft.explain(lazy, lazy, lazy).plan == ft.explain(copy, copy, copy).plan
    assert torch.equal(ft.attention(lazy, lazy, lazy), ft.attention(copy, copy, copy))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.randn(1, 2, 5, 8)
        assert ft.attention(fake, fake, fake, alibi_slopes=[0.5, 0.25]).shape == fake.shape
    with pytest.raises(TypeError, match="`query` must hold values to explain, got a FakeTensor"):
        ft.explain(fake, fake, fake)


def test_function_modes_and_subclasses():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 5, 8)
    expected = ft.attention(x, x, x, alibi_slopes=[0.5, 0.25])
    with Mode():
        assert torch.equal(ft.attention(x, x, x, alibi_slopes=[0.5, 0.25]), expected)
    own = x.as_subclass(Subclass)
    out = ft.attention(own, own, own, alibi_slopes=[0.5, 0.25])
    assert type(out) is Subclass and torch.equal(out.as_subclass(torch.Tensor), expected)


def test_import_changes_nothing_of_torch():
    from process import output_of

    code = f"""
import torch
state = lambda: (torch._C._dispatch_dump_table({OPERATOR!r}), torch.get_num_threads(),
                 torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype())
before = state()
import fastattn.torch
assert state() == before
"""
    assert output_of("-c", code) == ""


def test_who_watches_pytorch_sees_calls_and_gets_the_same_bits(untouched):
    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    def calls_of(q, k, v, keep):
        with ft.enable():
            return [
                ft.attention(q, k, v, causal=True, scale=0.3),
                ft.attention(q, k, v, mask=keep),
                ft.scaled_dot_product_attention(q, k, v, is_causal=True),
                sdpa(q, k, v, attn_mask=keep),
                sdpa(q, k, v, is_causal=True, scale=0.3),
            ]

    x = [t.detach() for t in leaves(lengths=(5, 7))]
    keep = torch.rand(5, 7) < 0.7
    expected = calls_of(*x, keep)
    seen = []
    with Watching():
        assert all(map(torch.equal, calls_of(*x, keep), expected))
    assert seen.count(_ops.FORWARD) == 5
    with torch.profiler.profile() as profile:
        assert all(map(torch.equal, calls_of(*x, keep), expected))
    assert sum(event.name == "fastattn::attention" for event in profile.events()) == 5
    traced = torch.jit.trace(lambda q, k, v: ft.attention(q, k, v, causal=True, scale=0.3), x)
    assert "fastattn::attention" in str(traced.graph)
    for x_with_gradients in (x[0].clone().requires_grad_(), torch.nn.Parameter(x[0])):
        out = calls_of(x_with_gradients, *x[1:], keep)
        assert all(y.requires_grad for y in out) and all(map(torch.equal, out, expected))
        with torch.no_grad():
            out = calls_of(x_with_gradients, *x[1:], keep)
        assert not any(y.requires_grad for y in out) and all(map(torch.equal, out, expected))
    bias = torch.randn(5, 7, requires_grad=True)
    assert sdpa(*x, attn_mask=bias).requires_grad
    with ft.enable():
        assert sdpa(*x, attn_mask=bias).requires_grad
