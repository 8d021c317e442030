"""Train a small character-level GPT on Python's own manual, with fastattn or PyTorch's attention.

The text is that of `help()`: the parts of the language reference that ship with Python, the last
tenth held out.  The model is a decoder-only transformer: root-mean-square norms, rotary positions,
causal attention, an MLP of ReLUs.  Its loss is reported in bits per character, beside what
counting characters (unigrams) and pairs of them (bigrams) reaches on the same held-out text.
`bfloat16` is autocast: products and attention in bfloat16, the weights themselves in float32.

    python examples/train_gpt.py --save gpt.npz
    python examples/train_gpt.py --attention torch --dtype bfloat16
    python examples/generate.py --weights gpt.npz --temperature 0.5
"""

import argparse
import math
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastattn.torch
from gpt import UNKNOWN, rotary_angles
from stopwatch import Attend

ATTENTION: dict[str, Attend] = {
    "fastattn": fastattn.torch.scaled_dot_product_attention,
    "torch": F.scaled_dot_product_attention,
}
RARE = 20  # characters that are in the text less often than this are one unknown character
HELD_OUT = 0.1  # of the text, its end


# --- text -------------------------------------------------------------------------------------


class Text(NamedTuple):
    characters: str  # the number of a character is its place here
    training: Tensor
    held_out: Tensor


def read_text() -> Text:
    text = "\n\n".join(topics.values())
    characters = UNKNOWN + "".join(sorted(c for c in set(text) if text.count(c) >= RARE))
    number = {c: i for i, c in enumerate(characters)}
    numbers = torch.tensor([number.get(c, 0) for c in text])
    end = int((1 - HELD_OUT) * len(numbers))
    return Text(characters, numbers[:end], numbers[end:])


def counting_bits(text: Text) -> tuple[float, float]:
    """Bits per held-out character when characters, and pairs of them, are counted in training."""
    size = len(text.characters)
    pairs = torch.bincount(text.training[:-1] * size + text.training[1:], minlength=size * size)
    pairs = pairs.reshape(size, size).double() + 0.1  # a pair that was never seen may come
    unigram = (pairs.sum(0) / pairs.sum()).log2()
    bigram = (pairs / pairs.sum(1, keepdim=True)).log2()
    before, after = text.held_out[:-1], text.held_out[1:]
    return -unigram[after].mean().item(), -bigram[before, after].mean().item()


