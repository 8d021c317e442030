"""What fastattn.torch refuses, and in which words."""

import math

import numpy as np
import pytest
from torch_cases import leaf, marks, sdpa, torch

import fastattn as fa
import fastattn.torch as ft
from fastattn.torch import _ops

pytestmark = marks


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
