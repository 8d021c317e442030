"""A self-attention text classifier, trained with fastattn's attention and with PyTorch's.

It reads docstrings of the standard library and tells which family of modules each is from:

    embedding + positions -> multi-head self-attention -> + residual -> mean over the real tokens
    -> dense -> dropout -> softmax

Two copies start from the same weights and see the same batches and the same dropout, step by step;
one attends by `fastattn.torch.scaled_dot_product_attention`, the other by PyTorch's own function of
that name.  Their losses must agree within `TOLERANCE` at every step, and each must be right about
held-out docstrings more often than the most frequent family would be; else the exit code is 1.

    python examples/text_classifier.py --plot classifier.png
"""

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn.torch
from corpus import PADDING, UNKNOWN, Text, Texts, read_texts

Attend = Callable[..., Tensor]  # (q, k, v, attn_mask=...), as F.scaled_dot_product_attention

ATTENTION: dict[str, Attend] = {
    "fastattn": fastattn.torch.scaled_dot_product_attention,
    "PyTorch": F.scaled_dot_product_attention,
}
# The two round differently, in the last of float32's 24 bits, and training can make that grow.
TOLERANCE = 1e-4  # of a loss, at any step
MARGIN = 0.1  # by which the accuracy must be above the share of the most frequent family

DROPOUT = 0.3


class Sizes(NamedTuple):
    texts: int  # the most of each family
    vocabulary: int
    max_length: int  # tokens that are read of a docstring
    embed_dim: int
    num_heads: int
    hidden: int
    epochs: int
    learning_rate: float
    batch_size: int = 32


FULL = Sizes(1000, 5000, 128, 128, 4, 128, epochs=8, learning_rate=1e-3)
QUICK = Sizes(100, 2000, 64, 32, 2, 32, epochs=5, learning_rate=5e-3)


def batch_of(texts: list[Text], numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The words' numbers, (len(texts), longest) with padding at the end, and the families."""
    rows = [torch.tensor([numbers.get(word, UNKNOWN) for word in text.words]) for text in texts]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    return padded, torch.tensor([text.family for text in texts])


# --- the model --------------------------------------------------------------------------------


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

    @torch.no_grad()
    def attention_map(self, words: Tensor, head: int, attend: Attend) -> Tensor:
        """Weights of one head over one text, (seqlen, seqlen); rows are queries."""
        q, k, _ = self.heads(self.embed(words[None]))
        # With the identity for values, the result is the weights themselves.
        return attend(q[:, head], k[:, head], torch.eye(len(words))[None])[0]


# --- training ---------------------------------------------------------------------------------


class Run:
    """One of the copies: its model, its loss and its seconds at each step."""

    def __init__(self, model: Classifier, attend: Attend, rate: float, steps: int) -> None:
        self.model = copy.deepcopy(model)
        self.attend = attend
        # The rate falls: at a constant one, what differs in the last bit grows without end once the
        # training text is nearly known by heart, between PyTorch's own two attentions as well.
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, words: Tensor, families: Tensor) -> None:
        torch.manual_seed(len(self.losses))  # for the dropout
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(words, self.attend), families)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, texts: list[Text], numbers: dict[str, int]) -> float:
        self.model.eval()
        right = 0
        for start in range(0, len(texts), 64):
            words, families = batch_of(texts[start : start + 64], numbers)
            right += (self.model(words, self.attend).argmax(1) == families).sum().item()
        return right / len(texts)


def train(texts: Texts, sizes: Sizes, rng: np.random.Generator) -> dict[str, Run]:
    torch.manual_seed(0)
    model = Classifier(sizes, UNKNOWN + 1 + len(texts.numbers), len(texts.families))
    order = [i for _ in range(sizes.epochs) for i in rng.permutation(len(texts.training))]
    starts = range(0, len(order) - sizes.batch_size + 1, sizes.batch_size)
    runs = {
        name: Run(model, attend, sizes.learning_rate, len(starts))
        for name, attend in ATTENTION.items()
    }
    for start in tqdm(starts, desc="training both", unit="step", disable=None):
        chosen = [texts.training[i] for i in order[start : start + sizes.batch_size]]
        words, families = batch_of(chosen, texts.numbers)
        for run in runs.values():
            run.step(words, families)
    return runs


