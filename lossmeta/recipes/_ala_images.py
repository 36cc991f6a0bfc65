"""CIFAR-10 as the ALA paper splits it, small and whole, and training on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta import data, models
from lossmeta._batches import Batch
from lossmeta._model_state import evaluating
from lossmeta.ala import LossSpace, Robust, Smoothing
from lossmeta.experiments import Diverged, Measure, Task
from lossmeta.metrics import Metric
from lossmeta.recipes._adalfl_tasks import augmented
from lossmeta.recipes._ala_methods import Fit
from lossmeta.recipes._ala_tasks import CLASSES, SELECTION, WEIGHTS, OfProbabilities, Problem

DROP = 0.1  # of the learning rate, after half and three quarters of the training
DROPS = (0.5, 0.75)
AT_ONCE = 1000  # samples that are predicted in one call
CHILD = 100  # streams of random numbers of two children lie this far apart
TRAINING = Measure("training error", higher_is_better=False, percent=True, digits=2)


def small_mlp() -> nn.Module:
    """One hidden layer of 128 units, for images of 8×8; 25,994 parameters."""
    return models.mlp(192, CLASSES, width=128, layers=1)


@dataclass(frozen=True)
class Setting:
    """A size of the experiments.

    Attributes:
        model: draws new weights; its last layer is linear.
        shrink: images are means of squares of this side.
        rows: for training and validation, of the official training part.
        test: rows of the official test part.
        batch: rows of a step.
        steps: of training.
        rates: learning rates to choose from, of cross-entropy.
        bounded_rates: the same for losses whose slope the sigmoid of Eq. 6 makes smaller.
        step_sizes: of Phi to choose from, in units of 0.1.
        least_eases: of L-Softmax to choose from.
        weight_decay: of SGD with momentum 0.9.
        augment: random horizontal flips and crops.
        window: K.
        evaluations: of the metric in a window.
        children: of multi-network training.
        episodes: that a teacher learns from.
        teacher_rate: of its Adam.
        meta_rates: of Adam for a Phi that is learned by gradient, to choose from.
        tuning_seeds: how many seeds settings are chosen on.
    """

    model: Callable[[], nn.Module]
    shrink: int
    rows: tuple[int, int]
    test: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    bounded_rates: tuple[float, ...]
    step_sizes: tuple[float, ...]
    least_eases: tuple[float, ...]
    weight_decay: float
    augment: bool
    window: int
    evaluations: int
    children: int
    episodes: int
    teacher_rate: float
    meta_rates: tuple[float, ...]
    tuning_seeds: int


SMALL = Setting(
    model=small_mlp,
    shrink=4,
    rows=(4000, 1000),
    test=2000,
    batch=64,
    steps=2000,
    rates=(0.003, 0.01, 0.03),
    bounded_rates=(0.03, 0.1, 0.3),
    step_sizes=(1.0, 0.1, 0.01),
    least_eases=(0.0, 5.0),
    weight_decay=0.0,
    augment=False,
    window=20,
    evaluations=2,
    children=4,
    episodes=50,
    teacher_rate=0.01,
    meta_rates=(1e-5, 1e-4, 1e-3),
    tuning_seeds=3,
)
# 300 epochs of 40,000 rows.
PAPER = Setting(
    model=models.resnet32,
    shrink=1,
    rows=(40_000, 10_000),
    test=10_000,
    batch=128,
    steps=93_750,
    rates=(0.1,),
    bounded_rates=(0.1,),
    step_sizes=(1.0,),
    least_eases=(0.0,),
    weight_decay=1e-4,
    augment=True,
    window=200,
    evaluations=4,
    children=10,
    episodes=50,
    teacher_rate=1e-3,
    meta_rates=(1e-3,),
    tuning_seeds=1,
)
SETTINGS = {"small": SMALL, "paper": PAPER}


@dataclass(frozen=True)
class Images:
    """One seed's rows, standardised."""

    problem: Problem
    setting: Setting
    train: Batch
    valid: Batch
    test: Batch


@cache
def _images(name: str, shrink: int) -> tuple[Batch, Batch]:
    """The official parts, by the training part's mean and deviation of each channel."""
    dataset = data.load(name)
    assert dataset.test is not None
    parts = []
    for inputs, labels in (dataset.train, dataset.test):
        pixels = [F.avg_pool2d(x.float() / 255, shrink) for x in inputs.split(5000)]
        parts.append((torch.cat(pixels), labels))
    known = parts[0][0]
    mean, deviation = known.mean((0, 2, 3), keepdim=True), known.std((0, 2, 3), keepdim=True)
    train, test = (((x - mean) / deviation, y) for x, y in parts)
    return train, test