# --- the model --------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.Parameter(torch.ones(embed_dim))
        self.w_qkv = nn.Parameter(torch.randn(embed_dim, 3 * embed_dim) / math.sqrt(embed_dim))
        self.w_o = nn.Parameter(torch.zeros(embed_dim, embed_dim))
        self.mlp_norm = nn.Parameter(torch.ones(embed_dim))
        self.w_hidden = nn.Parameter(torch.randn(embed_dim, 4 * embed_dim) / math.sqrt(embed_dim))
        self.w_out = nn.Parameter(torch.zeros(4 * embed_dim, embed_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        product = F.rms_norm(x, x.shape[-1:], self.attention_norm, eps=1e-6) @ self.w_qkv
        q, k, v = product.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        heads = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + heads.transpose(1, 2).flatten(2) @ self.w_o
        hidden = F.rms_norm(x, x.shape[-1:], self.mlp_norm, eps=1e-6) @ self.w_hidden
        return x + F.relu(hidden) @ self.w_out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x's halves by its position's angle (https://arxiv.org/abs/2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Gpt(nn.Module):
    def __init__(
        self, characters: str, num_layers: int, embed_dim: int, num_heads: int, context: int
    ) -> None:
        super().__init__()
        self.characters, self.context, self.num_heads = characters, context, num_heads
        self.tokens = nn.Parameter(0.5 * torch.randn(len(characters), embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(num_layers))
        self.norm = nn.Parameter(torch.ones(embed_dim))
        self.w_logits = nn.Parameter(torch.zeros(embed_dim, len(characters)))
        self.angles = rotary_angles(np.arange(context), embed_dim // num_heads)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        angles = torch.from_numpy(self.angles[: tokens.shape[1]])
        cos, sin = angles.cos(), angles.sin()
        x = F.embedding(tokens, self.tokens)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        return (F.rms_norm(x, x.shape[-1:], self.norm, eps=1e-6) @ self.w_logits).float()

    def save(self, path: Path) -> None:
        """What `gpt.Gpt.load` reads: float32 arrays and what they do not tell themselves."""
        arrays = {name: p.detach().numpy() for name, p in self.named_parameters()}
        config = {
            "characters": np.array(self.characters),
            "num_heads": np.array(self.num_heads),
            "context": np.array(self.context),
        }
        with path.open("wb") as file:  # np.savez would add .npz to another name
            np.savez(file, **arrays, **config)


# --- training ---------------------------------------------------------------------------------


def loss_of(model: Gpt, windows: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor:
    """Mean of -log p, in nats, of each character but the first of every window."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits = model(windows[:, :-1], attend)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_bits(model: Gpt, text: Text, attend: Attend, dtype: torch.dtype) -> float:
    """Bits per character over consecutive windows; their first characters are not asked for."""
    length = model.context + 1
    windows = text.held_out[: len(text.held_out) // length * length].reshape(-1, length)
    losses = [loss_of(model, part, attend, dtype) * len(part) for part in windows.split(16)]
    return torch.stack(losses).sum().item() / len(windows) / math.log(2)


def train(
    model: Gpt, text: Text, attend: Attend, dtype: torch.dtype, steps: int, batch_size: int
) -> tuple[list[float], list[float]]:
    """Losses and seconds of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    within = np.arange(model.context + 1)
    losses, seconds = [], []
    progress = tqdm(range(steps), desc="training", unit="step", disable=None)
    for _ in progress:
        starts = rng.integers(0, len(text.training) - model.context, batch_size)
        windows = text.training[torch.from_numpy(starts[:, None] + within)]
        start = time.perf_counter()
        loss = loss_of(model, windows, attend, dtype)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a small character-level GPT.")
    parser.add_argument("--attention", choices=ATTENTION, default="fastattn")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of a step")
    parser.add_argument("--context", type=int, default=256, help="characters of a window")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--save", type=Path, metavar="NPZ", help="where to write the weights")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch_size, args.context, args.layers, args.heads) < 1:
        parser.error("--steps, --batch-size, --context, --layers, --heads must be at least 1")
    if args.embed_dim < 1 or args.embed_dim % (2 * args.heads):
        parser.error("--embed-dim must be a multiple of 2 * heads")

    text = read_text()
    if args.context >= len(text.held_out):
        parser.error(f"--context must be below {len(text.held_out)}, the held-out characters")
    attend, dtype = ATTENTION[args.attention], getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = Gpt(text.characters, args.layers, args.embed_dim, args.heads, args.context)
    print(
        f"{len(text.training):,} characters to train on, {len(text.held_out):,} held out, "
        f"{len(text.characters)} different; {sum(p.numel() for p in model.parameters()):,} weights"
    )
    losses, seconds = train(model, text, attend, dtype, args.steps, args.batch_size)
    few = max(1, args.steps // 20)
    speed = args.batch_size * args.context / np.median(seconds)
    print(
        f"{args.attention}, {args.dtype}: loss {np.mean(losses[:few]):.3f} at first, "
        f"{np.mean(losses[-few:]):.3f} at last (nats, means of {few} of {args.steps} steps)\n"
        f"{speed:,.0f} tokens per second (of the median step)"
    )
    unigram, bigram = counting_bits(text)
    bits = held_out_bits(model, text, attend, dtype)
    print(f"bits per held-out character: {bits:.3f}; unigrams {unigram:.3f}, bigrams {bigram:.3f}")
    if args.save is not None:
        model.save(args.save)
        print(f"weights saved to {args.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
