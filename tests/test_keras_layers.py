"""The layers of fastattn.keras against Keras's own."""

import numpy as np
import pytest
from keras_cases import (
    BACKEND,
    HAS_KEYS,
    LAYERS,
    assert_close,
    gradients,
    grouped,
    keras,
    marks,
    multi_head,
    normal,
    ops,
    pair,
)

import fastattn as fa
import fastattn.keras as fk
from fastattn.keras import _ops

pytestmark = marks


def functional(layer, call):
    """``call(layer, *inputs)`` as a function of inputs and then the layer's weights."""

    def function(*tensors):
        count = len(tensors) - len(layer.trainable_variables)
        mapping = list(zip(layer.trainable_variables, tensors[count:], strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return call(layer, *tensors[:count])

    return function


def assert_same_layers(layers, call, *inputs, attended=None):
    """Outputs, and gradients of inputs and weights."""
    ours, kerass = layers
    assert_close(call(ours, *inputs), call(kerass, *inputs))
    if attended is not None:
        assert len(attended) == 1
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
def test_layers(rng, make, kind, attended):
    x, y = normal(rng, 2, 7, 12), normal(rng, 2, 9, 12)
    masks = {
        name: mask if mask is True else ops.convert_to_tensor(mask)
        for name, mask in masks_of(kind, rng).items()
    }
    layers = pair(make, x.shape, y.shape)
    assert_same_layers(layers, lambda layer, x, y: layer(x, y, **masks), x, y, attended=attended)


@LAYERS
@pytest.mark.parametrize(
    "options", [{"use_bias": False}, {"use_gate": True}, {"sliding_window": 3}], ids=str
)
def test_options_of_layers(rng, make, options, attended):
    try:
        layers = pair(make, (2, 7, 12), (2, 7, 12), **options)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this Keras has no such option: {error}")
    x = normal(rng, 2, 7, 12)
    attend = lambda layer, x: layer(x, x, use_causal_mask="sliding_window" in options)  # noqa: E731
    assert_same_layers(layers, attend, x, attended=attended)


def test_a_window_that_leaves_queries_without_keys(rng):
    x, y = normal(rng, 2, 9, 12), normal(rng, 2, 5, 12)
    try:
        ours, kerass = pair(multi_head, x.shape, y.shape, sliding_window=2)
    except (TypeError, ValueError) as error:
        pytest.skip(f"this Keras has no such option: {error}")
    assert_close(ours(x, y), kerass(x, y))


def test_keys_values_and_results_of_other_widths(rng, attended):
    x, y, z = normal(rng, 2, 7, 12), normal(rng, 2, 9, 10), normal(rng, 2, 9, 14)
    layers = pair(multi_head, x.shape, y.shape, z.shape, value_dim=5, output_shape=11)
    if BACKEND == "jax":
        assert layers[0](x, y, z).shape == (2, 7, 11)
        pytest.skip("Keras's own layer gives values the width of keys on JAX, and fails")
    assert_same_layers(layers, lambda layer, x, y, z: layer(x, y, z), x, y, z, attended=attended)


def test_grouped_heads_are_not_repeated(rng, attended):
    x = normal(rng, 2, 7, 12)
    layer = grouped(fk)
    layer(x, x)
    [(query, key, _)] = attended
    assert (query, key) == ((2, 7, 4, 8), (2, 7, 2, 8))


@LAYERS
def test_no_mask_of_queries_by_keys_is_made(rng, make, attended):
    x = normal(rng, 2, 7, 12)
    padded = ops.convert_to_tensor(np.arange(7) < np.array([[7], [5]]))
    make(fk)(x, x, value_mask=padded, use_causal_mask=True)
    [(_, _, call)] = attended
    assert call.arrays == ("q_ids", "k_ids")
    assert call.causal


@LAYERS
def test_scores_are_kerass(rng, make, attended):
    x = normal(rng, 2, 7, 12)
    layers = pair(make, x.shape, x.shape)
    mask = ops.convert_to_tensor(rng.random((2, 7, 7)) < 0.6)
    options = {"attention_mask": mask, "use_causal_mask": True, "return_attention_scores": True}
    for actual, expected in zip(*(layer(x, x, **options) for layer in layers), strict=True):
        assert_close(actual, expected)
    assert not attended


@pytest.mark.parametrize("axes", [None, (1,), (2,), (1, 2)], ids=str)
def test_more_axes_are_kerass(rng, axes, attended):
    x = normal(rng, 2, 3, 4, 12)
    layers = pair(multi_head, x.shape, x.shape, attention_axes=axes)
    assert_same_layers(layers, lambda layer, x: layer(x, x), x)
    assert not attended


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
def test_16_bit_policies(rng, make, policy, attended):
    if BACKEND == "jax" and policy == "mixed_float16":
        pytest.skip("JAX has no products of float16 on the CPU, which Keras's own layer needs")
    x = normal(rng, 2, 20, 12)
    ours, kerass = pair(make, x.shape, x.shape, dtype=policy)
    out = ours(x, x, use_causal_mask=True)
    assert keras.backend.standardize_dtype(out.dtype) == policy.removeprefix("mixed_")
    expected = kerass(x, x, use_causal_mask=True)
    tolerance = {"mixed_bfloat16": 2e-2, "mixed_float16": 3e-3}[policy]
    assert_close(ops.cast(out, "float32"), ops.cast(expected, "float32"), tolerance)
    assert len(attended) == 1
    if BACKEND != "numpy":
        weights = ours.get_weights()[: len(ours.trainable_variables)]
        call = lambda layer, x: layer(x, x)  # noqa: E731
        computed = [gradients(functional(layer, call), x, *weights) for layer in (ours, kerass)]
        for actual, expected in zip(*computed, strict=True):
            assert_close(actual, expected, 4 * tolerance)


@LAYERS
def test_masks_of_an_embedding(rng, make, attended):
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
    assert len(attended) == 1
    assert "q_ids" in attended[0][2].arrays


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
def test_dropout_of_layers(rng, make, attended):
    x = normal(rng, 2, 40, 12)
    ours, kerass = pair(make, x.shape, x.shape, dropout=0.5, seed=7)
    assert_close(ours(x, x), kerass(x, x))  # none where nothing is trained
    assert [call.dropout_p for _, _, call in attended] == [0.0]
    first, second = (ops.convert_to_numpy(ours(x, x, training=True)) for _ in range(2))
    assert attended[-1][2].dropout_p == 0.5
    assert np.abs(first - second).max() > 0.01
    again, _ = pair(make, x.shape, x.shape, dropout=0.5, seed=7)
    again.set_weights(kerass.get_weights())  # the state of the seed generator is among them
    assert_close(again(x, x, training=True), first, 0.0)
    # On average it changes nothing.
    mean = np.mean([ops.convert_to_numpy(ours(x, x, training=True)) for _ in range(60)], 0)
    assert np.abs(mean - ops.convert_to_numpy(ours(x, x))).mean() < 0.2 * np.abs(mean).mean()
