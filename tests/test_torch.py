"""fastattn.torch: values, gradients and PyTorch's machinery, against PyTorch's own."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastattn as fa  # noqa: E402
import fastattn.torch as ft  # noqa: E402
from fastattn._backward import (  # noqa: E402
    attention_and_kept,
    attention_backward_of_kept,
)
from fastattn._rounding import round_once  # noqa: E402
from fastattn._validate import BFLOAT16_BITS  # noqa: E402
from fastattn.torch import _ops  # noqa: E402

sdpa = torch.nn.functional.scaled_dot_product_attention

pytestmark = [
    pytest.mark.any_kernel_set,
    # PyTorch's compiler warns of what PyTorch itself uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

# Largest error of a result or gradient, relative to the largest element of the true one.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


@pytest.fixture
def fresh_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def leaves(dtype=torch.float64, lead=(2,), heads=4, kv_heads=4, lengths=(7, 9), width=8, width_v=6):
    (seqlen_q, seqlen_k), q_lead = lengths, (*lead, heads)
    kv_lead = (*lead, kv_heads)
    return (
        leaf(*q_lead, seqlen_q, width, dtype=dtype),
        leaf(*kv_lead, seqlen_k, width, dtype=dtype),
        leaf(*kv_lead, seqlen_k, width_v, dtype=dtype),
    )


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    if actual.numel():
        actual, expected = actual.detach().double(), expected.detach()
        largest = max(1.0, float(expected.abs().max()))
        assert (actual - expected).abs().max() <= TOLERANCE[dtype] * largest


def double(x):
    """A float64 copy of a tensor, its own leaf."""
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


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


# --- scaled_dot_product_attention: values -------------------------------------------------------


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


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "args", "options"),
    [
        ("`key` and `value` must have dtype", [(2, 3, 4), (2, 3, 4), (2, 3, 4)], {}),
        ("`query` must have at least 2 dimensions", [(4,), (3, 4), (3, 4)], {}),
        ("`key` must have E 4", [(2, 3, 4), (2, 3, 5), (2, 3, 4)], {}),
        ("`value` must have S 3", [(2, 3, 4), (2, 3, 4), (2, 5, 4)], {}),
        ("`key` must have 4 heads or 1", [(1, 4, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)], {}),
        ("divides the 4", [(1, 4, 3, 4), (1, 3, 3, 4), (1, 3, 3, 4)], {"enable_gqa": True}),
        ("broadcast", [(2, 4, 3, 4), (3, 4, 3, 4), (3, 4, 3, 4)], {}),
        ("`attn_mask` must broadcast", [(3, 4)] * 3, {"attn_mask": torch.ones(2, 3, 3).bool()}),
        ("`attn_mask` must be bool", [(3, 4)] * 3, {"attn_mask": torch.ones(3, 3).double()}),
        ("`attn_mask` must be bool", [(3, 4)] * 3, {"attn_mask": torch.ones(3, 3).long()}),
        ("`dropout_p` must be 0 to 1", [(3, 4)] * 3, {"dropout_p": 1.5}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sdpa_errors_are_of_the_types_of_torch(message, args, options):
    tensors = [torch.randn(shape) for shape in args]
    if "dtype" in message:
        tensors[1] = tensors[1].double()
    with pytest.raises(RuntimeError, match=message):
        ft.scaled_dot_product_attention(*tensors, **options)
    with pytest.raises(RuntimeError):
        sdpa(*tensors, **options)


def test_sdpa_takes_tensors_of_floats():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match=r"`key` must be a torch\.Tensor, got a ndarray"):
        ft.scaled_dot_product_attention(x, x.numpy(), x)
    with pytest.raises(RuntimeError, match="`query` must be float16"):
        ft.scaled_dot_product_attention(x.long(), x.long(), x.long())
    with pytest.raises(TypeError, match="positional"):
        ft.scaled_dot_product_attention(x, x, x, None, 0.0, False, 1.0)


def test_attention_names_what_is_wrong():
    x = torch.zeros(2, 3, 4)
    cases = [
        (TypeError, "`q` must be a torch.Tensor", lambda: ft.attention(x.numpy(), x, x)),
        (TypeError, "`v` must have dtype torch.float32", lambda: ft.attention(x, x, x.double())),
        (TypeError, "`q` must be float16", lambda: ft.attention(x.int(), x.int(), x.int())),
        (ValueError, "`k` must have head_dim 4", lambda: ft.attention(x, x[..., :2], x)),
        (TypeError, "`mask` must be bool", lambda: ft.attention(x, x, x, mask=x[0, :, :3])),
        (ValueError, "`window` must be a pair", lambda: ft.attention(x, x, x, window=(1,))),
        (ValueError, "`window` must hold ints >= 0", lambda: ft.attention(x, x, x, window=(-1, 0))),
        (ValueError, "`dropout_seed` must", lambda: ft.attention(x, x, x, dropout_seed=-1)),
        (ValueError, "`dropout_p` must", lambda: ft.attention(x, x, x, dropout_p=2.0)),
        (ValueError, "`num_threads` must", lambda: ft.attention(x, x, x, num_threads=0)),
        (TypeError, "`causal` must be True or False", lambda: ft.attention(x, x, x, causal="no")),
        (TypeError, "`scale` must be a real", lambda: ft.attention(x, x, x, scale="1")),
        (ValueError, "`scale` must be finite", lambda: ft.attention(x, x, x, scale=math.nan)),
        (TypeError, "`window` must be a pair", lambda: ft.attention(x, x, x, window=(1.0, 0))),
        (ValueError, "`softmax_axis` must", lambda: ft.attention(x, x, x, softmax_axis="rows")),
        (TypeError, "unexpected keyword", lambda: ft.attention(x, x, x, out=x)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_other_devices_are_refused():
    x = torch.zeros(2, 3, 4)
    assert ft.attention(x.to("meta"), x.to("meta"), x.to("meta")).device.type == "meta"
    for name in ("k", "v"):
        others = {"k": x, "v": x} | {name: x.to("meta")}
        message = f"`{name}` must be on cpu like `q`, got meta"
        with pytest.raises(TypeError, match=message):
            ft.attention(x, **others)
        with pytest.raises(TypeError, match=message):  # of the operator itself
            _ops.FORWARD(x, *others.values(), *_ops.DEFAULTS.values())
    far = torch.zeros((), device="meta")
    for name, option in {
        "bias": far,
        "residual": x.to("meta"),
        "sinks": far.expand(2),
        "alibi_slopes": far.expand(2),
        "mask": far.bool(),
        "q_offset": far.long(),
        "kv_lengths": far.long(),
        "dropout_seed": far.long(),
    }.items():
        with pytest.raises(TypeError, match=f"`{name}` must be on cpu like `q`, got meta"):
            ft.attention(x, x, x, **{name: option})
    for index in (0, 1):
        ids = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
        ids[index] = ids[index].to("meta")
        with pytest.raises(TypeError, match=rf"`segment_ids\[{index}\]` must be on cpu"):
            ft.attention(x, x, x, segment_ids=ids)
    with pytest.raises(RuntimeError, match="`value` must be on cpu like `query`, got meta"):
        ft.scaled_dot_product_attention(x, x, x.to("meta"))
    with pytest.raises(RuntimeError, match="`attn_mask` must be on cpu like `query`, got meta"):
        ft.scaled_dot_product_attention(x, x, x, far.bool())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of kinds that PyTorch has in beta
def test_kinds_of_tensors_that_are_refused():
    x = torch.randn(2, 3, 4)
    floats = "float16, bfloat16, float32 or float64"
    for y, rule in [
        (x.to_sparse(), "must be a dense tensor, got torch.sparse_coo"),
        (x[0].to_sparse_csr(), "must be a dense tensor, got torch.sparse_csr"),
        (x.to_mkldnn(), "must be a dense tensor, got torch._mkldnn"),
        (torch.nested.nested_tensor([x, x]), "must be a dense tensor, got a nested one"),
        (x.to(torch.complex64), f"must be {floats}, got torch.complex64"),
        (x.to(torch.complex64).conj(), f"must be {floats}, got torch.complex64"),
        (x.to(torch.float8_e5m2), f"must be {floats}, got torch.float8_e5m2"),
        (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), f"must be {floats}, got torch.qint8"),
    ]:
        with pytest.raises(TypeError, match=f"`q` {rule}"):
            ft.attention(y, y, y)
        with pytest.raises(TypeError, match=f"`bias` {rule}"):
            ft.attention(x, x, x, bias=y)
        with pytest.raises(RuntimeError, match=f"`query` {rule}"):
            ft.scaled_dot_product_attention(y, y, y)
        with pytest.raises(RuntimeError, match="`attn_mask` must be"):
            ft.scaled_dot_product_attention(x, x, x, y)


def test_errors_name_the_dtypes_of_torch():
    x = torch.randn(2, 3, 4)
    bf16 = torch.ones(3, 3, dtype=torch.bfloat16)
    for options, message in [
        ({"mask": bf16}, "`mask` must be bool.*got torch.bfloat16"),
        (
            {"residual": x.bfloat16()},
            "`residual` must have dtype torch.float32 like `q`, got torch.bf",
        ),
        ({"bias": bf16.int()}, "`bias` must be float16.*got torch.int32"),
        ({"kv_lengths": bf16[0, 0]}, "`kv_lengths` must be integers.*got torch.bfloat16"),
        ({"q_offset": torch.tensor(True)}, "`q_offset` must be integers.*got torch.bool"),
        ({"sinks": torch.ones(2).bool()}, "`sinks` must be real numbers, got torch.bool"),
        ({"dropout_seed": torch.tensor(1.0)}, "`dropout_seed` must be an integer, got torch.f"),
    ]:
        with pytest.raises(TypeError, match=message):
            ft.attention(x, x, x, **options)
    with pytest.raises(ValueError, match=r"`dropout_seed` must be one integer, got shape \(2,\)"):
        ft.attention(x, x, x, dropout_seed=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "options",
    [
        *({"dropout_p": 0.5, "dropout_seed": x} for x in (True, 1.5, "1", -1, 2**64, [1])),
        *({"q_offset": x} for x in (True, 1.5, "1", [2**64], [1.0], [True], ["a"])),
        *({"kv_lengths": x} for x in (True, 1.5, "1", 2**70, [3], 4)),
        *({"window": x} for x in ((True, 0), (0.5, 1), "ab", 5, (1,))),
        *({"segment_ids": x} for x in (5, ([0],), ([0.5] * 3, [0] * 3))),
        {"mask": [[1, 0, 1]]},
        {"bias": [[1, 2, 3]]},
        {"alibi_slopes": [1j, 2]},
        {"scale": 1j},
        *({"softcap": x} for x in (0, -1, "2", float("inf"))),
        *({"dropout_p": x, "dropout_seed": 1} for x in (2, -1, "0", None)),
        {"num_threads": True},
    ],
    ids=str,
)
def test_what_numpy_refuses_is_refused_in_the_same_words(options):
    x = torch.randn(2, 3, 4)
    with pytest.raises((TypeError, ValueError)) as expected:
        fa.attention(*[x.numpy()] * 3, **options)
    with pytest.raises(expected.type) as given:
        ft.attention(x, x, x, **options)
    assert str(given.value) == str(expected.value)


@pytest.mark.parametrize(
    "options",
    [
        *({"dropout_p": 0.5, "dropout_seed": x} for x in (2**63, 2**64 - 1, np.uint64(2**64 - 1))),
        *({"causal": True, "q_offset": x} for x in (2**70, -(2**70), np.int64(1), 2**63)),
        *({"window": x} for x in ((2**70, 0), (None, 2**63), (np.int64(1), 0))),
        {"num_threads": 2**70},
        {"scale": np.float32(0.5), "softcap": np.float64(2.0), "causal": np.True_},
        {"bias": np.arange(9.0).reshape(3, 3)[::-1]},
        {"mask": [[True, False, True]]},
        {"sinks": [1, 2]},
        {"alibi_slopes": [0.1, 0.2], "kv_lengths": 2},
        {"segment_ids": ([0, 0, 1], [0, 1, 1])},
    ],
    ids=str,
)
@pytest.mark.parametrize("default", ["dtype", "device", "context"])
def test_what_is_no_tensor_is_read_as_by_numpy(options, default):
    """Whatever dtype and device PyTorch takes where none is given."""
    q, k, v = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    expected = fa.attention(*(x.numpy() for x in (q, k, v)), **options)
    try:
        if default == "dtype":
            torch.set_default_dtype(torch.bfloat16)
        elif default == "device":
            torch.set_default_device("meta")
        with torch.device("meta" if default == "context" else "cpu"):
            out = ft.attention(q, k, v, **options)
            ones = v * 0 + 1
            drawn = ft.scaled_dot_product_attention(q, k, ones, dropout_p=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert out.device.type == "cpu"
    np.testing.assert_array_equal(out.numpy(), expected)
    torch.testing.assert_close(drawn, ones)


def test_what_has_no_gradient_may_not_require_one():
    x = leaf(4, 7, 8)
    slopes = leaf(4)
    with pytest.raises(ValueError, match="`alibi_slopes` must not require a gradient"):
        ft.attention(x, x, x, alibi_slopes=slopes)
    with torch.no_grad():
        ft.attention(x, x, x, alibi_slopes=slopes)
    wide = leaf(1, 2, 1025)
    with pytest.raises(ValueError, match="head_dim must be at most 1024 for gradients, got 1025"):
        ft.attention(wide, wide, wide)
    ft.attention(wide.detach(), wide.detach(), wide.detach())


# --- attention: values and gradients of every option --------------------------------------------

GRADIENT_CASES = {
    "plain": {},
    "scale": {"scale": -0.4},
    "softcap": {"softcap": 0.9},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "open window": {"window": (None, 1)},
    "q_offset": {"causal": True, "q_offset": -1},
    "q_offsets": {"causal": True, "q_offset": [0, 3]},
    "kv_lengths": {"kv_lengths": [4, 0], "causal": True},
    "segment_ids": {
        "segment_ids": (torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 2, 2]))
    },
    "mask": {"mask": torch.tensor([True, False, True, True, False, True])},
    "alibi_slopes": {"alibi_slopes": [0.5, 0.25]},
    "bias": {"bias": (2, 5, 6)},
    "broadcast bias": {"bias": (2, 1, 1, 6), "softcap": 2.0},
    "sinks": {"sinks": (2,)},
    "residual": {"residual": (2, 2, 5, 3)},
    "queries": {"softmax_axis": "queries", "bias": (2, 5, 6)},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 2**64 - 5},
    "dropout and queries": {"dropout_p": 0.3, "dropout_seed": 5, "softmax_axis": "queries"},
    "all": {
        "bias": (5, 6), "sinks": (2,), "residual": (2, 2, 5, 3), "softcap": 3.0, "causal": True,
        "window": (3, None), "kv_lengths": [6, 5], "dropout_p": 0.2, "dropout_seed": 1,
    },
}  # fmt: skip
LEARNED = ("bias", "sinks", "residual")


def gradient_case(name):
    """Learned options as leaves, the others."""
    given = GRADIENT_CASES[name]
    learned = {key: leaf(*given[key]) for key in LEARNED if key in given}
    return learned, {key: x for key, x in given.items() if key not in LEARNED}


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


# --- routing --------------------------------------------------------------------------------------

OPERATOR = "aten::scaled_dot_product_attention"


def state_of_torch():
    return torch._C._dispatch_dump_table(OPERATOR), torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def untouched():
    """The test leaves PyTorch as it found it."""
    before = state_of_torch()
    yield
    left_enabled = ft.is_enabled()
    ft.disable()
    assert not left_enabled
    assert state_of_torch() == before


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


# --- attention_weights ------------------------------------------------------------------------


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
