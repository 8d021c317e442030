"""`fastattn.torch.attention`: values, gradients and dropout of every option."""

import math

import numpy as np
import pytest
from torch_cases import (
    DTYPES,
    GRADIENT_CASES,
    assert_close,
    double,
    gradient_case,
    leaf,
    leaves,
    marks,
    sdpa,
    torch,
)

import fastattn.torch as ft
from fastattn._backward import (
    attention_and_kept,
    attention_backward_of_kept,
)
from fastattn._rounding import round_once
from fastattn._validate import BFLOAT16_BITS
from fastattn.torch import _ops

pytestmark = marks


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradcheck(name, kv_heads):
    q, k, v = leaves(heads=2, kv_heads=kv_heads, lengths=(5, 6), width=4, width_v=3)
    learned, options = gradient_case(name)

    def outputs(q, k, v, *learned_values):
        given = options | dict(zip(learned, learned_values, strict=True))
        out, lse = ft.attention(q, k, v, return_lse=True, **given)
        # The lse of a row without keys has no derivative.
        return out, torch.where(lse == -math.inf, 0.0, lse)

    inputs = (q, k, v, *learned.values())
    assert torch.autograd.gradcheck(outputs, inputs)
    # Of `out` alone and of `lse` alone, whose other gradient is then absent.
    for index in (0, 1):
        used = [x for x in inputs if index == 0 or x is not learned.get("residual")]
        assert torch.autograd.gradcheck(
            lambda *used, index=index: outputs(*used, *inputs[len(used) :])[index], used
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_attention_is_that_of_numpy(name, dtype):
    """The same bits, forward and backward, through every conversion."""
    learned, options = gradient_case(name)
    learned = {key: x.detach().to(dtype).requires_grad_() for key, x in learned.items()}
    q, k, v = leaves(dtype, heads=2, kv_heads=1, lengths=(5, 6), width=4, width_v=3)
    out, lse = ft.attention(q, k, v, return_lse=True, **learned, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    torch.autograd.backward([out, lse], [grad_out, grad_lse])

    def array(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.bfloat16:
            import ml_dtypes

            return x.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.detach().numpy()

    # In NumPy, sinks are of the kinds that NumPy knows.
    learned_arrays = {key: array(x) for key, x in learned.items()}
    if "sinks" in learned:
        learned_arrays["sinks"] = learned_arrays["sinks"].astype(np.float64)
    given = learned_arrays | {key: array(x) for key, x in options.items()}
    if "segment_ids" in options:
        given["segment_ids"] = tuple(map(array, options["segment_ids"]))
    arrays = list(map(array, (q, k, v)))
    expected, expected_lse, kept = attention_and_kept(*arrays, **given)
    made = expected, expected_lse
    gradients = attention_backward_of_kept(
        array(grad_out), *arrays, *made, kept, grad_lse=array(grad_lse), **given
    )
    np.testing.assert_array_equal(array(out), expected)
    np.testing.assert_array_equal(array(lse), expected_lse)
    for x, gradient in [(q, gradients.q), (k, gradients.k), (v, gradients.v)]:
        np.testing.assert_array_equal(array(x.grad), gradient)
    if "bias" in learned:
        np.testing.assert_array_equal(array(learned["bias"].grad), gradients.bias)
    if "sinks" in learned:
        exact = torch.from_numpy(gradients.sinks)
        once = exact if dtype == torch.float64 else exact.float()
        assert torch.equal(learned["sinks"].grad, once.to(dtype))
    if "residual" in learned:
        np.testing.assert_array_equal(array(learned["residual"].grad), array(grad_out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_shared_prefix_gets_the_sum_of_its_gradients(dtype):
    q, k, v = leaf(3, 4, 7, 8, dtype=dtype), leaf(2, 9, 8, dtype=dtype), leaf(2, 9, 6, dtype=dtype)
    bias = leaf(1, 9, dtype=dtype)
    exact = [double(x) for x in (q, k, v, bias)]
    for tensors in ((q, k, v, bias), exact):
        *qkv, b = tensors
        ft.attention(*qkv, bias=b).square().sum().backward()
    for x, expected in zip((q, k, v, bias), exact, strict=True):
        assert x.grad.dtype == dtype
        assert_close(x.grad, expected.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_large_scores_beside_pytorchs_exact_path(dtype):
    """The medians of their errors: one call's owes much to luck."""
    errors = {"q": [], "k": [], "v": []}
    for _ in range(20):
        x = [(torch.rand(1, n, 8) * 18 - 9).to(dtype).requires_grad_() for n in (3, 6, 6)]
        grad_out = torch.randn(1, 3, 8).to(dtype)
        ours = torch.autograd.grad(ft.scaled_dot_product_attention(*x), x, grad_out)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            theirs = torch.autograd.grad(sdpa(*x), x, grad_out)
            wide = [double(t) for t in x]
            exact = torch.autograd.grad(sdpa(*wide), wide, grad_out.double())
        for name, true, *pair in zip(errors, exact, ours, theirs, strict=True):
            errors[name].append([float((g.double() - true).abs().max()) for g in pair])
    for name, pairs in errors.items():
        own, other = np.median(pairs, axis=0)
        assert own <= 1.5 * other, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", [ft.attention, ft.scaled_dot_product_attention])
def test_a_single_key_has_no_gradient_of_scores(call, dtype):
    q, k, v = (x.detach().mul(5).requires_grad_() for x in leaves(dtype, lengths=(7, 1)))
    out = call(q, k, v)
    out.backward(torch.randn_like(out))
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert v.grad.count_nonzero() > 0


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    asked = []
    backward = _ops.attention_backward_of_kept

    def recording(*args, needs, **options):
        asked.append(needs)
        return backward(*args, needs=needs, **options)

    monkeypatch.setattr(_ops, "attention_backward_of_kept", recording)
    q, k, v = leaves()
    ft.attention(q.detach(), k, v.detach(), sinks=leaf(4)).sum().backward()
    residual = leaf(2, 4, 7, 6)
    ft.attention(q.detach(), k.detach(), v.detach(), residual=residual).sum().backward()
    assert asked == [("k", "sinks")]
    assert torch.equal(residual.grad, torch.ones_like(residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_16_bit_gradients_beside_pytorchs_exact_path(dtype, masked):
    """Of values and keys far from zero, beside which the rounding of the result is large, and with
    rows that a mask of the lowest number leaves nothing else."""
    bias = None
    if masked:
        bias = torch.where(torch.rand(40, 300) < 0.5, torch.finfo(torch.float32).min, 0.0)
        bias[::3] = torch.finfo(torch.float32).min
    for seed in range(5):
        torch.manual_seed(seed)
        shapes, offsets = [(2, 40, 32), (2, 300, 32), (2, 300, 32)], (0, 3, 5)
        x = [
            (torch.randn(shape) + offset).to(dtype).requires_grad_()
            for shape, offset in zip(shapes, offsets, strict=True)
        ]
        grad_out = torch.randn(2, 40, 32).to(dtype)
        ours = torch.autograd.grad(ft.scaled_dot_product_attention(*x, bias), x, grad_out)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            given = bias if bias is None else bias.clamp(min=torch.finfo(dtype).min).to(dtype)
            theirs = torch.autograd.grad(sdpa(*x, given), x, grad_out)
            wide = [double(t) for t in x]
            exact = torch.autograd.grad(
                sdpa(*wide, bias if bias is None else bias.double()), wide, grad_out.double()
            )
        for true, *pair in zip(exact, ours, theirs, strict=True):
            own, other = (float((g.double() - true).abs().max()) for g in pair)
            assert own <= 2 * other


def test_only_calls_with_gradients_keep_something_for_them(monkeypatch):
    asked = []
    forward = _ops.attention_and_kept

    def recording(*args, **options):
        asked.append(len(asked))
        return forward(*args, **options)

    monkeypatch.setattr(_ops, "attention_and_kept", recording)
    q, k, v = leaves()
    with torch.no_grad():
        ft.attention(q, k, v)
    ft.attention(q.detach(), k.detach(), v.detach())
    assert not asked
    ft.attention(q, k, v)
    assert asked == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_to_gradients_has_the_same_bits(untouched, fresh_compiler, dtype):
    """Eager, compiled, routed, by a transform and from a checkpoint, of concentrated rows."""
    x = [t.detach().mul(6).requires_grad_() for t in leaves(dtype, lengths=(50, 70))]

    def loss(function, *arguments):
        return function(*arguments, is_causal=True).float().square().sum()

    def gradients(function):
        return torch.autograd.grad(loss(function, *x), x)

    expected = gradients(ft.scaled_dot_product_attention)
    compiled = torch.compile(ft.scaled_dot_product_attention, fullgraph=True)
    ways = [gradients(compiled)]
    with ft.enable():
        ways.append(gradients(sdpa))
    by_transform = torch.func.grad(
        lambda *x: loss(ft.scaled_dot_product_attention, *x), argnums=(0, 1, 2)
    )
    ways.append(by_transform(*(t.detach() for t in x)))

    def checkpointed(*arguments, **options):
        return torch.utils.checkpoint.checkpoint(
            ft.scaled_dot_product_attention, *arguments, use_reentrant=False, **options
        )

    ways.append(gradients(checkpointed))
    for way in ways:
        assert all(map(torch.equal, way, expected))


def test_bits_of_bfloat16_are_rounded_as_by_ml_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    halves = (rng.integers(0, 2**16, 1000, dtype=np.uint32) << 16) | 0x8000  # ties
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45], np.float32)
    for x in (bits.view(np.float32), halves.view(np.float32), special):
        with np.errstate(all="ignore"):
            double_x = x.astype(np.float64)
        for wide in (x, double_x):
            rounded = round_once(wide, BFLOAT16_BITS)
            assert rounded.dtype is BFLOAT16_BITS
            expected = round_once(wide, np.dtype(ml_dtypes.bfloat16))
            nan = np.isnan(wide)
            np.testing.assert_array_equal(rounded[~nan], expected[~nan].view(np.uint16))
            assert np.all((rounded[nan] & 0x7FFF) > 0x7F80)


# --- second derivatives -------------------------------------------------------------------------


def test_second_derivatives_are_refused_where_they_are_asked_for():
    q, k, v = leaves()
    for function in (ft.attention, ft.scaled_dot_product_attention):
        out = function(q, k, v)
        with pytest.raises(NotImplementedError, match=r"create_graph.*SDPBackend\.MATH"):
            torch.autograd.grad(out.sum(), q, create_graph=True)


def test_second_derivatives_of_transforms_are_refused():
    q, k, v = (x.detach() for x in leaves())

    def loss(q):
        return ft.attention(q, k, v).sum()

    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (q,), (q,))
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        ft.attention(forward_ad.make_dual(q, q), k, v)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_governed_by_the_generator_of_torch():
    q, k, v = (x.detach() for x in leaves(lengths=(50, 60)))

    def draw(seed):
        torch.manual_seed(seed)
        return [ft.scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2)]

    first, second = draw(7)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, draw(7), (first, second)))
    assert not torch.equal(draw(8)[0], first)
    state = torch.get_rng_state()
    ft.scaled_dot_product_attention(q, k, v)
    ft.attention(q, k, v, dropout_p=0.5, dropout_seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_keeps_the_mean_and_drops_the_share():
    # The weights themselves: each value is a row of the identity.
    q, k = torch.randn(2, 64, 256, 16, dtype=torch.float64).unbind()
    v = torch.eye(256, dtype=torch.float64).expand(64, 256, 256)
    weights = ft.attention(q, k, v)
    dropped = ft.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    kept = dropped != 0
    count = kept.numel()
    # 6 standard deviations.
    assert abs(kept.double().mean() - 0.7) < 6 * math.sqrt(0.3 * 0.7 / count)
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.7)
    assert torch.all(ft.scaled_dot_product_attention(q, k, v, dropout_p=1.0) == 0)


def test_dropout_has_the_same_mask_forward_and_backward():
    q, k, v = leaves()
    torch.manual_seed(1)
    out = ft.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.randn(100)  # the generator goes on before the backward pass
    out.sum().backward()
    identity = torch.eye(9, dtype=torch.float64)
    torch.manual_seed(1)
    weights = ft.scaled_dot_product_attention(q, k, identity.expand(2, 4, 9, 9), dropout_p=0.4)
    torch.testing.assert_close(v.grad, weights.sum(-2)[..., None].expand(v.shape))


def test_checkpointed_dropout():
    q, k, v = leaves()
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        args = (ft.scaled_dot_product_attention, q, k, v, None, 0.5)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(*args, use_reentrant=False)
        else:
            out = args[0](*args[1:])
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert all(map(torch.equal, *grads))
