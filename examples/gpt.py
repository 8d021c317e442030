"""The model of `train_gpt.py` in NumPy and fastattn, for `generate.py`."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

UNKNOWN = "\ufffd"  # stands for every character that the model does not know; number 0
BLOCK = ("attention_norm", "w_qkv", "w_o", "mlp_norm", "w_hidden", "w_out")


def rotary_angles(positions: np.ndarray, head_dim: int) -> np.ndarray:
    """Angles by which positions turn queries and keys, float32 (len(positions), head_dim / 2)."""
    frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.outer(positions, frequencies).astype(np.float32)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6)) * weight


class Layer(NamedTuple):
    """What a cache needs to know of an attention."""

    num_kv_heads: int
    head_dim: int
    head_dim_v: int


class Gpt:
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.characters = str(arrays["characters"])
        self.num_heads, self.context = int(arrays["num_heads"]), int(arrays["context"])
        self.num_layers = sum(name.endswith(".w_qkv") for name in arrays)
        self.head_dim = arrays["tokens"].shape[1] // self.num_heads
        self.layers = [Layer(self.num_heads, self.head_dim, self.head_dim)] * self.num_layers

    @classmethod
    def load(cls, path: Path) -> Self:
        file = np.load(path, allow_pickle=False)
        if "w_logits" not in getattr(file, "files", ()):  # an .npy file is one array without names
            raise ValueError(f"{path} does not hold the weights that train_gpt.py saves")
        with file:
            return cls(dict(file))

    def encode(self, text: str) -> np.ndarray:
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise ValueError(f"characters that the model does not know: {unknown}")
        # A line end before the text, so that no text is empty.
        return np.array([self.characters.index(c) for c in "\n" + text])

    def __call__(self, tokens: np.ndarray, start: int, attends: list[Any]) -> np.ndarray:
        """Logits of what follows `tokens`, which stand at position `start` and on."""
        angles = rotary_angles(start + np.arange(len(tokens)), self.head_dim)
        x = self.arrays["tokens"][tokens]
        for i, attend in enumerate(attends):
            weights = {name: self.arrays[f"blocks.{i}.{name}"] for name in BLOCK}
            product = rms_norm(x, weights["attention_norm"]) @ weights["w_qkv"]
            # (1, num_heads, seqlen, head_dim) each, a batch of one
            q, k, v = product.reshape(1, len(x), 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
            # A text longer than those of the training: nobody looks further back than there.
            heads = attend(rotate(q, angles), rotate(k, angles), v, window=(self.context - 1, 0))
            x = x + heads.transpose(0, 2, 1, 3).reshape(x.shape) @ weights["w_o"]
            hidden = rms_norm(x, weights["mlp_norm"]) @ weights["w_hidden"]
            x = x + np.maximum(hidden, 0) @ weights["w_out"]
        return rms_norm(x[-1], self.arrays["norm"]) @ self.arrays["w_logits"]
