"""Questions whose answer lies 16,000 tokens back, by full attention, a window, and with its start.

`recall.py` has the texts, which end with questions "name =" about pairs "name = value" strewn in
long before, and a small model, trained in PyTorch through `fastattn.torch` on texts of 256 tokens.
Here it reads held-out texts of 17,000 in parts, each layer through a `fastattn.KVCache`:

    full               KVCache(..., max_seqlen=17000)            remembers everything
    window             KVCache(..., window_tokens=256)                    the last 256 tokens
    window and start   KVCache(..., window_tokens=256, sink_tokens=64)    and the first 64
                                                      (https://arxiv.org/abs/2309.17453)

Each runs in a process of its own, as does PyTorch's attention with the same weights, for which a
window is a mask of all pairs of tokens.

    python examples/long_range.py --plot long_range.png
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import fastattn as fa
import recall
from recall import HEADS, KEPT, START_OF_TEXT, Model, Question, Tokens
from stopwatch import Attend, Stopwatch

WINDOW, PART = 256, 1024  # tokens: that a window sees, that are appended at once


class Sizes(NamedTuple):
    steps: int
    length: int  # of a long text
    texts: int
    distances: tuple[int, ...]
    target: float  # accuracy of full attention at the last of them
    questions: int = 10  # of each distance in a text


FULL = Sizes(300, 17_000, 10, (50, 200, 500, 1000, 2000, 4000, 8000, 16_000), 0.95)
QUICK = Sizes(100, 2500, 2, (50, 200, 500, 1000), 0.8)
BY_WINDOW = 0.05  # at most: of answers beyond it, those that are guessed


def cached(**options: Any) -> Attend:
    """Causal attention through a cache that gets the tokens in parts."""

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


ATTENTION: dict[str, Attend] = {
    "fastattn, full": cached(),
    "fastattn, window": cached(window_tokens=WINDOW),
    "fastattn, window and start": cached(window_tokens=WINDOW, sink_tokens=KEPT),
    "PyTorch, full": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "PyTorch, window": masked,
}


class Reading(NamedTuple):
    accuracy: dict[int, float]  # by the distance of the answer
    seconds: float  # of a text
    share: float  # of them in attention
    mebibytes: float  # that reading added to the peak of the process


@torch.no_grad()
def read(name: str, model: Model, texts: list[tuple[Tokens, list[Question]]]) -> Reading:
    attend = Stopwatch(ATTENTION[name])
    model(torch.from_numpy(texts[0][0][None, :PART]), attend)  # the first call sets things up
    before, attend.seconds, start = getrusage(RUSAGE_SELF).ru_maxrss, 0.0, time.perf_counter()
    right = defaultdict(list)
    for text, questions in texts:
        x = model(torch.from_numpy(text[None]), attend)[0, [q.place for q in questions]]
        for question, word in zip(questions, model.logits(x).argmax(-1), strict=True):
            right[question.distance].append(text[question.answer] == word.item())
    seconds = time.perf_counter() - start
    kibibytes = getrusage(RUSAGE_SELF).ru_maxrss - before
    accuracy = {distance: float(np.mean(answers)) for distance, answers in right.items()}
    return Reading(accuracy, seconds / len(texts), attend.seconds / seconds, kibibytes / 1024)


def read_alone(*args: Any) -> Reading:
    """In a process, so that the peak of its memory is its own: a spawned one has its parent's."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(read, *args).result()


def plot(
    path: Path, readings: dict[str, Reading], distances: dict[int, str], length: int,
    weights: np.ndarray, answer: int, words: str,
) -> None:  # fmt: skip
    figure = Figure(figsize=(10, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for way, colour, marker in (
        ("full", "#0072B2", "o"), ("window", "#D55E00", "s"), ("window and start", "#009E73", "^"),
    ):  # fmt: skip
        right = [readings[f"fastattn, {way}"].accuracy[d] for d in distances]
        top.plot(right, color=colour, marker=marker, markersize=9, fillstyle="none", label=way)
    top.set_xticks(range(len(distances)), distances.values())
    back = f"tokens from the question back to the answer (first {KEPT}: where it stands)"
    top.set(xlabel=back, ylabel="questions answered correctly")
    top.set_title(f"Trained on {recall.LENGTH} tokens, asked in {length:,}", loc="left")
    top.legend(frameon=False, loc="center left")
    last = len(weights) - 1
    bottom.plot(weights, color="#0072B2", linewidth=1.5)
    bottom.axvspan(last - WINDOW, last, color="#D55E00", alpha=0.4)
    arrow = {"textcoords": "offset points", "arrowprops": {"arrowstyle": "->"}}
    for note, at, shift in (
        (f"the answer, {last - answer:,} tokens back:\n{words}", (answer, weights[answer]), 40),
        (f"all that a window of {WINDOW} tokens sees", (last - WINDOW, 0.5), -40),
    ):
        bottom.annotate(note, at, (shift, -40), ha="left" if shift > 0 else "right", **arrow)
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    bottom.set(xlabel="position of the key in the text", ylabel="weight (they sum to 1)")
    title = "Where one question looks: its weights in the head that finds the answer"
    bottom.set_title(title, loc="left")
    for axes in (top, bottom):
        axes.set_ylim(-0.03, 1.05)
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask for what stands 16,000 tokens back.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    picture = Path(tempfile.gettempdir()) / "long_range.png"
    parser.add_argument("--plot", type=Path, metavar="PNG", default=picture)
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL

    rng = np.random.default_rng(0)
    words = recall.read_words()
    print(
        f"{len(words.training):,} words of docstrings to train on, {len(words.held_out):,} held "
        f"out; {len(words.names)} different ones are names and values"
    )
    model = recall.train(words, sizes.steps, rng)
    print(f"trained on {sizes.steps * recall.BATCH_SIZE:,} texts of {recall.LENGTH} tokens")

    distances = {d: f"{d:,}" for d in sizes.distances} | {START_OF_TEXT: f"first {KEPT}"}
    asked = [*distances] * sizes.questions
    texts = [recall.long_text(words, sizes.length, asked, rng) for _ in range(sizes.texts)]
    print(f"\nright answers, %; tokens back: {''.join(f'{d:>9}' for d in distances.values())}"
          f"{'s a text':>10}{'attention':>11}{'MiB':>7}")  # fmt: skip
    readings = {}
    for name in ATTENTION:
        found = readings[name] = read_alone(name, model, texts)
        print(f"{name:<30}{''.join(f'{100 * found.accuracy[d]:>9.1f}' for d in distances)}"
              f"{found.seconds:>10.2f}{found.share:>11.0%}{found.mebibytes:>7,.0f}")  # fmt: skip

    far = sizes.distances[-1]
    text, questions = texts[0]
    place, answer, _ = next(q for q in questions if q.distance == far)
    weights = model.weights(text[: place + 1], ATTENTION["fastattn, full"])
    weights = max(weights.reshape(-1, place + 1), key=lambda head: head[answer])
    pair = " ".join(words.vocabulary[i] for i in text[answer - 2 : answer + 1])
    plot(args.plot, readings, distances, sizes.length, weights, answer, pair)
    print(f"drawn to {args.plot}")

    full, window = (readings[f"fastattn, {way}"].accuracy[far] for way in ("full", "window"))
    reached = full >= sizes.target and window <= BY_WINDOW
    print(
        f"{100 * full:.1f} % of {sizes.texts * sizes.questions} answers {far:,} tokens back are "
        f"right (target {100 * sizes.target:.0f} %), {100 * window:.1f} % with a window "
        f"(at most {100 * BY_WINDOW:.0f} %): {'ok' if reached else 'MISSED'}"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
