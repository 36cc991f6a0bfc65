"""Classes that are rare, labels that are wrong, both, and neither: the data of ALA's recipes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta import data
from lossmeta._batches import Batch
from lossmeta.ala import LogitAdjustment, LossSpace, Robust
from lossmeta.experiments import Measure, Task
from lossmeta.experiments.trial import STREAM, seeded
from lossmeta.metrics import AveragePrecision, BalancedErrorRate, ErrorRate, Metric, WorstClassRecall

CLASSES, HIDDEN, BATCH = 10, 64, 64
SQUARES = {28: 2, 32: 4}  # by the side of an image, that of the squares of which the means are taken
# What chooses among rates, stops and fixed losses: the same metric on the validation part.
SELECTION = Measure("validation", higher_is_better=True, shown=False)
# Streams of random numbers of a seed. Stream 0 draws the data.
WEIGHTS, ORDER, SEARCH = range(1, 4)


@dataclass(frozen=True)
class Problem:
    """What is hard, and by what it is judged.

    Attributes:
        name: of it.
        metric: as a class.
        measure: the metric on the test part.
        ratio: of the most frequent class to the rarest; between them the sizes are a geometric sequence.
        noise: share of the training labels that are moved to another class.
    """

    name: str
    metric: str
    measure: Measure
    ratio: float = 1.0
    noise: float = 0.0

    def space(self, counts: Tensor) -> LossSpace:
        """What of the loss is adapted."""
        adjustment, robust = LogitAdjustment(counts), Robust()
        if self.ratio > 1 and not self.noise:
            return adjustment
        return robust if self.noise and self.ratio == 1 else adjustment * robust

    def new_metric(self) -> Metric:
        return METRICS[self.metric]()


class OfProbabilities(Metric):
    """Another metric, of the logarithms of the probabilities: for metrics that compare samples with each other."""

    def __init__(self, metric: Metric) -> None:
        self.metric, self.higher_is_better = metric, metric.higher_is_better

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.metric.each(scores.log_softmax(-1), labels)


METRICS: dict[str, Any] = {
    "error": ErrorRate,
    "worst-class recall": lambda: WorstClassRecall(CLASSES),
    "balanced error": lambda: BalancedErrorRate(CLASSES),
    "macro average precision": lambda: OfProbabilities(AveragePrecision()),
    "AUCPR": AveragePrecision,  # of scores that may not be a softmax's
}


def _measure(name: str, higher_is_better: bool) -> Measure:
    return Measure(name, higher_is_better=higher_is_better, percent=True, digits=2)


RARE = "rare classes, 20 : 1"
IMBALANCE = Problem(RARE, "worst-class recall", _measure("worst-class recall", True), ratio=20)
IMBALANCE_BY_BALANCED_ERROR = Problem(
    f"{RARE}, by balanced error", "balanced error", _measure("balanced error", False), ratio=20
)
IMBALANCE_BY_AVERAGE_PRECISION = Problem(
    f"{RARE}, by macro average precision",
    "macro average precision",
    _measure("macro average precision", True),
    ratio=20,
)
NOISE = Problem("40 % wrong labels", "error", _measure("error", False), noise=0.4)
CLEAN = Problem("right labels", "error", _measure("error", False))
AUCPR = Problem("right labels, AUCPR", "AUCPR", _measure("AUCPR", True))
BOTH = Problem(
    "20 : 1 and 30 % wrong labels", "balanced error", _measure("balanced error", False), ratio=20, noise=0.3
)


@dataclass(frozen=True)
class Source:
    """A data set of images in ten classes.

    Attributes:
        name: for :func:`lossmeta.data.load`.
        even: rows of each class for training, where none is rare.
        most: rows of the most frequent class for training, where others are rare.
        valid: rows of each class for validation.
        test: rows of each class for the test, from the official test part where there is one.
        steps: of training.
    """

    name: str
    even: int
    most: int
    valid: int
    test: int
    steps: int

    def rows(self, problem: Problem) -> int:
        """Of the most frequent class, for training."""
        return self.most if problem.ratio > 1 else self.even


DIGITS = Source("digits", even=100, most=100, valid=20, test=50, steps=500)
MNIST = Source("mnist", even=150, most=400, valid=30, test=200, steps=800)
# No setting of a population was chosen by it.
CIFAR10 = Source("cifar10", even=150, most=400, valid=30, test=200, steps=800)


@dataclass(frozen=True)
class Drawn:
    """One seed's data.

    Attributes:
        train: inputs, and labels of which some may be wrong.
        valid: right labels, as many of each class; trains nothing but the row that says so.
        test: right labels, as many of each class.
    """

    problem: Problem
    train: Batch
    valid: Batch
    test: Batch

    @property
    def counts(self) -> Tensor:
        return self.train[1].bincount(minlength=CLASSES)

    def space(self) -> LossSpace:
        return self.problem.space(self.counts)


@cache
def _pixels(name: str) -> tuple[Tensor, Tensor, int | None]:
    """Standardised rows, labels, and where the official test part begins; large images as means of small squares."""
    dataset = data.load(name)
    parts = [dataset.train] if dataset.test is None else [dataset.train, dataset.test]
    images = torch.cat([inputs for inputs, _ in parts]).float() / 255
    if side := SQUARES.get(images.shape[-1]):
        images = torch.cat([F.avg_pool2d(x, side) for x in images.split(10_000)])
    rows = images.flatten(1)
    known = rows[: len(parts[0][1])]
    rows = (rows - known.mean()) / known.std()
    return rows, torch.cat([labels for _, labels in parts]), None if len(parts) == 1 else len(parts[0][1])


def draw(source: Source, problem: Problem, seed: int, device: torch.device) -> Drawn:
    """A seed's rows: which classes are rare, which samples, and which labels are wrong."""
    rows, labels, official = _pixels(source.name)
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randperm(CLASSES, generator=generator).tolist()
    parts: dict[str, list[Tensor]] = {"train": [], "valid": [], "test": []}
    for c in range(CLASSES):
        found = (labels == c).nonzero()[:, 0]
        found = found[torch.randperm(len(found), generator=generator)]
        test = found[-source.test :] if official is None else found[found >= official][: source.test]
        known = found[: -source.test] if official is None else found[found < official]
        size = max(3, round(source.rows(problem) * problem.ratio ** (-rank[c] / (CLASSES - 1))))
        parts["test"].append(test)
        parts["valid"].append(known[: source.valid])
        parts["train"].append(known[source.valid :][:size])
    chosen = {name: torch.cat(each) for name, each in parts.items()}
    train = labels[chosen["train"]]
    moved = torch.rand(len(train), generator=generator) < problem.noise
    shift = torch.randint(1, CLASSES, train.shape, generator=generator)
    train = torch.where(moved, (train + shift) % CLASSES, train)

    def part(name: str) -> Batch:
        return rows[chosen[name]].to(device), labels[chosen[name]].to(device)

    return Drawn(problem, (part("train")[0], train.to(device)), part("valid"), part("test"))


