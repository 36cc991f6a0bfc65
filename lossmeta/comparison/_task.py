"""A user's task, and what of it is checked before anything trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lossmeta._batches import Loss
from lossmeta.comparison._parts import PARTS, Parts, TaskError, parts_of
from lossmeta.experiments.trial import seeded
from lossmeta.metrics import ErrorRate, Metric

EPOCHS, BATCH_SIZE, RATE, MOMENTUM = 20, 64, 0.03, 0.9
IGNORED = -100
TRIED = 8  # samples that the model is tried on
AT_ONCE = 1024  # samples that are predicted together


def default_optimizer(parameters: Iterable[Tensor]) -> Optimizer:
    """SGD with momentum."""
    return SGD(parameters, RATE, momentum=MOMENTUM)


@dataclass(frozen=True)
class OwnTask:
    """What a user says of a task.

    Attributes:
        where: a file or a function, for errors.
        name: of the table.
        model: makes a new model, its weights drawn from the global random numbers.
        data: makes the three parts; it may draw from the global random numbers, which are other ones for each seed.
        metric: a metric of :mod:`lossmeta.metrics`, or a function of predictions and targets; ``None`` for the error,
            or in regression the task loss.
        higher_is_better: the metric's direction, where it does not say it.
        task_loss: of predictions and targets; ``None`` for cross-entropy, or in regression squared error.
        optimizer: of a model's parameters.
        epochs: of every training.
        batch_size: of the training.
        fingerprint: of the source, so that a run does not go on with another task.
    """

    where: str
    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    metric: Any = None
    higher_is_better: bool | None = None
    task_loss: Loss | None = None
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = default_optimizer
    epochs: int = EPOCHS
    batch_size: int = BATCH_SIZE
    fingerprint: str | None = None


@dataclass(frozen=True)
class Judge:
    """A metric as a function.

    Attributes:
        name: of its column.
        higher_is_better: its direction.
        metric: as the user gave it.
        percent: whether it is a share.
    """

    name: str
    higher_is_better: bool
    metric: Any
    percent: bool = False

    def __call__(self, prediction: Tensor, target: Tensor) -> float:
        if not isinstance(self.metric, Metric):
            return float(self.metric(prediction, target))
        own = copy.deepcopy(self.metric)
        own.reset()
        own.update(prediction, target)
        return float(own.compute())


@dataclass(frozen=True)
class Plan:
    """A task that has been checked.

    Attributes:
        task: the user's.
        classes: of the model's output; ``None`` where targets are no classes.
        loss: the task loss.
        usual_loss: whether that is cross-entropy, or squared error where targets are no classes.
        judge: the metric.
        small: whether one thread is the fastest.
    """

    task: OwnTask
    classes: int | None
    loss: Loss
    usual_loss: bool
    judge: Judge
    small: bool

    def parts(self, device: torch.device) -> Parts:
        """New data, checked.

        Raises:
            TaskError: as :func:`plan_of`.
        """
        parts = _parts(self.task)
        if self.classes is not None:
            _check_labels(self.task.where, parts, self.classes)
        return parts.to(device)


def plan_of(task: OwnTask, seed: int, device: torch.device) -> Plan:
    """Checks data, model, loss, metric and optimizer with one seed.

    Raises:
        TaskError: for what does not fit.
    """
    where = task.where
    for name, number in (("EPOCHS", task.epochs), ("BATCH_SIZE", task.batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise TaskError(f"{where}: {name} must be an integer of at least 1, got {number!r}")
    for name, function in (
        ("task_loss", task.task_loss),
        ("metric", task.metric),
        ("optimizer", task.optimizer),
    ):
        if function is not None and not callable(function):
            raise TaskError(f"{where}: {name} must be a function, got {type(function).__name__}")
    with seeded(seed, device):
        parts = _parts(task).to(device)
        model = _model(task).to(device)
        prediction = _output(task, model, parts.train[0][:TRIED])
        classes = _classes(task, parts, prediction)
        _check_optimizer(task, model)
    loss = task.task_loss or (F.mse_loss if classes is None else F.cross_entropy)
    target = parts.train[1][: len(prediction)]
    value = _asked(task, "task_loss", loss, prediction.requires_grad_(), target)
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TaskError(
            f"{where}: task_loss must give one number as a tensor that can be differentiated, got {got}"
        )
    judge = _judge(task, classes, loss)
    _check_metric(task, judge, predicted(model, parts.validation[0]), parts.validation[1])
    size = sum(p.numel() for p in model.parameters())
    return Plan(task, classes, loss, _is_usual(loss, classes), judge, small=size < 200_000)


@torch.no_grad()
def predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    """In evaluation mode, which the model is left in."""
    model.eval()
    return torch.cat([model(x) for x in inputs.split(AT_ONCE)])


def _asked(task: OwnTask, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{task.where}: {name}() raised {type(error).__name__}: {error}") from error


def _parts(task: OwnTask) -> Parts:
    return parts_of(task.where, _asked(task, "data", task.data))


def _model(task: OwnTask) -> nn.Module:
    found = [_asked(task, "model", task.model) for _ in range(2)]
    if not isinstance(found[0], nn.Module):
        raise TaskError(f"{task.where}: model() must return a torch.nn.Module, got {type(found[0]).__name__}")
    if found[0] is found[1]:
        raise TaskError(
            f"{task.where}: model() must make a new model each time, got the same one twice; build it inside"
        )
    if not any(p.requires_grad for p in found[0].parameters()):
        raise TaskError(f"{task.where}: model() must have weights to train, got none")
    return found[0]


def _output(task: OwnTask, model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        prediction: Any = predicted(model, inputs)
    except Exception as error:
        raise TaskError(
            f"{task.where}: the model of model() must take the inputs of data(), {list(inputs.shape)}, it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return prediction  # type: ignore[no-any-return]


def _classes(task: OwnTask, parts: Parts, prediction: Tensor) -> int | None:
    """How many there are; None where targets are no classes."""
    target = parts.train[1][: len(prediction)]
    shapes = f"outputs {list(prediction.shape)} for targets {list(target.shape)}"
    if target.is_floating_point():
        if prediction.shape != target.shape:
            raise TaskError(
                f"{task.where}: the outputs of model() must have the shape of floating targets, got {shapes}; reshape "
                "one of them, or give classes as integers"
            )
        return None
    if prediction.dim() < 2 or target.shape != (*prediction.shape[:1], *prediction.shape[2:]):
        raise TaskError(
            f"{task.where}: the outputs of model() must be [N, C] or [N, C, d...] for classes [N] or [N, d...], got "
            f"{shapes}"
        )
    classes = prediction.shape[1]
    _check_labels(task.where, parts, classes)
    return classes


def _check_labels(where: str, parts: Parts, classes: int) -> None:
    for name, (_, labels) in zip(PARTS, (parts.train, parts.validation, parts.test), strict=True):
        bad = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
        if bad.any():
            raise TaskError(
                f"{where}: the labels of {name} must lie in [0, {classes}), the outputs of model(), got "
                f"{int(labels[bad][0])}; count classes from 0, or give the model more outputs"
            )


def _check_optimizer(task: OwnTask, model: nn.Module) -> None:
    optimizer = _asked(task, "optimizer", task.optimizer, model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise TaskError(
            f"{task.where}: optimizer(parameters) must return a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )


def _is_usual(loss: Loss, classes: int | None) -> bool:
    usual, kind = (F.mse_loss, nn.MSELoss) if classes is None else (F.cross_entropy, nn.CrossEntropyLoss)
    return loss is usual or type(loss) is kind


def _judge(task: OwnTask, classes: int | None, loss: Loss) -> Judge:
    metric, higher = task.metric, task.higher_is_better
    if metric is None:
        if classes is None:
            return Judge("test loss", False, loss)
        return Judge("error", False, ErrorRate(), percent=True)
    if isinstance(metric, type) and issubclass(metric, Metric):
        metric = _asked(task, "metric", metric)
    if higher is None:
        higher = getattr(metric, "higher_is_better", None)
    if not isinstance(higher, bool):
        raise TaskError(
            f"{task.where}: the direction of metric must be known, got {higher}; set HIGHER_IS_BETTER = True or False "
            "(higher_is_better= of lossmeta.compare)"
        )
    name = getattr(metric, "__name__", None) or type(metric).__name__
    usable = name.isidentifier() and name != "seconds"  # which is a column already
    return Judge(name if usable else "metric", higher, metric, isinstance(metric, ErrorRate))


def _check_metric(task: OwnTask, judge: Judge, prediction: Tensor, target: Tensor) -> None:
    try:
        value = judge(prediction, target)
    except Exception as error:
        raise TaskError(
            f"{task.where}: metric must take predictions and targets and give a number, it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not math.isfinite(value):
        raise TaskError(
            f"{task.where}: metric must give a finite number for the validation samples and a new model, got {value}"
        )
