"""Questions about Python, answered from Python's own documentation.

The passages are docstrings of the standard library and the language reference behind `help()`, cut
into pieces of about a hundred words.  The questions are in questions.tsv, written as a programmer
would ask, each with where its answer is and some words of the sentence that gives it.

A passage and a question each become one vector by the encoder all-MiniLM-L6-v2 with its real
weights and fastattn's attention (https://arxiv.org/abs/1908.10084); the passages nearest to the
question are the answers, and within a passage the nearest sentence is marked.  Beside it: BM25, the
usual ranking by shared words (https://doi.org/10.1561/1500000019), and the same encoder with plain
NumPy's attention.

    python examples/question_answering.py --ask "How do I delete a folder?"
"""

import argparse
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import bm25s
import numpy as np
from Stemmer import Stemmer

from minilm import MiniLM
from python_docs import MODULES, Passage, passages

QUESTIONS = Path(__file__).with_name("questions.tsv")
QUICK_MODULES = "os.path pathlib shutil tempfile itertools statistics random threading".split()
TARGETS, QUICK_TARGETS = (0.28, 0.5), (0.38, 0.68)  # recall@1 and recall@5
RANKS = 10  # that the picture shows


class Question(NamedTuple):
    text: str
    place: str
    answer: str


def read_questions() -> list[Question]:
    rows = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return [Question(*row.split("\t")) for row in rows[1:]]


def answerable(questions: list[Question], found: list[Passage]) -> list[Question]:
    """The questions whose answers are in this Python's documentation: docstrings change."""
    return [q for q in questions if any(q.answer in p.text for p in found)]


# --- finding ----------------------------------------------------------------------------------


