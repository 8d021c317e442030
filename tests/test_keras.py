"""fastattn.keras: values, gradients and Keras's machinery, against Keras's own.

Keras has one backend in a process, KERAS_BACKEND; ``make test-keras`` runs this file once on each.
"""

import os
import runpy
import threading

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
pytest.importorskip(os.environ.setdefault("KERAS_BACKEND", "numpy"))
keras = pytest.importorskip("keras")
BACKEND = keras.backend.backend()

from keras import ops  # noqa: E402

import fastattn as fa  # noqa: E402
import fastattn.keras as fk  # noqa: E402
from fastattn.keras import _ops  # noqa: E402

pytestmark = [
    pytest.mark.any_kernel_set,
    # Keras and its backends warn of what they use of each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
]
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras's NumPy backend has no gradients")
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="about JAX")

TOLERANCE = 1e-5  # of the largest element
# Masks here have a query without keys, except on PyTorch, whose gradients of one are not those of
# the average that it gives: its kernel takes each of its weights for 1 in the backward pass.
HAS_KEYS = BACKEND == "torch"


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """What fastattn attended to, call by call: the shapes and the options."""
    seen = []
    attend = _ops.BACKEND.attend

    def recording(call, q, k, v, *arrays):
        seen.append((tuple(q.shape), tuple(k.shape), call))
        return attend(call, q, k, v, *arrays)

    monkeypatch.setattr(_ops.BACKEND, "attend", recording)
    return seen


def gradients(function, *arrays):
    """Of the sum of ``function(*arrays)`` times fixed numbers, by each array; in NumPy."""

    def loss(*tensors):
        out = ops.cast(function(*tensors), "float32")
        weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
        return ops.sum(out * ops.convert_to_tensor(weights))

    if BACKEND == "jax":
        import jax

        tensors = tuple(map(ops.convert_to_tensor, arrays))
        computed = jax.jit(jax.grad(loss, tuple(range(len(arrays)))))(*tensors)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = tuple(map(tf.convert_to_tensor, arrays))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = loss(*tensors)
        computed = tape.gradient(value, tensors)
    else:
        tensors = [ops.convert_to_tensor(x).requires_grad_() for x in arrays]
        loss(*tensors).backward()
        computed = [x.grad for x in tensors]
    return [ops.convert_to_numpy(x) for x in computed]


def compiled(function):
    """`function` as the backend compiles it; PyTorch and NumPy run it as it is."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = (ops.convert_to_numpy(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    largest = max(1.0, np.abs(expected).max(initial=0.0))
    assert np.abs(actual - expected).max(initial=0.0) <= tolerance * largest


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


# --- dot_product_attention ----------------------------------------------------------------------


def keras_attention(query, key, value, **options):
    """Keras's own, which on some backends needs as many key heads as query heads."""
    groups = query.shape[2] // key.shape[2]
    key, value = (ops.repeat(x, groups, axis=2) for x in (key, value))
    return keras.ops.dot_product_attention(query, key, value, **options)


def options_of(kind, rng):
    mask = rng.random((2, 1, 7, 9)) < 0.6
    mask[0, 0, 3] = HAS_KEYS
    mask[..., 0] |= HAS_KEYS  # which causal queries see, too
    bias = normal(rng, 1, 4, 7, 9)
    return {
        "plain": {},
        "scale": {"scale": 0.3},
        "causal": {"is_causal": True},
        "mask": {"mask": mask},
        "mask of heads": {"mask": rng.random((1, 4, 7, 9)) < 0.6},
        "causal mask": {"mask": mask, "is_causal": True},
        "bias": {"bias": bias},
        "causal bias": {"bias": bias, "is_causal": True},
        "bias and mask": {"bias": bias, "mask": mask},
    }[kind]


