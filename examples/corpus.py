"""Docstrings of the standard library, for programs that tell where a text is from.

Each is labelled with the family of modules that it is written in.  They ship with Python.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Modules and packages of every Python since 3.11; those that a system leaves out are skipped.
FAMILIES = {
    "concurrency": "asyncio concurrent multiprocessing queue selectors subprocess threading",
    "email": "email imaplib mailbox poplib smtplib",
    "files": "_pyio fileinput glob gzip io os pathlib shutil tarfile tempfile zipfile",
    "imports": "importlib modulefinder pkgutil runpy zipimport",
    "inspection": "ast bdb dis inspect pdb pydoc trace traceback",
    "logging": "logging",
    "numbers": "_pydatetime _pydecimal datetime fractions numbers random statistics",
    "testing": "doctest unittest",
    "web": "ftplib http socketserver ssl urllib wsgiref xmlrpc",
    "windows": "tkinter turtle",
    "xml": "html plistlib xml",
}
MIN_TOKENS = 8  # a shorter docstring says little of where it is from
PADDING, UNKNOWN = 0, 1  # numbers of tokens that are no words
LIBRARY = Path(sysconfig.get_path("stdlib"))


class Text(NamedTuple):
    words: list[str]
    family: int


class Texts(NamedTuple):
    training: list[Text]
    held_out: list[Text]
    families: list[str]
    numbers: dict[str, int]  # of the words that are known, the most frequent ones in training

    def __str__(self) -> str:
        tokens = np.mean([len(text.words) for text in self.training])
        return (
            f"{len(self.training)} docstrings of {len(self.families)} families to train on, "
            f"{tokens:.0f} tokens on average; {len(self.held_out)} held out"
        )

    def arrays(self, texts: list[Text], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The words' numbers, (len(texts), length) with padding at the end, and the families.

        Without a `length`, it is that of the longest.
        """
        length = max(len(text.words) for text in texts) if length is None else length
        words = np.full((len(texts), length), PADDING)
        for row, text in zip(words, texts, strict=True):
            row[: len(text.words)] = [self.numbers.get(word, UNKNOWN) for word in text.words]
        return words, np.array([text.family for text in texts])


def files(modules: str) -> Iterator[Path]:
    """Where these modules and packages are written, less their tests."""
    for name in modules.split():
        for path in [LIBRARY / f"{name}.py", *sorted((LIBRARY / name).rglob("*.py"))]:
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(LIBRARY).parts):
                yield path


def docstrings(paths: Iterable[Path]) -> Iterator[str]:
    """Those of modules, of their classes and of their functions."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented):
                yield ast.get_docstring(node) or ""


def read_texts(rng: np.random.Generator, texts: int, vocabulary: int, max_length: int) -> Texts:
    """Docstrings, each once, a fifth of them held out: at most so many of a family.

    Words beyond the `vocabulary` most frequent ones are unknown, tokens beyond `max_length` cut.
    """
    by_words: dict[str, Text] = {}
    families = []
    for family, modules in FAMILIES.items():
        written = docstrings(files(modules))
        split = (re.findall(r"[a-z]+|\d+|[^\w\s]", text.lower()) for text in written)
        distinct = {" ".join(words): words for words in split if len(words) >= MIN_TOKENS}
        new = [key for key in distinct if key not in by_words]
        for i in rng.permutation(len(new))[:texts]:
            by_words[new[i]] = Text(distinct[new[i]][:max_length], len(families))
        if new:
            families.append(family)
    every = list(by_words.values())
    shuffled = [every[i] for i in rng.permutation(len(every))]
    held_out, training = np.split(np.arange(len(every)), [len(every) // 5])
    counts = Counter(word for i in training for word in shuffled[i].words)
    known = [word for word, _ in counts.most_common(vocabulary)]
    return Texts(
        [shuffled[i] for i in training],
        [shuffled[i] for i in held_out],
        families,
        {word: number for number, word in enumerate(known, start=UNKNOWN + 1)},
    )
