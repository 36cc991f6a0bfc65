"""TuneLoss, Figure 3: a regulariser learned while the model trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer

from lossmeta import experiments, plot
from lossmeta.experiments import Method, Task, Trial
from lossmeta.recipes import _tuneloss_curves as curves
from lossmeta.recipes._tuneloss_methods import label_of
from lossmeta.recipes._tuneloss_tasks import VALIDATION, Source
from lossmeta.recipes._tuneloss_training import SEARCH, Course, Setting, fit, task
from lossmeta.tuneloss import ConvexPWLRegularizer, ConvexRegularizer
from lossmeta.tuneloss._regularizer import Regularizer

REFERENCE = "TuneLoss"
RUNS = (1, 3, 10)
LEGEND = """\
TuneLoss: a convex regulariser for each matrix of weights, learned after every epoch from the first one on whose
validation loss is worse than that of the one before. The paper's: Eq. 4 with 50 knots and Eq. 6 with Appendix B.2's
eps. Both are the model at the end of the training. Stopped: the epoch that is best on the validation part. l2: weight
decay drawn evenly over its logarithm; of the first runs, the one and the epoch that are best on the validation part.
All start from the same weights and see the same batches. The test part decides nothing. Above its least: how far the
log loss on the test part is above the least that it was at any epoch of the same training. Averaged weights: an
exponential moving average over some 200 steps, of the same training."""


def adagrad(parameters: list[nn.Parameter], decay: float) -> Optimizer:
    return Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1, weight_decay=decay)


def _adam(parameters: list[nn.Parameter], decay: float) -> Optimizer:
    return Adam(parameters, lr=1e-3, weight_decay=decay)


def _sgd(parameters: list[nn.Parameter], decay: float) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=decay)


def softmax_regression(width: int, classes: int) -> nn.Module:
    model = nn.Linear(width, classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def _mlp(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, classes))


def _cnn(side: int, classes: int) -> nn.Module:
    after = math.ceil(math.ceil(side / 2) / 2)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * after**2, classes),
    )


_BOUNDS = (0.1, 100.0)
_FLOWERS = Source("flowers-features", 1500, 1000, _BOUNDS)
_DIGITS = Source("digits", 500, 500, _BOUNDS, scale=1 / 255)
_MNIST = Source("mnist", 1000, 1000, _BOUNDS, scale=1 / 255, test=4000)
SMALL = {
    "flowers, softmax regression": Setting(_FLOWERS, partial(softmax_regression, 1280, 5), adagrad, 32, 300),
    "digits, MLP": Setting(_DIGITS, partial(_mlp, 64, 10), _adam, 32, 300),
    "MNIST, MLP": Setting(_MNIST, partial(_mlp, 784, 10), _adam, 32, 300),
    "MNIST, CNN": Setting(_MNIST, partial(_cnn, 28, 10), _sgd, 32, 100),
}
PAPER = {
    "flowers, softmax regression": Setting(
        replace(_FLOWERS, train=1670, test=1000), partial(softmax_regression, 1280, 5), adagrad, 1, 1000
    ),
    "MNIST, CNN": Setting(_MNIST, partial(_cnn, 28, 10), _sgd, 32, 1000),
}


def _trained(
    settings: dict[str, Setting], row: str, make: Callable[[], Regularizer] | None, trial: Trial
) -> Course:
    courses: dict[str, Course] = trial.scratch.setdefault("courses", {})
    if row not in courses:
        courses[row] = fit(trial, settings[trial.task.name], regularizer=make and make())
        if not trial.seed and plot.installed():
            _draw(trial, courses, courses[row])
    courses[row].record(trial)
    return courses[row]


def _draw(trial: Trial, courses: dict[str, Course], last: Course) -> None:
    name = plot.file_name(trial.task.name)
    plot.save(curves.log_losses(courses), trial.folder / f"log-loss-{name}.png")
    figure = curves.regularizers(last)
    if figure is not None and isinstance(getattr(last.tuner, "regularizer", None), ConvexRegularizer):
        plot.save(figure, trial.folder / f"regulariser-{name}.png")


def _with_l2(settings: dict[str, Setting], runs: int, trial: Trial) -> dict[str, float]:
    setting = settings[trial.task.name]
    found: list[dict[str, float]] = trial.scratch.setdefault("l2", [])
    generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
    low, high = (math.log(end) for end in setting.decay)
    drawn = torch.rand(max(RUNS), generator=generator, dtype=torch.float64)
    for share in drawn[len(found) : runs].tolist():
        part = partial(_tell, trial, len(found), runs)
        found.append(fit(trial, setting, decay=math.exp(low + share * (high - low)), progress=part).stopped())
    return min(found[:runs], key=lambda measures: measures[VALIDATION.name])


def _tell(trial: Trial, done: int, of: int, share: float) -> None:
    trial.progress((done + share) / of)


def row(
    settings: dict[str, Setting],
    label: str,
    make: Callable[[], Regularizer] | None,
    *,
    stopped: bool,
    averaged: bool = False,
) -> Method:
    """One training, for tasks by name: its end, where it is stopped, or the average of its weights; all share it."""
    shared = label.removesuffix(", stopped").removesuffix(", averaged weights")

    def train(trial: Trial) -> dict[str, float]:
        course = _trained(settings, shared, make, trial)
        if averaged:
            assert course.averaged is not None
            course = course.averaged
        return course.stopped() if stopped else course.end()

    return Method(label, train, {"stopped": stopped, **({"averaged": True} if averaged else {})})


def rows(settings: dict[str, Setting]) -> tuple[Method, ...]:
    """Of the methods, for tasks by name."""
    return (
        row(settings, "plain", None, stopped=False),
        row(settings, "plain, stopped", None, stopped=True),
        row(settings, "plain, averaged weights, stopped", None, stopped=True, averaged=True),
        row(settings, REFERENCE, ConvexRegularizer, stopped=False),
        row(settings, f"{REFERENCE}, averaged weights", ConvexRegularizer, stopped=False, averaged=True),
        row(settings, f"{REFERENCE}, stopped", ConvexRegularizer, stopped=True),
        row(settings, "the paper's", ConvexPWLRegularizer, stopped=False),
        *(Method(label_of("l2", n), partial(_with_l2, settings, n), {"runs": n}) for n in RUNS),
    )


class Regularizers:
    """The recipe."""

    name = "tuneloss-regularizer"
    about = "TuneLoss, Figure 3: a regulariser learned while the model trains"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """As all recipes; ``steps`` is the number of epochs."""
        settings = PAPER if size == "paper" else SMALL
        tasks: list[Task] = [task(name, setting, steps) for name, setting in settings.items()]
        return experiments.run(
            self.name,
            tasks,
            rows(settings),
            seeds=seeds,
            device=device,
            folder=output,
            settings={"size": size, "steps": steps, "device": device},
            reference=REFERENCE,
            about=self.about,
            legend=LEGEND,
            threads=1,
        )


RECIPES = (Regularizers(),)
