"""Questions whose answer lies 16,000 tokens back: full attention, a window, a window and the start.

A text of real words (docstrings of the standard library) has pairs "name = value" strewn in, and
ends with questions "name =".  Names and values are words like the others, drawn anew for each text,
so that the only way to an answer is to find it.  The model has two layers without any code for
positions: a query and a key are the same projection of a token, mixed with the three tokens before
it by two short convolutions, and a query is multiplied by the logarithm of its number of keys
(https://arxiv.org/abs/2501.19399).  It is trained in PyTorch through `fastattn.torch` on texts of
256 tokens, and then reads held-out ones of 17,000 in parts, through one `fastattn.KVCache` a layer:

    full        KVCache(..., max_seqlen=17000)                 remembers everything
    window      KVCache(..., window=256)                       the last 256 tokens
    and start   KVCache(..., window=256, num_sinks=64)         and the first 64
                                                     (https://arxiv.org/abs/2309.17453)

Each runs in a process of its own, like PyTorch's attention with the same weights, which needs a
mask of all pairs of tokens for a window.

    python examples/long_range.py --plot long_range.png
"""

import argparse
import ast
import math
import re
import resource
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn as fa
import fastattn.torch
from stopwatch import Stopwatch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Tokens = np.ndarray  # of int64

START, EQUALS, UNKNOWN = 0, 1, 2
WORDS, NAMES = 2000, 1000  # in the vocabulary; of them, those that are names and values
EMBED_DIM, HEADS, LAYERS = 64, 2, 2
LENGTH, BATCH_SIZE = 256, 16  # of a training text, and texts of a step
WINDOW, KEPT, PART = 256, 64, 1024
START_OF_TEXT = -1  # a distance: within the first KEPT tokens


class Sizes(NamedTuple):
    steps: int
    length: int  # of a long text
    texts: int
    distances: tuple[int, ...]
    target: float  # accuracy of full attention at the last of them
    questions: int = 10  # of each distance in a text


FULL = Sizes(400, 17_000, 10, (50, 200, 500, 1000, 2000, 4000, 8000, 16_000), 0.95)
QUICK = Sizes(200, 2500, 2, (50, 200, 500, 1000), 0.8)


# --- text -------------------------------------------------------------------------------------


def docstrings() -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented):
                yield ast.get_docstring(node) or ""


def read_words() -> tuple[list[str], Tokens]:
    """The vocabulary and all the words by their numbers in it; an equals sign is ours alone."""
    text = "\n".join(docstrings()).lower()
    words = re.findall(r"[a-z]+|\d+|[^\w\s=]", text)
    vocabulary = ["\n", "=", "?"] + [word for word, _ in Counter(words).most_common(WORDS)]
    number = {word: i for i, word in enumerate(vocabulary)}
    return vocabulary, np.array([number.get(word, UNKNOWN) for word in words])


def pairs_of(names: Tokens, count: int, rng: np.random.Generator) -> Tokens:
    """Rows of a name, an equals sign, a value; no name twice."""
    equals = np.full(count, EQUALS)
    return np.stack([rng.permutation(names)[:count], equals, rng.choice(names, count)], axis=1)


