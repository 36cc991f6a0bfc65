"""What a metric is, and how labels are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lossmeta._checks import check_same_device, check_tensors, dtype_name, may_look, outside, refuse

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Metric:
    """A number that a batch of scores and labels adds to.

    Attributes:
        higher_is_better: its direction.
        joined: how each entry of :meth:`state_dict` joins over processes: ``"sum"`` for a tensor, ``"cat"`` for a list
            of tensors along samples. Empty where nothing is known.
    """

    higher_is_better: bool
    joined: ClassVar[Mapping[str, str]] = {}

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
        """Adds a batch, and returns the metric of that batch alone, as a metric of torchmetrics does."""
        alone = copy.copy(self)
        alone.reset()
        alone.update(scores, labels, weight)
        self.update(scores, labels, weight)
        return alone.compute()

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Of several models on the same samples, each alone; nothing is added.

        Args:
            scores: ``[B, N, ...]``, those of B models.
            labels: as for :meth:`update`.

        Returns:
            ``[B]``, float64.
        """
        values = []
        for one in scores:
            alone = copy.copy(self)
            alone.reset()
            alone.update(one, labels)
            values.append(alone.compute())
        return torch.stack(values)

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
    if weight.is_complex():
        raise ValueError(f"{name}: weight must be real, got {dtype_name(weight)}")
    if may_look(weight):
        refuse_weights(name, weight)


def is_no_weight(weight: Tensor) -> Tensor:
    return ~((weight >= 0) & weight.isfinite())


def refuse_weights(name: str, weight: Tensor) -> None:
    refuse(name, "weight must be finite and not negative", weight, is_no_weight(weight))


def check_ignore_index(name: str, ignore_index: int) -> None:
    if not isinstance(ignore_index, int):
        raise TypeError(f"{name}: ignore_index must be an integer, got {type(ignore_index).__name__}")


def counted_samples(
    name: str, labels: Tensor, classes: int, ignore_index: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels as int64, how much each counts, float64, and ``[]`` whether one of them or of the weights is unusable."""
    labels = class_labels(name, labels)
    bad = outside(name, "labels", labels, classes, ignore_index)
    share, unusable = ((labels != ignore_index) & ~bad).double(), bad.any()
    if weight is not None:
        share = share * weight.double().view(-1, *[1] * (labels.dim() - 1))
        unusable = unusable | is_no_weight(weight).any()
    return labels, share, unusable


def class_labels(name: str, labels: Tensor) -> Tensor:
    """Indices of classes as int64."""
    if labels.dtype not in INTEGERS:
        raise ValueError(f"{name}: labels must be integers, got {dtype_name(labels)}")
    return labels.long()


def yes_or_no(name: str, labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of 0 and 1, with those to be ignored, as int64; others are refused or, unlooked at, none of these."""
    if labels.dtype not in INTEGERS and not labels.is_floating_point():
        raise ValueError(f"{name}: labels must be 0 or 1, got {dtype_name(labels)}")
    labels = (
        labels if labels.is_floating_point() else labels.long()
    )  # an ignore_index of -100 is 156 as uint8
    other = (labels != 0) & (labels != 1) & (labels != ignore_index)
    if may_look(labels):
        refuse(name, "labels of the shape of scores must be 0 or 1", labels, other)
    # long() alone would make 0 of 0.7.
    return labels.where(~other, 2 if ignore_index != 2 else 3).long()