def ranks_of_answers(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each row of scores, the rank from 1 of the best passage that is right."""
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + (scores > best).sum(axis=1)


def recall(ranks: np.ndarray, k: int) -> float:
    return float(np.mean(ranks <= k))


def bm25_scores(texts: list[str], questions: list[str]) -> np.ndarray:
    """Scores of all texts for each question, as bm25s recommends: stems, without stop words."""
    options = {"stopwords": "en", "stemmer": Stemmer("english"), "show_progress": False}
    model = bm25s.BM25()
    model.index(bm25s.tokenize(texts, **options), show_progress=False)
    queries = bm25s.tokenize(questions, return_ids=False, **options)
    return np.stack([model.get_scores(query) for query in queries])


def mark(model: MiniLM, vectors: np.ndarray, chosen: list[Passage]) -> list[np.ndarray]:
    """Similarities of a question's vector with each sentence of its passage."""
    embedded = model.embed([s for p in chosen for s in p.sentences], "sentences")["fastattn"]
    ends = np.cumsum([len(p.sentences) for p in chosen])[:-1]
    return [x @ v for x, v in zip(np.split(embedded, ends), vectors, strict=True)]


def marked_rightly(question: Question, passage: Passage, similarities: np.ndarray) -> bool:
    return question.answer in passage.sentences[int(similarities.argmax())]


# --- report -----------------------------------------------------------------------------------


def plot(
    path: Path, ranks: dict[str, np.ndarray], question: Question, passage: Passage, near: np.ndarray
) -> None:
    """Recall against rank, and one answered question: how near each sentence of its passage is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    for name, colour, marker in (("MiniLM", "#D55E00", "o"), ("BM25", "#0072B2", "s")):
        curve = [100 * recall(ranks[name], k) for k in range(1, RANKS + 1)]
        left.plot(range(1, RANKS + 1), curve, color=colour, marker=marker, label=name)
    left.set(xlabel="passages looked at", ylabel="questions whose answer is among them (%)")
    left.set(ylim=(0, 100), xticks=range(1, RANKS + 1))
    left.set_title(f"Recall on {len(ranks['BM25'])} questions", loc="left")
    left.legend(frameon=False, loc="lower right")
    left.grid(True, alpha=0.3)

    labels = [textwrap.fill(textwrap.shorten(s, 110), 42) for s in passage.sentences]
    colours = ["#D55E00" if x == near.max() else "#BBBBBB" for x in near]
    bars = right.barh(labels, near, color=colours)
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.invert_yaxis()
    right.set_xlim(min(0, near.min() - 0.2 * near.max()), 1.15 * near.max())
    right.set_xlabel("similarity to the question (cosine); the nearest is marked")
    right.set_title(f"“{question.text}”\nanswered by {passage.place}", loc="left", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def answer(model: MiniLM, text: str, found: list[Passage], vectors: np.ndarray) -> None:
    """Print the passages nearest to one question, the nearest sentence of each marked."""
    vector = model.embed([text])["fastattn"]
    best = np.argsort(-(vectors @ vector[0]))[:3]
    chosen = [found[i] for i in best]
    print(text)
    for i, passage, near in zip(
        best, chosen, mark(model, np.repeat(vector, 3, axis=0), chosen), strict=True
    ):
        sentence = textwrap.shorten(passage.sentences[int(near.argmax())], 160)
        print(f"  {vectors[i] @ vector[0]:.2f}  {passage.place}: {sentence}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Answer questions about Python from its docs.")
    parser.add_argument("--quick", action="store_true", help="a few modules, for a test")
    parser.add_argument("--ask", metavar="QUESTION", help="a question of your own")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="where to draw (default: the temporary directory)",
        default=Path(tempfile.gettempdir()) / "question_answering.png",
    )  # fmt: skip
    args = parser.parse_args(argv)

    found = passages(QUICK_MODULES if args.quick else MODULES, with_topics=not args.quick)
    written = read_questions()
    questions = answerable(written, found)
    print(
        f"{len(found)} passages of Python {sys.version.split()[0]}'s documentation; "
        f"{len(questions)} of {len(written)} written questions have their answer in them"
    )
    if not args.quick:
        for question in sorted(set(written) - set(questions)):
            print(f"left out, for this Python says it in other words: {question.place}")
    model = MiniLM()
    vectors = model.embed([p.text for p in found], "passages")
    asked = model.embed([q.text for q in questions])
    right = np.array([[q.answer in p.text for p in found] for q in questions])
    texts = [q.text for q in questions]
    scores = {f"MiniLM by {name}": asked[name] @ vectors[name].T for name in vectors}
    scores["BM25"] = bm25_scores([p.text for p in found], texts)
    ranks = {name: ranks_of_answers(s, right) for name, s in scores.items()}

    first = right.argmax(axis=1)  # the passage that answers; the first of equals
    gold = [found[i] for i in first]
    near = mark(model, asked["fastattn"], gold)
    several = [i for i, passage in enumerate(gold) if len(passage.sentences) > 1]
    hits = [marked_rightly(questions[i], gold[i], near[i]) for i in several]
    chance = [np.mean([questions[i].answer in s for s in gold[i].sentences]) for i in several]

    print(f"\n{'':<24}{'recall@1':>10}{'recall@5':>10}")
    for name, found_at in ranks.items():
        print(f"{name:<24}{recall(found_at, 1):>10.1%}{recall(found_at, 5):>10.1%}")
    print(
        f"Of the {len(hits)} right passages of several sentences, the marked one holds the answer "
        f"in {np.mean(hits):.1%}\n(one at random: {np.mean(chance):.1%})."
    )
    difference = np.abs(vectors["fastattn"] - vectors["plain NumPy"]).max()
    print(f"\nThe vectors by the two attentions differ by at most {difference:.1e}.")
    print(model.report())
    if args.ask:
        print()
        answer(model, args.ask, found, vectors["fastattn"])

    shown = next(i for i in several if ranks["MiniLM by fastattn"][i] == 1 and len(near[i]) > 3)
    curves = {"MiniLM": ranks["MiniLM by fastattn"], "BM25": ranks["BM25"]}
    plot(args.plot, curves, questions[shown], gold[shown], near[shown])
    print(f"drawn to {args.plot}")

    ours = ranks["MiniLM by fastattn"]
    at_1, at_5 = recall(ours, 1), recall(ours, 5)
    target_1, target_5 = QUICK_TARGETS if args.quick else TARGETS
    same = np.array_equal(ours <= 5, ranks["MiniLM by plain NumPy"] <= 5)
    better = at_1 > recall(ranks["BM25"], 1) and at_5 > recall(ranks["BM25"], 5)
    holds = at_1 >= target_1 and at_5 >= target_5 and same and better
    print(
        f"recall@1 {at_1:.1%} (target {target_1:.0%}), recall@5 {at_5:.1%} (target {target_5:.0%}) "
        f"on {len(questions)} questions: {'ok' if holds else 'MISSED'}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
