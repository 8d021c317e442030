"""Five sentences that stand for a document of ten thousand tokens, found by one call of attention.

The documents are the docstrings of whole packages, of Python, NumPy, SciPy and others, and long
topics of `help()`.  all-MiniLM-L6-v2 reads each in windows, with its real weights; then the states
of all its tokens, as unit vectors, look at each other in one call:

    received = fa.attention_weights(states, states, scale=SCALE, reduce="keys")

are the sums of the weights that each token gets from the whole document, without the matrix of
10,000 x 10,000 weights.  In each fifth of the document, the sentence whose tokens receive most in
all goes into the summary: centrality by token, as LexRank's is by sentence
(https://arxiv.org/abs/1109.2128).

Coverage is the share of the document's words, each weighted by TF-IDF, that the summary mentions.
Beside it: the first five sentences; and, since longer sentences cover more and so do those from all
over a document, random ones of the same lengths and from the same fifths.

    python examples/summarization.py
"""

import argparse
import statistics
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fastattn as fa
from minilm import MAX_WINDOW, MiniLM
from python_docs import prose_of
from summaries import PARTS, Document, coverage, random_summary, rarity_of

# SCALE was chosen on asyncio, email, idlelib, logging and tkinter, which are not among these.
# Those that a system leaves out, or that are too short in its version, are skipped.
DOCUMENTS = """
    pip setuptools turtle unittest xml _pydecimal fontTools pandas.core
    numpy.ma numpy.polynomial numpy._core._add_newdocs numpy._core.fromnumeric
    numpy.lib._function_base_impl matplotlib.axes matplotlib.backend_bases matplotlib.figure
    scipy.interpolate scipy.optimize scipy.signal scipy.sparse scipy.stats
    sklearn.ensemble sklearn.linear_model sklearn.metrics topic/compound topic/specialnames
""".split()
QUICK_DOCUMENTS = "unittest xml topic/compound".split()
MIN_TOKENS, MAX_TOKENS = 8000, 10_000  # of a document; what comes after is not read
SCALE = 5.0
DRAWS = 50  # random summaries of a document
BLOCKS = 128  # rows and columns of the picture
MIN_DOCUMENTS = 20
TARGETS, QUICK_TARGETS = (0.08, 0.02), (0.05, 0.0)  # what the first five and random ones cover less


def read_document(name: str, model: MiniLM) -> Document | None:
    """The beginning of what is written about it; None where there is not enough of it."""
    document = Document(name, [], [])
    total = 0
    prose = prose_of(name)
    for sentence, encoding in zip(prose, model.tokenizer.encode_batch(prose), strict=True):
        ids = encoding.ids[1:-1]  # without [CLS] and [SEP]
        if total + len(ids) > MAX_TOKENS:
            break
        if len(ids) < MAX_WINDOW:  # else it is no sentence
            document.sentences.append(sentence)
            document.ids.append(ids)
            total += len(ids)
    return document if total >= MIN_TOKENS else None


# --- the summary ------------------------------------------------------------------------------


def plain_received(x: np.ndarray) -> np.ndarray:
    """`fastattn.attention_weights` of SCALE and ``reduce="keys"`` in NumPy, 1024 rows at a time."""
    received = np.zeros(len(x), x.dtype)
    for start in range(0, len(x), 1024):
        weights = np.float32(SCALE) * (x[start : start + 1024] @ x.T)
        weights -= weights.max(axis=1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=1, keepdims=True)
        received += weights.sum(axis=0)
    return received


RECEIVED = {
    "fastattn": lambda x: fa.attention_weights(x, x, scale=SCALE, reduce="keys"),
    "plain NumPy": plain_received,
}


def per_sentence(received: np.ndarray, document: Document) -> np.ndarray:
    """What the tokens of each sentence receive in all."""
    return np.bincount(document.sentence_of, received)


def summary(scores: np.ndarray, document: Document) -> list[int]:
    return [int(part[scores[part].argmax()]) for part in document.parts]


# --- report -----------------------------------------------------------------------------------


