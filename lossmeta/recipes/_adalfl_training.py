"""How the methods of the AdaLFL paper train: where the loss comes from, then how it and the model go on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lossmeta import plot
from lossmeta._batches import Batch
from lossmeta._model_state import evaluating
from lossmeta.adalfl import (
    DivergedError,
    OnlineLearner,
    Snapshot,
    initialize,
    initialize_learning_rate,
    plot_loss,
)
from lossmeta.experiments import Trial
from lossmeta.losses import LossNetwork, TaylorLoss
from lossmeta.recipes._adalfl_tasks import Problem, Splits

# Streams of random numbers of a seed. Every random number of a trial is from one of them.
WEIGHTS, LOSS, RESETS, OFFLINE_TRAIN, OFFLINE_VALIDATION, TRAIN, VALIDATION, NOISE = range(1, 9)
SNAPSHOTS = 20


class TaskLoss(nn.Module):
    """Squared error or cross-entropy; as a loss without parameters it serves to learn a learning rate alone."""

    def __init__(self, regression: bool) -> None:
        super().__init__()
        self.function = F.mse_loss if regression else F.cross_entropy

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.function(prediction, target)


LOSSES: dict[str, Callable[[bool], nn.Module]] = {
    "task": TaskLoss,
    "network": lambda regression: LossNetwork(link=link(regression)),
    "relu": lambda regression: LossNetwork(link=link(regression), activation="relu", output="softplus"),
    "quadratic": lambda regression: TaylorLoss(2, link=link(regression)),
    "cubic": lambda regression: TaylorLoss(3, link=link(regression)),
    "residual": lambda regression: LossNetwork(
        link=link(regression), residual="squared_error" if regression else "cross_entropy"
    ),
}


def link(regression: bool) -> str:
    return "identity" if regression else "softmax"


# ---- What all methods of a trial have in common.


@dataclass
class Start:
    """What training begins with, and the seconds that learning it took."""

    loss: nn.Module
    rate: float
    seconds: float = 0.0


def new_loss(trial: Trial, kind: str) -> nn.Module:
    """A loss as it is before anything has been learned."""
    with trial.seeded(LOSS):
        return LOSSES[kind](trial.data.splits.regression).to(trial.device)


def new_model(trial: Trial) -> nn.Module:
    """New weights, drawn from the global random numbers."""
    problem: Problem = trial.data.problem
    splits: Splits = trial.data.splits
    return problem.model(splits.features, splits.outputs).to(trial.device)


def batches(trial: Trial, parts: tuple[str, ...], stream: int) -> Iterator[Batch]:
    splits: Splits = trial.data.splits
    return splits.batches(splits.joined(*parts), trial.data.problem.batch, trial.random_seed(stream))


def now(trial: Trial) -> float:
    if trial.device.type == "cuda":
        torch.cuda.synchronize(trial.device)
    return time.perf_counter()


# ---- Where the loss and the learning rate come from.


@dataclass(frozen=True)
class Untrained:
    """A loss as it starts: the task loss itself, or the residual loss, which begins as the task loss."""

    kind: str = "task"
    normalize: bool = False

    def __call__(self, trial: Trial, rate: float) -> Start:
        loss = new_loss(trial, self.kind)
        return Start(normalized(loss) if self.normalize else loss, rate)


@dataclass(frozen=True)
class Offline:
    """A loss learned by Algorithm 1 at the task's base rate; learned once for all methods of a seed that begin so.

    Attributes:
        kind: a key of ``LOSSES``.
        inner_steps: of Algorithm 1.
        normalize: whether its slope is then scaled to the task loss's.
    """

    kind: str = "network"
    inner_steps: int = 1
    normalize: bool = False

    def __call__(self, trial: Trial, rate: float) -> Start:
        key = "Algorithm 1", self.kind, self.inner_steps
        loss = new_loss(trial, self.kind)
        if key not in trial.scratch:
            start = now(trial)
            with trial.seeded(RESETS):
                initialize(loss, lambda: new_model(trial), **offline_options(trial, self.inner_steps))
            state = {name: value.clone() for name, value in loss.state_dict().items()}
            trial.scratch[key] = state, now(trial) - start
        state, seconds = trial.scratch[key]
        loss.load_state_dict(state)
        return Start(normalized(loss) if self.normalize else loss, rate, seconds)


@dataclass(frozen=True)
class OfflineRate:
    """The task loss, with a learning rate learned by Algorithm 3 (Meta-LR)."""

    inner_steps: int = 1

    def __call__(self, trial: Trial, rate: float) -> Start:
        key = "Algorithm 3", self.inner_steps
        if key not in trial.scratch:
            start = now(trial)
            with trial.seeded(RESETS):
                options = offline_options(trial, self.inner_steps)
                learned = initialize_learning_rate(lambda: new_model(trial), **options)[0]
            trial.scratch[key] = learned, now(trial) - start
        return Start(new_loss(trial, "task"), *trial.scratch[key])


def offline_options(trial: Trial, inner_steps: int) -> dict[str, Any]:
    return {
        "train_batches": batches(trial, ("train",), OFFLINE_TRAIN),
        "valid_batches": batches(trial, ("validation",), OFFLINE_VALIDATION),
        "task_loss": new_loss(trial, "task"),
        "learning_rate": trial.data.problem.rate,
        "steps": trial.data.offline_steps,
        "inner_steps": inner_steps,
    }


def normalized(loss: nn.Module) -> nn.Module:
    """The same loss, whose slope is scaled to the task loss's from now on."""
    loss.normalize_slope = True  # type: ignore[assignment]
    return loss


# ---- How the model is trained.