# --- report -----------------------------------------------------------------------------------


def plot(path: Path, runs: dict[str, Run], texts: Texts) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    curves, differences = left.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    # The curves lie on each other: a wide light line under a narrow dark one.
    styles = {"PyTorch": ("#56B4E9", 5.0), "fastattn": ("#D55E00", 1.0)}
    for name, (colour, width) in styles.items():
        curves.plot(runs[name].losses, color=colour, linewidth=width, label=name)
    curves.set_ylabel("loss of a batch (nats)")
    curves.set_ylim(bottom=0)
    curves.set_title("The same loss with either attention", loc="left")
    curves.legend(frameon=False)
    differences.semilogy(loss_differences(runs), ".", color="black", markersize=2)
    differences.axhline(TOLERANCE, color="#999999", linestyle="--")
    differences.annotate("tolerance", (0, TOLERANCE), (2, 3), textcoords="offset points")
    differences.set_ylim(top=10 * TOLERANCE)
    differences.set_ylabel("difference")
    differences.set_xlabel("step")
    for axes in (curves, differences):
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    run = runs["fastattn"]
    text = next(t for t in texts.held_out if 14 <= len(t.words) <= 22)
    words, _ = batch_of([text], texts.numbers)
    weights = run.model.attention_map(words[0], 0, run.attend).numpy()
    axes = right.subplots()
    image = axes.imshow(weights, cmap="viridis", vmin=0)
    at = range(len(text.words))
    axes.set_xticks(at, text.words, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(at, text.words)
    axes.set_xlabel("word looked at (key)")
    axes.set_ylabel("word that looks (query)")
    axes.set_title(f"Attention of head 1 over a held-out text of {texts.families[text.family]!r}")
    right.colorbar(image, label="weight (each row sums to 1)", shrink=0.8)
    figure.savefig(path, dpi=100)


def loss_differences(runs: dict[str, Run]) -> np.ndarray:
    ours, theirs = (runs[name].losses for name in ATTENTION)
    return np.abs(np.subtract(ours, theirs))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train one classifier with two attentions.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw losses and attention there")
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL

    rng = np.random.default_rng(0)
    texts = read_texts(rng, sizes.texts, sizes.vocabulary, sizes.max_length)
    tokens = sum(len(text.words) for text in texts.training)
    print(
        f"{len(texts.training)} docstrings of {len(texts.families)} families to train on, "
        f"{tokens / len(texts.training):.0f} tokens each on average; {len(texts.held_out)} held out"
    )
    runs = train(texts, sizes, rng)

    frequent = Counter(text.family for text in texts.held_out).most_common(1)[0][1]
    share = frequent / len(texts.held_out)
    accuracy = {name: run.accuracy(texts.held_out, texts.numbers) for name, run in runs.items()}
    print(f"\n{'':<10}{'first loss':>11}{'last loss':>11}{'accuracy':>10}{'ms per step':>13}")
    for name, run in runs.items():
        first, last = statistics.mean(run.losses[:20]), statistics.mean(run.losses[-20:])
        milliseconds = 1e3 * statistics.median(run.seconds)
        print(f"{name:<10}{first:>11.3f}{last:>11.3f}{accuracy[name]:>10.1%}{milliseconds:>13.1f}")
    print(
        f"Losses are means of 20 of {len(run.losses)} steps, times are medians.  Accuracy is on\n"
        f"held-out text: chance is {1 / len(texts.families):.1%}, the most frequent family "
        f"{share:.1%}."
    )
    if args.plot is not None:
        plot(args.plot, runs, texts)
        print(f"drawn to {args.plot}")

    difference = loss_differences(runs).max()
    checks = {
        f"the losses differ by at most {difference:.1e} (tolerance {TOLERANCE})": (
            difference <= TOLERANCE
        ),
        "the losses fall": last < first,
        f"the accuracy is at least {MARGIN:.0%} above the most frequent family's": (
            min(accuracy.values()) >= share + MARGIN
        ),
    }
    for statement, holds in checks.items():
        print(f"{'ok' if holds else 'WRONG':<6}{statement}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