def plot(
    path: Path, document: Document, x: np.ndarray, scores: np.ndarray, chosen: list[int]
) -> None:
    """The map of all weights in blocks, and what the tokens of each sentence receive."""
    from matplotlib.figure import Figure

    pooled = fa.attention_weights(x, x, scale=SCALE, pool=(BLOCKS, BLOCKS))
    ends = np.cumsum([len(i) for i in document.ids])
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
    extent = (0, len(x), len(x), 0)
    ratio = np.log2(pooled * len(x))  # 0: as much as if all were equal
    bound = float(np.quantile(np.abs(ratio), 0.99))
    image = left.imshow(ratio, extent=extent, cmap="RdBu_r", vmin=-bound, vmax=bound)
    figure.colorbar(image, label="log2 of weight / equal weight", shrink=0.8)
    left.set(xlabel="token looked at (key)", ylabel="token that looks (query)")
    left.set_title(f"{len(x):,} x {len(x):,} weights in {BLOCKS} x {BLOCKS} blocks", loc="left")

    right.vlines(ends, 0, scores, color="#BBBBBB", linewidth=0.8)
    right.plot(ends[chosen], scores[chosen], "o", color="#D55E00")
    for number, i in enumerate(chosen, start=1):
        right.annotate(str(number), (ends[i], scores[i]), (4, 2), textcoords="offset points")
    right.set(xlabel="place of a sentence (tokens)", xlim=(0, len(x)), ylim=(0, None))
    right.set_ylabel("attention that its tokens receive (1 for each if all were equal)")
    lines = [textwrap.shorten(document.sentences[i], 170) for i in chosen]
    numbered = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
    summary = f"The summary of {document.name}:\n{numbered}"
    figure.suptitle(summary, x=0.01, ha="left", fontsize="medium")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Summarize long documents by attention.")
    parser.add_argument("--quick", action="store_true", help="three documents, for a test")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where to draw (default: the temporary directory)",
        default=Path(tempfile.gettempdir()) / "summarization.png",
    )  # fmt: skip
    args = parser.parse_args(argv)

    model = MiniLM()
    read = [read_document(name, model) for name in (QUICK_DOCUMENTS if args.quick else DOCUMENTS)]
    documents = [document for document in read if document is not None]
    tokens = sum(len(document.sentence_of) for document in documents)
    print(f"{len(documents)} documents of {tokens / len(documents):.0f} tokens on average")

    rarity = rarity_of(documents)
    rng = np.random.default_rng(0)
    seconds = dict.fromkeys(RECEIVED, 0.0)
    rows, same = [], 0
    for document in tqdm(documents, "summarizing", disable=None, leave=False):
        states = model.states_of_all(document.ids)
        scores = {}
        for name, x in states.items():
            start = time.perf_counter()
            scores[name] = per_sentence(RECEIVED[name](x), document)
            seconds[name] += time.perf_counter() - start
        chosen = summary(scores["fastattn"], document)
        same += chosen == summary(scores["plain NumPy"], document)
        lead = np.concatenate(document.parts)[:PARTS].tolist()
        others = [random_summary(chosen, document, rng) for _ in range(DRAWS)]
        by_chance = statistics.mean(coverage(document, other, rarity) for other in others)
        rows.append([coverage(document, c, rarity) for c in (chosen, lead)] + [by_chance])
        if document is documents[-1]:
            plot(args.plot, document, states["fastattn"], scores["fastattn"], chosen)

    ours, lead, by_chance = np.array(rows).T
    print(f"\n{'':<42}{'coverage':>9}{'attention covers more':>24}")
    print(f"{'attention':<42}{ours.mean():>9.1%}")
    beside = {"the first five sentences": lead, "random, of the same lengths and fifths": by_chance}
    for name, theirs in beside.items():
        wins = f"in {(ours > theirs).sum()} of {len(ours)}"
        print(f"{name:<42}{theirs.mean():>9.1%}{wins:>24}")
    print(f"\nPlain NumPy's attention chooses the same in {same} of {len(ours)} documents.")
    for name, took in seconds.items():
        inside, total = model.encoders[name].attention_seconds, model.encoders[name].seconds + took
        share = (took + inside) / total
        print(f"{name:<12}{total:7.1f} s, of which attention {share:.0%}: ", end="")
        print(f"{took:.1f} s in calls over whole documents, {inside:.1f} s in the encoder")
    print(f"drawn to {args.plot}")

    margins = (ours - lead).mean(), (ours - by_chance).mean()
    targets = QUICK_TARGETS if args.quick else TARGETS
    enough = args.quick or len(ours) >= MIN_DOCUMENTS
    holds = enough and all(m >= t for m, t in zip(margins, targets, strict=True))
    last = ", ".join(
        f"{m:+.1%} beside {name} (target {t:+.1%})"
        for name, m, t in zip(("the first five", "random"), margins, targets, strict=True)
    )
    print(f"covers {last}, {len(ours)} documents: {'ok' if holds else 'MISSED'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
