"""The rows of a comparison: plain training, and the methods that apply to a task."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam

from lossmeta.adalfl import CleanLearner, OnlineLearner
from lossmeta.ala import ClassCorrelation, LogitAdjustment, LossSpace, Population, Robust, Smoothing
from lossmeta.comparison._parts import Part, Parts
from lossmeta.comparison._task import IGNORED, Plan, predicted
from lossmeta.experiments import Diverged, Failed, Measure, Method, Task, Trial, Tuned
from lossmeta.losses import LossNetwork
from lossmeta.tuneloss import OnlineTuner

FACTORS = (
    1.0,
    0.1,
    0.3,
    3.0,
    10.0,
)  # of the learning rate; the task's own first, so that it wins among equals
BESIDE = {0.1: 0.03, 10.0: 30.0}  # once beyond each edge
TUNING_SEEDS = (10_000, 10_001, 10_002)
WINDOW = 20
MOST_CLASSES = 20  # whose pairs a population adapts
REGRESSION_META_RATE = 1e-2
CHUNK = 512  # samples of which the online regulariser takes a gradient at once

# Streams of a trial's random numbers; stream 0 is the training's own.
MODEL, ORDER, VALIDATION_ORDER, SEARCH = 1, 2, 3, 4

OWN, TUNED, BOTH = "plain, own rate", "plain, tuned rate", "plain, tuned rate, validation too"
PLAIN = (TUNED, BOTH, OWN)
LEARNED, CLEAN, TUNER = "learned loss", "learned loss, validation too", "online regulariser"
SECONDS = Measure("seconds", None, digits=2, ratio=True)
TEST_LOSS = "test loss"


def batches(part: Part, size: int, steps: int, seed: int) -> Iterator[Part]:
    """Whole batches in an order of their own, or all samples where they are fewer."""
    inputs, targets = part
    count = len(inputs)
    size = min(size, count)
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        order = torch.randperm(count, generator=generator)[: count - count % size].to(inputs.device)
        for rows in order.split(size)[:steps]:
            yield inputs[rows], targets[rows]
        steps -= count // size


@dataclass
class Fit:
    """A training that begins.

    Attributes:
        plan: of the task.
        trial: of it.
        factor: of the learning rate.
    """

    plan: Plan
    trial: Trial
    factor: float

    def __post_init__(self) -> None:
        task = self.plan.task
        self.parts: Parts = self.trial.data
        self.size = min(task.batch_size, len(self.parts.train[0]))
        self.epoch = len(self.parts.train[0]) // self.size
        self.steps = task.epochs * self.epoch
        with self.trial.seeded(MODEL):
            self.model = task.model().to(self.trial.device)
        self.model.train()
        self.optimizer = task.optimizer(self.model.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def batches(self, part: Part | None = None) -> Iterator[Part]:
        """Of training: of every step, the same ones for every method."""
        part = part or self.parts.train
        for i, batch in enumerate(batches(part, self.size, self.steps, self.trial.random_seed(ORDER))):
            self.trial.progress(i / self.steps)
            yield batch

    def validation_batches(self) -> Iterator[Part]:
        return batches(self.parts.validation, self.size, self.steps, self.trial.random_seed(VALIDATION_ORDER))

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Of validation and test.

        Raises:
            Diverged: where a prediction is not finite.
        """
        judge = self.plan.judge
        found = {}
        for name, (inputs, targets) in (
            (f"validation {judge.name}", self.parts.validation),
            (judge.name, self.parts.test),
        ):
            prediction = predicted(model, inputs)
            if not prediction.isfinite().all():
                raise Diverged
            found[name] = judge(prediction, targets)
        found[TEST_LOSS] = float(self.plan.loss(prediction, targets))
        return found


Training = Callable[[Fit], nn.Module]
"""Trains a model, and gives the one that is judged."""


