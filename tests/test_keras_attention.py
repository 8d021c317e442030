"""`fastattn.keras.dot_product_attention` against Keras's own."""

import numpy as np
import pytest
from keras_cases import (
    BACKEND,
    HAS_KEYS,
    assert_close,
    gradients,
    keras,
    keras_attention,
    marks,
    normal,
    ops,
)

import fastattn as fa
import fastattn.keras as fk
from fastattn.keras import _ops

pytestmark = marks


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
