"""The seconds that a program spends in attention, for the examples that compare two of them."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attend = Callable[..., Tensor]  # (q, k, v, ...), shapes as in fastattn.torch.attention


class Stopwatch:
    """Call an attention and add up its seconds, those of its backward pass included."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.seconds = 0.0
        self._started: float | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        q, k, v = Turn.apply(self, q, k, v)
        (out,) = Turn.apply(self, self.attend(q, k, v, **options))
        return out

    def turn(self) -> None:
        """Start at the first call, stop at the second."""
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        else:
            self.seconds += now - self._started
            self._started = None


class Turn(torch.autograd.Function):
    """The identity, which turns a stopwatch when tensors pass and again when their gradients do."""

    @staticmethod
    def forward(ctx: Any, watch: Stopwatch, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.watch = watch
        watch.turn()
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watch.turn()
        return None, *gradients
