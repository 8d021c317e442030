"""MultiHeadAttention with the weights of PyTorch's and Keras's layers."""

import sys

import numpy as np
import pytest
from layers import KEY_DIM, VALUE_DIM, assert_close, make_inputs

import fastattn as fa

# --- PyTorch ----------------------------------------------------------------------------------


class FakeTensor:
    """What a torch tensor offers, without torch."""

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype = array, dtype

    def detach(self):
        return self

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return self.array


def state_dict(make=lambda array: array, prefix="", same_dims=True, bias=True):
    rng = np.random.default_rng(4)

    def normal(*shape):
        return make(rng.standard_normal(shape).astype(np.float32))

    weights = {"out_proj.weight": normal(12, 12)}
    if same_dims:
        weights["in_proj_weight"] = normal(36, 12)
    else:
        weights["q_proj_weight"] = normal(12, 12)
        weights["k_proj_weight"] = normal(12, KEY_DIM)
        weights["v_proj_weight"] = normal(12, VALUE_DIM)
    if bias:
        weights |= {"in_proj_bias": normal(36), "out_proj.bias": normal(12)}
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.any_kernel_set
@pytest.mark.parametrize("prefix", ["", "a.self_attn", "a.self_attn."])
def test_torch_state_dict_weights(prefix):
    weights = state_dict(prefix="a.self_attn." if prefix else "")
    others = {"a.norm.weight": np.ones(3), "b": None} if prefix else {}
    layer = fa.MultiHeadAttention.from_torch_state_dict({**weights, **others}, 4, prefix)
    plain = state_dict()
    np.testing.assert_array_equal(layer.w_q, plain["in_proj_weight"][:12].T)
    np.testing.assert_array_equal(layer.w_k, plain["in_proj_weight"][12:24].T)
    np.testing.assert_array_equal(layer.w_v, plain["in_proj_weight"][24:].T)
    np.testing.assert_array_equal(layer.w_k_bias, plain["in_proj_bias"][12:24])
    np.testing.assert_array_equal(layer.w_o, plain["out_proj.weight"].T)
    np.testing.assert_array_equal(layer.w_o_bias, plain["out_proj.bias"])
    assert (layer.num_heads, layer.num_kv_heads) == (4, 4)


@pytest.mark.any_kernel_set
def test_torch_tensors_are_converted():
    layer = fa.MultiHeadAttention.from_torch_state_dict(state_dict(FakeTensor, bias=False), 4)
    np.testing.assert_array_equal(layer.w_q, state_dict()["in_proj_weight"][:12].T)
    assert layer.w_q_bias is None and layer.w_o_bias is None
    weights = state_dict(lambda array: FakeTensor(array, "torch.bfloat16"))
    with pytest.raises(TypeError, match=r"must be float32 or float64, got torch\.bfloat16"):
        fa.MultiHeadAttention.from_torch_state_dict(weights, 4)


@pytest.mark.any_kernel_set
def test_torch_state_dict_errors():
    build = fa.MultiHeadAttention.from_torch_state_dict
    with pytest.raises(ValueError, match=r"got also 'attn\.extra'"):
        build({**state_dict(prefix="attn."), "attn.extra": np.ones(1)}, 4, "attn")
    weights = state_dict()
    del weights["out_proj.weight"]
    with pytest.raises(ValueError, match=r"`state_dict` must hold 'out_proj\.weight'"):
        build(weights, 4)
    with pytest.raises(ValueError, match=r"`state_dict` must hold 'in_proj_weight', got keys none"):
        build({}, 4)
    with pytest.raises(ValueError, match=r"`in_proj_weight` must have a multiple of 3 rows"):
        build({**state_dict(), "in_proj_weight": np.ones((35, 12), np.float32)}, 4)
    with pytest.raises(ValueError, match="`state_dict` must hold 'bias_v'"):
        build({**state_dict(), "bias_k": np.ones((1, 1, 12), np.float32)}, 4)


