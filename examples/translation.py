"""Translate dates, as nearly 300 languages write them, to ISO dates.

Babel's CLDR data write a date in a language's own words, and often in its own digits:

    viernes, 3 de febrero de 1989   ->  1989-02-03
    १२ ऑगस्ट, २०४५                  ->  2045-08-12

The program is not told the language.  A transformer over characters (`seq2seq.py`) learns it in
PyTorch, its attention in the encoder, in the decoder and across by `fastattn.torch`.  A beam search
then translates: a `fastattn.KVCache` for each layer of the decoder holds the beams and follows them
by `reorder`.  Beside it, the same weights translate with PyTorch's attention alone.

The dates of the test are held out in every language.  Beside them stand languages, drawn by lot,
of which the training saw nothing, and regional forms and other scripts of languages that it saw.

    python examples/translation.py --plot translation.png
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn.torch
from dates import Pairs, read_data
from fastattn.plot import attention_map
from seq2seq import END, PADDING, Cached, Concatenated, Translator, beam_search
from side_by_side import Run, print_times, train
from stopwatch import Attend

ATTENTION: dict[str, Attend] = {
    "fastattn": fastattn.torch.scaled_dot_product_attention,
    "PyTorch": F.scaled_dot_product_attention,
}
MEMORY = {"fastattn": Cached, "PyTorch": Concatenated}  # of the decoder in a beam search
OUTPUT = "\n-0123456789"  # the line end is seq2seq.END
UNKNOWN = PADDING + 1
BEAMS, HEADS, LAYERS, BATCH_SIZE = 4, 4, 2, 64
LEARNING_RATE, WARM_UP = 2e-3, 0.1  # the highest; the share of the steps that leads up to it
TIMED = 50  # steps, with both attentions


class Sizes(NamedTuple):
    languages: int  # the most that are seen in training
    pairs: int
    epochs: int
    width: int
    test: int  # pairs of each kind
    target: float  # exact matches among held-out dates


FULL = Sizes(300, 60_000, 4, 128, 2000, 0.97)
QUICK = Sizes(8, 4000, 6, 64, 200, 0.8)


class Characters:
    """Numbers of the characters of sources; those that training hardly knows are one."""

    def __init__(self, pairs: Pairs) -> None:
        counts = Counter(c for text, _ in pairs for c in text)
        known = sorted(c for c, count in counts.items() if count >= 3)
        self.numbers = {c: i for i, c in enumerate(known, start=UNKNOWN + 1)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.tensor([self.numbers.get(c, UNKNOWN) for c in text]) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def outputs(dates: Sequence[str]) -> Tensor:
    """With the line end before and after."""
    return torch.tensor([[OUTPUT.index(c) for c in f"\n{date}\n"] for date in dates])


def batches(pairs: Pairs, characters: Characters) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs again and again in random order, those of a batch of about the same length."""
    rng, size = random.Random(1), BATCH_SIZE
    while True:
        shuffled = rng.sample(pairs, len(pairs))
        for start in range(0, len(pairs) - 20 * size + 1, 20 * size):
            ordered = sorted(shuffled[start : start + 20 * size], key=lambda pair: len(pair[0]))
            for i in rng.sample(range(0, 20 * size, size), 20):
                texts, dates = zip(*ordered[i : i + size], strict=True)
                yield characters(texts), outputs(dates)


def translate(
    model: Translator, texts: Sequence[str], characters: Characters, contender: str
) -> list[str]:
    found, attend, memory = {}, ATTENTION[contender], MEMORY[contender]
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), 100):
        part = ordered[start : start + 100]
        tokens = beam_search(model, characters(part), len("\n2026-11-28"), BEAMS, attend, memory)
        for text, row in zip(part, tokens.tolist(), strict=True):
            found[text] = "".join(OUTPUT[token] for token in row if token != END)
    return [found[text] for text in texts]


