"""A decoder-only transformer over characters that needs no training, for `generate.py`.

Its weights are made in a few seconds from the language reference that ships with Python:

1. attention: head h looks h characters back, by the angles of the positional code, and notes what
   is there.  Every position then knows the last `order` characters.
   MLP: one hidden unit for each frequent sequence of characters up to that length, which is 1 where
   the text just ended with it.  Its output weights are how the sequence changes the log-probability
   of each next character, compared to the sequence without its first character.  The differences
   add up to the log-probabilities after the longest known sequence: a back-off n-gram model.
2. attention: one head looks for places where the same characters stood before, and votes against
   what followed there ("copy suppression", https://arxiv.org/abs/2310.04625), so that greedy
   writing does not go in circles.  Where there is none, the head's `sinks` take its weight.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np

import fastattn as fa

Attend = Callable[..., Any]  # (q, k, v, **options) -> attention over everything so far

LETTERS = " abcdefghijklmnopqrstuvwxyz"
ALPHABET = "\n" + LETTERS + "0123456789.,'()-"
NUM_ANGLES = 32  # of the positional code; random ones, so that no two positions look alike
# Scores that differ by 1 give weights that differ by e**SHARPNESS: as good as one and none.
SHARPNESS = 20.0
SUPPRESSION = 6.0  # what the second block takes off a log-probability
PSEUDOCOUNT = 1.0  # weight of the shorter context's probabilities in the counts of a longer one


# --- the model --------------------------------------------------------------------------------


class Block(NamedTuple):
    attention: fa.MultiHeadAttention
    options: dict[str, Any]  # of the attention
    w_hidden: np.ndarray | None  # (embed_dim, hidden); None: no MLP
    b_hidden: np.ndarray | None
    w_out: np.ndarray | None  # (hidden, embed_dim)


class Model(NamedTuple):
    order: int
    tokens: np.ndarray  # (vocabulary, embed_dim)
    angles: np.ndarray  # (NUM_ANGLES,) per position
    blocks: list[Block]
    w_logits: np.ndarray  # (embed_dim, vocabulary)
    b_logits: np.ndarray

    @property
    def characters(self) -> str:
        return ALPHABET

    @property
    def layers(self) -> list[fa.MultiHeadAttention]:
        return [block.attention for block in self.blocks]

    def encode(self, text: str) -> np.ndarray:
        unknown = sorted(set(text.lower()) - set(ALPHABET))
        if unknown:
            raise ValueError(f"characters that the model does not know: {unknown}")
        # Line ends before the text, for the heads that look back beyond it.
        return np.array([ALPHABET.index(c) for c in "\n" * self.order + text.lower()])

    def __call__(self, tokens: np.ndarray, start: int, attends: list[Attend]) -> np.ndarray:
        """Logits of what follows `tokens`, which stand at position `start` and on."""
        x = self.tokens[tokens]
        x[:, -2 * NUM_ANGLES :] = position_code(self.angles, start + np.arange(len(tokens)))
        x = x[np.newaxis]  # a batch of one
        for block, attend in zip(self.blocks, attends, strict=True):
            block.attention.attend = attend  # between the projections
            x = block.attention(x, residual=True, **block.options)
            if block.w_hidden is not None:
                x += np.maximum(x @ block.w_hidden + block.b_hidden, 0) @ block.w_out
        return x[0, -1] @ self.w_logits + self.b_logits


def position_code(angles: np.ndarray, positions: np.ndarray) -> np.ndarray:
    turned = np.outer(positions, angles)
    return np.concatenate([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)


# --- its weights ------------------------------------------------------------------------------


def corpus() -> str:
    """The paragraphs of prose in Python's language reference, one a line, in our alphabet."""
    reference = "\n\n".join(topics.values()).lower().replace("’", "'")
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", reference)]
    prose = [p for p in paragraphs if sum(c in LETTERS for c in p) > max(100, 0.93 * len(p))]
    return "\n".join(re.sub(rf"[^{ALPHABET}]", "", p) for p in prose)