def draw(problem: Problem, setting: Setting, seed: int, device: torch.device) -> Images:
    """A seed's rows for training, validation and test, without replacement."""
    train, test = _images("cifar10", setting.shrink)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train[1]), generator=generator)
    last = torch.randperm(len(test[1]), generator=generator)[: setting.test]
    own, valid = order[: setting.rows[0]], order[setting.rows[0] :][: setting.rows[1]]

    def part(whole: Batch, rows: Tensor) -> Batch:
        return whole[0][rows].to(device), whole[1][rows].to(device)

    return Images(problem, setting, part(train, own), part(train, valid), part(test, last))


def task(problem: Problem, setting: Setting, steps: int | None, *more: Measure) -> Task:
    settings: dict[str, Any] = {
        "problem": problem.name,
        "rows": setting.rows,
        "test rows": setting.test,
        "shrink": setting.shrink,
        "batch": setting.batch,
        "steps": steps or setting.steps,
        "weight decay": setting.weight_decay,
        "augment": setting.augment,
        "window": setting.window,
        "evaluations": setting.evaluations,
    }

    def prepare(seed: int, device: torch.device) -> Images:
        return draw(problem, setting, seed, device)

    name = "CIFAR-10 + ResNet-32" if setting.shrink == 1 else "CIFAR-10, 8 x 8 + MLP"
    return Task(name, prepare, (problem.measure, *more, SELECTION), settings)


def split(part: Batch) -> list[Batch]:
    """Batches for prediction."""
    return list(zip(part[0].split(AT_ONCE), part[1].split(AT_ONCE), strict=True))


@dataclass
class ImageFit(Fit):
    """A training in progress.

    Attributes:
        child: which of several networks, each with first weights of its own.
        one_against_rest: whether the model's outputs are scores of each class against the rest, and not logits of a
            softmax.
    """

    child: int = 0
    one_against_rest: bool = False

    def __post_init__(self) -> None:
        self.drawn: Images = self.trial.data  # type: ignore[assignment]
        self.setting = self.drawn.setting
        self.batch = self.setting.batch  # type: ignore[misc]
        self.steps = self.trial.task.settings["steps"]
        with self.trial.seeded(WEIGHTS + CHILD * self.child):
            self.model = self.setting.model().to(self.drawn.train[0].device)
        self.optimizer = SGD(
            self.model.parameters(), self.rate, momentum=0.9, weight_decay=self.setting.weight_decay
        )
        self.drops = [round(share * self.steps) for share in DROPS]

    def space(self) -> LossSpace:
        """What of the loss a population adapts."""
        return Robust() * Smoothing()

    def validation(self) -> list[Batch]:
        return split(self.drawn.valid)

    def new_metric(self) -> Metric:
        metric = self.drawn.problem.new_metric()
        return metric if self.one_against_rest else OfProbabilities(metric)

    def batches(self, with_validation: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.trial.seed)
        for i, x, y in super().batches(with_validation):
            self.schedule(i)
            yield i, augmented(x, generator) if self.setting.augment else x, y

    def schedule(self, step: int) -> None:
        """To be called before every step."""
        for _ in range(self.drops.count(step) if step else 0):
            for group in self.optimizer.param_groups:
                group["lr"] *= DROP

    @torch.no_grad()
    def predicted(self, part: Batch) -> Tensor:
        with evaluating(self.model):
            found = torch.cat([self.model(x) for x, _ in split(part)])
        if not found.isfinite().all():
            raise Diverged
        return found

    def of(self, part: Batch, biases: Tensor | float = 0.0) -> float:
        return self.new_metric().each(self.predicted(part)[None] + biases, part[1]).item()

    def measures(self, biases: Tensor | float = 0.0) -> dict[str, float]:
        wrong = self.predicted(self.drawn.train).argmax(1) != self.drawn.train[1]
        return {**super().measures(biases), TRAINING.name: wrong.double().mean().item()}


def best_of(fits: list[ImageFit]) -> ImageFit:
    """By the validation part; those that diverged are the worst.

    Raises:
        Diverged: where all have.
    """
    known = []
    for fit in fits:
        with suppress(Diverged):
            known.append((fit.selection(), fit))
    if not known:
        raise Diverged
    return max(known, key=lambda pair: pair[0])[1]
