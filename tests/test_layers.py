"""MultiHeadAttention against its definition in float64, and its constructors."""

import copy
import pickle

import numpy as np
import pytest
from layers import EMBED_DIM, KEY_DIM, OUT_DIM, VALUE_DIM, assert_close, make_inputs

import fastattn as fa


def make_layer(
    dtype=np.float32,
    *,
    num_heads=4,
    num_kv_heads=4,
    head_dim=3,
    head_dim_v=3,
    biases=True,
    w_o=True,
    learned_key=False,
    self_attention=False,
    layer_class=fa.MultiHeadAttention,
):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    key_dim, value_dim = (EMBED_DIM, EMBED_DIM) if self_attention else (KEY_DIM, VALUE_DIM)
    columns = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim_v)
    weights = [normal(EMBED_DIM, columns[0]), normal(key_dim, columns[1])]
    weights += [normal(value_dim, columns[2])]
    options = {}
    if w_o:
        weights.append(normal(num_heads * head_dim_v, OUT_DIM))
    if biases:
        options = {
            "w_q_bias": normal(columns[0]),
            "w_k_bias": normal(columns[1]),
            "w_v_bias": normal(columns[2]),
        }
        if w_o:
            options["w_o_bias"] = normal(OUT_DIM)
    if learned_key:
        options.update(learned_k=normal(columns[1]), learned_v=normal(columns[2]))
    return layer_class(*weights, num_heads=num_heads, num_kv_heads=num_kv_heads, **options)


def expected(layer, query, key, value, residual=0.0, return_lse=False, **options):
    """The layer by its definition, in float64; a learned key is one more row of k and v."""
    batch_shape = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])

    def heads(x, w, b, num_heads, learned=None):
        y = x.astype(np.float64) @ w + (0 if b is None else b)
        if learned is not None:
            row = np.broadcast_to(learned, (*y.shape[:-2], 1, y.shape[-1]))
            y = np.concatenate([y, row], axis=-2)
        return y.reshape(*y.shape[:-1], num_heads, y.shape[-1] // num_heads).swapaxes(-2, -3)

    out, lse = fa.reference.attention(
        heads(query, layer.w_q, layer.w_q_bias, layer.num_heads),
        heads(key, layer.w_k, layer.w_k_bias, layer.num_kv_heads, layer.learned_k),
        heads(value, layer.w_v, layer.w_v_bias, layer.num_kv_heads, layer.learned_v),
        return_lse=True,
        **options,
    )
    out = out.swapaxes(-2, -3).reshape(
        *batch_shape, query.shape[-2], layer.num_heads * layer.head_dim_v
    )
    if layer.w_o is not None:
        out = out @ layer.w_o.astype(np.float64) + (0 if layer.w_o_bias is None else layer.w_o_bias)
    return (out + residual, lse) if return_lse else out + residual


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 3)])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"biases": False},
        {"w_o": False},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 5, "head_dim_v": 2},
        {"head_dim_v": 9, "w_o": False},
        {"num_heads": 1, "num_kv_heads": 1},
        {"learned_key": True},
        {"learned_key": True, "num_kv_heads": 2, "w_o": False},
    ],
)
def test_cross_attention(dtype, batch_shape, shape):
    layer = make_layer(dtype, **shape)
    inputs = make_inputs(dtype, batch_shape)
    untouched = [x.copy() for x in inputs]
    out, lse = layer(*inputs, return_lse=True)
    expected_out, expected_lse = expected(layer, *inputs, return_lse=True)
    assert_close(out, expected_out, dtype)
    assert_close(lse, expected_lse, dtype)
    assert_close(layer(*inputs), expected_out, dtype)
    for x, before in zip(inputs, untouched, strict=True):
        np.testing.assert_array_equal(x, before)


KEEP = np.random.default_rng(2).random((2, 1, 1, 7)) < 0.6


