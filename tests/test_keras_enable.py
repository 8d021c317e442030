"""`fastattn.keras.enable`: what it routes, and what it leaves alone."""

import runpy

import numpy as np
import pytest
from keras_cases import (
    LAYERS,
    assert_close,
    classifier,
    keras,
    keras_attention,
    marks,
    multi_head,
    normal,
    ops,
    texts,
    trains,
)

import fastattn.keras as fk
from fastattn.keras import _ops

pytestmark = marks


@LAYERS
def test_enable_routes_layers(rng, make, attended):
    x = normal(rng, 2, 7, 12)
    mask = ops.convert_to_tensor(rng.random((2, 7, 7)) < 0.6)
    layer = make(keras.layers)
    expected = [layer(x, x, attention_mask=mask), layer(x, x, use_causal_mask=True)]
    assert not attended
    with fk.enable():
        assert fk.is_enabled()
        assert_close(layer(x, x, attention_mask=mask), expected[0])
        assert_close(layer(x, x, use_causal_mask=True), expected[1])
        assert len(attended) == 2
        layer(x, x, return_attention_scores=True)
        assert len(attended) == 2
    assert not fk.is_enabled()
    layer(x, x)
    assert len(attended) == 2


@trains
def test_enable_routes_fit(rng, attended):
    tokens, labels = texts(rng)
    model = classifier(multi_head, keras.layers)
    expected = keras.models.clone_model(model)
    expected.set_weights(model.get_weights())
    losses = []
    with fk.enable():
        for each in (model, expected):
            each.compile("sgd", "sparse_categorical_crossentropy")
            losses.append(each.fit(tokens, labels, verbose=0, shuffle=False).history["loss"])
            assert attended
            fk.disable()
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_enable_routes_functions_under_all_names(rng, attended):
    x = normal(rng, 2, 7, 4, 8)
    expected = keras.ops.dot_product_attention(x, x, x, is_causal=True)
    inputs = keras.Input((None, 4, 8))
    node = keras.Model(inputs, keras.ops.dot_product_attention(inputs, inputs, inputs))
    with fk.enable():
        for function in (keras.ops.dot_product_attention, keras.ops.nn.dot_product_attention):
            assert_close(function(x, x, x, is_causal=True), expected)
        node(x)
    assert len(attended) == 3


def test_enable_leaves_what_keras_does_otherwise(rng, attended):
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
    assert not attended


def test_enable_twice(rng, attended):
    x = normal(rng, 1, 5, 2, 8)
    with fk.enable():
        with fk.enable():
            pass
        assert fk.is_enabled()
        keras.ops.dot_product_attention(x, x, x)
    assert len(attended) == 1
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
