"""fastattn.torch in PyTorch's compiler, exporter, transforms and autocast."""

import pytest
from torch_cases import DTYPES, GRADIENT_CASES, gradient_case, leaf, leaves, marks, sdpa, torch

import fastattn.torch as ft
from fastattn.torch import _ops

pytestmark = marks


# --- PyTorch's machinery ------------------------------------------------------------------------


def operator_arguments(name, requires_grad=True):
    learned, options = gradient_case(name)
    q, k, v = leaves(heads=2, kv_heads=1, lengths=(5, 6), width=4, width_v=3)
    seen = []

    def recording(*args):
        seen.append(args)
        return FORWARD(*args)

    FORWARD = _ops.FORWARD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "FORWARD", recording)
        ft.attention(q, k, v, **learned, **options)
    return seen[0]


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_opcheck(name):
    arguments = operator_arguments(name)
    torch.library.opcheck(_ops.FORWARD, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(_ops.FORWARD_AND_KEPT, detached)
    out, lse, weighing, *exact = _ops.FORWARD_AND_KEPT(*detached)
    kept = (weighing, exact[0] if exact else None)
    options = dict(zip(_ops.ARGUMENTS, arguments[3:], strict=True))
    given = [True, False, True, options["bias"] is not None, options["sinks"] is not None]
    backward = (torch.randn_like(out), None, out, lse, *kept, *detached, given)
    torch.library.opcheck(_ops.BACKWARD, backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_strides(dtype):
    """What is foretold of strides: of permuted, of broadcast and of narrow tensors."""
    base = torch.randn(2, 6, 4, 8, dtype=dtype)
    prefix = torch.randn(6, 1, 8, dtype=dtype).transpose(0, 1)
    options = tuple(_ops.DEFAULTS.values())
    for q, k in [
        (base.transpose(1, 2), base.transpose(1, 2)),
        (base[:, :, :1].transpose(1, 2), prefix),
        (base[:1].expand(2, 6, 4, 8).transpose(1, 2), prefix),
        (base[..., ::2], base[..., 1::2]),
        (base[0, 0], base[0, 1]),
    ]:
        leaves = [x.detach().requires_grad_() for x in (q, k, k)]
        torch.library.opcheck(_ops.FORWARD, (*leaves, *options))
        leaves = [x.detach() for x in leaves]
        torch.library.opcheck(_ops.FORWARD_AND_KEPT, (*leaves, *options))
        out, lse, weighing, *exact = _ops.FORWARD_AND_KEPT(*leaves, *options)
        kept = (weighing, exact[0] if exact else None)
        needs = [True, True, True, False, False]
        torch.library.opcheck(_ops.BACKWARD, (out, None, out, lse, *kept, *leaves, *options, needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(fresh_compiler, dynamic):
    def loss(q, k, v, bias):
        out = ft.scaled_dot_product_attention(q * 2, k, v, bias)
        out, lse = ft.attention(q, k, out @ out.mT @ v, causal=True, window=(3, 0), return_lse=True)
        return out.sin().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for length in (6, 8):
        inputs = [*leaves(lengths=(length, length), width_v=8), leaf(length, length)]
        value, expected = compiled(*inputs), loss(*inputs)
        torch.testing.assert_close(value, expected)
        for gradient, own in zip(
            torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(gradient, own)


def test_compiled_dropout_follows_the_generator(fresh_compiler):
    q, k, v = (x.detach() for x in leaves(lengths=(50, 60)))
    compiled = torch.compile(
        lambda: ft.scaled_dot_product_attention(q, k, v, dropout_p=0.5), fullgraph=True
    )
    compiled()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class Causal(torch.nn.Module):
    def forward(self, q, k, v):
        return ft.attention(q, k, v, causal=True) * 2


def test_export():
    q, k, v = (x.detach() for x in leaves())
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    shapes = {"q": {0: batch, 2: length}, "k": {0: batch}, "v": {0: batch}}
    program = torch.export.export(Causal(), (q, k, v), dynamic_shapes=shapes)
    for shorter in (7, 3):
        part = q[:1, :, :shorter], k[:1], v[:1]
        torch.testing.assert_close(program.module()(*part), Causal()(*part))


def test_vmap_and_gradients_of_each_sample():
    q, k, v = (x.detach() for x in leaves(lead=(3,)))
    expected = ft.attention(q, k, v, causal=True)
    mapped = torch.vmap(lambda q, k, v: ft.attention(q, k, v, causal=True))(q, k, v)
    assert torch.equal(mapped, expected)
    shared = torch.vmap(lambda q: ft.attention(q, k[0], v[0]), in_dims=1, out_dims=2)
    each = [ft.attention(x, k[0], v[0]) for x in q]
    assert torch.equal(shared(q.transpose(0, 1)), torch.stack(each, 2))

    def loss(q, k, v):
        return ft.attention(q, k, v, causal=True).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    loss(*inputs).backward()
    for gradient, x in zip(per_sample, inputs, strict=True):
        assert torch.equal(gradient, x.grad)
    jacobian = torch.func.jacrev(lambda q: ft.attention(q, k, v)[0, 0, 0])(q)
    assert jacobian.shape == (6, *q.shape)
    torch.testing.assert_close(
        jacobian[2],
        torch.func.grad(lambda q: ft.attention(q, k, v)[0, 0, 0, 2])(q),
    )


def test_dropout_in_vmap_is_as_its_randomness():
    q, k, v = (x[0].detach() for x in leaves())
    drop = lambda q: ft.attention(q, k, v, dropout_p=0.5)  # noqa: E731
    batch = q.expand(2, *q.shape)
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(drop)(batch)
    same = torch.vmap(drop, randomness="same")(batch)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(drop, randomness="different")(batch)
    assert not torch.equal(different[0], different[1])


def test_autocast():
    q, k, v = leaves(torch.float32)
    bias = leaf(7, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ft.scaled_dot_product_attention(q, k, v, bias)
        exact = ft.attention(*(x.double() for x in (q, k, v)))
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float64
    expected = ft.attention(*(x.bfloat16() for x in (q, k, v)), bias=bias)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert {x.grad.dtype for x in (q, k, v, bias)} == {torch.float32}


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_before_anything_is_checked(untouched, region):
    q, k = torch.randn(2, 1, 2, 5, 8)
    v = torch.randn(1, 2, 5, 8).to(region)
    expected = ft.attention(q.to(region), k.to(region), v)
    mask = torch.randn(5, 5).half()
    masked = ft.attention(q.to(region), k.to(region), v, bias=mask)
    with torch.autocast("cpu", region):
        for function in (ft.attention, ft.scaled_dot_product_attention):
            assert torch.equal(function(q, k, v), expected)
        assert torch.equal(ft.scaled_dot_product_attention(q, k, v, mask), masked)
        residual = torch.randn(1, 2, 5, 8)
        assert ft.attention(q, k, v, residual=residual).dtype == region
        with pytest.raises(TypeError, match=f"`k` must have dtype torch.int32.*got {region}"):
            ft.attention(q.int(), k, v)
        with ft.enable():
            assert torch.equal(sdpa(q, k, v), expected)
            assert ft.explain(q, k, v, mask).plan.dtype == str(region).removeprefix("torch.")


# --- batches of gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
def test_batched_gradients(untouched, routed):
    q, k, v = leaves(lengths=(3, 4), width=4, width_v=3)
    bias = leaf(3, 4)
    with ft.enable():
        if routed:
            outputs = (sdpa(q, k, v, bias),)
        else:
            outputs = ft.attention(q, k, v, bias=bias, return_lse=True)
    grads = [torch.randn(5, *x.shape, dtype=x.dtype) for x in outputs]
    inputs = (q, k, v, bias)
    batched = torch.autograd.grad(outputs, inputs, grads, retain_graph=True, is_grads_batched=True)
    mapped = torch.vmap(lambda *g: torch.autograd.grad(outputs, inputs, g, retain_graph=True))
    for i in range(5):
        each = torch.autograd.grad(outputs, inputs, [g[i] for g in grads], retain_graph=True)
        for x, y, z in zip(each, batched, mapped(*grads), strict=True):
            assert torch.equal(x, y[i]) and torch.equal(x, z[i])


@pytest.mark.parametrize("function", [ft.attention, ft.scaled_dot_product_attention])
def test_vectorised_jacobian_and_gradcheck(function):
    q, k, v = leaves(lead=(1,), heads=2, kv_heads=2, lengths=(2, 3), width=4, width_v=3)
    jacobian = torch.autograd.functional.jacobian
    call = lambda q: function(q, k.detach(), v.detach())  # noqa: E731
    expected = jacobian(call, q.detach())
    assert torch.equal(jacobian(call, q.detach(), vectorize=True), expected)
    assert torch.autograd.gradcheck(function, (q, k, v), check_batched_grad=True)


def test_vmap_over_options_alone_over_nothing_and_of_no_entries():
    q, k, v = (x.detach() for x in leaves())
    lengths = torch.tensor([1, 5, 9])
    mapped = torch.vmap(lambda n: ft.attention(q, k, v, kv_lengths=n))(lengths)
    grads = torch.vmap(
        torch.func.grad(lambda q, n: ft.attention(q, k, v, kv_lengths=n).sum()), (None, 0)
    )(q, lengths)
    for i, n in enumerate(lengths):
        leaf_q = q.clone().requires_grad_()
        expected = ft.attention(leaf_q, k, v, kv_lengths=n)
        expected.sum().backward()
        assert torch.equal(mapped[i], expected) and torch.equal(grads[i], leaf_q.grad)
    added = torch.vmap(lambda x: ft.attention(q, k, v) + x)(torch.arange(2.0))
    assert torch.equal(added[1], ft.attention(q, k, v) + 1)
    empty = torch.zeros(0, *q.shape, dtype=q.dtype)
    assert torch.vmap(lambda q: ft.attention(q, k, v))(empty).shape == (0, 2, 4, 7, 6)
    gradient = torch.func.grad(lambda q: ft.attention(q, k, v).sum())
    assert torch.vmap(gradient)(empty).shape == empty.shape


def test_backward_after_a_change_in_place_is_an_error():
    q, k, v = leaves()
    doubled = k * 2
    out = ft.attention(q, doubled, v)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
