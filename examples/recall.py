"""Texts that ask for what they said before, and a model that finds it, for `long_range.py`.

A text of real words (docstrings of the standard library) has pairs "name = value" strewn in.  Names
and values are words like the others, drawn anew for each text, so that the only way to answer
"name =" is to find where it stood before.

The model has two layers without any code for positions.  A query and a key are the same projection
of a token, mixed with the three tokens before it by two short convolutions; so the query of an
equals sign can hold the name before it, and the key of a value the name two tokens before it.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn.torch
from corpus import LIBRARY, docstrings
from stopwatch import Attend

Tokens = np.ndarray  # of int64

START, EQUALS, UNKNOWN = 0, 1, 2
WORDS, NAMES = 2000, 1000  # in the vocabulary; of them, those that are names and values
EMBED_DIM, HEADS, LAYERS = 64, 2, 2
LENGTH, BATCH_SIZE = 256, 16  # tokens of a text to train on, texts of a step
KEPT = 64  # tokens at the start of a text, where some answers are
START_OF_TEXT = -1  # in the place of a distance


# --- text -------------------------------------------------------------------------------------


class Words(NamedTuple):
    vocabulary: list[str]
    names: Tokens  # those words that are names and values
    training: Tokens
    held_out: Tokens


def read_words() -> Words:
    """All words by their numbers in the vocabulary; an equals sign is ours alone."""
    text = "\n".join(docstrings(sorted(LIBRARY.glob("*.py")))).lower()
    words = re.findall(r"[a-z]+|\d+|[^\w\s=]", text)
    vocabulary = ["\n", "=", "?"] + [word for word, _ in Counter(words).most_common(WORDS)]
    number = {word: i for i, word in enumerate(vocabulary)}
    names = [i for i, word in enumerate(vocabulary) if word.isalpha() and len(word) > 2][:NAMES]
    tokens = np.array([number.get(word, UNKNOWN) for word in words])
    training, held_out = np.split(tokens, [len(tokens) * 7 // 10])
    return Words(vocabulary, np.array(names), training, held_out)


def pairs_of(names: Tokens, count: int, rng: np.random.Generator) -> Tokens:
    """Rows of a name, an equals sign, a value; no name twice."""
    equals = np.full(count, EQUALS)
    return np.stack([rng.permutation(names)[:count], equals, rng.choice(names, count)], axis=1)


def training_text(words: Words, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """A text with each pair twice, and the answers at the second places' equals signs, else -1."""
    begin = rng.integers(len(words.training) - LENGTH)
    text, answers = words.training[begin : begin + LENGTH].copy(), np.full(LENGTH, -1)
    text[0] = START
    count = LENGTH // 16
    slots = np.sort(rng.permutation(LENGTH // 4)[: 2 * count].reshape(2, count), axis=0)
    places = 4 * slots[..., np.newaxis] + [1, 2, 3]
    text[places] = pairs = pairs_of(words.names, count, rng)
    answers[places[1, :, 1]] = pairs[:, 2]
    return text, answers


class Question(NamedTuple):
    place: int  # of its equals sign
    answer: int  # where the answer stands before
    distance: int  # between them, about; or START_OF_TEXT: it is among the first KEPT tokens


def long_text(
    words: Words, length: int, distances: list[int], rng: np.random.Generator
) -> tuple[Tokens, list[Question]]:
    """A held-out text that ends with a question of each distance, and has a pair in 64 tokens."""
    begin = rng.integers(len(words.held_out) - length)
    text = words.held_out[begin : begin + length].copy()
    text[0] = START
    pairs = pairs_of(words.names, max(len(distances), length // 64), rng)
    places = length - 8 * np.arange(1, len(distances) + 1)
    taken = {0, *(places[:, np.newaxis] + [0, 1, 2]).ravel()}

    def put(pair: Tokens, place: int) -> int:
        """At the last free place that is not behind this one; where its value stands."""
        while taken & {place, place + 1, place + 2}:
            place -= 1
        taken.update((place, place + 1, place + 2))
        text[place : place + 3] = pair
        return place + 2

    questions = []
    for place, distance, pair in zip(places, rng.permutation(distances), pairs, strict=False):
        text[place : place + 3] = pair
        back = put(pair, KEPT - 3 if distance == START_OF_TEXT else place - 1 - distance)
        questions.append(Question(place + 1, back, distance))
    for pair in pairs[len(distances) :]:
        put(pair, rng.integers(KEPT, places[-1]))
    return text, questions


# --- the model --------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(EMBED_DIM), nn.LayerNorm(EMBED_DIM)
        self.q_k, self.v, self.out = (nn.Linear(EMBED_DIM, EMBED_DIM) for _ in range(3))
        self.mix_q, self.mix_k = (
            nn.Conv1d(EMBED_DIM, EMBED_DIM, 4, padding=3, groups=EMBED_DIM) for _ in range(2)
        )
        hidden = nn.Linear(EMBED_DIM, 4 * EMBED_DIM)
        self.mlp = nn.Sequential(hidden, nn.ReLU(), nn.Linear(4 * EMBED_DIM, EMBED_DIM))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of (batch, seqlen, EMBED_DIM), each (batch, HEADS, seqlen, head_dim)."""
        y = self.norm(x)
        q_k, seqlen = self.q_k(y).transpose(1, 2), x.shape[1]
        mixes = self.mix_q(q_k), self.mix_k(q_k)  # PyTorch's fused kernel wants them contiguous
        q, k = (mix[..., :seqlen].transpose(1, 2).contiguous() for mix in mixes)
        # Beside more keys, the right one keeps its weight only if its score grows with log(keys).
        keys = torch.arange(2.0, seqlen + 2)
        q = q * (4 / math.log(LENGTH) * keys.log())[:, None]
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, self.v(y)))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.out(attend(*self.heads(x)).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(UNKNOWN + 1 + WORDS, EMBED_DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(EMBED_DIM)

    def forward(self, text: Tensor, attend: Attend) -> Tensor:
        """What each token is followed by, as an embedding: `logits` compares it with all words.

        `attend` is causal.
        """
        x = self.words(text)
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.words.weight.T * (2 / math.sqrt(EMBED_DIM))

    @torch.no_grad()
    def weights(self, text: Tokens, attend: Attend) -> np.ndarray:
        """How the last token weighs all, (LAYERS, HEADS, len(text))."""
        x, weights = self.words(torch.from_numpy(text[None])), []
        for layer in self.layers:
            q, k, _ = layer.heads(x)
            weights.append(fastattn.torch.attention_weights(q, k, rows=[-1])[0, :, 0].numpy())
            x = layer(x, attend)
        return np.stack(weights)


def train(words: Words, steps: int, rng: np.random.Generator) -> Model:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps, pct_start=0.1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.torch.attention(q, k, v, causal=True)

    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    for _ in progress:
        texts = [training_text(words, rng) for _ in range(BATCH_SIZE)]
        text, answers = (torch.from_numpy(np.stack(part)) for part in zip(*texts, strict=True))
        asked = answers >= 0
        loss = F.cross_entropy(model.logits(model(text, attend)[asked]), answers[asked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model
