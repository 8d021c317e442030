"""Questions whose answer lies 16,000 tokens back, by full attention, a window, and with its start.

`recall.py` has the texts, which end with questions "name =" about pairs "name = value" strewn in
long before, and a small model, trained in PyTorch through `fastattn.torch` on texts of 256 tokens.
Here it reads held-out texts of 17,000 in parts, each layer through a `fastattn.KVCache`:

    full               KVCache(..., max_seqlen=17000)            remembers everything
    window             KVCache(..., window=256)                  the last 256 tokens
    window and start   KVCache(..., window=256, num_sinks=64)    and the first 64
                                                      (https://arxiv.org/abs/2309.17453)

Each runs in a process of its own, as does PyTorch's attention with the same weights, for which a
window is a mask of all pairs of tokens.

    python examples/long_range.py --plot long_range.png
"""

import argparse
import math
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastattn as fa
from recall import (
    BATCH_SIZE,
    HEADS,
    KEPT,
    LENGTH,
    START_OF_TEXT,
    Attend,
    Model,
    Tokens,
    long_text,
    read_words,
    train,
)
from stopwatch import Stopwatch

WINDOW, PART = 256, 1024  # tokens: that a window sees, that are appended at once


class Sizes(NamedTuple):
    steps: int
    length: int  # of a long text
    texts: int
    distances: tuple[int, ...]
    target: float  # accuracy of full attention at the last of them
    questions: int = 10  # of each distance in a text


FULL = Sizes(300, 17_000, 10, (50, 200, 500, 1000, 2000, 4000, 8000, 16_000), 0.95)
QUICK = Sizes(150, 2500, 2, (50, 200, 500, 1000), 0.8)


# --- the long texts ---------------------------------------------------------------------------


