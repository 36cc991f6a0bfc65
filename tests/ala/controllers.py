"""Controllers of a small problem, and metrics whose values are known."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from toy_problem import CLASSES, data, margin

from lossmeta.ala import (
    ClassCorrelation,
    Controller,
    ControllerReport,
    LossSpace,
)
from lossmeta.metrics import Metric


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def made(
    space: LossSpace | None = None, metric: Any = margin, valid: Any = None, **options: Any
) -> Controller:
    options = {"steps": 100, "window": 1, "evaluations": 1, **options}
    return Controller(
        space or ClassCorrelation(CLASSES), metric, data(40, 1) if valid is None else valid, **options
    )


class Margin(Metric):
    """The same as a metric of the library."""

    higher_is_better = True

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([margin(s, labels) for s in scores]).double()


class Told:
    """A metric whose values are known beforehand, and that knows how often it was asked."""

    def __init__(self, *values: float) -> None:
        self.values, self.asked = list(values), 0
        self.__name__ = "told"

    def __call__(self, prediction: Tensor, target: Tensor) -> float:
        self.asked += 1
        return self.values[(self.asked - 1) % len(self.values)]


def restless(space: LossSpace | None = None, **options: Any) -> Controller:
    """One whose metric changes with every step although nothing is trained."""

    def metric(prediction: Tensor, target: Tensor) -> float:
        return math.sin(3 * controller.steps_done) + float(prediction.mean())

    controller = made(space, metric, **options)
    return controller


def run(controller: Controller, steps: int, models: Any = None) -> list[ControllerReport]:
    """The reports of the windows that end; nothing is trained."""
    models = models or [network(i) for i in range(len(controller.losses))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = [controller.step(models) for _ in range(steps)]
    return [r for r in reports if r is not None]


def trained(controller: Controller, model: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        x, y = data(16, 50 + i)
        optimizer.zero_grad()
        controller(model(x), y).backward()
        optimizer.step()
        controller.step(model)


def equal(a: Any, b: Any) -> bool:
    """To the last bit, NaN included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
