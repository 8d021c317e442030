"""Docstrings of the standard library, for programs that tell where a text is from.

Each is labelled with the family of modules that it is written in.  They ship with Python.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
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


class Text(NamedTuple):
    words: list[str]
    family: int


class Texts(NamedTuple):
    training: list[Text]
    held_out: list[Text]
    families: list[str]
    numbers: dict[str, int]  # of the words that are known, the most frequent ones in training


def docstrings(modules: str) -> Iterator[str]:
    """What is written about these modules, their classes and their functions."""
    library = Path(sysconfig.get_path("stdlib"))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for name in modules.split():
        for path in [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]:
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(library).parts):
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
        split = (re.findall(r"[a-z]+|\d+|[^\w\s]", d.lower()) for d in docstrings(modules))
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