@pytest.mark.parametrize("w_o", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "q_offset": 0},
        {"mask": KEEP},
        {"kv_lengths": np.array([3, 7])},
        {"kv_lengths": np.array([0, 7])},
        {"window": (2, 1), "scale": 0.3, "softcap": 2.0},
        {"bias": np.linspace(-1, 1, 4 * 5 * 7).reshape(4, 5, 7), "sinks": np.arange(4.0)},
        {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625])},
        {"segment_ids": (np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 1, 1]))},
        {"softmax_axis": "queries"},
        {"num_threads": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_reach_the_attention(w_o, options):
    layer, inputs = make_layer(w_o=w_o), make_inputs()
    known = {name: options[name] for name in options if name != "num_threads"}
    assert_close(layer(*inputs, **options), expected(layer, *inputs, **known))


def test_key_and_value_default_to_query_and_key():
    layer = make_layer(self_attention=True)
    x, memory = make_inputs()[0], make_inputs()[0][:, :3]
    assert_close(layer(x), expected(layer, x, x, x))
    np.testing.assert_array_equal(layer(x, memory), layer(x, memory, memory))
    assert_close(layer(x, memory), expected(layer, x, memory, memory))


def test_leading_dimensions_broadcast():
    layer = make_layer()
    query, _, _ = make_inputs(batch_shape=(3, 1))
    _, key, value = make_inputs(batch_shape=(2,))
    assert_close(layer(query, key, value), expected(layer, query, key, value))
    y = layer(query, key, value, residual=True)
    assert_close(y, expected(layer, query, key, value, residual=query))


def test_strided_inputs_give_what_copies_give():
    layer, inputs = make_layer(), make_inputs()
    strided = [np.repeat(x[:, ::-1], 2, axis=-1)[:, ::-1, ::2] for x in inputs]
    np.testing.assert_array_equal(layer(*strided), layer(*inputs))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty(empty):
    layer = make_layer()
    query, key, value = make_inputs()
    if empty == "batch":
        query, key, value = query[:0], key[:0], value[:0]
    elif empty == "queries":
        query = query[:, :0]
    else:
        key, value = key[:, :0], value[:, :0]
    y = layer(query, key, value, residual=True)
    assert_close(y, expected(layer, query, key, value, residual=query))


class Spy(fa.MultiHeadAttention):
    """Records what the attention is given."""

    def attend(self, q, k, v, **options):
        self.seen = {"q": q, "k": k, "v": v, **options}
        return super().attend(q, k, v, **options)


def test_heads_are_views_of_the_projections():
    layer = make_layer(layer_class=Spy)
    layer(*make_inputs())
    row = 4 * 3 * 4
    for name, seqlen in (("q", 5), ("k", 7), ("v", 7), ("out", 5)):
        assert layer.seen[name].strides == (seqlen * row, 3 * 4, row, 4), name


def test_projections_of_one_input_are_views_of_one_product():
    layer = make_layer(self_attention=True, layer_class=Spy)
    x, memory = make_inputs()[0], make_inputs()[0][:, :3]
    # Per case: features in a row of the product that q, and k and v, are views of.
    for inputs, features in (((x,), (36, 36)), ((x, memory), (12, 24)), ((x, x, x), (36, 36))):
        assert_close(layer(*inputs), expected(layer, x, inputs[-1], inputs[-1]))
        for name, row in zip("qkv", (features[0], features[1], features[1]), strict=True):
            assert layer.seen[name].strides[-2] == 4 * row, (name, features)
    # Equal values elsewhere in memory are another input.
    assert_close(layer(x, x.copy(), x.copy()), expected(layer, x, x, x))
    assert [layer.seen[name].strides[-2] for name in "qkv"] == [4 * 12] * 3


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("name", ["w_q", "w_k", "w_v", "w_o", "w_v_bias"])
@pytest.mark.parametrize("way", ["write", "assign", "subtract"])
def test_what_a_weight_shows_is_what_is_used(self_attention, name, way):
    layer = make_layer(self_attention=self_attention, num_kv_heads=2)
    inputs = make_inputs()[:1] * 3 if self_attention else make_inputs()
    before, weight = layer(*inputs), getattr(layer, name)
    new = np.random.default_rng(6).standard_normal(weight.shape).astype(np.float32)
    wanted = weight - new if way == "subtract" else new.copy()
    if way == "write":
        weight[...] = new
    elif way == "assign":
        setattr(layer, name, new)
    else:
        weight -= new
        setattr(layer, name, weight)
    np.testing.assert_array_equal(getattr(layer, name), wanted)
    assert_close(layer(*inputs), expected(layer, *inputs))
    assert not np.allclose(layer(*inputs), before)


@pytest.mark.any_kernel_set
def test_weights_of_inputs_are_copied_and_the_others_kept():
    ones = [np.ones((12, 12), np.float32) for _ in range(4)]
    bias = np.ones(12, np.float32)
    layer = fa.MultiHeadAttention(*ones, num_heads=4, w_q_bias=bias)
    for given, name in zip(ones, ("w_q", "w_k", "w_v"), strict=False):
        assert not np.shares_memory(given, getattr(layer, name)), name
    assert np.shares_memory(layer.w_o, ones[3]) and np.shares_memory(layer.w_q_bias, bias)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["copy", "pickle"],
)
def test_copies_of_a_layer_are_layers_of_their_own(copied):
    layer, x = make_layer(self_attention=True), make_inputs()[0]
    before = layer(x)
    twin = copied(layer)
    np.testing.assert_array_equal(twin(x), before)
    twin.w_k[...] = 0
    assert_close(twin(x), expected(twin, x, x, x))
    np.testing.assert_array_equal(layer(x), before)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.ones((10, 12)), TypeError, "`w_k` must have dtype float32 like the layer, got float64"),
        (np.ones((12, 12), np.float32), ValueError, r"`w_k` must have shape \(10, 12\), got \(12,"),
        (np.ones(12, np.float32), ValueError, "`w_k` must have 2 dimensions"),
        (None, TypeError, "`w_k` must be float32 or float64"),
    ],
)
def test_assigned_weights_must_fit(value, error, message):
    layer = make_layer()
    before = layer.w_k.copy()
    with pytest.raises(error, match=message):
        layer.w_k = value
    np.testing.assert_array_equal(layer.w_k, before)


