"""A self-attention text classifier, trained with fastattn's attention and with PyTorch's.

It reads docstrings of the standard library and tells which family of modules each is from:

    embedding + positions -> multi-head self-attention -> + residual -> mean over the real tokens
    -> dense -> dropout -> softmax

Two copies start from the same weights and see the same batches and the same dropout, step by step;
one attends by `fastattn.torch.scaled_dot_product_attention`, the other by PyTorch's own function of
that name.  Their losses must agree within `TOLERANCE` at every step, and both must reach the
accuracy on held-out docstrings that is their target; else the exit code is 1.

    python examples/text_classifier.py --plot classifier.png
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn.torch
from corpus import PADDING, UNKNOWN, Text, Texts, read_texts
from fastattn.plot import attention_map
from side_by_side import Run, print_times, train
from stopwatch import Attend

ATTENTION: dict[str, Attend] = {
    "fastattn": fastattn.torch.scaled_dot_product_attention,
    "PyTorch": F.scaled_dot_product_attention,
}
# The two round differently, in the last of float32's 24 bits, and training can make that grow: at
# twice the rate of FULL, once the training text is nearly known by heart, to 0.02.
TOLERANCE = 1e-4  # of a loss, at any step
DROPOUT, WARM_UP = 0.3, 0.1  # the share of the steps in which the learning rate rises


class Sizes(NamedTuple):
    texts: int  # the most of each family
    vocabulary: int
    max_length: int  # tokens that are read of a docstring
    embed_dim: int
    num_heads: int
    hidden: int
    epochs: int
    learning_rate: float  # the highest
    target: float  # accuracy on held-out text
    batch_size: int = 32


FULL = Sizes(1000, 5000, 128, 128, 4, 128, epochs=8, learning_rate=1e-3, target=0.7)
QUICK = Sizes(100, 2000, 64, 32, 2, 32, epochs=5, learning_rate=1e-2, target=0.3)

Batch = tuple[Tensor, Tensor]  # the words' numbers, (texts, longest), and the families


def batch_of(texts: Texts, chosen: list[Text]) -> Batch:
    words, families = texts.arrays(chosen)
    return torch.from_numpy(words), torch.from_numpy(families)


class Classifier(nn.Module):
    def __init__(self, sizes: Sizes, vocabulary: int, families: int) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.words = nn.Embedding(vocabulary, sizes.embed_dim)
        self.positions = nn.Parameter(0.1 * torch.randn(sizes.max_length, sizes.embed_dim))
        self.q_k_v = nn.Linear(sizes.embed_dim, 3 * sizes.embed_dim)
        self.out = nn.Linear(sizes.embed_dim, sizes.embed_dim)
        self.dense = nn.Linear(sizes.embed_dim, sizes.hidden)
        self.dropout = nn.Dropout(DROPOUT)
        self.families = nn.Linear(sizes.hidden, families)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each (batch, num_heads, seqlen, head_dim): views of one product."""
        return self.q_k_v(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)

    def embed(self, words: Tensor) -> Tensor:
        return self.words(words) + self.positions[: words.shape[1]]

    def forward(self, words: Tensor, attend: Attend) -> Tensor:
        """Logits of the families; the softmax is in the loss."""
        real = words != PADDING
        x = self.embed(words)
        heads = attend(*self.heads(x), attn_mask=real[:, None, None, :])
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.families(self.dropout(F.relu(self.dense(mean))))

    def loss(self, batch: Batch, attend: Attend) -> Tensor:
        words, families = batch
        return F.cross_entropy(self(words, attend), families)


def batches(texts: Texts, sizes: Sizes, rng: np.random.Generator) -> Iterator[Batch]:
    order = [i for _ in range(sizes.epochs) for i in rng.permutation(len(texts.training))]
    for start in range(0, len(order) - sizes.batch_size + 1, sizes.batch_size):
        chosen = order[start : start + sizes.batch_size]
        yield batch_of(texts, [texts.training[i] for i in chosen])