KINDS = [
    *("plain", "scale", "causal", "mask", "mask of heads", "causal mask"),
    *("bias", "causal bias", "bias and mask"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_dot_product_attention(rng, kind, kv_heads):
    if BACKEND == "torch" and kind == "bias and mask":
        pytest.skip("Keras refuses both together on PyTorch")
    inputs = normal(rng, 2, 7, 4, 8), normal(rng, 2, 9, kv_heads, 8), normal(rng, 2, 9, kv_heads, 8)
    options = options_of(kind, rng)
    assert_close(fk.dot_product_attention(*inputs, **options), keras_attention(*inputs, **options))
    if BACKEND == "numpy":
        return
    if BACKEND == "torch" and kind == "causal bias":
        return  # which PyTorch refuses with gradients
    bias = options.pop("bias", None)
    if bias is not None:
        inputs = (*inputs, bias)
    ours = gradients(lambda *x: fk.dot_product_attention(*x, **options), *inputs)
    kerass = gradients(
        lambda *x: keras_attention(*x[:3], bias=x[3] if x[3:] else None, **options), *inputs
    )
    for actual, expected in zip(ours, kerass, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_query_without_keys_averages_all_values(rng, kv_heads):
    query, key = normal(rng, 1, 3, 4, 8), normal(rng, 1, 5, kv_heads, 8)
    value = normal(rng, 1, 5, kv_heads, 6)
    mask = np.ones((1, 1, 3, 5), bool)
    mask[..., 1, :] = False

    def masked(query, key, value):
        return fk.dot_product_attention(query, key, value, mask=mask, is_causal=True)

    average = value.mean(1).repeat(4 // kv_heads, axis=1)
    assert_close(masked(query, key, value)[:, 1], average)
    if BACKEND != "numpy":
        by_query, by_key, by_value = gradients(
            lambda *inputs: masked(*inputs)[:, 1:2], query, key, value
        )
        assert not by_query.any() and not by_key.any()
        upstream = np.random.default_rng(1).standard_normal((1, 1, 4, 6)).astype(np.float32)
        grouped = upstream.reshape(1, 1, kv_heads, -1, 6).sum(3)
        assert_close(by_value, np.broadcast_to(grouped / 5, value.shape))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(rng, dtype):
    if BACKEND == "jax" and dtype == "float64":
        pytest.skip("JAX has no float64 unless it is told to")
    arrays = [rng.standard_normal((2, 50, 4, 16)) for _ in range(3)]
    tensors = [ops.cast(ops.convert_to_tensor(x), dtype) for x in arrays]
    out = fk.dot_product_attention(*tensors, is_causal=True)
    # Keras takes float64 for float32 on most backends.
    joint = keras.backend.result_type(dtype, dtype, dtype)
    assert keras.backend.standardize_dtype(out.dtype) == joint
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[joint]
    readable = "float64" if dtype == "float64" else "float32"
    rounded = [ops.convert_to_numpy(ops.cast(x, readable)) for x in tensors]
    expected = fa.reference.attention(*(x.swapaxes(1, 2) for x in rounded), causal=True)
    assert_close(ops.cast(out, readable), expected.swapaxes(1, 2), tolerance)
    if BACKEND == "numpy" or dtype == "float64":
        return

    def attend(*inputs):
        return fk.dot_product_attention(*(ops.cast(x, dtype) for x in inputs))

    computed = gradients(attend, *rounded), gradients(keras_attention, *rounded)
    for actual, expected in zip(*computed, strict=True):
        assert_close(actual, expected, 4 * tolerance)


def test_dtypes_of_a_call_are_joined(rng):
    x = normal(rng, 1, 5, 2, 8)
    half = ops.cast(ops.convert_to_tensor(x), "float16")
    out = fk.dot_product_attention(half, x, x)
    assert keras.backend.standardize_dtype(out.dtype) == "float32"
    assert_close(out, keras_attention(half, x, x))


def test_values_of_another_width(rng):
    q, k, v = normal(rng, 2, 7, 4, 8), normal(rng, 2, 9, 2, 8), normal(rng, 2, 9, 2, 6)
    mask = rng.random((2, 1, 1, 9)) < 0.6
    out = fk.dot_product_attention(q, k, v, mask=mask)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    assert_close(out, fa.reference.attention(q, k, v, mask=mask).swapaxes(1, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.zeros((3, 4, 8), np.float32)}, ValueError, "`query` must have 4 dimensions"),
        ({"key": np.zeros((1, 5, 3, 8), np.float32)}, ValueError, "`key` must have a number of"),
        ({"value": np.zeros((1, 5, 1, 8), np.float32)}, ValueError, "`value` must have 2 heads"),
        ({"mask": np.zeros((5, 5), np.float32)}, TypeError, "`mask` must be bool, True = takes"),
        ({"bias": np.zeros((5, 5), np.int32)}, TypeError, "`bias` must be float16 or bfloat16 or"),
        ({"scale": float("nan")}, TypeError, "`scale` must be a finite number or None, got nan"),
        ({"scale": "large"}, TypeError, "`scale` must be a finite number or None, got 'large'"),
        ({"flash_attention": False}, ValueError, "`flash_attention` must be None or True"),
        ({"attn_logits_soft_cap": 5.0}, ValueError, "`attn_logits_soft_cap` is for JAX on TPUs"),
    ],
)
def test_what_is_refused(change, error, message):
    x = np.zeros((1, 5, 4, 8), np.float32)
    arguments = {"query": x, "key": x[:, :, :2], "value": x[:, :, :2]} | change
    with pytest.raises(error, match=message):
        fk.dot_product_attention(**arguments)


def test_integers_are_refused():
    x = np.zeros((1, 5, 4, 8), np.int32)
    with pytest.raises(TypeError, match="`query`, `key` and `value` must be float16 or"):
        fk.dot_product_attention(x, x, x)


def test_another_device_is_refused(monkeypatch, rng):
    monkeypatch.setattr(_ops.BACKEND, "refusal", lambda query: "`query` is on a moon")
    x = normal(rng, 1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match=r"fastattn.keras: `query` is on a moon"):
        fk.dot_product_attention(x, x, x)
    expected = keras.ops.dot_product_attention(x, x, x)
    with fk.enable():
        assert_close(keras.ops.dot_product_attention(x, x, x), expected, 0.0)


def test_symbolic(rng, tmp_path):
    query = keras.Input((None, 4, 8))
    value = keras.Input((None, 2, 6))
    mask = keras.Input((1, None, None), dtype="bool")
    key = keras.Input((None, 2, 8))
    out = fk.dot_product_attention(query, key, value, mask=mask, scale=0.5, is_causal=True)
    assert out.shape == (None, None, 4, 6)
    assert out.dtype == "float32"
    model = keras.Model([query, key, value, mask], out)
    inputs = [normal(rng, 2, 7, 4, 8), normal(rng, 2, 9, 2, 8), normal(rng, 2, 9, 2, 6)]
    inputs.append(rng.random((2, 1, 7, 9)) < 0.6)
    expected = fk.dot_product_attention(*inputs[:3], mask=inputs[3], scale=0.5, is_causal=True)
    assert_close(model(inputs), expected, 0.0)
    model.save(tmp_path / "model.keras")
    assert_close(keras.models.load_model(tmp_path / "model.keras")(inputs), expected, 0.0)
    with pytest.raises(ValueError, match="`key` must have a number of heads"):
        fk.dot_product_attention(query, keras.Input((None, 3, 8)), value)


def test_inside_a_layer_without_shapes(rng):
    """Keras finds the shape of its result by tracing the call."""

    class Attends(keras.layers.Layer):
        def call(self, x):
            return fk.dot_product_attention(x, x, x, is_causal=True)

    x = keras.Input((None, 2, 8))
    y = Attends()(x)
    assert y.shape == (None, None, 2, 8)
    array = normal(rng, 3, 6, 2, 8)
    assert_close(keras.Model(x, y)(array), keras_attention(array, array, array, is_causal=True))


# --- the layers ---------------------------------------------------------------------------------


def multi_head(module, **options):
    return module.MultiHeadAttention(**{"num_heads": 2, "key_dim": 8} | options)


def grouped(module, **options):
    sizes = {"head_dim": 8, "num_query_heads": 4, "num_key_value_heads": 2}
    return module.GroupQueryAttention(**sizes | options)


LAYERS = pytest.mark.parametrize("make", [multi_head, grouped])


def pair(make, *shapes, **options):
    """fastattn's layer and Keras's with the same weights, which include biases that are not 0."""
    options = {"bias_initializer": "normal"} | options
    ours, kerass = make(fk, **options), make(keras.layers, **options)
    ours.build(*shapes)
    kerass.build(*shapes)
    kerass.set_weights(ours.get_weights())
    return ours, kerass


def functional(layer, call):
    """``call(layer, *inputs)`` as a function of inputs and then the layer's weights."""

    def function(*tensors):
        count = len(tensors) - len(layer.trainable_variables)
        mapping = list(zip(layer.trainable_variables, tensors[count:], strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return call(layer, *tensors[:count])

    return function


def assert_same_layers(layers, call, *inputs, calls=None):
    """Outputs, and gradients of inputs and weights."""
    ours, kerass = layers
    assert_close(call(ours, *inputs), call(kerass, *inputs))
    if calls is not None:
        assert len(calls) == 1
    if BACKEND == "numpy":
        return
    weights = ours.get_weights()[: len(ours.trainable_variables)]
    computed = [gradients(functional(layer, call), *inputs, *weights) for layer in layers]
    for actual, expected in zip(*computed, strict=True):
        assert_close(actual, expected)


def masks_of(kind, rng):
    mask = rng.random((2, 7, 9)) < 0.6
    mask[0, 3] = HAS_KEYS
    mask[..., 0] |= HAS_KEYS
    keys = np.arange(9) < np.array([[9], [5]])
    return {
        "none": {},
        "causal": {"use_causal_mask": True},
        "attention": {"attention_mask": mask},
        "integers": {"attention_mask": mask.astype(np.int32)},
        "queries by keys": {"attention_mask": mask[0]},
        "heads": {"attention_mask": mask[:, None]},
        "values": {"value_mask": keys},
        "keys": {"key_mask": keys[::-1]},
        "all": {
            **{"attention_mask": mask, "value_mask": keys, "key_mask": keys[::-1]},
            "use_causal_mask": True,
        },
    }[kind]


@LAYERS
@pytest.mark.parametrize(
    "kind",
    [
        *("none", "causal", "attention", "integers", "queries by keys", "heads"),
        *("values", "keys", "all"),
    ],
)
def test_layers(rng, make, kind, calls):
    x, y = normal(rng, 2, 7, 12), normal(rng, 2, 9, 12)
    masks = {
        name: mask if mask is True else ops.convert_to_tensor(mask)
        for name, mask in masks_of(kind, rng).items()
    }
    layers = pair(make, x.shape, y.shape)
    assert_same_layers(layers, lambda layer, x, y: layer(x, y, **masks), x, y, calls=calls)


@LAYERS
@pytest.mark.parametrize(
    "options", [{"use_bias": False}, {"use_gate": True}, {"sliding_window": 3}], ids=str
)
def test_options_of_layers(rng, make, options, calls):
    try:
        layers = pair(make, (2, 7, 12), (2, 7, 12), **options)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this Keras has no such option: {error}")
    x = normal(rng, 2, 7, 12)
    attend = lambda layer, x: layer(x, x, use_causal_mask="sliding_window" in options)  # noqa: E731
    assert_same_layers(layers, attend, x, calls=calls)


def test_a_window_that_leaves_queries_without_keys(rng):
    x, y = normal(rng, 2, 9, 12), normal(rng, 2, 5, 12)
    try:
        ours, kerass = pair(multi_head, x.shape, y.shape, sliding_window=2)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this Keras has no such option: {error}")
    assert_close(ours(x, y), kerass(x, y))


def test_keys_values_and_results_of_other_widths(rng, calls):
    x, y, z = normal(rng, 2, 7, 12), normal(rng, 2, 9, 10), normal(rng, 2, 9, 14)
    layers = pair(multi_head, x.shape, y.shape, z.shape, value_dim=5, output_shape=11)
    if BACKEND == "jax":
        assert layers[0](x, y, z).shape == (2, 7, 11)
        pytest.skip("Keras's own layer gives values the width of keys on JAX, and fails")
    assert_same_layers(layers, lambda layer, x, y, z: layer(x, y, z), x, y, z, calls=calls)


def test_grouped_heads_are_not_repeated(rng, calls):
    x = normal(rng, 2, 7, 12)
    layer = grouped(fk)
    layer(x, x)
    [(query, key, _)] = calls
    assert (query, key) == ((2, 7, 4, 8), (2, 7, 2, 8))


@LAYERS
def test_no_mask_of_queries_by_keys_is_made(rng, make, calls):
    x = normal(rng, 2, 7, 12)
    padded = ops.convert_to_tensor(np.arange(7) < np.array([[7], [5]]))
    make(fk)(x, x, value_mask=padded, use_causal_mask=True)
    [(_, _, call)] = calls
    assert call.arrays == ("q_ids", "k_ids")
    assert call.causal


@LAYERS
def test_scores_are_kerass(rng, make, calls):
    x = normal(rng, 2, 7, 12)
    layers = pair(make, x.shape, x.shape)
    mask = ops.convert_to_tensor(rng.random((2, 7, 7)) < 0.6)
    options = {"attention_mask": mask, "use_causal_mask": True, "return_attention_scores": True}
    for actual, expected in zip(*(layer(x, x, **options) for layer in layers), strict=True):
        assert_close(actual, expected)
    assert not calls


@pytest.mark.parametrize("axes", [None, (1,), (2,), (1, 2)], ids=str)
def test_more_axes_are_kerass(rng, axes, calls):
    x = normal(rng, 2, 3, 4, 12)
    layers = pair(multi_head, x.shape, x.shape, attention_axes=axes)
    assert_same_layers(layers, lambda layer, x: layer(x, x), x)
    assert not calls


@LAYERS
def test_flash_attention_refuses_what_kerass_does(rng, make):
    with pytest.raises(ValueError, match="Dropout is not supported when flash attention"):
        make(fk, flash_attention=True, dropout=0.1)
    x = normal(rng, 2, 7, 12)
    layer = make(fk, flash_attention=True)
    layer(x, x)
    with pytest.raises(ValueError, match="Returning attention scores is not supported"):
        layer(x, x, return_attention_scores=True)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@LAYERS
def test_16_bit_policies(rng, make, policy, calls):
    if BACKEND == "jax" and policy == "mixed_float16":
        pytest.skip("JAX has no products of float16 on the CPU, which Keras's own layer needs")
    x = normal(rng, 2, 20, 12)
    ours, kerass = pair(make, x.shape, x.shape, dtype=policy)
    out = ours(x, x, use_causal_mask=True)
    assert keras.backend.standardize_dtype(out.dtype) == policy.removeprefix("mixed_")
    expected = kerass(x, x, use_causal_mask=True)
    tolerance = {"mixed_bfloat16": 2e-2, "mixed_float16": 3e-3}[policy]
    assert_close(ops.cast(out, "float32"), ops.cast(expected, "float32"), tolerance)
    assert len(calls) == 1
    if BACKEND != "numpy":
        weights = ours.get_weights()[: len(ours.trainable_variables)]
        call = lambda layer, x: layer(x, x)  # noqa: E731
        computed = [gradients(functional(layer, call), x, *weights) for layer in (ours, kerass)]
        for actual, expected in zip(*computed, strict=True):
            assert_close(actual, expected, 4 * tolerance)


@LAYERS
def test_masks_of_an_embedding(rng, make, calls):
    """Padding that Keras hands from layer to layer, among queries too."""
    tokens = rng.integers(1, 20, (2, 7))
    tokens[1, 4:] = 0
    embed = keras.layers.Embedding(20, 12, mask_zero=True)
    layers = pair(make, (2, 7, 12), (2, 7, 12))
    outs = []
    for layer in layers:
        x = embed(tokens)
        outs.append(layer(x, x, use_causal_mask=True))
    assert_close(*outs)
    assert len(calls) == 1
    assert "q_ids" in calls[0][2].arrays


@LAYERS
def test_symbolic_layers(make):
    x = keras.Input((None, 12))
    assert make(fk)(x, x).shape == (None, None, 12)
    out, scores = make(fk)(x, x, return_attention_scores=True)
    assert (out.shape, len(scores.shape)) == ((None, None, 12), 4)


@LAYERS
def test_weights_go_both_ways(rng, make, tmp_path):
    x = normal(rng, 2, 7, 12)
    ours, kerass = make(fk, bias_initializer="normal"), make(keras.layers)
    ours.build(x.shape, x.shape)
    kerass.build(x.shape, x.shape)
    paths = [[w.path.partition("/")[2] for w in layer.weights] for layer in (ours, kerass)]
    assert paths[0] == paths[1]
    kerass.set_weights(ours.get_weights())
    assert_close(kerass(x, x), ours(x, x))
    kerass.set_weights([w + 0.1 for w in kerass.get_weights()])
    ours.set_weights(kerass.get_weights())
    assert_close(kerass(x, x), ours(x, x))

    models = []
    for module in (fk, keras.layers):
        tokens = keras.Input((7, 12))
        models.append(keras.Model(tokens, make(module)(tokens, tokens)))
    models[1].save_weights(tmp_path / "model.weights.h5")
    models[0].load_weights(tmp_path / "model.weights.h5")
    assert_close(models[0](x), models[1](x))


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_is_fastattns(rng):
    x, y = normal(rng, 2, 7, 4, 8), normal(rng, 2, 9, 2, 8)
    arrays = [a.swapaxes(1, 2) for a in (x, y, y)]
    seed = ops.convert_to_tensor(np.array([5, 3], np.int32))
    attend = lambda q, k, v: _ops.attend(  # noqa: E731
        q, k, v, scale=None, causal=True, dropout_p=0.3, seed=seed
    )
    options = {"causal": True, "q_offset": 0, "dropout_p": 0.3, "dropout_seed": 5 << 32 | 3}
    expected = fa.reference.attention(*arrays, **options)
    assert_close(attend(*map(ops.convert_to_tensor, (x, y, y))), expected.swapaxes(1, 2))
    if BACKEND != "numpy":
        weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
        grads = fa.reference.attention_backward(weights.swapaxes(1, 2), *arrays, **options)
        for actual, expected in zip(gradients(attend, x, y, y), grads[:3], strict=True):
            assert_close(actual, expected.swapaxes(1, 2))


@LAYERS
def test_dropout_of_layers(rng, make, calls):
    x = normal(rng, 2, 40, 12)
    ours, kerass = pair(make, x.shape, x.shape, dropout=0.5, seed=7)
    assert_close(ours(x, x), kerass(x, x))  # none where nothing is trained
    assert [call.dropout_p for _, _, call in calls] == [0.0]
    first, second = (ops.convert_to_numpy(ours(x, x, training=True)) for _ in range(2))
    assert calls[-1][2].dropout_p == 0.5
    assert np.abs(first - second).max() > 0.01
    again, _ = pair(make, x.shape, x.shape, dropout=0.5, seed=7)
    again.set_weights(kerass.get_weights())  # the state of the seed generator is among them
    assert_close(again(x, x, training=True), first, 0.0)
    # On average it changes nothing.
    mean = np.mean([ops.convert_to_numpy(ours(x, x, training=True)) for _ in range(60)], 0)
    assert np.abs(mean - ops.convert_to_numpy(ours(x, x))).mean() < 0.2 * np.abs(mean).mean()


# --- models -------------------------------------------------------------------------------------


def classifier(make, module, **options):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(20, 12, mask_zero=True)(tokens)
    x = keras.layers.Add()([x, make(module, **options)(x, x)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(2, activation="softmax")(x))


def texts(rng):
    tokens = rng.integers(1, 20, (64, 9))
    tokens[np.arange(9) >= rng.integers(2, 10, (64, 1))] = 0
    return tokens, (tokens == 3).any(1).astype(np.int32)


@trains
@LAYERS
def test_fit(rng, make, calls):
    tokens, labels = texts(rng)
    losses, models = [], []
    for module in (fk, keras.layers):
        model = classifier(make, module)
        if models:
            model.set_weights(models[0].get_weights())
        models.append(classifier(make, module))
        models[-1].set_weights(model.get_weights())
        model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
        history = model.fit(tokens, labels, 16, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
        if module is fk:
            assert model.jit_compile == (BACKEND == "jax")  # XLA, which TensorFlow cannot call from
            seen = len(calls)
    # Some traces, and on PyTorch one call for each batch.
    batches = 12 if BACKEND == "torch" else 0
    assert batches + 1 <= seen <= batches + 4
    assert len(calls) == seen
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@trains
@LAYERS
def test_fit_with_dropout(rng, make):
    tokens, labels = texts(rng)
    model = classifier(make, fk, dropout=0.3)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    history = model.fit(tokens, labels, 16, epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert np.isfinite(model.predict(tokens, verbose=0)).all()


@LAYERS
def test_a_saved_model(rng, make, tmp_path):
    tokens, _ = texts(rng)
    model = classifier(make, fk, dropout=0.1, use_bias=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for actual, expected in zip(loaded.layers, model.layers, strict=True):
        assert type(actual) is type(expected)
        assert actual.get_config() == expected.get_config()
    assert_close(loaded(tokens), model(tokens), 0.0)


# --- compiled -----------------------------------------------------------------------------------


@LAYERS
def test_compiled(rng, make):
    x = normal(rng, 2, 7, 12)
    ours, kerass = pair(make, x.shape, x.shape)
    mask = ops.convert_to_tensor(rng.random((2, 7, 7)) < 0.6)
    call = compiled(lambda x, mask: ours(x, x, attention_mask=mask))
    for _ in range(2):
        assert_close(call(ops.convert_to_tensor(x), mask), kerass(x, x, attention_mask=mask))


@trains
def test_second_derivatives_are_refused(rng):
    x = normal(rng, 1, 5, 2, 8)
    attend = lambda x: fk.dot_product_attention(x, x, x)  # noqa: E731
    if BACKEND == "torch":
        import torch

        x = torch.tensor(x, requires_grad=True)
        out = attend(x).sum()
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(out, x, create_graph=True)
    elif BACKEND == "jax":
        import jax

        first = jax.grad(lambda x: attend(x).sum())
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            jax.grad(lambda x: first(x).sum())(x)
    else:
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                out = tf.reduce_sum(attend(x))
            first = inner.gradient(out, x)
        with pytest.raises(NotImplementedError, match="fastattn has no second derivatives"):
            outer.gradient(first, x)


@only_tensorflow
def test_tensorflow_with_unknown_shapes(rng):
    import tensorflow as tf

    any_shape = tf.TensorSpec((None, None, 2, 8), tf.float32)

    @tf.function(input_signature=[any_shape, tf.TensorSpec((None, 1, None, None), tf.bool)])
    def attend(x, mask):
        out = fk.dot_product_attention(x, x, x, mask=mask)
        assert out.shape.as_list() == [None, None, 2, 8]
        return out

    for length in (5, 9):
        x, mask = normal(rng, 3, length, 2, 8), rng.random((3, 1, length, length)) < 0.5
        assert_close(attend(x, mask), keras_attention(x, x, x, mask=mask))


@only_tensorflow
def test_tensorflow_compiled_by_xla(rng, calls):
    import tensorflow as tf

    x = normal(rng, 2, 5, 2, 8)
    xla = tf.function(lambda x: fk.dot_product_attention(x, x, x), jit_compile=True)
    with pytest.raises(NotImplementedError, match=r"fastattn.keras: XLA \(jit_compile=True\)"):
        xla(x)
    inner = tf.function(lambda x: fk.dot_product_attention(x, x, x))
    with pytest.raises(NotImplementedError, match=r"compile with jit_compile=False"):
        tf.function(lambda x: inner(x), jit_compile=True)(x)
    expected = keras_attention(x, x, x)
    with fk.enable():  # Keras's own attention can do it, and does
        xla = tf.function(lambda x: keras.ops.dot_product_attention(x, x, x), jit_compile=True)
        assert_close(xla(x), expected)
    assert not calls


@only_tensorflow
def test_a_tensorflow_model_leaves_xla_out(rng):
    tokens, labels = texts(rng)
    model = classifier(multi_head, fk)
    with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
        model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=True)
    model.fit(tokens, labels, verbose=0)


@only_jax
def test_jax_vmap(rng):
    import jax

    x = normal(rng, 3, 2, 5, 2, 8)
    out = jax.jit(jax.vmap(lambda x: fk.dot_product_attention(x, x, x)))(x)
    for actual, each in zip(out, x, strict=True):
        assert_close(actual, keras_attention(each, each, each))


@only_jax
def test_jax_compiles_equal_calls_once(rng):
    import jax

    compilations = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            compilations.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    x = ops.convert_to_tensor(normal(rng, 1, 5, 2, 8))
    new = []
    for scale in (0.1, 0.2, 0.2):
        before = len(compilations)
        fk.dot_product_attention(x, x, x, scale=scale)
        new.append(len(compilations) - before)
    assert new[1:] == [1, 0]  # for its own options, and no more


@only_jax
def test_jax_callbacks_from_two_threads_come_to_an_end(rng):
    """Many at once, in compiled code that does not wait for them: none may wait for another."""
    import jax

    @jax.jit
    def many(x):
        ys = [fk.dot_product_attention(x + i, x, x * 1.0) for i in range(8)]
        return sum(ys[1:], ys[0])

    x = normal(rng, 2, 200, 4, 64)
    expected = np.asarray(many(x))
    wrong = []

    def work():
        y = [many(x) for _ in range(10)]
        wrong.extend(abs(np.asarray(z) - expected).max() for z in y)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
        assert not thread.is_alive()
    assert max(wrong) == 0.0


# --- enable -------------------------------------------------------------------------------------


@LAYERS
def test_enable_routes_layers(rng, make, calls):
    x = normal(rng, 2, 7, 12)
    mask = ops.convert_to_tensor(rng.random((2, 7, 7)) < 0.6)
    layer = make(keras.layers)
    expected = [layer(x, x, attention_mask=mask), layer(x, x, use_causal_mask=True)]
    assert not calls
    with fk.enable():
        assert fk.is_enabled()
        assert_close(layer(x, x, attention_mask=mask), expected[0])
        assert_close(layer(x, x, use_causal_mask=True), expected[1])
        assert len(calls) == 2
        layer(x, x, return_attention_scores=True)
        assert len(calls) == 2
    assert not fk.is_enabled()
    layer(x, x)
    assert len(calls) == 2


@trains
def test_enable_routes_fit(rng, calls):
    tokens, labels = texts(rng)
    model = classifier(multi_head, keras.layers)
    expected = keras.models.clone_model(model)
    expected.set_weights(model.get_weights())
    losses = []
    with fk.enable():
        for each in (model, expected):
            each.compile("sgd", "sparse_categorical_crossentropy")
            losses.append(each.fit(tokens, labels, verbose=0, shuffle=False).history["loss"])
            assert calls
            fk.disable()
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_enable_routes_functions_under_all_names(rng, calls):
    x = normal(rng, 2, 7, 4, 8)
    expected = keras.ops.dot_product_attention(x, x, x, is_causal=True)
    inputs = keras.Input((None, 4, 8))
    node = keras.Model(inputs, keras.ops.dot_product_attention(inputs, inputs, inputs))
    with fk.enable():
        for function in (keras.ops.dot_product_attention, keras.ops.nn.dot_product_attention):
            assert_close(function(x, x, x, is_causal=True), expected)
        node(x)
    assert len(calls) == 3


def test_enable_leaves_what_keras_does_otherwise(rng, calls):
    x = normal(rng, 1, 5, 2, 8)
    wide = normal(rng, 1, 3, 1, 1025)
    with fk.enable():
        for inputs, options in (
            ((x, x, x), {"flash_attention": False}),
            ((wide, wide, wide), {}),
        ):
            result = keras.ops.dot_product_attention(*inputs, **options)
            assert_close(result, keras_attention(*inputs, **options))
        with pytest.raises(ValueError, match="attn_logits_soft_cap is only supported"):
            keras.ops.dot_product_attention(x, x, x, attn_logits_soft_cap=3.0)
        with pytest.raises(ValueError, match="only supports 4D inputs"):
            keras.ops.dot_product_attention(x[0], x[0], x[0])
    assert not calls


def test_enable_twice(rng, calls):
    x = normal(rng, 1, 5, 2, 8)
    with fk.enable():
        with fk.enable():
            pass
        assert fk.is_enabled()
        keras.ops.dot_product_attention(x, x, x)
    assert len(calls) == 1
    fk.disable()
    fk.enable()
    assert fk.is_enabled()
    fk.disable()
    assert not fk.is_enabled()


def test_enable_does_not_replace_a_stranger(monkeypatch):
    from keras.src.backend import nn

    def stranger():
        pass

    monkeypatch.setattr(nn, "dot_product_attention", stranger)
    with pytest.raises(RuntimeError, match="has been replaced already, by <function"):
        fk.enable()
    assert not fk.is_enabled()
    assert nn.dot_product_attention is stranger


def test_import_changes_nothing():
    from keras.src.backend import nn

    assert nn.dot_product_attention.__module__ == nn.__name__


def test_a_backend_that_is_none_of_ours(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(
        ImportError, match=r"fastattn.keras runs on Keras's backends tensorflow, jax"
    ):
        runpy.run_path(_ops.__file__)