def test_residual_is_fused_where_there_is_no_output_projection():
    layer = make_layer(w_o=False, layer_class=Spy)
    query, key, value = make_inputs()
    y = layer(query, key, value, residual=True)
    assert np.shares_memory(layer.seen["residual"], query)
    assert np.shares_memory(layer.seen["out"], y)
    assert_close(y, expected(layer, query, key, value, residual=query))


@pytest.mark.parametrize("shape", [{}, {"learned_key": True}, {"learned_key": True, "w_o": False}])
def test_residual_is_added_behind_an_output_projection(shape):
    layer = make_layer(layer_class=Spy, **shape)
    query, key, value = make_inputs()
    y = layer(query, key, value, residual=True)
    assert "residual" not in layer.seen
    assert_close(y, expected(layer, query, key, value, residual=query))


@pytest.mark.parametrize("w_o", [True, False])
def test_residual_values(w_o):
    layer = make_layer(w_o=w_o)
    inputs = make_inputs()
    residual = np.random.default_rng(3).standard_normal((2, 5, OUT_DIM)).astype(np.float32)
    desired = expected(layer, *inputs, residual=residual)
    assert_close(layer(*inputs, residual=residual), desired)
    np.testing.assert_array_equal(layer(*inputs, residual=False), layer(*inputs))
    np.testing.assert_array_equal(layer(*inputs, residual=None), layer(*inputs))


@pytest.mark.parametrize("shape", [{}, {"w_o": False}, {"learned_key": True, "w_o": False}])
@pytest.mark.parametrize("residual", [False, True])
def test_out(shape, residual):
    layer, inputs = make_layer(**shape), make_inputs()
    desired = layer(*inputs, residual=residual)
    wide = np.full((2, 5, 2 * OUT_DIM), np.nan, np.float32)
    out = wide[..., ::2]
    result = layer(*inputs, residual=residual, out=out)
    assert result is out
    assert_close(out, desired.astype(np.float64))
    assert np.isnan(wide[..., 1::2]).all()


@pytest.mark.parametrize("shape", [{}, {"w_o": False}, {"learned_key": True, "w_o": False}])
@pytest.mark.parametrize("residual", [False, True])
def test_out_may_be_the_query(shape, residual):
    layer = make_layer(self_attention=True, **shape)
    x = make_inputs()[0]
    desired = layer(x, residual=residual)
    assert layer(x, residual=residual, out=x) is x
    np.testing.assert_array_equal(x, desired)


