"""Five sentences that stand for a document of ten thousand tokens, found by one call of attention.

The documents are the docstrings of whole packages, of Python, NumPy and matplotlib, and long
topics of `help()`.  all-MiniLM-L6-v2 reads each in windows, with its real weights and fastattn's attention;
then the states of all its tokens look at each other in one call:

    received = fa.attention_weights(states, states, scale=SCALE, reduce="keys")

are the sums of the weights that each token gets from the whole document, without the matrix of
10,000 x 10,000 weights.  The sentences whose tokens receive most are the summary, as in LexRank
(https://arxiv.org/abs/1109.2128), whose similarities are between sentences.

Coverage is the share of the document's words, each weighted by TF-IDF, that the summary mentions.
Beside it: the first five sentences, and random ones of the same lengths as the chosen, for long
sentences cover more.

    python examples/summarization.py
"""

import argparse
import ast
import inspect
import math
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

import fastattn as fa
from minilm import MiniLM
from python_docs import sentences_of

# Those that a system leaves out, or that are shorter in its version, are skipped.
DOCUMENTS = """
    asyncio email http idlelib logging tkinter turtle unittest xml _pydecimal
    numpy.linalg numpy.fft numpy.ma numpy.polynomial numpy._core._add_newdocs
    numpy._core.fromnumeric numpy.lib._function_base_impl
    matplotlib.axes matplotlib.backend_bases matplotlib.backends matplotlib.colors matplotlib.figure
    matplotlib.patches matplotlib.ticker mpl_toolkits.axes_grid1 mpl_toolkits.mplot3d
    topic/compound topic/specialnames
""".split()
QUICK_DOCUMENTS = "logging numpy.ma topic/compound".split()
MIN_TOKENS, MAX_TOKENS = 8000, 10_000  # of a document; what follows is not read
WINDOW = 254  # tokens that the encoder reads at a time, beside [CLS] and [SEP]
SUMMARY = 5
SCALE = 10.0
RANDOM_DRAWS = 50
BLOCKS = 128  # of the picture
TARGET = 1.0


class Document(NamedTuple):
    name: str
    sentences: list[str]
    ids: list[list[int]]  # tokens of each sentence

    @property
    def sentence_of(self) -> np.ndarray:
        """The sentence that each token is in."""
        return np.repeat(np.arange(len(self.ids)), [len(i) for i in self.ids])


# --- documents --------------------------------------------------------------------------------


def texts_of(name: str) -> Iterator[str]:
    """What is written about a package or module, from its source, or a topic of `help()`."""
    if name.startswith("topic/"):
        yield topics.get(name.removeprefix("topic/"), "")
        return
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return
    source = Path(spec.origin)
    paths = sorted(source.parent.rglob("*.py")) if source.name == "__init__.py" else [source]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in paths:
        if {"test", "tests", "idle_test"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented):
                yield ast.get_docstring(node) or ""
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
                for part in ast.walk(node):  # how NumPy documents what is written in C
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield inspect.cleandoc(part.value)


def read_document(name: str, model: MiniLM) -> Document | None:
    """The prose, each sentence once; None where there is not enough of it."""
    sentences: dict[str, None] = {}
    for text in texts_of(name):
        for paragraph in re.split(r"\n\s*\n", text):
            if ">>>" not in paragraph:
                found = sentences_of(" ".join(paragraph.split()))
                sentences.update(dict.fromkeys(filter(is_prose, found)))
    document = Document(name, [], [])
    total = 0
    for sentence, encoding in zip(
        sentences, model.tokenizer.encode_batch(list(sentences)), strict=True
    ):
        ids = encoding.ids[1:-1]
        if len(ids) <= WINDOW:
            total += len(ids)
            if total > MAX_TOKENS:
                break
            document.sentences.append(sentence)
            document.ids.append(ids)
    return document if total >= MIN_TOKENS else None


