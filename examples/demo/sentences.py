"""The text that the demo searches: Markdown files and docstrings, cut into sentences."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import fastattn

ROOT = Path(__file__).parents[2]


def read_sentences(path: Path | None) -> tuple[str, list[str]]:
    """Where the sentences come from, and the sentences, each once.

    Parameters
    ----------
    path : Path or None
        A file of text or Markdown; None is fastattn's own documentation.
    """
    if path is None:
        source, texts = "fastattn's docs and docstrings", list(_project_texts())
    else:
        content = path.read_text(encoding="utf-8", errors="replace")
        source, texts = str(path), [markdown_prose(content) if path.suffix == ".md" else content]
    return source, list(dict.fromkeys(s for text in texts for s in split_sentences(text)))


def _project_texts() -> Iterator[str]:
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))):
        yield markdown_prose(path.read_text(encoding="utf-8"))
    for public in (fastattn, *(getattr(fastattn, name) for name in fastattn.__all__)):
        yield docstring_prose(inspect.getdoc(public) or "")
        for name, method in inspect.getmembers(public, inspect.isfunction):
            if name[0] != "_":
                yield docstring_prose(inspect.getdoc(method) or "")


def markdown_prose(text: str) -> str:
    """Paragraphs and list items, without code, tables, headings and markup."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^([#|>]|<|[-=]{3}|    ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([-*+]|\d+\.)\s+", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`|\*\*", "", text)


def docstring_prose(text: str) -> str:
    """A numpydoc docstring without its section titles, signatures and examples."""
    text = re.sub(r"^>>>.*?(\n\n|\Z)", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^.*\n-{3,}$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^[\w*, ]+( : .*)?\n(?=    )", "\n", text, flags=re.MULTILINE)
    return text.replace("`", "")


def split_sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        # Two word characters before the full stop: not behind "e.g." or an initial.
        for sentence in re.split(r"(?<=[\w)\"'][\w)\"'][.!?])\s+", " ".join(paragraph.split())):
            if len(sentence.split()) >= 4:
                yield sentence
