"""What a metric is, and how labels are read."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lossmeta._checks import check_same_device, check_tensors, dtype_name, may_look, refuse

M = TypeVar("M", bound="Metric")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Metric:
    """A number that a batch of scores and labels adds to.

    Attributes:
        higher_is_better: its direction.
    """

    higher_is_better: ClassVar[bool]

    def reset(self) -> None:
        """Forgets every sample."""
        raise NotImplementedError

    def update(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Of all samples since :meth:`reset`, a float64 scalar."""
        raise NotImplementedError

    def __call__(self, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Adds a batch, and returns the metric of that batch alone."""
        alone = copy.copy(self)
        alone.reset()
        alone.update(scores, labels, weight)
        self.update(scores, labels, weight)
        return alone.compute()

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def check_batch(name: str, scores: Tensor, labels: Tensor, weight: Tensor | None) -> None:
    """Refuses what is no batch, before anything is counted. The shapes of scores and labels each metric knows."""
    check_tensors(name, scores=scores, labels=labels)
    check_same_device(name, labels=labels, scores=scores)
    if not scores.is_floating_point():
        raise ValueError(f"{name}: scores must be floating, got {dtype_name(scores)}")
    if weight is None:
        return
    check_tensors(name, weight=weight)
    check_same_device(name, weight=weight, scores=scores)
    if weight.shape != scores.shape[:1]:
        raise ValueError(f"{name}: weight must be {list(scores.shape[:1])}, got {list(weight.shape)}")
    if may_look(weight):
        refuse(name, "weight must not be negative", weight, ~(weight >= 0))


def class_labels(name: str, labels: Tensor) -> Tensor:
    """Indices of classes as int64."""
    if labels.dtype not in INTEGERS:
        raise ValueError(f"{name}: labels must be integers, got {dtype_name(labels)}")
    return labels.long()


def yes_or_no(name: str, labels: Tensor, ignore_index: int | None) -> Tensor:
    """Labels of 0 and 1, with those to be ignored, as int64; of floats only these values."""
    if labels.dtype not in INTEGERS and not labels.is_floating_point():
        raise ValueError(f"{name}: labels must be 0 or 1, got {dtype_name(labels)}")
    if may_look(labels):
        other = (labels != 0) & (labels != 1)
        if ignore_index is not None:
            other &= labels != ignore_index
        refuse(name, "labels of the shape of scores must be 0 or 1", labels, other)
    return labels.long()
