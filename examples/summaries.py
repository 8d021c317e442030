"""Summaries of a document by five of its sentences, and how much of its words they cover.

Coverage is the share of a document's words, each weighted by TF-IDF, that the summary mentions.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

PARTS = 5  # of a document, each with a sentence in the summary
NEAREST = 10  # in length, of which a random summary takes one


class Document(NamedTuple):
    name: str
    sentences: list[str]
    ids: list[list[int]]  # tokens of each sentence

    @property
    def sentence_of(self) -> np.ndarray:
        """The sentence that each token is in."""
        return np.repeat(np.arange(len(self.ids)), [len(i) for i in self.ids])

    @property
    def parts(self) -> list[np.ndarray]:
        """Sentences that a summary may be made of, in fifths."""
        able = [8 <= len(s.split()) <= 40 and s.endswith(".") for s in self.sentences]
        return np.array_split(np.flatnonzero(able), PARTS)


def words(sentences: list[str]) -> list[str]:
    return re.findall(r"[a-z]{3,}", " ".join(sentences).lower())


def coverage(document: Document, chosen: list[int], rarity: dict[str, float]) -> float:
    """Share of the words, by TF-IDF, that the chosen sentences mention."""
    weight = {word: n * rarity[word] for word, n in Counter(words(document.sentences)).items()}
    mentioned = set(words([document.sentences[i] for i in chosen]))
    return sum(weight[word] for word in mentioned) / sum(weight.values())


def rarity_of(documents: list[Document]) -> dict[str, float]:
    """Inverse document frequency: 0 for a word that all documents have."""
    found = Counter(word for document in documents for word in set(words(document.sentences)))
    return {word: math.log(len(documents) / n) for word, n in found.items()}


def random_summary(chosen: list[int], document: Document, rng: np.random.Generator) -> list[int]:
    lengths = np.array([len(sentence.split()) for sentence in document.sentences])
    result = []
    for i, part in zip(chosen, document.parts, strict=True):
        nearest = part[np.argsort(np.abs(lengths[part] - lengths[i]), kind="stable")]
        result.append(int(rng.choice(nearest[:NEAREST])))
    return result
