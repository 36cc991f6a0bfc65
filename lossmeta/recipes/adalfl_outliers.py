"""AdaLFL where targets are partly far off: a loss that is learned from a few right ones, and robust losses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta import data
from lossmeta._batches import Batch, Loss
from lossmeta.experiments import Measure, Task, Trial
from lossmeta.losses import LossNetwork, PinballLoss, TukeyLoss
from lossmeta.recipes import _noise_methods as methods
from lossmeta.recipes import _noise_tasks as tasks
from lossmeta.recipes._clean_recipe import LEARNED, CleanRecipe
from lossmeta.recipes._noise_tasks import LOSS, Drawn, Source

SQUARED_ERROR = Measure("squared error", higher_is_better=False, digits=3)
FURTHEST = 10.0
"""In standard deviations of the targets."""


@dataclass(frozen=True)
class Outliers:
    """How targets go wrong: a share of them is moved by what is uniform up to :data:`FURTHEST`.

    Attributes:
        name: in the table.
        share: of the targets.
        both: whether they move either way; upwards alone otherwise.
    """

    name: str
    share: float
    both: bool = False

    def of(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        moved = torch.rand(targets.shape, generator=generator) < self.share
        by = FURTHEST * torch.rand(targets.shape, generator=generator)
        sign = 2.0 * torch.randint(2, targets.shape, generator=generator) - 1.0 if self.both else 1.0
        return torch.where(moved, targets + sign * by, targets)


RAISED = Outliers("30% raised", 0.3)
EITHER = Outliers("30% moved either way", 0.3, both=True)
NONE = Outliers("right targets", 0.0)


@torch.no_grad()
def squared_error(model: nn.Module, part: Batch) -> float:
    """Mean over the samples."""
    return F.mse_loss(model(part[0]).double(), part[1].double()).item()


def _source(name: str, label: str, inputs: int, train: int, test: int) -> Source:
    network = tasks.mlp(inputs, 1, 64)
    return Source(
        name, label, 1, train, 100, 300, test, 1600, network, F.mse_loss, SQUARED_ERROR, squared_error
    )


CALIFORNIA = _source("california", "California", 8, 2000, 4000)
COMMUNITIES = _source("communities", "Communities and Crime", 99, 1000, 500)
DIABETES = Source(
    "diabetes",
    "diabetes",
    1,
    200,
    42,
    50,
    150,
    1600,
    tasks.mlp(10, 1, 64),
    F.mse_loss,
    SQUARED_ERROR,
    squared_error,
)
SOURCES = (DIABETES, CALIFORNIA, COMMUNITIES)


@cache
def pool(name: str) -> Batch:
    """Inputs and targets, each column with mean 0 and standard deviation 1; inputs from -4 to 4.

    California has blocks with a thousand people to a household, at which any network says anything.
    """
    inputs, targets = (x.double() for x in data.load(name).train)
    found = [(x - x.mean(0)) / x.std(0) for x in (inputs, targets.reshape(len(targets), 1))]
    return found[0].clamp(-4, 4).float(), found[1].float()


def draw(source: Source, outliers: Outliers, seed: int, device: torch.device) -> Drawn:
    """A seed's rows and wrong targets."""
    inputs, targets = pool(source.name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    sizes = [source.clean, source.selection, source.train, source.test]
    if len(order) < sum(sizes):
        raise ValueError(f"{source.name}: needs {sum(sizes)} samples, got {len(order)}")
    clean, selection, train, test = order[: sum(sizes)].split(sizes)
    wrong = outliers.of(targets[train], generator)

    def part(rows: Tensor, given: Tensor | None = None) -> Batch:
        return inputs[rows].to(device), (targets[rows] if given is None else given).to(device)

    return Drawn(source, part(train, wrong), part(clean), part(selection), part(test))


def task(source: Source, outliers: Outliers, steps: int | None) -> Task:
    settings = {
        "outliers": outliers.name,
        "sizes": [source.train, source.clean, source.selection, source.test],
        "steps": steps or source.steps,
        "batch": tasks.BATCH,
        "optimizer": "SGD, momentum 0.9",
    }

    def prepare(seed: int, device: torch.device) -> Drawn:
        return draw(source, outliers, seed, device)

    return Task(f"{source.label}: {outliers.name}", prepare, (SQUARED_ERROR, tasks.SELECTION), settings)


def squared(trial: Trial) -> Loss:
    return F.mse_loss


def huber(trial: Trial, delta: float) -> Loss:
    """Divided by delta, so that a large residual pulls alike at each of them, as the absolute error does."""
    loss = nn.HuberLoss(delta=delta)
    return lambda prediction, target: loss(prediction, target) / min(delta, 1.0)


def tukey(trial: Trial, c: float) -> Loss:
    return TukeyLoss(c)


def pinball(trial: Trial, quantile: float) -> Loss:
    return PinballLoss(quantile)


def shape(trial: Trial) -> nn.Module:
    """A function of prediction and target that starts as the squared error."""
    with trial.seeded(LOSS):
        loss = LossNetwork(link="identity", residual="squared_error", normalize_slope=True)
    return loss.to(trial.device)


ROWS: tuple[Any, ...] = (
    methods.clean_alone_tuned("clean samples alone"),
    methods.tuned("squared error", squared, clean_weight=(0.0, 1.0)),
    methods.tuned("Huber", huber, delta=(0.1, 0.5)),
    methods.tuned("Tukey", tukey, c=(1.0, 3.0)),
    methods.tuned("pinball", pinball, quantile=(0.35, 0.5)),
    methods.learned(LEARNED, shape),
)
LEGEND = """\
A seed draws rows, wrong targets, weights and batches, the same for all rows. Targets have standard deviation 1; wrong
ones are moved by what is uniform between 0 and 10 of them. Clean samples have targets that are known to be right; every
row may use them. Each fixed loss has the learning rate, the weight decay and the parameter that are best on two other
seeds, by a selection part of right targets that trains nothing: of a grid, and then of what lies beside the best, one
step at a time, until nothing is better. Its stop, the averaging of its weights and a last stage on the clean samples
are chosen on each seed by that part. Clean batches are in every step of it; the squared error is tried without them
too. The learned loss is `LossNetwork(link="identity", residual="squared_error", normalize_slope=True)` with the
defaults of `learn_with_clean` at a learning rate of 0.03 and a weight decay of 0.005, no stop, and does not see the
selection part. The test part decides nothing. Differences are to it, paired by seed."""


RECIPE = CleanRecipe(
    "adalfl-outliers",
    "AdaLFL: regression where targets are partly far off, a loss learned from a few right ones, robust losses",
    lambda steps: [
        task(source, outliers, steps) for source in SOURCES for outliers in (RAISED, EITHER, NONE)
    ],
    ROWS,
    LEGEND,
)
RECIPES = (RECIPE,)
"""Ways to train on targets that are partly far off, with a few that are right."""
