"""Tensors for the tests of fastattn.torch, and what it is compared with."""

import pytest

torch = pytest.importorskip("torch")

sdpa = torch.nn.functional.scaled_dot_product_attention
OPERATOR = "aten::scaled_dot_product_attention"

# What every file of these tests sets `pytestmark` to.
marks = [
    pytest.mark.any_kernel_set,
    pytest.mark.usefixtures("seeded_torch"),
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


# Options of `attention`; of the learned ones the shapes.
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


def state_of_torch():
    return torch._C._dispatch_dump_table(OPERATOR), torch.backends.mha.get_fastpath_enabled()