def cached(**options: Any) -> Attend:
    """Attention through a cache that gets the tokens in parts."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        most = WINDOW + KEPT + PART if options else k.shape[2]
        cache = fa.KVCache(1, HEADS, most, k.shape[3], **options)
        out = np.empty(q.shape, np.float32)
        for begin in range(0, k.shape[2], PART):
            part = np.s_[:, :, begin : begin + PART]
            cache.append(k[part].numpy(), v[part].numpy())
            out[part] = cache.attention(q[part].numpy())
        return torch.from_numpy(out)

    return attend


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    back = torch.arange(k.shape[2])[:, None] - torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < WINDOW))


CONTENDERS: dict[str, Attend] = {
    "fastattn, full": cached(),
    "fastattn, window": cached(window=WINDOW),
    "fastattn, window and start": cached(window=WINDOW, num_sinks=KEPT),
    "PyTorch, full": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "PyTorch, window": masked,
}


class Reading(NamedTuple):
    words: list[Tokens]  # the answers given in each text
    seconds: float
    share: float  # of them in attention
    mebibytes: float  # that reading added to the peak of the process


@torch.no_grad()
def read(name: str, model: Model, texts: list[Tokens], places: list[list[int]]) -> Reading:
    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    attend = Stopwatch(CONTENDERS[name])
    model(torch.from_numpy(texts[0][None, :PART]), attend)  # the first call sets things up
    before, attend.seconds, start = peak(), 0.0, time.perf_counter()
    found = []
    for text, asked in zip(texts, places, strict=True):
        x = model(torch.from_numpy(text[None]), attend)[0, asked]
        found.append(model.logits(x).argmax(-1).numpy())
    seconds = time.perf_counter() - start
    return Reading(found, seconds, attend.seconds / seconds, peak() - before)


@torch.no_grad()
def last_weights(model: Model, text: Tokens, place: int) -> np.ndarray:
    """Weights of one query in the last layer, (HEADS, place + 1)."""
    x = model.words(torch.from_numpy(text[None, : place + 1]))
    *layers, last = model.layers
    for layer in layers:
        x = layer(x, CONTENDERS["fastattn, full"])
    q, k, v = (t.numpy() for t in last.heads(x))
    _, lse = fa.attention(q[:, :, -1:], k, v, return_lse=True)
    scores = q[:, :, -1:] @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])
    return np.exp(scores - lse[..., np.newaxis])[0, :, 0]


# --- report -----------------------------------------------------------------------------------


def label(distance: int) -> str:
    return f"first {KEPT}" if distance == START_OF_TEXT else f"{distance:,}"


def plot(
    path: Path, accuracy: dict[str, list[float]], distances: list[int], weights: np.ndarray,
    answer: int, words: str,
) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for name, colour, marker in (
        ("full", "#0072B2", "o"), ("window", "#D55E00", "s"), ("window and start", "#009E73", "^"),
    ):  # fmt: skip
        line = accuracy[f"fastattn, {name}"]
        top.plot(line, color=colour, marker=marker, markersize=9, fillstyle="none", label=name)
    top.set_xticks(range(len(distances)), [label(d) for d in distances])
    top.set_xlabel(f"tokens from the question back to the answer (first {KEPT}: where it stands)")
    top.set_ylabel("questions answered correctly")
    title = f"Trained on texts of {LENGTH} tokens, asked in texts of {len(weights):,}"
    top.set_title(title, loc="left")
    top.legend(frameon=False, loc="center left")
    last = len(weights) - 1
    bottom.plot(weights, color="#0072B2", linewidth=0.8)
    bottom.set_title("Where one question looks: its weights in the last layer", loc="left")
    bottom.annotate(
        f"the answer, {last - answer:,} tokens back:\n{words}", (answer, weights[answer]),
        (40, -40), textcoords="offset points", arrowprops={"arrowstyle": "->"},
    )  # fmt: skip
    bottom.axvspan(last - WINDOW, last, color="#D55E00", alpha=0.4, label="all that a window sees")
    bottom.legend(frameon=False, loc="center right")
    bottom.set_xlabel("position of the key in the text")
    bottom.set_ylabel("weight (they sum to 1)")
    for axes in (top, bottom):
        axes.set_ylim(-0.03, 1.05)
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask for what stands 16,000 tokens back.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--plot", type=Path, metavar="PNG", default=Path("long_range.png"))
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL

    rng = np.random.default_rng(0)
    words = read_words()
    print(
        f"{len(words.training):,} words of docstrings to train on, {len(words.held_out):,} held "
        f"out; {len(words.names)} different ones are names and values"
    )
    start = time.perf_counter()
    model = train(words, sizes.steps, rng)
    seconds = time.perf_counter() - start
    print(f"trained on {sizes.steps * BATCH_SIZE:,} texts of {LENGTH} tokens, {seconds:.0f} s")

    distances = [*sizes.distances, START_OF_TEXT]
    made = [
        long_text(words, sizes.length, distances * sizes.questions, rng) for _ in range(sizes.texts)
    ]
    texts = [text for text, _ in made]
    accuracy = {}
    print(f"\nright answers, %; tokens back: {''.join(f'{label(d):>9}' for d in distances)}"
          f"{'s a text':>10}{'attention':>11}{'MiB':>7}")  # fmt: skip
    for name in CONTENDERS:
        # A process for each, so that the peak of its memory is its own.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            places = [[question.place for question in questions] for _, questions in made]
            reading = pool.submit(read, name, model, texts, places).result()
        right: dict[int, list[bool]] = {d: [] for d in distances}
        for (text, questions), found in zip(made, reading.words, strict=True):
            for question, word in zip(questions, found, strict=True):
                right[question.distance].append(text[question.answer] == word)
        accuracy[name] = [float(np.mean(right[d])) for d in distances]
        print(f"{name:<30}{''.join(f'{100 * a:>9.1f}' for a in accuracy[name])}"
              f"{reading.seconds / sizes.texts:>10.2f}{reading.share:>11.0%}"
              f"{reading.mebibytes:>7,.0f}")  # fmt: skip

    far = distances[-2]
    text, questions = made[0]
    question = next(q for q in questions if q.distance == far)
    weights = last_weights(model, text, question.place)
    pair = " ".join(words.vocabulary[i] for i in text[question.answer - 2 : question.answer + 1])
    head = weights[:, question.answer].argmax()
    plot(args.plot, accuracy, distances, weights[head], question.answer, pair)
    print(f"drawn to {args.plot}")

    full, window = (accuracy[f"fastattn, {name}"][-2] for name in ("full", "window"))
    good = full >= sizes.target and window <= 0.05
    print(f"{100 * full:.1f} % of {sizes.texts * sizes.questions} answers {far:,} tokens back are "
          f"right (target {100 * sizes.target:.0f} %), {100 * window:.1f} % with a window: "
          f"{'ok' if good else 'WRONG'}")  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
