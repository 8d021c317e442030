"""Python's own documentation: docstrings of the standard library and the topics of `help()`."""

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

# Importing any of these starts nothing and needs no display.  builtins first: of equal docstrings
# the first is kept, and the names of builtins are the ones that people know.
MODULES = """
    builtins abc argparse ast asyncio base64 bisect calendar cmath codecs collections
    concurrent.futures configparser contextlib copy csv dataclasses datetime decimal difflib dis
    email.message email.utils enum filecmp fileinput fnmatch fractions functools gc getpass glob
    graphlib gzip hashlib heapq hmac html http.client http.cookies http.server inspect io ipaddress
    itertools json linecache locale logging logging.handlers math mimetypes mmap multiprocessing
    multiprocessing.pool numbers operator os os.path pathlib pdb pickle pkgutil platform pprint
    queue random re reprlib runpy sched secrets select selectors shelve shlex shutil signal
    smtplib socket socketserver sqlite3 ssl statistics string struct subprocess sys sysconfig
    tarfile tempfile textwrap threading time timeit tokenize traceback tracemalloc types typing
    unicodedata unittest unittest.mock urllib.parse urllib.request uuid venv warnings weakref
    webbrowser xml.etree.ElementTree xml.sax.saxutils zipfile zlib zoneinfo
""".split()
PASSAGE_WORDS = 100


class Passage(NamedTuple):
    place: str
    sentences: list[str]

    @property
    def text(self) -> str:
        return f"{self.place}: {' '.join(self.sentences)}"


def documents(modules: list[str]) -> Iterator[tuple[str, str]]:
    """Names and docstrings of the modules, their functions, their classes and those's methods."""
    for name in modules:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            module = importlib.import_module(name)
        yield name, docstring(module)
        prefix = "" if name == "builtins" else f"{name}."
        classes = []
        for key in getattr(module, "__all__", None) or dir(module):
            member = getattr(module, key, None)
            home = getattr(member, "__module__", None)
            if not hasattr(module, "__all__") and home not in (name, f"_{name}"):
                continue  # imported from elsewhere
            if inspect.isclass(member):
                classes.append((prefix + key, member))
            if inspect.isclass(member) or inspect.isroutine(member):
                yield prefix + key, docstring(member)
        for key, owner in classes:
            for method, member in vars(owner).items():
                documented = inspect.isroutine(member) or inspect.isdatadescriptor(member)
                if documented and not method.startswith("_"):
                    yield f"{key}.{method}", docstring(member)


def docstring(member: Any) -> str:
    """What is written about it, and not about what it inherits from."""
    text = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def passages(modules: list[str], with_topics: bool) -> list[Passage]:
    """Pieces of the documentation, each once, at the first place where it stands."""
    texts = list(documents(modules))
    if with_topics:
        # Shorter topics are parts of longer ones.
        shortest_first = sorted(topics, key=lambda name: len(topics[name]))
        texts += [(f"topic/{name}", topics[name]) for name in shortest_first]
    found: dict[str, Passage] = {}
    for place, text in texts:
        for sentences in pieces(text):
            if sum(len(sentence.split()) for sentence in sentences) > 3:
                found.setdefault(" ".join(sentences), Passage(place, sentences))
    return list(found.values())


def sentences_of(line: str) -> list[str]:
    # Two word characters before the full stop: not behind "e.g." or an initial.
    return [s for s in re.split(r"(?<=[\w)\"'\]*][\w)\"'\]*][.!?])\s+", line) if s]


def pieces(text: str) -> Iterator[list[str]]:
    """Whole paragraphs up to about `PASSAGE_WORDS` words, as sentences."""
    piece: list[str] = []
    words = 0
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if piece and words + len(line.split()) > PASSAGE_WORDS:
            yield piece
            piece, words = [], 0
        piece += sentences_of(line)
        words += len(line.split())
    if piece:
        yield piece


def source_texts(name: str) -> Iterator[str]:
    """What the source of a package or module says about it, or a topic of `help()`."""
    if name.startswith("topic/"):
        yield topics.get(name.removeprefix("topic/"), "")
        return
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # the package that it is in
        spec = None
    if spec is None or spec.origin is None:
        return
    source = Path(spec.origin)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted(source.parent.rglob("*.py")) if source.stem == "__init__" else [source]:
        if {"test", "tests", "idle_test"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, documented):
                yield ast.get_docstring(node) or ""
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
                for part in ast.walk(node):  # how NumPy documents what is written in C
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield inspect.cleandoc(part.value)


def prose_of(name: str) -> list[str]:
    """The sentences of `source_texts`, each once, without headings, code and tables."""
    found: dict[str, None] = {}
    for text in source_texts(name):
        for paragraph in re.split(r"\n\s*\n", text):
            if ">>>" in paragraph or re.search(r"^\s*(---|===|\.\. )", paragraph, re.MULTILINE):
                continue
            for sentence in sentences_of(" ".join(paragraph.split())):
                letters = sum(c.isalpha() or c == " " for c in sentence)
                if len(sentence.split()) >= 4 and letters > 0.7 * len(sentence):
                    found[sentence] = None
    return list(found)
