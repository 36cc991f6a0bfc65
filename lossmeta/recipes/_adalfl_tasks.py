"""The tasks of the AdaLFL paper: data, split, model and schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta import data, models
from lossmeta._batches import Batch
from lossmeta._model_state import evaluating
from lossmeta.data import Dataset
from lossmeta.experiments import Measure, Task

# Train; validation, which the meta-objective sees; selection, by which hyper-parameters are chosen; test.
SHARES = {"validation": 0.1, "selection": 0.1, "test": 0.2}


@dataclass(frozen=True)
class Problem:
    """A data set with a model and a schedule.

    Attributes:
        name: as in the paper's tables.
        data: name for :func:`lossmeta.data.load`.
        model: called with inputs per sample and outputs; draws new weights.
        batch: batch size.
        steps: training steps.
        rate: learning rate of plain SGD, the paper's or, at a smaller width, what corresponds to it.
        rates: among which the tuned rate is chosen.
        momentum: of Nesterov's kind.
        weight_decay: of SGD.
        augment: random horizontal flips and crops.
    """

    name: str
    data: str
    model: Callable[[int, int], nn.Module]
    batch: int
    steps: int
    rate: float
    rates: tuple[float, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0
    augment: bool = False

    @property
    def optimizer_options(self) -> dict[str, float | bool]:
        return {
            "momentum": self.momentum,
            "nesterov": self.momentum > 0,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True)
class Splits:
    """One seed's parts of a data set, ready for the model."""

    parts: dict[str, Batch]
    classes: int | None
    augment: bool = False
    pixels: tuple[Tensor, Tensor] | None = None  # mean and deviation, [C, 1, 1] each, of images as bytes

    @property
    def regression(self) -> bool:
        return self.classes is None

    @property
    def outputs(self) -> int:
        return self.parts["train"][1].shape[1] if self.classes is None else self.classes

    @property
    def features(self) -> int:
        return self.parts["train"][0][0].numel()

    def joined(self, *names: str) -> Batch:
        inputs, targets = zip(*(self.parts[name] for name in names), strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def batches(self, part: Batch, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches in an order of the seed's own, epoch by epoch, of the same size throughout."""
        inputs, targets = part
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(targets))
        rows = torch.empty(0, dtype=torch.int64)
        while True:
            while len(rows) < size:
                rows = torch.cat([rows, torch.randperm(len(targets), generator=generator)])
            chosen, rows = rows[:size].to(targets.device), rows[size:]
            yield self.prepared(inputs[chosen], generator), targets[chosen]

    def prepared(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs for the model: images are normalised and, with a generator, augmented if the task asks for it."""
        if self.pixels is not None:
            mean, deviation = self.pixels
            inputs = (inputs - mean) / deviation
        return augmented(inputs, generator) if self.augment and generator else inputs

    @torch.no_grad()
    def evaluate(self, model: nn.Module, name: str) -> float:
        """Mean squared error, or share of wrong classes; infinite where the model's outputs are not finite."""
        inputs, targets = self.parts[name]
        total = 0.0
        with evaluating(model):
            for x, y in zip(inputs.split(500), targets.split(500), strict=True):
                prediction = model(self.prepared(x))
                if not prediction.isfinite().all():
                    total = float("inf")
                elif self.regression:
                    total += F.mse_loss(prediction, y, reduction="sum").item() / y.shape[1]
                else:
                    total += (prediction.argmax(1) != y).sum().item()
        return total / len(targets)


def augmented(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random horizontal flips and crops of padded images, one draw per image [N, C, H, W]."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = (torch.randint(2 * padding + 1, (n, 1), generator=generator) for _ in range(2))
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows = (top + torch.arange(height)).to(images.device)
    columns = left + torch.arange(width)
    columns = torch.where(flip, columns.flip(1), columns).to(images.device)
    n_index = torch.arange(n, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[n_index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def split(dataset: Dataset, seed: int, device: torch.device, augment: bool) -> Splits:
    """A seed's parts: the official test set where there is one, else a share of the rows.

    By what is not tested on, images are normalised per channel, inputs of regression standardised, and its targets
    brought to [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = dataset.train
    order = torch.randperm(len(targets), generator=generator)
    parts: dict[str, Batch] = {}
    held_out = 0
    if dataset.test is not None:
        parts["test"] = dataset.test
    for name, share in SHARES.items():
        if name in parts:
            continue
        size = max(1, round(share * len(targets)))
        rows = order[held_out : held_out + size]
        parts[name] = inputs[rows], targets[rows]
        held_out += size
    parts["train"] = inputs[order[held_out:]], targets[order[held_out:]]
    if dataset.classes is None:
        known = [name for name in parts if name != "test"]
        x, y = (torch.cat(column).double() for column in zip(*(parts[k] for k in known), strict=True))
        low, high = y.amin(0), y.amax(0)
        mean, deviation = x.mean(0), x.std(0).clamp_min(1e-12)
        parts = {
            name: (((a - mean) / deviation).float(), ((b - low) / (high - low)).float())
            for name, (a, b) in parts.items()
        }
    on_device = {name: (a.to(device), b.to(device)) for name, (a, b) in parts.items()}
    if inputs.dtype != torch.uint8:
        return Splits(on_device, dataset.classes, augment)
    sample = on_device["train"][0][:10_000].float().transpose(0, 1).flatten(1)
    mean, deviation = (t[:, None, None] for t in (sample.mean(1), sample.std(1)))
    return Splits(on_device, dataset.classes, augment, (mean, deviation))


@dataclass(frozen=True)
class Drawn:
    """What a trial is given.

    Attributes:
        problem: with the number of steps that was asked for.
        splits: of the trial's seed.
        offline_steps: of Algorithms 1 and 3.
    """

    problem: Problem
    splits: Splits
    offline_steps: int


OFFLINE_STEPS = 2500
ERROR = Measure("test error", higher_is_better=False)
SELECTION = Measure("selection error", higher_is_better=False, shown=False)
SLOPE, RATE = Measure("slope", higher_is_better=None, digits=2), Measure("rate", higher_is_better=None)
SECONDS = Measure("seconds", higher_is_better=False, digits=2, ratio=True)


@lru_cache(maxsize=1)  # the tasks of one data set follow one another
def _dataset(name: str) -> Dataset:
    return data.load(name)


def as_task(problem: Problem, steps: int | None, measures: tuple[Measure, ...]) -> Task:
    """The task for the runner, with another number of steps where one is given."""
    if steps is not None:
        problem = replace(problem, steps=steps)
    offline_steps = OFFLINE_STEPS if steps is None else steps
    settings = {
        "data": problem.data,
        "batch": problem.batch,
        "steps": problem.steps,
        "offline_steps": offline_steps,
        "base rate": problem.rate,
        "augment": problem.augment,
        **problem.optimizer_options,
    }
    return Task(problem.name, partial(_prepare, problem, offline_steps), measures, settings)


def _prepare(problem: Problem, offline_steps: int, seed: int, device: torch.device) -> Drawn:
    splits = split(_dataset(problem.data), seed, device, problem.augment)
    return Drawn(problem, splits, offline_steps)


# ---- The tasks. Paper: batch 128; SGD without momentum at 1e-3 (regression) and 1e-2; CIFAR and SVHN with Nesterov
# momentum 0.9 and weight decay 5e-4. Steps, widths and batch size are those of the same authors' EvoMAL (see DESIGN).


def _mlp(width: int) -> Callable[[int, int], nn.Module]:
    return lambda features, outputs: models.mlp(features, outputs, width=width)


def _image(name: str) -> Callable[[int, int], nn.Module]:
    return lambda features, outputs: getattr(models, name)(outputs)


def _wide(depth: int, widen: int) -> Callable[[int, int], nn.Module]:
    return lambda features, outputs: models.wide_resnet(depth, widen, outputs)


GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
REGRESSION = {"Crime": "communities", "Diabetes": "diabetes", "California": "california"}
CIFAR_MODELS = {
    "VGG-16": "vgg16",
    "AllCNN-C": "allcnn_c",
    "ResNet-18": "resnet18",
    "SqueezeNet": "squeezenet",
}
DEEP = {"batch": 128, "rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "augment": True}


def _regression(width: int, steps: int, rate: float, batch: int) -> list[Problem]:
    return [
        Problem(f"{name} + MLP", data, _mlp(width), batch, steps, rate, GRID)
        for name, data in REGRESSION.items()
    ]


def _deep(name: str, data: str, model: Callable[[int, int], nn.Module]) -> Problem:
    return Problem(name, data, model, steps=150_000, rates=GRID[:5], **DEEP)  # type: ignore[arg-type]


def _small_cnn(data: str, label: str) -> Problem:
    """What a CPU trains in a minute, on the same data."""
    return Problem(f"{label} + small CNN", data, _image("small_cnn"), 64, 1500, 0.01, GRID[1:6], momentum=0.9)


SMALL: dict[str, list[Problem]] = {
    # At width 100 and a rate of 1e-2 the last layer moves as at width 1000 and 1e-3.
    "regression": _regression(100, 2000, 0.01, 64),
    "mnist": [
        Problem("MNIST + Logistic", "mnist", models.logistic, 64, 3000, 0.01, GRID),
        Problem("MNIST + MLP", "mnist", _mlp(256), 64, 3000, 0.01, GRID),
        Problem("MNIST + LeNet-5", "mnist", _image("lenet5"), 32, 2000, 0.01, GRID),
    ],
    "cifar10": [_small_cnn("cifar10", "CIFAR-10")],
    "cifar100": [_small_cnn("cifar100", "CIFAR-100")],
    "svhn": [_small_cnn("svhn", "SVHN")],
}
PAPER: dict[str, list[Problem]] = {
    "regression": _regression(1000, 10_000, 0.001, 128),
    "mnist": [
        Problem("MNIST + Logistic", "mnist", models.logistic, 128, 10_000, 0.01, GRID),
        Problem("MNIST + MLP", "mnist", _mlp(1000), 128, 10_000, 0.01, GRID),
        Problem("MNIST + LeNet-5", "mnist", _image("lenet5"), 128, 10_000, 0.01, GRID),
    ],
    "cifar10": [_deep(f"CIFAR-10 + {name}", "cifar10", _image(f)) for name, f in CIFAR_MODELS.items()],
    "cifar100": [_deep("CIFAR-100 + WRN 28-10", "cifar100", _wide(28, 10))],
    "svhn": [_deep("SVHN + WRN 16-8", "svhn", _wide(16, 8))],
}


def problems(size: str, *groups: str) -> list[Problem]:
    """The tasks of some groups, of all without any."""
    table = {"small": SMALL, "paper": PAPER}[size]
    return list(itertools.chain.from_iterable(table[group] for group in groups or table))
