"""What the losses share that take class indices alone: the samples of a batch, and how their losses are reduced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lossmeta._checks import check_float, check_same_device, check_tensors, dtype_name, outside
from lossmeta.ops._precision import accumulation_dtype


class Samples(NamedTuple):
    """All samples of a batch, S of them, in the order of the labels."""

    logits: Tensor
    """``[S, C]`` in the accumulation dtype, 0 where the sample does not count"""
    labels: Tensor
    """``[S]``, int64, 0 where the sample does not count"""
    counts: Tensor
    """``[S]``: whether the label is a class that is not ignored"""
    bad: Tensor
    """``[S]``: whether the label is neither a class nor ignored, which nobody could look at"""
    shape: torch.Size
    """of the target"""

    def cross_entropy(self) -> Tensor:
        """``[S]``"""
        return -self.logits.log_softmax(1).gather(1, self.labels[:, None]).squeeze(1)

    def cross_entropy_slope(self) -> Tensor:
        """Of each sample's cross-entropy in its logits, ``[S, C]``; 0 where the sample does not count."""
        one_hot = self.labels[:, None] == torch.arange(self.logits.shape[1], device=self.labels.device)
        return (self.logits.softmax(1) - one_hot.to(self.logits.dtype)).where(self.counts[:, None], 0)

    def reduced(self, losses: Tensor, reduction: str) -> Tensor:
        """Of the losses of the samples, ``[S]``; a bad label's is NaN."""
        losses = losses.where(self.counts, 0).masked_fill(self.bad, torch.nan)
        if reduction == "none":
            return losses.reshape(self.shape)
        return losses.sum() if reduction == "sum" else losses.sum() / self.counts.sum()


def check(
    name: str,
    pred: Tensor,
    target: Tensor,
    num_classes: tuple[int, str] | None = None,
    argument: str = "pred",
) -> int:
    """Refuses what is not logits and class indices, in the shapes of :func:`torch.nn.functional.cross_entropy`.

    Args:
        name: who asks, for errors.
        pred: the logits.
        target: the class indices.
        num_classes: C, and what fixes it, where something does.
        argument: what the logits are called.

    Returns:
        C.
    """
    check_tensors(name, **{argument: pred, "target": target})
    check_float(name, **{argument: pred})
    check_same_device(name, **{"target": target, argument: pred})
    if target.dtype not in (torch.int64, torch.uint8):
        hint = "; class indices are int64: target.long()" if target.dim() < pred.dim() else ""
        raise ValueError(
            f"{name}: target must be class indices (int64 or uint8), got {dtype_name(target)}{hint}"
        )
    dim = 1 if pred.dim() > 1 else 0
    if pred.dim() == 0 or pred.shape[dim] == 0:
        raise ValueError(
            f"{name}: {argument} must be [C], [N, C] or [N, C, d...] with C at least 1, got {list(pred.shape)}"
        )
    expected = [*pred.shape[:dim], *pred.shape[dim + 1 :]]
    if list(target.shape) != expected:
        raise ValueError(
            f"{name}: target must be {expected} for {argument} {list(pred.shape)}, got {list(target.shape)}"
        )
    if num_classes and pred.shape[dim] != num_classes[0]:
        classes, fixed_by = num_classes
        raise ValueError(
            f"{name}: {argument} must have {classes} classes in dimension {dim}, as {fixed_by} has, "
            f"got {list(pred.shape)}"
        )
    return pred.shape[dim]


def rows(logits: Tensor, classes: int) -> Tensor:
    """``[S, C]``, in the order of the labels."""
    if logits.dim() == 2:
        return logits
    return (logits.movedim(1, -1) if logits.dim() > 2 else logits).reshape(-1, classes)


def read(
    name: str, pred: Tensor, target: Tensor, ignore_index: int, num_classes: tuple[int, str] | None = None
) -> Samples:
    """The samples of a batch that :func:`check` lets pass."""
    classes = check(name, pred, target, num_classes)
    labels = target.reshape(-1).long()
    bad = outside(name, "labels", labels, classes, ignore_index)
    counts = (labels != ignore_index) & ~bad
    # What such a row holds, NaN perhaps, must not reach the gradients of the parameters.
    logits = rows(pred, classes).to(accumulation_dtype(pred.dtype)).masked_fill(~counts[:, None], 0)
    return Samples(logits, labels.where(counts, 0), counts, bad, target.shape)
