"""Translate dates, as nearly 300 languages write them, to ISO dates.

Babel's CLDR data write a date in a language's own words, and often in its own digits:

    viernes, 3 de febrero de 1989   ->  1989-02-03
    १२ ऑगस्ट, २०४५                  ->  2045-08-12

The program is not told the language.  A transformer over characters (`seq2seq.py`) learns it in
PyTorch, its attention in the encoder, in the decoder and across by `fastattn.torch`.  A beam search
then translates: a `fastattn.KVCache` for each layer of the decoder holds the beams and follows them
by `reorder`.  Beside it, the same weights translate with PyTorch's attention, without a cache.

The dates of the test are held out in every language.  Beside them stand languages, drawn by lot,
of which the training saw nothing, and regional forms and other scripts of languages that it saw.

    python examples/translation.py --plot translation.png
"""

import argparse
import copy
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn.torch
from dates import Pairs, read_data
from seq2seq import END, PADDING, Attend, Cached, Concatenated, Translator, beam_search
from stopwatch import Stopwatch

CONTENDERS: dict[str, tuple[Attend, Any]] = {
    "fastattn": (fastattn.torch.scaled_dot_product_attention, Cached),
    "PyTorch": (F.scaled_dot_product_attention, Concatenated),
}
OUTPUT = "\n-0123456789"  # the line end is seq2seq.END
UNKNOWN = PADDING + 1
BEAMS, HEADS, LAYERS, BATCH_SIZE = 4, 4, 2, 64


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


# --- training ---------------------------------------------------------------------------------


def batches(pairs: Pairs) -> Iterator[Pairs]:
    """All pairs again and again in random order, those of a batch of about the same length."""
    rng, size = random.Random(1), BATCH_SIZE
    while True:
        shuffled = rng.sample(pairs, len(pairs))
        for start in range(0, len(pairs) - 20 * size + 1, 20 * size):
            ordered = sorted(shuffled[start : start + 20 * size], key=lambda pair: len(pair[0]))
            yield from rng.sample([ordered[i : i + size] for i in range(0, 20 * size, size)], 20)


def decode(model: Translator, source: Tensor, target: Tensor, attend: Attend) -> Tensor:
    """Logits of what follows each character of the target."""
    mask = (source != PADDING)[:, None, None, :]

    def across(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, attn_mask=mask)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, is_causal=True)

    return model.decode(target, 0, model.encode(source, across), [own] * LAYERS, across)


def train(
    model: Translator, pairs: Pairs, characters: Characters, steps: int, attend: Attend
) -> tuple[list[float], float]:
    """The losses and the seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    losses, start = [], time.perf_counter()
    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    for _, batch in zip(progress, batches(pairs), strict=False):
        texts, dates = zip(*batch, strict=True)
        source, target = characters(texts), outputs(dates)
        logits = decode(model, source, target[:, :-1], attend)
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, time.perf_counter() - start


def translate(
    model: Translator, texts: Sequence[str], characters: Characters, attend: Attend, memory: Any
) -> list[str]:
    found = {}
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), 100):
        part = ordered[start : start + 100]
        tokens = beam_search(model, characters(part), len("\n2026-11-28"), BEAMS, attend, memory)
        for text, row in zip(part, tokens.tolist(), strict=True):
            found[text] = "".join(OUTPUT[token] for token in row if token != END)
    return [found[text] for text in texts]


# --- report -----------------------------------------------------------------------------------


@torch.no_grad()
def cross_weights(model: Translator, text: str, date: str, characters: Characters) -> Any:
    """How the last layer of the decoder weighs the text's characters, (len(date), len(text))."""
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k))
        return F.scaled_dot_product_attention(q, k, v, **options)

    decode(model, characters([text]), outputs([date])[:, :-1], attend)
    q, k = seen[-1]
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[3]), dim=-1)
    return weights[0].mean(0)[: len(date)].numpy()


def plot(path: Path, text: str, date: str, weights: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.3 * len(text) + 1.5), 4.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(text)), ["␣" if c == " " else c for c in text])
    axes.set_yticks(range(len(date)), list(date))
    axes.set_xlabel(f"looks at: “{text}”")
    axes.set_ylabel("writes, from top to bottom")
    axes.set_title("Cross-attention in the last layer, mean of the heads", loc="left")
    figure.colorbar(image, label="weight (each row sums to 1)")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Translate dates by an encoder-decoder.")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--plot", type=Path, metavar="PNG", default=Path("translation.png"))
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

    print("\nthe first 20 steps of training")
    for name, (attend, _) in CONTENDERS.items():
        watch = Stopwatch(attend)
        losses, seconds = train(copy.deepcopy(model), data.training, characters, 20, watch)
        print(f"{name:<10}{50 * seconds:>6.0f} ms a step, {watch.seconds / seconds:.0%} of it in "
              f"attention; loss {losses[-1]:.5f}")  # fmt: skip
    steps = sizes.epochs * sizes.pairs // BATCH_SIZE
    _, seconds = train(model, data.training, characters, steps, CONTENDERS["fastattn"][0])
    print(f"trained with fastattn: {steps:,} steps, {seconds:.0f} s")

    tests = {
        f"held-out dates, {data.languages} languages": data.held_out_dates,
        "their regional forms and other scripts": data.other_forms,
        "unseen languages": data.unseen_languages,
    }
    print(f"\n{'exact match, %; seconds':<42}{'fastattn':>15}{'PyTorch':>15}")
    exact = []
    for kind, pairs in tests.items():
        texts, dates = zip(*pairs, strict=True)
        line = ""
        for attend, memory in CONTENDERS.values():
            start = time.perf_counter()
            found = translate(model, texts, characters, attend, memory)
            seconds = time.perf_counter() - start
            exact.append(sum(map(str.__eq__, found, dates)) / len(dates))
            line += f"{100 * exact[-1]:>9.1f}{seconds:>6.1f}"
        print(f"{kind:<42}{line}")

    text, date = next(p for p in data.held_out_dates if p[0].isascii() and len(p[0]) > 24)
    plot(args.plot, text, date, cross_weights(model, text, date, characters))
    print(f"drawn to {args.plot}")
    good = min(exact[:2]) >= sizes.target
    print(f"exact match {100 * exact[0]:.1f} % on {sizes.test:,} held-out dates "
          f"(target {100 * sizes.target:.0f} %): {'ok' if good else 'WRONG'}")  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
