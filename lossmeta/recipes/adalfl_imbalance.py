"""AdaLFL where classes are rare: a loss that is learned from a few even samples, and losses that know the counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Loss
from lossmeta.experiments import Task, Trial
from lossmeta.losses import FocalLoss, LDAMLoss, LogitAdjustedLoss
from lossmeta.recipes import _noise_methods as methods
from lossmeta.recipes import _noise_tasks as tasks
from lossmeta.recipes._clean_recipe import LEARNED, CleanRecipe
from lossmeta.recipes._noise_tasks import Drawn, Source

RATIO = 50
DIGITS = replace(tasks.DIGITS, train=88)
MNIST = replace(tasks.MNIST, train=600)
CIFAR10 = replace(tasks.CIFAR10, train=600)
FLOWERS = replace(tasks.FLOWERS, train=400)
SOURCES = (DIGITS, MNIST, CIFAR10, FLOWERS)
"""``train`` is how many samples the most frequent class has."""


def sizes(source: Source) -> list[int]:
    """Samples of each class, in a geometric row from the most to the least frequent."""
    last = source.classes - 1
    return [round(source.train * RATIO ** (-c / last)) for c in range(source.classes)]


def draw(source: Source, seed: int, device: torch.device) -> Drawn:
    """A seed's rows; clean, selection and test parts have as many of each class, so that all classes count alike."""
    inputs, labels, official = tasks.pool(source.name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(official or len(labels), generator=generator)
    even = [source.clean, source.selection, *([source.test] if official is None else [])]
    parts: list[list[Tensor]] = [[] for _ in range(4)]
    for c, count in enumerate(sizes(source)):
        rows = order[labels[order] == c]
        wanted = [size // source.classes for size in even] + [count]
        if len(rows) < sum(wanted):
            raise ValueError(f"{source.name}: needs {sum(wanted)} samples of class {c}, got {len(rows)}")
        clean, selection, *test, train = rows[: sum(wanted)].split(wanted)
        if official is not None:
            wanted_of_test = source.test // source.classes
            test = [official + (labels[official:] == c).nonzero()[:wanted_of_test, 0]]
            if len(test[0]) < wanted_of_test:
                raise ValueError(
                    f"{source.name}: needs {wanted_of_test} test samples of class {c}, got {len(test[0])}"
                )
        for part, found in zip(parts, (train, clean, selection, test[0]), strict=True):
            part.append(found)
    rows_of = [torch.cat(part) for part in parts]
    return Drawn(source, *((inputs[rows].to(device), labels[rows].to(device)) for rows in rows_of))


def task(source: Source, steps: int | None) -> Task:
    settings = {
        "classes": sizes(source),
        "sizes": [source.clean, source.selection, source.test],
        "steps": steps or source.steps,
        "batch": tasks.BATCH,
        "optimizer": "SGD, momentum 0.9",
    }

    def prepare(seed: int, device: torch.device) -> Drawn:
        return draw(source, seed, device)

    return Task(f"{source.label}: {RATIO} : 1", prepare, (tasks.ERROR, tasks.SELECTION), settings)


def _counts(trial: Trial) -> Tensor:
    return trial.data.train[1].bincount(minlength=trial.data.source.classes)


def weighted(trial: Trial, power: float) -> Loss:
    """Cross-entropy; a class weighs by its rareness, to a power."""
    weights = _counts(trial).float() ** -power
    return nn.CrossEntropyLoss(weights / weights.mean())


def adjusted(trial: Trial, tau: float) -> Loss:
    return LogitAdjustedLoss(_counts(trial), tau)


def margins(trial: Trial, margin: float) -> Loss:
    """Without the paper's scale of 30, which is for logits of unit length."""
    return LDAMLoss(_counts(trial), margin, scale=1.0)


def focal(trial: Trial, gamma: float) -> Loss:
    return FocalLoss(gamma)


ROWS: tuple[Any, ...] = (
    methods.clean_alone_tuned("even samples alone"),
    methods.tuned("cross-entropy", methods.cross_entropy, clean_weight=(0.0, 1.0)),
    methods.tuned("class weights", weighted, power=(0.5, 1.0)),
    methods.tuned("logit adjustment", adjusted, tau=(1.0, 2.0)),
    methods.tuned("margins by frequency", margins, margin=(0.5,)),
    methods.tuned("focal loss", focal, gamma=(1.0, 2.0)),
    methods.learned("learned weights, nothing tuned", methods.weights),
    methods.learned("learned loss, given labels, nothing tuned", relabel=False),
    methods.learned(LEARNED),
)
LEGEND = """\
A seed draws rows, weights and batches, the same for all rows. The most frequent class has 50 times the samples of the
rarest. Every row may use a few samples more, as many of each class, which AdaLFL learns its loss from. All classes are
as frequent in the test part, so that its error is the balanced one. Each fixed loss has the learning rate, the weight
decay and the parameter that are best on two other seeds, by a selection part that trains nothing and is even too: of a
grid, and then of what lies beside the best, until nothing is better. Its stop, the averaging of its weights and a last
stage on the even samples are chosen on each seed by that part. Even batches are in every step of it; cross-entropy is
tried without them too. The rows of which nothing is tuned have the defaults of `learn_with_clean` at a learning rate of
0.03 and a weight decay of 0.005, no stop, and do not see the selection part; weights are `LossWeighting` in the place
of its default loss. The test part decides nothing. Differences are to the learned loss, paired by seed."""


RECIPE = CleanRecipe(
    "adalfl-imbalance",
    "AdaLFL: rare classes, a loss learned from a few even samples, and losses that know the counts",
    lambda steps: [task(source, steps) for source in SOURCES],
    ROWS,
    LEGEND,
)
RECIPES = (RECIPE,)
"""Ways to train where classes are rare, with a few samples of all."""