@torch.no_grad()
def accuracy(run: Run, texts: Texts) -> float:
    """On held-out text."""
    run.model.eval()
    right = 0
    for start in range(0, len(texts.held_out), 64):
        words, families = batch_of(texts, texts.held_out[start : start + 64])
        right += (run.model(words, run.attend).argmax(1) == families).sum().item()
    return right / len(texts.held_out)


def plot(path: Path, runs: dict[str, Run], differences: np.ndarray, texts: Texts) -> None:
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    parts = figure.subplot_mosaic(
        [["curves", "map"], ["below", "map"]], width_ratios=[1, 1.3], height_ratios=[2.2, 1]
    )
    curves, below = parts["curves"], parts["below"]
    # The curves lie on each other: a wide light line under a narrow dark one.
    for name, colour, width in (("PyTorch", "#56B4E9", 5.0), ("fastattn", "#D55E00", 1.0)):
        curves.plot(runs[name].losses, color=colour, linewidth=width, label=name)
    curves.set(ylabel="loss of a batch (nats)", ylim=(0, None))
    curves.set_title("The same loss with either attention", loc="left")
    curves.legend(frameon=False)
    below.semilogy(differences, ".", color="black", markersize=2)
    below.axhline(TOLERANCE, color="#999999", linestyle="--")
    below.annotate("tolerance", (0, TOLERANCE), (2, 3), textcoords="offset points")
    below.set(ylim=(None, 10 * TOLERANCE), ylabel="difference", xlabel="step")
    for axes in (curves, below):
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    model, text = runs["fastattn"].model, next(t for t in texts.held_out if 14 <= len(t.words) < 23)
    words, _ = batch_of(texts, [text])
    with torch.no_grad():
        q, k, _ = model.heads(model.embed(words))
    [weights] = fastattn.torch.attention_weights(q[0], k[0], heads=[0])
    axes = attention_map(weights, tokens_q=text.words, tokens_k=text.words, ax=parts["map"], vmin=0)
    axes.set(xlabel="word looked at (key)", ylabel="word that looks (query)")
    axes.set_title(f"Attention of head 1 over a held-out text of {texts.families[text.family]!r}")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train one classifier with two attentions.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    picture = Path(tempfile.gettempdir()) / "text_classifier.png"
    parser.add_argument("--plot", type=Path, metavar="PNG", default=picture)
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL

    rng = np.random.default_rng(0)
    texts = read_texts(rng, sizes.texts, sizes.vocabulary, sizes.max_length)
    print(texts)
    torch.manual_seed(0)
    model = Classifier(sizes, UNKNOWN + 1 + len(texts.numbers), len(texts.families))
    steps = sizes.epochs * len(texts.training) // sizes.batch_size
    learn = batches(texts, sizes, rng)
    runs = train(model, ATTENTION, learn, sizes.learning_rate, steps, WARM_UP)

    count = Counter(text.family for text in texts.held_out).most_common(1)[0][1]
    share = count / len(texts.held_out)
    right = {name: accuracy(run, texts) for name, run in runs.items()}
    print(f"\n{'':<10}{'first loss':>11}{'last loss':>11}{'accuracy':>10}")
    for name, run in runs.items():
        first, last = np.mean(run.losses[:20]), np.mean(run.losses[-20:])
        print(f"{name:<10}{first:>11.3f}{last:>11.3f}{right[name]:>10.1%}")
    print(
        f"Losses are means of 20 of {steps} steps.  Accuracy is on held-out text: chance is "
        f"{1 / len(texts.families):.1%},\nthe most frequent family {share:.1%}."
    )
    print_times(runs)
    differences = np.abs(np.subtract(*(runs[name].losses for name in ATTENTION)))
    plot(args.plot, runs, differences, texts)
    print(f"drawn to {args.plot}")

    reached = min(right.values()) >= sizes.target and differences.max() <= TOLERANCE
    print(
        f"accuracy {right['fastattn']:.1%} on {len(texts.held_out)} held-out docstrings (target "
        f"{sizes.target:.0%}), losses differ by {differences.max():.1e} (at most {TOLERANCE}): "
        f"{'ok' if reached else 'MISSED'}"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