@dataclass
class Outcome:
    """How the loss changed, and what else is worth keeping."""

    history: list[Snapshot] = field(default_factory=list)
    skipped: int = 0
    diverged: bool = False


@dataclass(frozen=True)
class Fixed:
    """Plain training; the loss stays as it is.

    Attributes:
        parts: of the data that are trained on.
    """

    parts: tuple[str, ...] = ("train",)

    def __call__(self, trial: Trial, model: nn.Module, optimizer: Optimizer, loss: nn.Module) -> Outcome:
        steps = trial.data.problem.steps
        drawn = batches(trial, self.parts, TRAIN)
        for step in range(steps):
            inputs, target = next(drawn)
            optimizer.zero_grad()
            loss(model(inputs), target).backward()
            optimizer.step()
            trial.progress((step + 1) / steps)
        return Outcome()


@dataclass(frozen=True)
class Online:
    """Algorithm 2: every step moves the loss too. With ``learning_rate`` Algorithm 4 moves the learning rate.

    Attributes:
        meta_rate: of the loss; 0 keeps it as it is.
        learning_rate: step size of the learning rate; 0 keeps it.
        parts: of the data that are trained on.
        objective: the parts of the data whose task loss is lowered.
    """

    meta_rate: float = 0.0
    learning_rate: float = 0.0
    parts: tuple[str, ...] = ("train",)
    objective: tuple[str, ...] = ("validation",)

    def __call__(self, trial: Trial, model: nn.Module, optimizer: Optimizer, loss: nn.Module) -> Outcome:
        steps = trial.data.problem.steps
        learner = OnlineLearner(
            model,
            optimizer,
            loss,
            new_loss(trial, "task"),
            meta_optimizer=Adam(loss.parameters(), self.meta_rate) if self.meta_rate else None,
            learning_rate=self.learning_rate,
            snapshot_every=max(1, steps // SNAPSHOTS),
        )
        drawn, objective = batches(trial, self.parts, TRAIN), batches(trial, self.objective, VALIDATION)
        diverged = False
        try:
            for step in range(steps):
                learner.step(next(drawn), next(objective))
                trial.progress((step + 1) / steps)
        except DivergedError:
            diverged = True
        return Outcome(learner.history, int(learner.skipped), diverged)


# ---- A trial.


@dataclass(frozen=True)
class Training:
    """What a method does with a trial: a start, then training from there.

    Attributes:
        label: of the method, for its figures.
        start: gives the loss and the learning rate.
        advance: trains.
        rate: learning rate; None is the task's base rate.
    """

    label: str
    start: Untrained | Offline | OfflineRate
    advance: Fixed | Online
    rate: float | None = None

    def __call__(self, trial: Trial) -> dict[str, float | None]:
        problem: Problem = trial.data.problem
        splits: Splits = trial.data.splits
        start = self.start(trial, problem.rate if self.rate is None else self.rate)
        with trial.seeded(WEIGHTS):
            model = new_model(trial)
        optimizer = SGD(model.parameters(), start.rate, **problem.optimizer_options)  # type: ignore[arg-type]
        began = now(trial)
        with trial.seeded(NOISE):
            outcome = self.advance(trial, model, optimizer, start.loss)
        seconds = now(trial) - began + start.seconds
        errors = {f"{part} error": splits.evaluate(model, part) for part in ("selection", "test")}
        diverged = outcome.diverged or not all(map(math.isfinite, errors.values()))
        _record_slopes(trial, model, start.loss, [] if diverged else outcome.history)
        if trial.seed == 0:
            self._draw(trial, outcome.history)
        return {
            **{name: None if diverged else error for name, error in errors.items()},
            "slope": None if diverged else slope_ratio(trial, model, start.loss),
            "rate": float(optimizer.param_groups[0]["lr"]),
            "seconds": seconds,
            "updates skipped": outcome.skipped,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a call does."""
        pieces = {"start": self.start, "advance": self.advance}
        described = {name: {"kind": type(piece).__name__} | asdict(piece) for name, piece in pieces.items()}
        return described | {"rate": self.rate}

    def _draw(self, trial: Trial, history: list[Snapshot]) -> None:
        """How the loss changed (Figures 8 to 17), where matplotlib is installed."""
        kind = getattr(self.start, "kind", "task")
        if kind == "task" or not history or not plot.installed():
            return
        classes = trial.data.splits.classes
        figure = plot_loss(
            history,
            new_loss(trial, kind),  # type: ignore[arg-type]
            num_classes=classes if kind == "residual" else None,
            predictions=(0.0, 1.0) if classes is None else None,
        )
        plot.save(figure, trial.folder / f"{plot.file_name(trial.task.name, self.label)}.png")


def _record_slopes(trial: Trial, model: nn.Module, loss: nn.Module, history: list[Snapshot]) -> None:
    """How steep the loss was over the training, against the task loss: all at the model that training ends with."""
    loss = copy.deepcopy(loss)
    for snapshot in history if any(True for _ in loss.parameters()) else ():
        loss.load_state_dict(snapshot.state)
        trial.record("slope of the learned loss", snapshot.step, slope_ratio(trial, model, loss))


def slope_ratio(trial: Trial, model: nn.Module, loss: nn.Module) -> float:
    """How many times larger the loss's mean absolute slope is than the task loss's, on training data."""
    inputs, target = next(batches(trial, ("train",), TRAIN))
    with evaluating(model), torch.no_grad():  # no dropout: the trial's random numbers are drawn
        prediction = model(inputs)
    slopes = []
    for function in (loss, new_loss(trial, "task")):
        f = prediction.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(f, target), f)
        slopes.append(slope.abs().mean().item())
    return slopes[0] / slopes[1] if slopes[1] else 1.0
