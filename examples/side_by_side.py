"""Copies of one PyTorch model, trained with different attentions, and what time those take."""

import copy
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from stopwatch import Attend, Stopwatch


class Run:
    """A copy of a model, whose `loss(batch, attend)` is made small, and where its time goes."""

    def __init__(
        self, model: nn.Module, attend: Attend, rate: float, steps: int, warm_up: float
    ) -> None:
        self.model, self.attend = copy.deepcopy(model), Stopwatch(attend)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, steps, pct_start=warm_up
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Any) -> None:
        torch.manual_seed(len(self.losses))  # for what the model draws
        start = time.perf_counter()
        loss = self.model.loss(batch, self.attend)
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
        share = run.attend.seconds / sum(run.seconds)
        print(f"{name}: {milliseconds:.1f} ms a step (median), attention took {share:.0%} of it")
