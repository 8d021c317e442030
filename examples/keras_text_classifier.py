"""The text classifier of the self-attention tutorials, in Keras with TensorFlow.

It reads docstrings of the standard library and tells which family of modules each is from:

    embedding + positions -> multi-head self-attention -> + residual -> mean over the real tokens
    -> dense -> dropout -> softmax

Three copies start from the same weights and are trained by ``fit`` on the same batches, in turns.
They differ in one layer: `fastattn.keras.MultiHeadAttention`, Keras's own, and one that projects
but does not attend, from whose time the share of attention follows.  The exit code is 1 when the
accuracy on held-out text misses its target, or differs by more than noise from that with Keras's
layer: texts that only one is right about must divide as 19 in 20 series of coin flips do.

    python examples/keras_text_classifier.py --plot classifier.png
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"}  # before their imports

import keras
import numpy as np
from keras import layers, ops
from matplotlib.figure import Figure

import fastattn.keras
from corpus import PADDING, UNKNOWN, Texts, read_texts
from fastattn.plot import attention_map


class Sizes(NamedTuple):
    texts: int  # the most of each family
    vocabulary: int
    max_length: int  # tokens that are read of a docstring
    width: int  # of embeddings and of the dense layer
    num_heads: int
    epochs: int
    learning_rate: float
    target: float  # accuracy on held-out text


BATCH_SIZE = 32
FULL = Sizes(1000, 5000, 128, 128, 4, epochs=8, learning_rate=1e-3, target=0.7)
QUICK = Sizes(100, 2000, 64, 32, 2, epochs=5, learning_rate=5e-3, target=0.3)


class NoAttention(layers.MultiHeadAttention):
    """The projections of Keras's layer: each token takes its own value."""

    def _compute_attention(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return value, None


LAYERS = {
    "fastattn": fastattn.keras.MultiHeadAttention,
    "Keras": layers.MultiHeadAttention,
    "no attention": NoAttention,
}


class Classifier(keras.Model):
    def __init__(self, attention: Any, sizes: Sizes, vocabulary: int, families: int) -> None:
        super().__init__()
        self.words = layers.Embedding(vocabulary, sizes.width)
        self.positions = layers.Embedding(sizes.max_length, sizes.width)
        self.attention = attention(sizes.num_heads, sizes.width // sizes.num_heads)
        self.mean = layers.GlobalAveragePooling1D()
        self.dense = layers.Dense(sizes.width, activation="relu")
        self.dropout = layers.Dropout(0.3, seed=0)
        self.families = layers.Dense(families, activation="softmax")

    def embed(self, tokens: Any) -> Any:
        return self.words(tokens) + self.positions(ops.arange(tokens.shape[1]))

    def call(self, tokens: Any, training: bool = False) -> Any:
        real = ops.not_equal(tokens, PADDING)
        x = self.embed(tokens)
        x = x + self.attention(x, x, value_mask=real)
        x = self.dense(self.mean(x, mask=real))
        return self.families(self.dropout(x, training=training))


class Run:
    """A model, and what came of each epoch of its training."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.losses: list[float] = []
        self.accuracies: list[float] = []  # on held-out text
        self.seconds: list[float] = []

    def right(self, words: np.ndarray, families: np.ndarray) -> np.ndarray:
        """For each text, whether the model is right about it."""
        return self.model.predict(words, verbose=0).argmax(1) == families


def train(sizes: Sizes, texts: Texts, held_out: tuple[np.ndarray, np.ndarray]) -> dict[str, Run]:
    warnings.filterwarnings("ignore", "Gradients do not exist")  # where nothing attends
    keras.utils.set_random_seed(0)
    learn = texts.arrays(texts.training, sizes.max_length)
    steps = sizes.epochs * (len(learn[1]) // BATCH_SIZE + 1)
    vocabulary, runs = UNKNOWN + 1 + len(texts.numbers), {}
    for name, layer in LAYERS.items():
        model = Classifier(layer, sizes, vocabulary, len(texts.families))
        runs[name] = Run(model)
        model(learn[0][:1])  # makes the weights
        model.set_weights(runs["fastattn"].model.get_weights())
        rate = keras.optimizers.schedules.PolynomialDecay(sizes.learning_rate, steps, 0.0)
        loss = "sparse_categorical_crossentropy"
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    for epoch in range(sizes.epochs):
        for run in runs.values():
            keras.utils.set_random_seed(epoch)  # for the order of the texts
            start = time.perf_counter()
            history = run.model.fit(*learn, BATCH_SIZE, verbose=0)
            run.seconds.append(time.perf_counter() - start)
            run.losses += history.history["loss"]
            run.accuracies.append(run.model.evaluate(*held_out, verbose=0)[1])
    return runs


def plot(path: Path, runs: dict[str, Run], words: list[str], weights: np.ndarray) -> None:
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    parts = figure.subplot_mosaic(
        [["accuracy", "map"], ["times", "map"]], width_ratios=[1, 1.3], height_ratios=[2.2, 1]
    )
    accuracy, times = parts["accuracy"], parts["times"]
    # The curves lie on each other: a wide light line under a narrow dark one.
    styles = {"Keras": ("#56B4E9", 6), "fastattn": ("#D55E00", 1.5), "no attention": ("#999999", 1)}
    for name, (colour, width) in styles.items():
        percent = 100 * np.array(runs[name].accuracies)
        accuracy.plot(1 + np.arange(len(percent)), percent, color=colour, lw=width, label=name)
        times.barh(name, np.median(runs[name].seconds), color=colour)
    accuracy.set_title("Trained with either attention, and with none", loc="left")
    accuracy.set(xlabel="epoch", ylabel="right about held-out texts (%)")
    accuracy.legend(frameon=False, loc="lower right")
    accuracy.locator_params("x", integer=True)
    times.set_xlabel("seconds of an epoch (median)")
    axes = attention_map(weights, tokens_q=words, tokens_k=words, ax=parts["map"], vmin=0)
    axes.set(xlabel="word looked at (key)", ylabel="word that looks (query)")
    axes.set_title("Attention of head 1 over a held-out text")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train one Keras classifier with two attentions.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    picture = Path(tempfile.gettempdir()) / "keras_text_classifier.png"
    parser.add_argument("--plot", type=Path, metavar="PNG", default=picture)
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL
    texts = read_texts(np.random.default_rng(0), sizes.texts, sizes.vocabulary, sizes.max_length)
    print(texts)
    held_out = texts.arrays(texts.held_out, sizes.max_length)
    runs = train(sizes, texts, held_out)

    seconds = {name: np.median(run.seconds) for name, run in runs.items()}
    print(f"\n{'':<13}{'first loss':>11}{'last loss':>11}{'accuracy':>10}{'s per epoch':>13}")
    for name, run in runs.items():
        print(
            f"{name:<13}{run.losses[0]:>11.3f}{run.losses[-1]:>11.3f}"
            f"{run.accuracies[-1]:>10.1%}{seconds[name]:>13.2f}"
        )
    ours, theirs = (runs[name].right(*held_out) for name in ("fastattn", "Keras"))
    alone = [(ours & ~theirs).sum(), (theirs & ~ours).sum()]
    noise = 1.96 * sum(alone) ** 0.5
    print(
        f"texts that one alone is right about: fastattn {alone[0]}, Keras {alone[1]} "
        f"(noise would make them differ by {noise:.1f} at most)"
    )
    for name in ("fastattn", "Keras"):
        share = 1 - seconds["no attention"] / seconds[name]
        print(f"{name}: attention took {share:.0%} of an epoch (median)")

    model, text = runs["fastattn"].model, next(t for t in texts.held_out if 12 <= len(t.words) < 21)
    x = model.embed(texts.arrays([text])[0])
    _, weights = model.attention(x, x, return_attention_scores=True)  # such calls Keras computes
    plot(args.plot, runs, text.words, ops.convert_to_numpy(weights[0, 0]))
    print(f"drawn to {args.plot}")

    reached = ours.mean() >= sizes.target and abs(alone[0] - alone[1]) <= noise
    print(
        f"accuracy {ours.mean():.1%} on {len(ours)} held-out docstrings (target "
        f"{sizes.target:.0%}), Keras's layer {theirs.mean():.1%}: {'ok' if reached else 'MISSED'}"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
