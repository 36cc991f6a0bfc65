"""Training until it overfits, with and without a regulariser: what TuneLoss's Figure 3 compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._batches import Batch
from lossmeta.adalfl import AveragedWeights
from lossmeta.experiments import Diverged, Measure, Task, Trial
from lossmeta.recipes._tuneloss_tasks import ERROR, LOG_LOSS, VALIDATION, Drawn, Source, draw
from lossmeta.tuneloss import OnlineReport, OnlineTuner
from lossmeta.tuneloss._regularizer import Regularizer

# How far the log loss on the test part is above the least that it was at any epoch.
ABOVE = Measure("above its least", higher_is_better=None, percent=True, digits=1)
WEIGHTS, ORDER, SEARCH = range(2, 5)  # streams of random numbers of a seed


@dataclass(frozen=True)
class Setting:
    """How the models of a task are trained.

    Attributes:
        source: of the data.
        network: a new one.
        optimizer: of parameters, with weight decay, which is an l2 in the loss.
        batch: samples of a step; the last of an epoch may have less.
        epochs: of a training.
        decay: the range of weight decay that is searched.
    """

    source: Source
    network: Callable[[], nn.Module]
    optimizer: Callable[[list[nn.Parameter], float], Optimizer]
    batch: int
    epochs: int
    decay: tuple[float, float] = (1e-5, 1e-1)


@dataclass
class Course:
    """One training.

    Attributes:
        train: log loss on the training part, after every epoch.
        valid: on the validation part.
        test: on the test part, which decides nothing.
        error: share of errors on the test part.
        reports: of an online tuner, where there was one.
        tuner: it.
        averaged: the same training, looked at through the average of its weights.
    """

    train: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    reports: list[OnlineReport] = field(default_factory=list)
    tuner: OnlineTuner | None = None
    averaged: Course | None = None

    def at(self, epoch: int) -> dict[str, float]:
        return {
            VALIDATION.name: self.valid[epoch],
            LOG_LOSS.name: self.test[epoch],
            ERROR.name: self.error[epoch],
            ABOVE.name: self.test[epoch] / min(self.test) - 1,
        }

    def end(self) -> dict[str, float]:
        return self.at(-1)

    def stopped(self) -> dict[str, float]:
        """At the epoch that is best on the validation part."""
        return self.at(min(range(len(self.valid)), key=self.valid.__getitem__))

    def record(self, trial: Trial) -> None:
        """The log loss on the validation part, over the epochs."""
        for epoch, value in enumerate(self.valid, 1):
            trial.record("log loss on the validation part", epoch, value)

    @torch.no_grad()
    def look(self, model: nn.Module, *of: Batch) -> None:
        """Takes an epoch in: the model on the training, the validation and the test part.

        Raises:
            Diverged: where a log loss is not finite.
        """
        model.eval()
        outputs: list[Tensor] = [model(inputs) for inputs, _ in of]
        model.train()
        for known, output, (_, labels) in zip((self.train, self.valid, self.test), outputs, of, strict=True):
            known.append(F.cross_entropy(output, labels).item())
            if not math.isfinite(known[-1]):
                raise Diverged
        self.error.append((outputs[-1].argmax(1) != of[-1][1]).float().mean().item())


def task(name: str, setting: Setting, epochs: int | None) -> Task:
    """``epochs``: instead of the setting's own."""

    def prepare(seed: int, device: torch.device) -> Drawn:
        return draw(setting.source, seed)

    settings = {
        **vars(setting.source),
        "bounds": list(setting.source.bounds),
        "batch": setting.batch,
        "epochs": epochs or setting.epochs,
        "decay": list(setting.decay),
    }
    return Task(name, prepare, (LOG_LOSS, ERROR, ABOVE, VALIDATION), settings)


def by_runs(name: str, setting: Setting, epochs: int | None) -> Task:
    """The task where some rows train to an exact minimum, which has no epochs: :data:`ABOVE` is no measure there."""
    return replace(task(name, setting, epochs), measures=(LOG_LOSS, ERROR, VALIDATION))


def parts(drawn: Drawn, device: torch.device) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test part in float32."""
    problem = drawn.problem
    train = problem.inputs[0, : problem.count, :-1], problem.labels[0, : problem.count]
    first, second, third = ((x.float().to(device), y.to(device)) for x, y in (train, drawn.valid, drawn.test))
    return first, second, third


def fit(
    trial: Trial,
    setting: Setting,
    *,
    regularizer: Regularizer | None = None,
    decay: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> Course:
    """A training; all of a seed start from the same weights and see the samples in the same order.

    Args:
        trial: of it.
        setting: of its task.
        regularizer: that an online tuner learns; none for no tuner.
        decay: of the weights.
        progress: is told what share is done.

    Raises:
        Diverged: where a log loss is not finite.
    """
    train, valid, test = parts(trial.data, trial.device)
    with trial.seeded(WEIGHTS):
        model = setting.network().to(trial.device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    optimizer = setting.optimizer(matrices, decay)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0})
    average = AveragedWeights(model)
    course, epochs = Course(averaged=Course()), int(trial.task.settings["epochs"])
    assert course.averaged is not None
    steps = math.ceil(len(train[1]) / setting.batch)
    if regularizer is not None:
        course.tuner = OnlineTuner(model, train, valid, regularizer=regularizer, every=steps)
    orders = torch.Generator().manual_seed(trial.random_seed(ORDER))
    for epoch in range(epochs):
        for inputs, labels in batches(train, setting.batch, orders):
            loss = F.cross_entropy(model(inputs), labels)
            if course.tuner is not None:
                loss = loss + course.tuner.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update()
            if course.tuner is not None and (report := course.tuner.step()) is not None:
                course.reports.append(report)
        course.look(model, train, valid, test)
        course.averaged.look(average.model, train, valid, test)
        (progress or trial.progress)((epoch + 1) / epochs)
    return course


def batches(part: Batch, size: int, orders: torch.Generator) -> Iterator[Batch]:
    """An epoch's."""
    inputs, labels = part
    for rows in torch.randperm(len(labels), generator=orders).to(labels.device).split(size):
        yield inputs[rows], labels[rows]