def make_model(text: str, order: int, hidden: int) -> Model:
    size = len(ALPHABET)
    # The residual stream: the last `order` characters, log-probabilities, the positional code.
    seen = [slice(h * size, (h + 1) * size) for h in range(order)]
    logits = slice(order * size, (order + 1) * size)
    position = slice(logits.stop, logits.stop + 2 * NUM_ANGLES)
    embed_dim = position.stop

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    eye = np.eye(size, dtype=np.float32)
    tokens = zeros(size, embed_dim)
    tokens[:, seen[0]] = eye
    angles = np.random.default_rng(0).uniform(0, np.pi, NUM_ANGLES)

    # Block 1: the key is the position, the query of head h the position turned back by h.
    num_heads, head_dim = order - 1, 2 * NUM_ANGLES
    w_q, w_k = zeros(embed_dim, num_heads, head_dim), zeros(embed_dim, head_dim)
    w_v, w_o = zeros(embed_dim, size), zeros(num_heads, size, embed_dim)
    w_k[position] = np.eye(head_dim)
    w_v[seen[0]] = eye
    for h in range(1, order):
        cos, sin = np.diag(np.cos(h * angles)), np.diag(np.sin(h * angles))
        w_q[position, h - 1] = np.block([[cos, -sin], [sin, cos]])
        w_o[h - 1, :, seen[h]] = eye
    look_back = fa.MultiHeadAttention(
        w_q.reshape(embed_dim, -1), w_k, w_v, w_o.reshape(-1, embed_dim), num_heads=num_heads
    )
    w_hidden, b_hidden, w_out = zeros(embed_dim, hidden), zeros(hidden), zeros(hidden, embed_dim)
    b_logits, units = context_units(text, order, hidden)
    for unit, (context, change) in enumerate(units):
        for h, char in enumerate(reversed(context)):
            w_hidden[seen[h].start + ALPHABET.index(char), unit] = 2.0
        b_hidden[unit] = 1.0 - 2.0 * len(context)  # 1 if every character is right, else negative
        w_out[unit, logits] = change

    # Block 2: the query is the last characters, the key the characters before.
    width = (order - 1) * size
    w_q, w_k = zeros(embed_dim, width), zeros(embed_dim, width)
    w_v, w_o = zeros(embed_dim, size), zeros(size, embed_dim)
    w_q[:width] = w_k[size : size + width] = np.eye(width)
    w_v[seen[0]] = eye
    w_o[:, logits] = -SUPPRESSION * eye
    suppress = fa.MultiHeadAttention(w_q, w_k, w_v, w_o, num_heads=1)
    all_but_half_right = np.array([SHARPNESS * (order - 1.5)])

    w_logits = zeros(embed_dim, size)
    w_logits[logits] = eye
    blocks = [
        Block(look_back, {"scale": SHARPNESS / 8}, w_hidden, b_hidden, w_out),
        Block(suppress, {"scale": SHARPNESS, "sinks": all_but_half_right}, None, None, None),
    ]
    return Model(order, tokens, angles, blocks, w_logits, b_logits)


def context_units(
    text: str, order: int, hidden: int
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Log-probabilities of characters, and how each frequent context changes them."""
    counts = Counter[str]()
    for n in range(1, order + 2):
        counts.update(text[i : i + n] for i in range(len(text) - n + 1))
    following: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(ALPHABET)))
    for chars, count in counts.items():
        following[chars[:-1]][ALPHABET.index(chars[-1])] = count
    # Shorter first among equals: a context without its first character is at least as frequent, so
    # it is always there too.
    ranked = sorted((-counts[c], len(c), c) for c in following if 0 < len(c) <= order)[:hidden]

    start = following[""] + PSEUDOCOUNT
    log_p = {"": np.log(start / start.sum())}
    units = []
    for _, _, context in sorted(ranked, key=lambda entry: entry[1]):
        shorter, n = log_p[context[1:]], following[context]
        p = (n + PSEUDOCOUNT * np.exp(shorter)) / (n.sum() + PSEUDOCOUNT)
        log_p[context] = np.log(p)
        units.append((context, log_p[context] - shorter))
    return log_p[""].astype(np.float32), units
