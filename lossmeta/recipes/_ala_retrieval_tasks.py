"""Embeddings of classes that training has not seen: the data of ALA's retrieval and verification recipes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta import data
from lossmeta._batches import Batch
from lossmeta.ala import ContrastiveShape, LossSpace
from lossmeta.experiments import Measure, Task, Trial
from lossmeta.experiments.trial import STREAM, seeded
from lossmeta.metrics import Metric, RecallAtK, VerificationAccuracy, recall_at_k, verification_pairs
from lossmeta.recipes._ala_methods import Fit
from lossmeta.recipes._ala_tasks import ORDER, SELECTION, WEIGHTS

HIDDEN, EMBEDDED = 128, 64
CLASSES_OF_A_BATCH, SAMPLES_OF_A_CLASS = 16, 4
KEPT = 8  # samples of a class for validation and test
SIDE = 14  # of Omniglot's images
PROJECTED = 256  # features of the cars
PAIRS = {"valid": 1000, "test": 3000}  # of the verification
RECALL = Measure("Recall@1", higher_is_better=True, percent=True, digits=2)
FURTHER = tuple(Measure(f"Recall@{k}", higher_is_better=None, percent=True, digits=2) for k in (10, 100))
VERIFICATION = Measure("verification accuracy", higher_is_better=True, percent=True, digits=2)


@dataclass(frozen=True)
class Source:
    """A data set of many classes.

    Attributes:
        name: for :func:`lossmeta.data.load`.
        classes: for training, validation and test.
        steps: of training.
    """

    name: str
    classes: tuple[int, int, int]
    steps: int


OMNIGLOT = Source("omniglot", (200, 60, 200), steps=500)
CARS = Source("cars196-features", (90, 40, 60), steps=400)


@dataclass(frozen=True)
class Unseen:
    """One seed's classes, no two parts with a class in common.

    Attributes:
        measure: that judges embeddings.
        train: all samples of its classes.
        valid: as many samples of each of its classes, as the test has.
        test: of it.
    """

    measure: Measure
    train: Batch
    valid: Batch
    test: Batch
    metrics: dict[str, Metric] = field(init=False)

    def __post_init__(self) -> None:
        metrics: dict[str, Metric] = {}
        for name, count in PAIRS.items():
            labels = getattr(self, name)[1]
            metrics[name] = (
                RecallAtK(1)
                if self.measure is RECALL
                else VerificationAccuracy(verification_pairs(labels, count))
            )
        object.__setattr__(self, "metrics", metrics)


@cache
def _rows(name: str) -> tuple[Tensor, Tensor]:
    """Standardised rows and labels."""
    dataset = data.load(name)
    if dataset.test is not None:
        images = torch.cat([dataset.train[0], dataset.test[0]])
        rows = torch.cat(
            [F.adaptive_avg_pool2d(x.float() / 255, SIDE).flatten(1) for x in images.split(4000)]
        )
        return (rows - rows.mean()) / rows.std(), torch.cat([dataset.train[1], dataset.test[1]])
    rows, labels = dataset.train
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-3)
    directions = torch.randn(rows.shape[1], PROJECTED, generator=torch.Generator().manual_seed(0))
    return rows @ directions / math.sqrt(rows.shape[1]), labels


def draw(source: Source, measure: Measure, seed: int, device: torch.device) -> Unseen:
    """A seed's classes and samples."""
    rows, labels = _rows(source.name)
    generator = torch.Generator().manual_seed(seed)
    large = [c for c, count in enumerate(labels.bincount().tolist()) if count >= KEPT]
    order = [large[i] for i in torch.randperm(len(large), generator=generator).tolist()]
    parts = []
    begin = 0
    for part, count in enumerate(source.classes):
        chosen = []
        for c in order[begin : begin + count]:
            members = (labels == c).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=generator)]
            chosen.append(members if part == 0 else members[:KEPT])
        begin += count
        found = torch.cat(chosen)
        parts.append((rows[found].to(device), labels[found].to(device)))
    return Unseen(measure, *parts)


def task(source: Source, measure: Measure, steps: int | None) -> Task:
    settings = {
        "measure": measure.name,
        "classes": list(source.classes),
        "validation and test samples of a class": KEPT,
        "steps": steps or source.steps,
        "hidden": HIDDEN,
        "embedded": EMBEDDED,
        "batch": [CLASSES_OF_A_BATCH, SAMPLES_OF_A_CLASS],
        "optimizer": "SGD, momentum 0.9",
    }

    def prepare(seed: int, device: torch.device) -> Unseen:
        return draw(source, measure, seed, device)

    further = FURTHER if measure is RECALL else ()
    return Task(f"{source.name}: {measure.name}", prepare, (measure, *further, SELECTION), settings)


class Normalized(nn.Module):
    """Rows of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class EmbeddingFit(Fit):
    """A network of one hidden layer that embeds, in training.

    Args:
        trial: of it.
        rate: learning rate.
        losses: what of the loss may adapt.
    """

    def __init__(self, trial: Trial, rate: float, losses: LossSpace | None = None) -> None:
        self.losses = losses or ContrastiveShape()
        super().__init__(trial, rate)

    def __post_init__(self) -> None:
        self.drawn: Unseen = self.trial.data  # type: ignore[assignment]
        self.steps = self.trial.task.settings["steps"]
        inputs = self.drawn.train[0]
        with seeded(self.trial.seed + STREAM * WEIGHTS, inputs.device):
            layers = nn.Linear(inputs.shape[1], HIDDEN), nn.Linear(HIDDEN, EMBEDDED)
            for layer, gain in zip(layers, (2, 1), strict=True):
                nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
                nn.init.zeros_(layer.bias)
            self.model = nn.Sequential(layers[0], nn.ReLU(), layers[1], Normalized()).to(inputs.device)
        self.optimizer = SGD(self.model.parameters(), self.rate, momentum=0.9)

    def batches(self, with_validation: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As many samples of as many classes, without replacement."""
        parts = [self.drawn.train, self.drawn.valid] if with_validation else [self.drawn.train]
        inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
        generator = torch.Generator().manual_seed(self.trial.seed + STREAM * ORDER)
        for i in range(self.steps):
            self.trial.progress(i / self.steps)
            classes = torch.randperm(len(members), generator=generator)[:CLASSES_OF_A_BATCH].tolist()
            rows = torch.cat(
                [
                    own[torch.randperm(len(own), generator=generator)[:SAMPLES_OF_A_CLASS].to(own.device)]
                    for own in (members[c] for c in classes)
                ]
            )
            yield i, inputs[rows], labels[rows]

    def space(self) -> LossSpace:
        return self.losses

    def new_metric(self) -> Metric:
        return self.drawn.metrics["valid"]

    @torch.no_grad()
    def measures(self, biases: Tensor | float = 0.0) -> dict[str, float]:
        embedded = {name: self.model(getattr(self.drawn, name)[0]) for name in PAIRS}
        found = {
            name: self.drawn.metrics[name].each(x[None], getattr(self.drawn, name)[1]).item()
            for name, x in embedded.items()
        }
        further = {}
        if self.drawn.measure is RECALL:
            recalls = recall_at_k(embedded["test"], self.drawn.test[1], (10, 100)).tolist()
            further = {m.name: value for m, value in zip(FURTHER, recalls, strict=True)}
        return {self.drawn.measure.name: found["test"], **further, SELECTION.name: found["valid"]}
