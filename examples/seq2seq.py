"""The encoder-decoder transformer of `translation.py`, and a beam search with fastattn's caches."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn as fa
from stopwatch import Attend

PADDING = 0  # in a source
END = 0  # of an output, and what stands before it


def without_padding(attend: Attend, source: Tensor) -> Attend:
    """Attention over a source, (batch, seqlen), to none of its padding."""
    return partial(attend, attn_mask=(source != PADDING)[:, None, None, :])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k(x)), self.split(self.v(x))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        return self.out(attend(self.split(self.q(x)), k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Of the encoder, or with cross-attention of the decoder."""

    def __init__(self, width: int, heads: int, crosses: bool) -> None:
        super().__init__()
        self.own, self.own_norm = Attention(width, heads), nn.LayerNorm(width)
        if crosses:
            self.cross, self.cross_norm = Attention(width, heads), nn.LayerNorm(width)
        hidden = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), hidden, nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Tensor, own: Attend, cross: Attend | None = None, source: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """`source` is what `encode` made of a source for the cross-attention of this layer."""
        y = self.own_norm(x)
        x = x + self.own(y, *self.own.keys_values(y), own)
        if cross is not None:
            x = x + self.cross(self.cross_norm(x), *source, cross)
        return x + self.mlp(x)


class Translator(nn.Module):
    def __init__(self, characters: int, outputs: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.source = nn.Embedding(characters, width, padding_idx=PADDING)
        self.target = nn.Embedding(outputs, width)
        # Characters mean little alone: each takes up its neighbours before the first attention.
        self.neighbours = nn.Conv1d(width, width, 5, padding=2, bias=False)
        self.positions = nn.Parameter(0.1 * torch.randn(100, width))
        self.encoder = nn.ModuleList(Layer(width, heads, crosses=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(width, heads, crosses=True) for _ in range(layers))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, outputs)

    def encode(self, source: Tensor, attend: Attend) -> list[tuple[Tensor, ...]]:
        """Keys and values for the cross-attention of each layer of the decoder."""
        x = self.source(source)
        x = x + self.neighbours(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.positions[: source.shape[1]]
        for layer in self.encoder:
            x = layer(x, attend)
        return [layer.cross.keys_values(x) for layer in self.decoder]

    def decode(
        self, tokens: Tensor, start: int, sources: list[tuple[Tensor, ...]], owns: list[Attend],
        cross: Attend,
    ) -> Tensor:  # fmt: skip
        """Logits of what follows each of the tokens, which stand at `start` and on."""
        x = self.target(tokens) + self.positions[start : start + tokens.shape[1]]
        for layer, source, own in zip(self.decoder, sources, owns, strict=True):
            x = layer(x, own, cross, source)
        return self.logits(self.norm(x))

    def forward(self, source: Tensor, target: Tensor, attend: Attend) -> Tensor:
        """Logits of what follows each character of the target."""
        across, own = without_padding(attend, source), partial(attend, is_causal=True)
        sources = self.encode(source, across)
        return self.decode(target, 0, sources, [own] * len(sources), across)

    def loss(self, pairs: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Of sources and of their targets, each between two ENDs."""
        source, target = pairs
        logits = self(source, target[:, :-1], attend)
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


# --- beam search ------------------------------------------------------------------------------


class Cached:
    """Self-attention of new tokens over all so far, by fastattn."""

    def __init__(self, batch_size: int, heads: int, most: int, head_dim: int) -> None:
        self.cache = fa.KVCache(batch_size, heads, most, head_dim)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.append(k.numpy(), v.numpy())
        return torch.from_numpy(self.cache.attention(q.numpy()))

    def reorder(self, parents: Tensor) -> None:
        self.cache.reorder(parents.numpy())


class Concatenated:
    """The same with PyTorch alone."""

    def __init__(self, batch_size: int, heads: int, most: int, head_dim: int) -> None:
        self.k = self.v = torch.empty(batch_size, heads, 0, head_dim)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        return F.scaled_dot_product_attention(q, self.k, self.v)

    def reorder(self, parents: Tensor) -> None:
        self.k, self.v = self.k[parents], self.v[parents]


@torch.no_grad()
def beam_search(
    model: Translator, source: Tensor, most: int, beams: int, attend: Attend, memory: Any
) -> Tensor:
    """The most likely outputs found, (len(source), most), with END in the rest of each.

    `attend` is for the encoder and for cross-attention, `memory` a class like `Cached`.
    """
    across = without_padding(attend, source)

    def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The beams of a source are queries over the same keys: (batch, heads, beams, head_dim)."""
        together = q.unflatten(0, (-1, beams))[:, :, :, 0].transpose(1, 2)
        return across(together, k, v).transpose(1, 2).flatten(0, 1)[:, :, None]

    sources = model.encode(source, across)
    batch_size, heads, _, head_dim = sources[0][0].shape
    owns = [memory(batch_size * beams, heads, most, head_dim) for _ in sources]
    tokens = torch.full((batch_size * beams, 1), END)
    # All beams begin alike: one is enough, else they would stay alike.
    scores = torch.full((batch_size, beams), -torch.inf)
    scores[:, 0] = 0.0
    first = beams * torch.arange(batch_size)[:, None]
    for step in range(most):
        gains = model.decode(tokens[:, -1:], step, sources, owns, cross)[:, 0].log_softmax(-1)
        if step:
            ended = tokens[:, -1] == END
            gains[ended] = -torch.inf
            gains[ended, END] = 0.0
        size = gains.shape[1]
        totals = (scores[..., None] + gains.unflatten(0, (-1, beams))).flatten(1)
        scores, best = totals.topk(beams)
        parents = (first + best // size).flatten()
        tokens = torch.cat([tokens[parents], (best % size).flatten()[:, None]], dim=1)
        for own in owns:
            own.reorder(parents)
    return tokens.unflatten(0, (-1, beams))[:, 0, 1:]