@torch.no_grad()
def cross_weights(model: Translator, source: Tensor, target: Tensor) -> np.ndarray:
    """How the last layer of the decoder weighs a text's characters, mean of the heads."""
    last = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        last["q"], last["k"] = q, k
        return F.scaled_dot_product_attention(q, k, v, **options)

    model(source, target, attend)
    return fastattn.torch.attention_weights(**last)[0].mean(0).numpy()


def plot(path: Path, text: str, date: str, weights: np.ndarray) -> None:
    figure = Figure(figsize=(max(6, 0.3 * len(text) + 1.5), 4.5), layout="constrained")
    axes = figure.subplots()
    shown = [c.replace(" ", "␣") for c in text]
    attention_map(weights, tokens_q=date, tokens_k=shown, ax=axes, aspect="auto", vmin=0)
    axes.tick_params("x", rotation=0)
    axes.set_xlabel("the text, ␣ for a space: what each row looks at")
    axes.set_ylabel("the ISO date, written from top to bottom")
    axes.set_title(f"“{text}” → {date}", loc="left", fontsize=14)
    axes.set_title("cross-attention of the last layer, mean of the heads", loc="right", fontsize=9)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Translate dates by an encoder-decoder.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    picture = Path(tempfile.gettempdir()) / "translation.png"
    parser.add_argument("--plot", type=Path, metavar="PNG", default=picture)
    args = parser.parse_args(argv)
    sizes = QUICK if args.quick else FULL

    data = read_data(sizes.languages, sizes.pairs, sizes.test)
    characters = Characters(data.training)
    print(
        f"{len(data.training):,} dates of {data.languages} languages to train on, "
        f"{len(characters.numbers):,} characters; languages that it never sees:\n{data.unseen}"
    )
    torch.manual_seed(0)
    model = Translator(len(characters.numbers) + 2, len(OUTPUT), sizes.width, HEADS, LAYERS)
    some = islice(batches(data.training, characters), TIMED)
    timed = train(model, ATTENTION, some, LEARNING_RATE, TIMED, WARM_UP)

    steps = sizes.epochs * sizes.pairs // BATCH_SIZE
    run = Run(model, ATTENTION["fastattn"], LEARNING_RATE, steps, WARM_UP)
    every = islice(batches(data.training, characters), steps)
    for batch in tqdm(every, desc="training", total=steps, unit="step", disable=None):
        run.step(batch)
    print(f"trained with fastattn: {steps:,} steps, {sum(run.seconds):.0f} s")

    tests = {
        f"held-out dates, {data.languages} languages": data.held_out_dates,
        "their regional forms and other scripts": data.other_forms,
        "unseen languages": data.unseen_languages,
    }
    print(f"\n{'exact match, %; seconds':<42}{'fastattn':>15}{'PyTorch':>15}")
    exact = []
    for kind, pairs in tests.items():
        texts, dates = zip(*pairs, strict=True)
        line = f"{kind:<42}"
        for name in ATTENTION:
            start = time.perf_counter()
            found = translate(run.model, texts, characters, name)
            seconds = time.perf_counter() - start
            exact.append(np.mean(np.equal(found, dates)))
            line += f"{100 * exact[-1]:>9.1f}{seconds:>6.1f}"
        print(line)
    print(f"the first {TIMED} steps of training with both, on the same batches:")
    print_times(timed)

    # One to draw: long, in Latin letters, in another order than the ISO date's.
    latin = (p for p in data.held_out_dates if p[0].isascii() and len(p[0]) > 24)
    text, date = next((text, date) for text, date in latin if text.endswith(date[:4]))
    weights = cross_weights(run.model, characters([text]), outputs([date]))
    plot(args.plot, text, date, weights[: len(date)])
    print(f"drawn to {args.plot}")
    reached = min(exact[:2]) >= sizes.target
    print(
        f"exact match {100 * exact[0]:.1f} % on {sizes.test:,} held-out dates "
        f"(target {100 * sizes.target:.0f} %): {'ok' if reached else 'MISSED'}"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
