"""The encoder of the demo in PyTorch, for comparison: the same weights, PyTorch's own attention."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from demo.encoder import HEAD_DIM, LAYER_NORM_EPS, pooled

Array = NDArray[Any]


class TorchEncoder:
    """As `demo.encoder.TimedEncoder`, every step of it by PyTorch.

    Attributes
    ----------
    seconds, attention_seconds : float
        Of all calls of `embed` so far, and of the attention within them.
    """

    def __init__(self, tensors: Mapping[str, Array], num_threads: int | None = None) -> None:
        self.tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
        self.hidden = self.tensors["embeddings.word_embeddings.weight"].shape[1]
        self.seconds = self.attention_seconds = 0.0
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, (self.hidden,), weight, bias, LAYER_NORM_EPS)

    def _attention(self, x: torch.Tensor, prefix: str, mask: torch.Tensor | None) -> torch.Tensor:
        heads = (*x.shape[:-1], self.hidden // HEAD_DIM, HEAD_DIM)
        q, k, v = (
            self._linear(x, f"{prefix}.self.{name}").view(heads).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        start = time.perf_counter()
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        self.attention_seconds += time.perf_counter() - start
        return self._linear(context.transpose(1, 2).flatten(2), f"{prefix}.output.dense")

    def _states(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        seqlen = token_ids.shape[1]
        position_embeddings = self.tensors["embeddings.position_embeddings.weight"]
        positions = torch.arange(seqlen) % len(position_embeddings)
        x = self.tensors["embeddings.word_embeddings.weight"][token_ids]
        x = x + position_embeddings[positions]
        x = x + self.tensors["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        mask = None
        if bool((lengths < seqlen).any()):
            mask = (torch.arange(seqlen) < lengths[:, None])[:, None, None]
        layer = 0
        while f"encoder.layer.{layer}.output.dense.weight" in self.tensors:
            prefix = f"encoder.layer.{layer}"
            attended = self._attention(x, f"{prefix}.attention", mask) + x
            x = self._norm(attended, f"{prefix}.attention.output.LayerNorm")
            wide = F.gelu(self._linear(x, f"{prefix}.intermediate.dense"))
            x = self._norm(
                self._linear(wide, f"{prefix}.output.dense") + x, f"{prefix}.output.LayerNorm"
            )
            layer += 1
        return x

    def embed(self, token_ids: Array, lengths: Array) -> Array:
        """Unit vectors, (batch, hidden), as those of `demo.encoder.Encoder`."""
        start = time.perf_counter()
        with torch.inference_mode():
            x = self._states(torch.from_numpy(token_ids), torch.from_numpy(lengths)).numpy()
        self.seconds += time.perf_counter() - start
        return pooled(x, lengths)
