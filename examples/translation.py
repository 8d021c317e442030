"""Translate dates, as nearly 300 languages write them, to ISO dates.

Babel's CLDR data write a date in a language's own words, and often in its own digits:

    viernes, 3 de febrero de 1989   ->  1989-02-03
    १२ ऑगस्ट, २०४५                  ->  2045-08-12

The program is not told the language.  An encoder-decoder transformer over characters learns it in
PyTorch, its three kinds of attention by `fastattn.torch`.  A beam search then translates: a
`fastattn.KVCache` holds the beams of each decoder layer and follows them by `reorder`; in
cross-attention the beams of a text are the queries, its characters the keys.  Beside it, the same
weights translate with PyTorch's attention.

The dates of the test are held out in every language.  Beside them stand languages, drawn by lot,
of which the training saw nothing, and regional forms and other scripts of languages that it saw.

    python examples/translation.py --plot translation.png
"""

import argparse
import datetime
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from babel import Locale
from babel.dates import format_date
from babel.localedata import locale_identifiers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn as fa
import fastattn.torch
from stopwatch import Stopwatch

Attend = Callable[..., Tensor]  # (q, k, v, attn_mask=..., is_causal=...)
ATTENTION = {
    "fastattn": fastattn.torch.scaled_dot_product_attention,
    "PyTorch": F.scaled_dot_product_attention,
}
FIRST, DAYS = datetime.date(1900, 1, 1), 73_049  # to the end of 2099
ZERO = {
    "adlm": "𞥐", "arab": "٠", "arabext": "۰", "beng": "০", "cakm": "𑄶", "deva": "०", "hmnp": "𞅀",
    "latn": "0", "mtei": "꯰", "mymr": "၀", "nkoo": "߀", "olck": "᱐", "tibt": "༠",
}  # fmt: skip
OUTPUT = "\n-0123456789"  # the line end stands before and after a date
END, PADDING, UNKNOWN = 0, 0, 1
BEAMS = 4


class Sizes(NamedTuple):
    languages: int  # the most that are seen in training
    pairs: int
    epochs: int
    test: int  # pairs of each kind
    target: float  # exact matches among held-out dates
    width: int
    heads: int = 4
    layers: int = 2
    batch_size: int = 128


FULL = Sizes(1000, 60_000, 5, 2000, 0.97, 128)
QUICK = Sizes(8, 4000, 6, 200, 0.5, 64)


# --- data -------------------------------------------------------------------------------------


def draw(rng: random.Random, count: int, locales: list[str], days: list[int]) -> dict[str, str]:
    """Dates as these locales write them, without those of digits alone: 3/2/1989 is two dates."""
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        locale = Locale.parse(rng.choice(locales))
        date = FIRST + datetime.timedelta(rng.choice(days))
        text = format_date(date, rng.choice(("full", "long", "medium")), locale)
        zero = ord(ZERO[locale.default_numbering_system])
        if any(c.isalpha() for c in text):
            pairs[text.translate({48 + i: zero + i for i in range(10)})] = date.isoformat()
    return pairs


def read_data(sizes: Sizes) -> dict[str, dict[str, str]]:
    rng = random.Random(0)
    names = sorted(locale_identifiers())
    # Where CLDR does not know the months, they are M01 to M12.
    names = [n for n in names if "M11" not in Locale.parse(n).months["format"]["wide"].values()]
    languages = [n for n in names if "_" not in n]
    rng.shuffle(languages)
    unseen, seen = languages[:30], languages[30:][: sizes.languages]
    forms = [n for n in names if "_" in n and n.split("_")[0] in seen]
    days = rng.sample(range(DAYS), DAYS)
    held_out, training = days[: DAYS // 10], days[DAYS // 10 :]
    data = {
        "training": draw(rng, sizes.pairs, seen, training),
        "held-out dates": draw(rng, sizes.test, seen, held_out),
        "unseen forms": draw(rng, 3 * sizes.test, forms, held_out),
        "unseen languages": draw(rng, sizes.test, unseen, held_out),
    }
    return data


def batch_of(sources: list[str], numbers: dict[str, int]) -> Tensor:
    rows = [torch.tensor([numbers.get(c, UNKNOWN) for c in source]) for source in sources]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


# --- the model --------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return self.out(attend(self.split(self.q(x)), k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, own: Attend, cross: Attend | None = None, kv: Any = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, *self.own.keys_values(y), own)
        if cross is not None:
            x = x + self.cross(self.norms[1](x), *kv, cross)
        return x + self.mlp(self.norms[2](x))


class Translator(nn.Module):
    def __init__(self, sizes: Sizes, characters: int) -> None:
        super().__init__()
        self.source = nn.Embedding(characters, sizes.width)
        self.target = nn.Embedding(len(OUTPUT), sizes.width)
        self.positions = nn.Parameter(0.1 * torch.randn(100, sizes.width))
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(sizes.width, sizes.heads) for _ in range(sizes.layers))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(sizes.width)
        self.logits = nn.Linear(sizes.width, len(OUTPUT))

    def encode(self, source: Tensor, attend: Attend) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the source for the cross-attention of each layer of the decoder."""
        x = self.source(source) + self.positions[: source.shape[1]]
        for layer in self.encoder:
            x = layer(x, attend)
        return [layer.cross.keys_values(x) for layer in self.decoder]

    def decode(self, tokens: Tensor, start: int, kvs: Any, owns: list[Attend], cross: Attend) -> Tensor:
        x = self.target(tokens) + self.positions[start : start + tokens.shape[1]]
        for layer, kv, own in zip(self.decoder, kvs, owns, strict=True):
            x = layer(x, own, cross, kv)
        return self.logits(self.norm(x))
