"""What the tests of fastattn.keras share.

Keras has one backend in a process, KERAS_BACKEND; ``make test-keras`` runs the tests once on each.
"""

import os

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
pytest.importorskip(os.environ.setdefault("KERAS_BACKEND", "numpy"))
keras = pytest.importorskip("keras")
BACKEND = keras.backend.backend()

from keras import ops  # noqa: E402

import fastattn.keras as fk  # noqa: E402

# What every file of these tests sets `pytestmark` to.
marks = [
    pytest.mark.any_kernel_set,
    pytest.mark.usefixtures("seeded_keras"),
    # Keras and its backends warn of what they use of each other.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
]
trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras's NumPy backend has no gradients")

TOLERANCE = 1e-5  # of the largest element

# Masks here have a query without keys, except on PyTorch, whose gradients of one are not those of
# the average that it gives: its kernel takes each of its weights for 1 in the backward pass.
HAS_KEYS = BACKEND == "torch"


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


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = (ops.convert_to_numpy(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    largest = max(1.0, np.abs(expected).max(initial=0.0))
    assert np.abs(actual - expected).max(initial=0.0) <= tolerance * largest


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def keras_attention(query, key, value, **options):
    """Keras's own, which on some backends needs as many key heads as query heads."""
    groups = query.shape[2] // key.shape[2]
    key, value = (ops.repeat(x, groups, axis=2) for x in (key, value))
    return keras.ops.dot_product_attention(query, key, value, **options)


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