def training_text(words: Tokens, names: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """A text with each pair twice, and the answers at the second places' equals signs, else -1."""
    begin = rng.integers(len(words) - LENGTH)
    text, answers = words[begin : begin + LENGTH].copy(), np.full(LENGTH, -1)
    text[0] = START
    count = LENGTH // 16
    slots = np.sort(rng.permutation(LENGTH // 4)[: 2 * count].reshape(2, count), axis=0)
    places = 4 * slots[..., np.newaxis] + [1, 2, 3]
    text[places] = pairs = pairs_of(names, count, rng)
    answers[places[1, :, 1]] = pairs[:, 2]
    return text, answers


class Question(NamedTuple):
    place: int  # of its equals sign
    answer: int  # where the answer stands before
    distance: int  # about, one of those of Sizes


def long_text(
    words: Tokens, names: Tokens, sizes: Sizes, rng: np.random.Generator
) -> tuple[Tokens, list[Question]]:
    """A text that ends with a question in every 8 tokens, and one pair in 64 tokens elsewhere."""
    begin = rng.integers(len(words) - sizes.length)
    text = words[begin : begin + sizes.length].copy()
    text[0] = START
    distances = rng.permutation(sizes.questions * [*sizes.distances, START_OF_TEXT])
    pairs = pairs_of(names, max(len(distances), sizes.length // 64), rng)
    places = sizes.length - 8 * np.arange(1, len(distances) + 1)
    free = np.arange(1, sizes.length)
    taken = {0, *(places[:, np.newaxis] + [0, 1, 2]).ravel()}

    def put(pair: Tokens, place: int) -> int:
        """At the last free place that is not behind this one; where its value stands."""
        while taken & {place, place + 1, place + 2}:
            place -= 1
        taken.update((place, place + 1, place + 2))
        text[place : place + 3] = pair
        return place + 2

    questions = []
    for place, distance, pair in zip(places, distances, pairs, strict=False):
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
        q, k = (mix(q_k)[..., :seqlen].transpose(1, 2) for mix in (self.mix_q, self.mix_k))
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
        """What each token is followed by, as an embedding: `logits` compares it with all words."""
        x = self.words(text)
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.words.weight.T * (2 / math.sqrt(EMBED_DIM))


def train(words: Tokens, names: Tokens, steps: int, rng: np.random.Generator) -> Model:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.torch.attention(q, k, v, causal=True)

    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    for _ in progress:
        texts = [training_text(words, names, rng) for _ in range(BATCH_SIZE)]
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
    answer: int, around: list[str],
) -> None:  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    styles = {"full": ("#0072B2", "o"), "window": ("#D55E00", "s"), "window and start": ("#009E73", "^")}
    for name, (colour, marker) in styles.items():
        top.plot(accuracy[f"fastattn, {name}"], color=colour, marker=marker, label=name)
    top.set_xticks(range(len(distances)), [label(d) for d in distances])
    top.set_xlabel("tokens between question and answer; at the right: answer in the first tokens")
    top.set_ylabel("questions answered correctly")
    top.set_title(f"Trained on texts of {LENGTH} tokens, asked in texts of {len(weights):,}", loc="left")
    top.legend(frameon=False, loc="center left")
    place = len(weights) - 1
    bottom.plot(weights, color="#0072B2", linewidth=0.8)
    bottom.set_title("Where one question looks: the weights of its last layer over all keys", loc="left")
    bottom.annotate(
        f"{place - answer:,} tokens back\n“… {' '.join(around)} …”", (answer, weights[answer]),
        (30, -30), textcoords="offset points", arrowprops={"arrowstyle": "->"},
    )  # fmt: skip
    bottom.axvspan(place - WINDOW, place, color="#D55E00", alpha=0.3, label="what a window sees")
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
    vocabulary, words = read_words()
    names = [i for i, word in enumerate(vocabulary) if word.isalpha() and len(word) > 2][:NAMES]
    training, held_out = np.split(words, [len(words) * 7 // 10])
    distances = [*sizes.distances, START_OF_TEXT]
    print(
        f"{len(training):,} words of docstrings to train on, {len(held_out):,} held out; "
        f"{len(names)} of them are names and values"
    )
    start = time.perf_counter()
    model = train(training, np.array(names), sizes.steps, rng)
    print(f"trained on {sizes.steps * BATCH_SIZE:,} texts of {LENGTH} tokens, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip

    texts, questions = zip(
        *(long_text(held_out, np.array(names), sizes, rng) for _ in range(sizes.texts)), strict=True
    )
    places = [[q.place for q in asked] for asked in questions]
    accuracy: dict[str, list[float]] = {}
    print(f"\nright answers, %; tokens back: {''.join(f'{label(d):>9}' for d in distances)}"
          f"{'s a text':>10}{'attention':>11}{'MiB':>7}")  # fmt: skip
    for name in CONTENDERS:
        # A process for each, so that the peak of its memory is its own.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            reading = pool.submit(read, name, model, list(texts), places).result()
        right: dict[int, list[bool]] = {d: [] for d in distances}
        for text, asked, found in zip(texts, questions, reading.words, strict=True):
            for question, word in zip(asked, found, strict=True):
                right[question.distance].append(text[question.answer] == word)
        accuracy[name] = [float(np.mean(right[d])) for d in distances]
        print(f"{name:<30}{''.join(f'{100 * a:>9.1f}' for a in accuracy[name])}"
              f"{reading.seconds / len(texts):>10.2f}{reading.share:>11.0%}{reading.mebibytes:>7,.0f}")

    text, asked = texts[0], questions[0]
    far = next(q for q in asked if q.distance == sizes.distances[-1])
    weights = last_weights(model, text, far.place)
    head = weights[:, far.answer].argmax()
    around = [vocabulary[i] for i in text[far.answer - 2 : far.answer + 1]]
    plot(args.plot, accuracy, distances, weights[head], far.answer, around)
    print(f"drawn to {args.plot}")

    count = sizes.texts * sizes.questions
    figure, windowed = (accuracy[f"fastattn, {n}"][len(distances) - 2] for n in ("full", "window"))
    good = figure >= sizes.target and windowed <= 0.05
    print(f"{100 * figure:.1f} % of {count} answers {sizes.distances[-1]:,} tokens back right "
          f"(target {100 * sizes.target:.0f} %), with a window {100 * windowed:.1f} %: "
          f"{'ok' if good else 'WRONG'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