def task(source: Source, problem: Problem, steps: int | None) -> Task:
    settings = {
        "problem": problem.name,
        "rows of the most frequent class": source.rows(problem),
        "validation rows of each class": source.valid,
        "test rows of each class": source.test,
        "steps": steps or source.steps,
        "hidden": HIDDEN,
        "batch": BATCH,
        "optimizer": "SGD, momentum 0.9",
    }

    def prepare(seed: int, device: torch.device) -> Drawn:
        return draw(source, problem, seed, device)

    return Task(f"{source.name}: {problem.name}", prepare, (problem.measure, SELECTION), settings)


def new_model(seed: int, drawn: Drawn) -> nn.Module:
    """One hidden layer; weights of standard deviation sqrt(2 / inputs) and sqrt(1 / inputs), no biases at first."""
    inputs = drawn.train[0]
    with seeded(seed + STREAM * WEIGHTS, inputs.device):
        layers = nn.Linear(inputs.shape[1], HIDDEN), nn.Linear(HIDDEN, CLASSES)
        for layer, gain in zip(layers, (2, 1), strict=True):
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], nn.ReLU(), layers[1]).to(inputs.device)


def batches(part: Batch, seed: int, steps: int, size: int = BATCH) -> Iterator[Batch]:
    """Rows drawn with replacement."""
    inputs, labels = part
    generator = torch.Generator().manual_seed(seed + STREAM * ORDER)
    for _ in range(steps):
        rows = torch.randint(len(labels), (size,), generator=generator).to(labels.device)
        yield inputs[rows], labels[rows]
