"""Copies of one PyTorch model, trained with different attentions, and what time those take."""

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

Attend = Callable[..., Tensor]  # (q, k, v), of shapes as in fastattn.torch.attention


class Clock:
    """Adds up the seconds from the first call of `turn` to the second, the third to the fourth."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.started: float | None = None

    def turn(self) -> None:
        now = time.perf_counter()
        if self.started is None:
            self.started = now
        else:
            self.seconds += now - self.started
            self.started = None


class Turn(torch.autograd.Function):
    """The identity, which turns the clock when tensors pass and again when their gradients do."""

    @staticmethod
    def forward(ctx: Any, clock: Clock, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.clock = clock
        clock.turn()
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.turn()
        return None, *gradients


def timed(attend: Attend, clock: Clock) -> Attend:
    """`attend` between two turns of the clock, which its gradients turn twice as well."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (out,) = Turn.apply(clock, attend(*Turn.apply(clock, q, k, v)))
        return out

    return call


class Run:
    """A copy of a model, whose `loss(batch, attend)` is made small, and where its time goes."""

    def __init__(
        self, model: nn.Module, attend: Attend, rate: float, steps: int, warm_up: float
    ) -> None:
        self.model, self.attend, self.clock = copy.deepcopy(model), attend, Clock()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, steps, pct_start=warm_up
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Any) -> None:
        torch.manual_seed(len(self.losses))  # for what the model draws
        start = time.perf_counter()
        loss = self.model.loss(batch, timed(self.attend, self.clock))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def train(
    model: nn.Module,
    attention: dict[str, Attend],
    batches: Iterable[Any],
    rate: float,
    steps: int,
    warm_up: float,  # the share of the steps in which the rate rises
) -> dict[str, Run]:
    """A run for each attention, all from the model's weights, on the same batches in turns."""
    runs = {name: Run(model, attend, rate, steps, warm_up) for name, attend in attention.items()}
    for batch in tqdm(batches, desc="training both", total=steps, unit="step", disable=None):
        for run in runs.values():
            run.step(batch)
    return runs


def print_times(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        milliseconds = 1e3 * np.median(run.seconds)
        share = run.clock.seconds / sum(run.seconds)
        print(f"{name}: {milliseconds:.1f} ms a step (median), attention took {share:.0%} of it")