def method(plan: Plan, label: str, factor: float, training: Training, *, may_fail: bool = True) -> Method:
    """A row; where it may fail the others go on."""

    def train(trial: Trial) -> dict[str, float]:
        try:
            fit = Fit(plan, trial, factor)
            start = _now(trial.device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Population: all children had the same fitness")
                model = training(fit)
            seconds = _now(trial.device) - start
            return {**fit.measures(model), SECONDS.name: seconds, "rate factor": factor}
        except Diverged:
            raise
        except Exception as error:
            if not may_fail:
                raise
            raise Failed(": ".join(filter(None, [type(error).__name__, str(error)]))) from error

    return Method(label, train, {"factor": factor})


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- Ways to train.


def plain(fit: Fit, part: Part | None = None) -> nn.Module:
    for inputs, targets in fit.batches(part):
        fit.optimizer.zero_grad()
        fit.plan.loss(fit.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        fit.optimizer.step()
    return fit.model


def plain_on_both(fit: Fit) -> nn.Module:
    return plain(fit, fit.parts.both)


def _new_loss(fit: Fit) -> LossNetwork:
    classes = fit.plan.classes is not None
    with fit.trial.seeded(SEARCH):
        loss = LossNetwork(
            link="softmax" if classes else "identity",
            residual="cross_entropy" if classes else "squared_error",
            normalize_slope=True,
        )
    return loss.to(fit.trial.device)


def learned(fit: Fit) -> nn.Module:
    loss = _new_loss(fit)
    meta = Adam(loss.parameters(), REGRESSION_META_RATE) if fit.plan.classes is None else None
    learner = OnlineLearner(fit.model, fit.optimizer, loss, fit.plan.loss, meta_optimizer=meta)
    for batch, held_out in zip(fit.batches(), fit.validation_batches(), strict=False):
        learner.step(batch, held_out)
    return fit.model


def learned_with_clean(fit: Fit) -> nn.Module:
    learner = CleanLearner(
        fit.model,
        fit.optimizer,
        fit.parts.validation,
        loss=None if fit.plan.usual_loss else _new_loss(fit),
        task_loss=fit.plan.loss,
        relabel=True,
        batch_size=fit.size,
        seed=fit.trial.random_seed(SEARCH),
    )
    for batch in fit.batches():
        learner.step(batch)
    return learner.averaged


def by_population(space: Callable[[Fit], LossSpace]) -> Training:
    def train(fit: Fit) -> nn.Module:
        population = Population(
            fit.model,
            fit.optimizer,
            space(fit),
            fit.plan.judge.metric,
            fit.parts.validation,
            steps=max(fit.steps, WINDOW),
            window=WINDOW,
            higher_is_better=fit.plan.judge.higher_is_better,
            seed=fit.trial.random_seed(SEARCH),
        )
        for batch in fit.batches():
            population.step(batch)
        return fit.model

    return train


def regularised(fit: Fit) -> nn.Module:
    def chunks(part: Part) -> list[Part]:
        return list(zip(part[0].split(CHUNK), part[1].split(CHUNK), strict=True))

    tuner = OnlineTuner(
        fit.model,
        chunks(fit.parts.train),
        chunks(fit.parts.validation),
        task_loss=fit.plan.loss,
        every=fit.epoch,
    )
    for inputs, targets in fit.batches():
        fit.optimizer.zero_grad()
        (fit.plan.loss(fit.model(inputs), targets) + tuner.penalty()).backward()  # type: ignore[no-untyped-call]
        fit.optimizer.step()
        tuner.step()
    return fit.model


# ---- Spaces of a population.


def _counts(fit: Fit) -> Tensor:
    labels = fit.parts.train[1].flatten()
    return torch.bincount(labels[labels != IGNORED], minlength=fit.plan.classes or 0)


def _robust(fit: Fit) -> LossSpace:
    return LogitAdjustment(_counts(fit)) * Robust()


def _smoothing(fit: Fit) -> LossSpace:
    return Smoothing()


def _class_pairs(fit: Fit) -> LossSpace:
    return ClassCorrelation(fit.plan.classes or 0, activation="identity", lowest=0.0)


# ---- The rows of a task.


def rows(plan: Plan) -> tuple[tuple[Method | Tuned, ...], dict[str, str]]:
    """All rows, the plain ones first, and why methods are left out."""
    found: dict[str, Training] = {}
    left_out: dict[str, str] = {}
    classes, usual = plan.classes, plan.usual_loss

    def add(label: str, training: Training, **needs: bool) -> None:
        lacking = [need.replace("_", " ") for need, met in needs.items() if not met]
        if lacking:
            left_out[label] = " and ".join(lacking)
        else:
            found[label] = training

    is_classes = {"classes_as_targets": classes is not None}
    add(LEARNED, learned, classes_or_squared_error=classes is not None or usual)
    add(CLEAN, learned_with_clean, **is_classes)
    on_cross_entropy = {**is_classes, "cross_entropy_as_task_loss": usual or classes is None}
    add("population, margins and robustness", by_population(_robust), **on_cross_entropy)
    add("population, smoothing", by_population(_smoothing), **on_cross_entropy)
    few = {f"at_most_{MOST_CLASSES}_classes": classes is None or 1 < classes <= MOST_CLASSES}
    add("population, class pairs", by_population(_class_pairs), **on_cross_entropy, **few)
    add(TUNER, regularised)

    tuned = [
        _at_the_tuned_rate(plan, label, training)
        for label, training in {BOTH: plain_on_both, **found}.items()
    ]
    at_tuned = Tuned(
        TUNED, _candidates(plan), f"validation {plan.judge.name}", TUNING_SEEDS, beside=_beside(plan)
    )
    return (_plain_at(plan, 1.0), at_tuned, *tuned), left_out


def _plain_at(plan: Plan, factor: float) -> Method:
    label = OWN if factor == 1 else f"plain, rate x {factor:g}"
    return method(plan, label, factor, plain, may_fail=False)


def _candidates(plan: Plan) -> tuple[Method, ...]:
    return tuple(_plain_at(plan, factor) for factor in FACTORS)


def _beside(plan: Plan) -> Callable[[Method], tuple[Method, ...]]:
    def beside(best: Method) -> tuple[Method, ...]:
        factor = BESIDE.get(best.settings["factor"])
        return () if factor is None else (_plain_at(plan, factor),)

    return beside


def _at_the_tuned_rate(plan: Plan, label: str, training: Training) -> Tuned:
    def then(best: Method) -> Method:
        return method(plan, label, best.settings["factor"], training, may_fail=label != BOTH)

    by = f"validation {plan.judge.name}"
    return Tuned(label, _candidates(plan), by, TUNING_SEEDS, then, _beside(plan))


def measures(plan: Plan) -> tuple[Measure, ...]:
    """The metric, the task loss beside it, and the cost."""
    judge = plan.judge
    higher, digits = judge.higher_is_better, 2 if judge.percent else 4
    named = Measure(judge.name, higher, percent=judge.percent, digits=digits)
    beside = () if judge.name == TEST_LOSS else (Measure(TEST_LOSS, None),)
    selection = Measure(f"validation {judge.name}", higher, shown=False)
    return named, *beside, SECONDS, selection


def task_of(plan: Plan) -> Task:
    return Task(plan.task.name, lambda seed, device: plan.parts(device), measures(plan))