@pytest.mark.parametrize("options", [{}, {"kdim": KEY_DIM, "vdim": VALUE_DIM}, {"bias": False}])
@pytest.mark.parametrize("add_bias_kv", [False, True])
def test_against_torch(options, add_bias_kv):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(
        12, 4, batch_first=True, add_bias_kv=add_bias_kv, **options
    ).eval()
    query, key, value = make_inputs()
    key, value = (key, value) if "kdim" in options else (np.repeat(key, 2, axis=-1)[..., :12],) * 2
    padding = np.array([[False] * 7, [False] * 4 + [True] * 3])
    masked = np.triu(np.ones((5, 7), bool), 3)
    with torch.no_grad():
        tensors = [torch.from_numpy(x) for x in (query, key, value, padding, masked)]
        desired, _ = module(
            *tensors[:3], key_padding_mask=tensors[3], attn_mask=tensors[4], need_weights=False
        )
    layer = fa.MultiHeadAttention.from_torch_state_dict(module.state_dict(), 4)
    actual = layer(query, key, value, mask=~padding[:, None, None, :] & ~masked)
    assert_close(actual, desired.numpy().astype(np.float64))


# --- Keras ------------------------------------------------------------------------------------


def keras_weights(num_kv_heads=4, bias=True):
    rng = np.random.default_rng(5)
    shapes = {
        "query/kernel": (12, 4, 3),
        "query/bias": (4, 3),
        "key/kernel": (KEY_DIM, num_kv_heads, 3),
        "key/bias": (num_kv_heads, 3),
        "value/kernel": (VALUE_DIM, num_kv_heads, 5),
        "value/bias": (num_kv_heads, 5),
        "attention_output/kernel": (4, 5, 12),
        "attention_output/bias": (12,),
    }
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
        if bias or name.endswith("kernel")
    }


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["list", "paths", "legacy paths"])
def test_keras_weights(num_kv_heads, bias, kind):
    weights = keras_weights(num_kv_heads, bias)
    given = {
        "list": list(weights.values()),
        "paths": {f"model/attention/{name}": value for name, value in weights.items()},
        "legacy paths": {f"{name}:0": value for name, value in weights.items()},
    }[kind]
    layer = fa.MultiHeadAttention.from_keras_weights(given)
    assert (layer.num_heads, layer.num_kv_heads) == (4, num_kv_heads)
    assert (layer.head_dim, layer.head_dim_v) == (3, 5)
    query, key, value = make_inputs()

    # As Keras computes it: one einsum for each projection.
    def dense(equation, x, name):
        return np.einsum(equation, x, weights[f"{name}/kernel"]) + weights.get(f"{name}/bias", 0)

    q, k, v = (
        dense("abc,cde->abde", x, name).swapaxes(1, 2)
        for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    attended = fa.reference.attention(q, k, v).swapaxes(1, 2)
    assert_close(layer(query, key, value), dense("abcd,cde->abe", attended, "attention_output"))


@pytest.mark.any_kernel_set
def test_keras_errors():
    build = fa.MultiHeadAttention.from_keras_weights
    weights = keras_weights()
    with pytest.raises(ValueError, match=r"must hold 8 arrays .* or 4 .*, got 7"):
        build(list(weights.values())[:7])
    with pytest.raises(ValueError, match="got also 'layer/query/scale'"):
        build({**weights, "layer/query/scale": np.ones(1)})
    with pytest.raises(ValueError, match="got a second query/kernel at 'b/query/kernel'"):
        build({**weights, "b/query/kernel": weights["query/kernel"]})
    with pytest.raises(ValueError, match="`weights` must hold 'value/kernel'"):
        build({name: x for name, x in weights.items() if name != "value/kernel"})
    with pytest.raises(ValueError, match=r"`query/kernel` must have 3 dimensions, got shape \(2,"):
        build({**weights, "query/kernel": np.ones((2, 2), np.float32)})


@pytest.mark.any_kernel_set
def test_neither_library_is_imported():
    before = set(sys.modules)
    fa.MultiHeadAttention.from_torch_state_dict(state_dict(FakeTensor), 4)
    fa.MultiHeadAttention.from_keras_weights(keras_weights())
    assert not {"torch", "keras"} & (set(sys.modules) - before)
