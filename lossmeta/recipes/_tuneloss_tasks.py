"""The data of TuneLoss's recipes: fixed features, and the boxes of the loss's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmeta import data
from lossmeta._batches import Batch
from lossmeta.experiments import Measure, Task
from lossmeta.recipes._softmax_regression import SoftmaxRegression

LOG_LOSS = Measure("log loss", higher_is_better=False, digits=4)
ERROR = Measure("error", higher_is_better=False, percent=True, digits=2)
# What chooses among the runs of a row.
VALIDATION = Measure("validation log loss", higher_is_better=False, shown=False)


@dataclass(frozen=True)
class Source:
    """Features and how they are split.

    Attributes:
        name: for :func:`lossmeta.data.load`.
        train: n.
        valid: samples of the validation part.
        bounds: of l1 and of l2.
        components: principal ones of the training part that are kept, or 0 for the features as they are.
        classes: the first ones that are kept, or 0 for all.
        scale: of the features.
        junk: whether as many features are added, those of another sample.
        groups: of features, each with an l2 of its own.
        epochs: of AdaGrad on single samples; 0 for the exact minimiser.
        test: samples of the test part, or 0 for all that are left.
    """

    name: str
    train: int
    valid: int
    bounds: tuple[float, float]
    components: int = 0
    classes: int = 0
    scale: float = 1.0
    junk: bool = False
    groups: int = 1
    epochs: int = 0
    test: int = 0

    @property
    def box(self) -> Mapping[str, tuple[Any, Any]]:
        """Bounds by name, as the paper's but for those of l1 and l2."""
        low, high = self.bounds
        l2 = self.bounds if self.groups == 1 else (np.full(self.groups, low), np.full(self.groups, high))
        return {"l1": self.bounds, "l2": l2, "uniform": (0.0, 0.1), "dropout": (0.0, 1.0)}


DIGITS = Source("digits", 200, 200, (0.01, 10.0), scale=4 / 255)
FLOWERS = Source("flowers-features", 500, 400, (0.1, 100.0), components=200)
CARS = Source("cars196-features", 320, 200, (0.1, 100.0), components=200, classes=20)
JUNK = Source("digits", 200, 200, (0.01, 10.0), scale=4 / 255, junk=True, groups=128)
JUNK_SHARED = Source("digits", 200, 200, (0.01, 10.0), scale=4 / 255, junk=True)
# These took no part when TuneLoss's settings were chosen. Scaled to rows of about the norm of those above.
MNIST = Source("mnist", 500, 400, (0.1, 100.0), components=200, scale=1.2 / 255, test=4000)
CIFAR10 = Source("cifar10", 500, 400, (0.1, 100.0), components=200, scale=0.63 / 255, test=4000)
FLOWERS_ADAGRAD = Source("flowers-features", 1500, 1000, (0.1, 100.0), epochs=30)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One seed's data.

    Attributes:
        source: of them.
        problem: with the training part.
        valid: chooses.
        test: decides nothing.
    """

    source: Source
    problem: SoftmaxRegression
    valid: Batch
    test: Batch


@cache
def _features(name: str) -> tuple[Tensor, Tensor]:
    dataset = data.load(name)
    parts = [dataset.train] if dataset.test is None else [dataset.train, dataset.test]
    x = torch.cat([inputs.flatten(1) for inputs, _ in parts])
    return x, torch.cat([labels for _, labels in parts])


def draw(source: Source, seed: int) -> Drawn:
    x, y = _features(source.name)
    if source.classes:
        x, y = x[y < source.classes], y[y < source.classes]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    if source.test:
        order = order[: source.train + source.valid + source.test]
    x, y = x[order].double() * source.scale, y[order]
    x = x - x[: source.train].mean(0)
    if source.components:
        _, _, v = torch.linalg.svd(x[: source.train], full_matrices=False)
        x = x @ v[: source.components].T
    if source.junk:
        x = torch.cat([x, x[torch.randperm(len(y), generator=generator)]], 1)
    ends = source.train, source.train + source.valid
    train, valid, test = ((x[a:b], y[a:b]) for a, b in ((0, ends[0]), ends, (ends[1], None)))
    problem = SoftmaxRegression(*train, classes=int(y.max()) + 1, seeds=[seed])
    return Drawn(source, problem, valid, test)


def task(name: str, source: Source, runs: int | None = None) -> Task:
    """``runs``: at most so many of each method, for a shorter recipe."""

    def prepare(seed: int, device: torch.device) -> Drawn:
        return draw(source, seed)

    settings = {**vars(source), "bounds": list(source.bounds), "runs": runs}
    return Task(name, prepare, (LOG_LOSS, ERROR, VALIDATION), settings)