def test_learned_key_is_seen_whatever_is_masked():
    layer, inputs = make_layer(learned_key=True, w_o=False), make_inputs()
    out, lse = layer(*inputs, mask=np.zeros((5, 7), bool), sinks=np.ones(4), return_lse=True)
    assert np.isfinite(lse).all()
    options = {"mask": np.arange(8) == 7, "sinks": np.ones(4)}
    expected_out, expected_lse = expected(layer, *inputs, return_lse=True, **options)
    assert_close(out, expected_out)
    assert_close(lse, expected_lse)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w_q": np.ones((12, 12), int)}, TypeError, "`w_q` must be float32 or float64"),
        ({"w_k": np.ones((10, 12))}, TypeError, "`w_k` must have dtype float32 like `w_q`"),
        ({"w_v": np.ones(3, np.float32)}, ValueError, "`w_v` must have 2 dimensions"),
        ({"num_heads": 5}, ValueError, "`w_q` must have a multiple of num_heads 5 columns, got 12"),
        ({"num_heads": 0}, ValueError, "`num_heads` must be at least 1, got 0"),
        ({"num_heads": True}, TypeError, "`num_heads` must be an int"),
        ({"num_kv_heads": 3}, ValueError, "`num_kv_heads` must be a divisor of num_heads 4, got 3"),
        ({"num_kv_heads": 2}, ValueError, "`w_k` must have 6 columns"),
        ({"w_k": np.ones((10, 13), np.float32)}, ValueError, "`w_k` must have a multiple of head"),
        ({"w_o": np.ones((5, 12), np.float32)}, ValueError, "`w_o` must have 12 rows"),
        (
            {"w_k_bias": np.ones(5, np.float32)},
            ValueError,
            r"`w_k_bias` must have shape \(12,\), got \(5,\)",
        ),
        (
            {"w_o_bias": np.ones(12, np.float32)},
            ValueError,
            "`w_o_bias` must be None where `w_o` is None",
        ),
        ({"learned_k": np.ones(12, np.float32)}, ValueError, "together, got only `learned_k`"),
        ({"w_q": np.ma.ones((12, 12), np.float32)}, TypeError, "`w_q` must be a plain array"),
    ],
)
def test_constructor_errors(change, error, message):
    ones = np.ones
    arguments = {
        "w_q": ones((12, 12), np.float32),
        "w_k": ones((10, 12), np.float32),
        "w_v": ones((14, 12), np.float32),
        "num_heads": 4,
        **change,
    }
    with pytest.raises(error, match=message):
        fa.MultiHeadAttention(**arguments)


@pytest.mark.any_kernel_set
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q": np.ones((5, 12))},
            TypeError,
            "`q` must have dtype float32 like the weights",
        ),
        ({"k": np.ones((7, 9), np.float32)}, ValueError, r"`k` must have shape \(..., seqlen"),
        ({"v": np.ones(14, np.float32)}, ValueError, "`v` must have shape"),
        ({"v": np.ones((6, 14), np.float32)}, ValueError, "must have seqlen_k 7 like `k`"),
        ({"k": None}, ValueError, "`v` must come with `k`"),
        ({"k": np.ones((3, 7, 10), np.float32)}, ValueError, "dimensions that broadcast"),
        ({"residual": np.ones((2, 5, 12))}, TypeError, "`residual` must have dtype float32"),
        ({"residual": np.ones((5, 12), np.float32)}, ValueError, "`residual` must have the result"),
        ({"out": np.ones((2, 5, 12))}, TypeError, "`out` must have dtype float32"),
        ({"out": np.ones((5, 12), np.float32)}, ValueError, "`out` must have the result's shape"),
        ({"out": [1.0]}, TypeError, "`out` must be a NumPy array"),
        ({"casual": True}, TypeError, "casual"),
        ({"mask": np.ones((5, 7))}, TypeError, "`mask` must be bool"),
    ],
)
def test_call_errors(change, error, message):
    layer = make_layer()
    arguments = dict(zip(("q", "k", "v"), make_inputs(), strict=True)) | change
    with pytest.raises(error, match=message):
        layer(**arguments)


@pytest.mark.any_kernel_set
def test_other_call_errors():
    query, key, value = make_inputs()
    with pytest.raises(ValueError, match=r"`residual` must be an array where out_dim 36"):
        make_layer(head_dim_v=9, w_o=False)(query, key, value, residual=True)
    with pytest.raises(
        ValueError, match=r"`softmax_axis` must be 'keys' in a layer with learned_k"
    ):
        make_layer(learned_key=True)(query, key, value, softmax_axis="queries")
    out = np.ones((2, 5, 12), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"`out` must be writeable"):
        make_layer()(query, key, value, out=out)


@pytest.mark.any_kernel_set
def test_repr_and_shapes():
    layer = make_layer(num_kv_heads=2, head_dim_v=5)
    assert repr(layer) == (
        "MultiHeadAttention(embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=3, "
        "head_dim_v=5, out_dim=12)"
    )
    assert layer.dtype == np.float32
    inferred = fa.MultiHeadAttention(layer.w_q, layer.w_k, layer.w_v, num_heads=4)
    assert (inferred.num_kv_heads, inferred.out_dim) == (2, 20)
