"""Labels that are partly wrong, and a few that are right: the data of AdaLFL's recipes of that name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta import data, models
from lossmeta._batches import Batch, Loss
from lossmeta.experiments import Measure, Task
from lossmeta.experiments.trial import STREAM, seeded

BATCH = 64
ERROR = Measure("error", higher_is_better=False, percent=True, digits=2)
SELECTION = Measure("selection error", higher_is_better=False, shown=False)
# Streams of random numbers of a seed. Stream 0 draws the data.
WEIGHTS, ORDER, CLEAN_ORDER, LOSS = range(1, 5)


@dataclass(frozen=True)
class Noise:
    """How labels become wrong.

    Attributes:
        name: in the table.
        rate: share of the labels that are drawn anew.
        flips: by class, the one that its wrong labels name; ``None``: any class, the right one too.
    """

    name: str
    rate: float
    flips: Callable[[Tensor, int], Tensor] | None = None

    def of(self, labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        moved = torch.rand(len(labels), generator=generator) < self.rate
        anew = torch.randint(classes, labels.shape, generator=generator)
        return torch.where(moved, anew if self.flips is None else self.flips(labels, classes), labels)


def _next(labels: Tensor, classes: int) -> Tensor:
    return (labels + 1) % classes


def _alike(labels: Tensor, classes: int) -> Tensor:
    """CIFAR-10's classes that are alike, after Patrini et al. (2017).

    Truck to car, bird to plane, deer to horse, cat and dog to each other.
    """
    return torch.tensor([0, 1, 0, 5, 7, 3, 6, 7, 8, 1])[labels]


UNIFORM = tuple(Noise(f"{rate:.0%} uniform", rate) for rate in (0.2, 0.4, 0.6))
PAIRS = tuple(Noise(f"{rate:.0%} to the next class", rate, _next) for rate in (0.2, 0.4))
ALIKE = Noise("40% to a class that is alike", 0.4, _alike)
NONE = Noise("right labels", 0.0)


def _small_cnn() -> nn.Module:
    """Two convolutions of stride 2, for colour images of 16 × 16; 10,218 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


@torch.no_grad()
def error(model: nn.Module, part: Batch) -> float:
    """Share of the samples that are predicted wrong."""
    inputs, labels = part
    found = torch.cat([model(x).argmax(1) for x in inputs.split(2000)])
    return (found != labels).double().mean().item()


@dataclass(frozen=True)
class Source:
    """A data set, and the network that is trained on it.

    Attributes:
        name: for :func:`lossmeta.data.load`.
        label: in the table.
        classes: how many.
        train: samples whose labels may be wrong.
        clean: samples whose labels are right, as many of each class.
        selection: samples with right labels that choose settings and stops of the rivals, and train nothing.
        test: samples.
        steps: of training.
        network: new weights, drawn from the global random numbers.
        task_loss: what is really to be lowered.
        measure: what is reported.
        judge: gives it, of a model and a part.
    """

    name: str
    label: str
    classes: int
    train: int
    clean: int
    selection: int
    test: int
    steps: int
    network: Callable[[], nn.Module]
    task_loss: Loss = F.cross_entropy
    measure: Measure = ERROR
    judge: Callable[[nn.Module, Batch], float] = error


def mlp(inputs: int, classes: int, width: int) -> Callable[[], nn.Module]:
    return lambda: models.mlp(inputs, classes, width=width, layers=1)


DIGITS = Source("digits", "digits", 10, 900, 100, 250, 500, 1600, mlp(64, 10, 64))
MNIST = Source("mnist", "MNIST, 14 x 14", 10, 3000, 200, 1500, 4000, 1600, mlp(196, 10, 100))
CIFAR10 = Source("cifar10", "CIFAR-10, 16 x 16, CNN", 10, 5000, 500, 1500, 4000, 1600, _small_cnn)
FLOWERS = Source("flowers-features", "flowers", 5, 2000, 50, 500, 1500, 1600, mlp(1280, 5, 64))
SOURCES = (DIGITS, MNIST, CIFAR10, FLOWERS)


@dataclass(frozen=True)
class Drawn:
    """One seed's data.

    Attributes:
        source: where it is from.
        train: inputs, and labels of which some are wrong.
        clean: right labels.
        selection: right labels; choose settings and stops of the rivals.
        test: right labels.
    """

    source: Source
    train: Batch
    clean: Batch
    selection: Batch
    test: Batch


@cache
def pool(name: str) -> tuple[Tensor, Tensor, int | None]:
    """Standardised inputs, labels, and where the official test part begins; images at half their size."""
    dataset = data.load(name)
    parts = [dataset.train] if dataset.test is None else [dataset.train, dataset.test]
    inputs = torch.cat([x for x, _ in parts]).float()
    if inputs.dim() == 4 and inputs.shape[-1] > 8:
        inputs = torch.cat([F.avg_pool2d(x, 2) for x in inputs.split(10_000)])
    known = inputs[: len(parts[0][1])]
    inputs = (inputs - known.mean()) / known.std()
    return inputs, torch.cat([y for _, y in parts]).long(), None if len(parts) == 1 else len(parts[0][1])


def draw(source: Source, noise: Noise, seed: int, device: torch.device) -> Drawn:
    """A seed's rows and wrong labels; the test part is the same in every seed where there is an official one."""
    inputs, labels, official = pool(source.name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(official or len(labels), generator=generator)
    clean = torch.cat(
        [order[labels[order] == c][: source.clean // source.classes] for c in range(source.classes)]
    )
    rest = order[~torch.isin(order, clean)]
    sizes = [source.selection, source.train, source.test if official is None else 0]
    if len(rest) < sum(sizes):
        raise ValueError(f"{source.name}: needs {sum(sizes) + len(clean)} samples, got {len(order)}")
    selection, train, test = rest[: sum(sizes)].split(sizes)
    if official is not None:
        test = torch.arange(official, official + source.test)
    wrong = noise.of(labels[train], source.classes, generator)

    def part(rows: Tensor, given: Tensor | None = None) -> Batch:
        return inputs[rows].to(device), (labels[rows] if given is None else given).to(device)

    return Drawn(source, part(train, wrong), part(clean), part(selection), part(test))


def task(source: Source, noise: Noise, steps: int | None) -> Task:
    settings = {
        "noise": noise.name,
        "sizes": [source.train, source.clean, source.selection, source.test],
        "steps": steps or source.steps,
        "batch": BATCH,
        "optimizer": "SGD, momentum 0.9",
    }

    def prepare(seed: int, device: torch.device) -> Drawn:
        return draw(source, noise, seed, device)

    return Task(f"{source.label}: {noise.name}", prepare, (ERROR, SELECTION), settings)


def new_model(seed: int, drawn: Drawn) -> nn.Module:
    device = drawn.train[0].device
    with seeded(seed + STREAM * WEIGHTS, device):
        return drawn.source.network().to(device)


def batches(part: Batch, seed: int, steps: int, stream: int = ORDER) -> Iterator[Batch]:
    """Whole batches in an order that changes with every pass; all samples at once where they are fewer."""
    inputs, labels = part
    generator = torch.Generator().manual_seed(seed + STREAM * stream)
    size, order = min(BATCH, len(labels)), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:size].to(labels.device), order[size:]
        yield inputs[rows], labels[rows]
