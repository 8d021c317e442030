"""Models with the layers of fastattn.keras, and what the backends compile."""

import threading

import numpy as np
import pytest
from keras_cases import (
    BACKEND,
    LAYERS,
    assert_close,
    classifier,
    keras,
    keras_attention,
    marks,
    multi_head,
    normal,
    ops,
    pair,
    texts,
    trains,
)

import fastattn.keras as fk

pytestmark = marks


@trains
@LAYERS
def test_fit(rng, make, attended):
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
            seen = len(attended)
    # Some traces, and on PyTorch one call for each batch.
    batches = 12 if BACKEND == "torch" else 0
    assert batches + 1 <= seen <= batches + 4
    assert len(attended) == seen
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

only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="about JAX")


def compiled(function):
    """`function` as the backend compiles it; PyTorch and NumPy run it as it is."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


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
def test_tensorflow_compiled_by_xla(rng, attended):
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
    assert not attended


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