def is_prose(sentence: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return len(sentence.split()) >= 4 and letters > 0.7 * len(sentence)


# --- summaries --------------------------------------------------------------------------------


def states_of(document: Document, model: MiniLM) -> np.ndarray:
    """Unit vectors of all tokens, (tokens, hidden), read in windows of whole sentences."""
    windows: list[list[int]] = [[]]
    for ids in document.ids:
        if len(windows[-1]) + len(ids) > WINDOW:
            windows.append([])
        windows[-1] += ids
    cls, sep = (model.tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    states = model.states([[cls, *ids, sep] for ids in windows], document.name)["fastattn"]
    x = np.concatenate([state[1:-1] for state in states])
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def received_in_numpy(x: np.ndarray) -> np.ndarray:
    """The same sums by the whole matrix of weights."""
    weights = SCALE * x @ x.T
    weights -= weights.max(axis=1, keepdims=True)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.sum(axis=0)


def summary_of(document: Document, received: np.ndarray) -> np.ndarray:
    """The sentences that receive most in all, in the order of the document."""
    by_sentence = np.bincount(document.sentence_of, received)
    return np.sort(np.argsort(-by_sentence, kind="stable")[:SUMMARY])


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z_]{2,}", text.lower())


def tf_idf(documents: list[Document]) -> list[dict[str, float]]:
    counts = [Counter(words_of(" ".join(d.sentences))) for d in documents]
    containing = Counter(word for count in counts for word in count)
    return [
        {word: n * math.log(len(counts) / containing[word]) for word, n in count.items()}
        for count in counts
    ]


def coverage(document: Document, chosen: np.ndarray, weight: dict[str, float]) -> float:
    words = {word for i in chosen for word in words_of(document.sentences[i])}
    return sum(weight[word] for word in words) / sum(weight.values())


def random_like(document: Document, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random sentence for each chosen one, among the 20 nearest to it in length."""
    lengths = np.array([len(ids) for ids in document.ids])
    near = [np.argsort(abs(lengths - lengths[i]), kind="stable")[:20] for i in chosen]
    return np.array([rng.choice(x) for x in near])


def draw(path: Path, document: Document, x: np.ndarray, received: np.ndarray) -> None:
    from matplotlib.figure import Figure

    from fastattn.plot import attention_map

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1])
    pooled = fa.attention_weights(x, x, scale=SCALE, pool=(BLOCKS, BLOCKS))
    attention_map(pooled, seqlen_q=len(x), seqlen_k=len(x), ax=above, norm="log")
    above.set_title(f"Who looks at whom in the {len(x):,} tokens of {document.name}", loc="left")
    by_sentence = np.bincount(document.sentence_of, received)
    below.bar(np.arange(len(by_sentence)), by_sentence, width=1.0, color="#BBBBBB")
    chosen = summary_of(document, received)
    below.bar(chosen, by_sentence[chosen], width=4.0, color="#D55E00", label="the summary")
    below.set(xlabel="sentence", ylabel="attention received", xlim=(0, len(by_sentence)))
    below.legend(frameon=False)
    figure.savefig(path, dpi=100)
    print(f"drawn to {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Summarize long documents in five sentences.")
    parser.add_argument("--quick", action="store_true", help="three documents, for a test")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where to draw (default: the temporary directory)",
        default=Path(tempfile.gettempdir()) / "summarization.png",
    )  # fmt: skip
    args = parser.parse_args(argv)
    model, rng = MiniLM(), np.random.default_rng(0)
    names = QUICK_DOCUMENTS if args.quick else DOCUMENTS
    documents = [d for name in names if (d := read_document(name, model)) is not None]
    print(f"{len(documents)} documents of {MIN_TOKENS:,} to {MAX_TOKENS:,} tokens")
    rows, seconds, plain_seconds, apart = [], 0.0, 0.0, 0.0
    print(f"{'coverage':<34}{'attention':>10}{'lead-5':>8}{'random':>8}")
    for document, weight in zip(documents, tf_idf(documents), strict=True):
        x = states_of(document, model)
        start = time.perf_counter()
        received = fa.attention_weights(x, x, scale=SCALE, reduce="keys")
        middle = time.perf_counter()
        apart = max(apart, float(np.abs(received - received_in_numpy(x)).max()))
        seconds, plain_seconds = seconds + middle - start, plain_seconds + time.perf_counter() - middle
        chosen = summary_of(document, received)
        random = [random_like(document, chosen, rng) for _ in range(RANDOM_DRAWS)]
        rows.append(
            [
                coverage(document, chosen, weight),
                coverage(document, np.arange(SUMMARY), weight),
                float(np.mean([coverage(document, draw, weight) for draw in random])),
            ]
        )
        print(f"{document.name:<34}{rows[-1][0]:>10.1%}{rows[-1][1]:>8.1%}{rows[-1][2]:>8.1%}")
    print(f"\nThe last one, {document.name}, in five sentences:")
    for i in chosen:
        print(textwrap.fill(document.sentences[i], 96, initial_indent="- ", subsequent_indent="  "))
    draw(args.plot, document, x, received)
    print(
        f"the sums: fastattn {seconds:.1f} s, plain NumPy {plain_seconds:.1f} s with"
        f" {4 * len(x) ** 2 / 2**20:.0f} MiB of weights; they differ by at most {apart:.1e}"
    )
    print(model.report())
    table = np.array(rows)
    ours, lead, random_mean = table.mean(axis=0)
    better = (table[:, :1] > table[:, 1:]).mean(axis=0)
    print(
        f"better than lead-5 for {better[0]:.0%} of the documents, than random for {better[1]:.0%}"
    )
    holds = ours >= TARGET * lead and ours >= TARGET * random_mean and apart < 1e-2
    print(
        f"coverage {ours:.1%}, lead-5 {lead:.1%}, random of the same lengths {random_mean:.1%} "
        f"(target: {TARGET} times both) on {len(rows)} documents: {'ok' if holds else 'MISSED'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
