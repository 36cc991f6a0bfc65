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


def read(
    name: str, pred: Tensor, target: Tensor, ignore_index: int, num_classes: int | None = None
) -> Samples:
    """Refuses what is not logits and class indices, in the shapes of :func:`torch.nn.functional.cross_entropy`."""
    check_tensors(name, pred=pred, target=target)
    check_float(name, pred=pred)
    check_same_device(name, target=target, pred=pred)
    if target.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"{name}: target must be class indices (int64 or uint8), got {dtype_name(target)}; class indices are "
            "int64: target.long()"
        )
    classes = pred.shape[min(pred.dim() - 1, 1)] if pred.dim() else 0
    if classes == 0:
        raise ValueError(
            f"{name}: pred must be [C], [N, C] or [N, C, d...] with C at least 1, got {list(pred.shape)}"
        )
    if num_classes is not None and num_classes != classes:
        raise ValueError(
            f"{name}: pred must have the {num_classes} classes of the loss, got {classes} in {list(pred.shape)}; make "
            "the loss with num_classes of the model"
        )
    expected = [*pred.shape[:1], *pred.shape[2:]] if pred.dim() > 1 else []
    if list(target.shape) != expected:
        raise ValueError(
            f"{name}: class indices must be {expected} for logits {list(pred.shape)}, got {list(target.shape)}"
        )
    labels = target.reshape(-1).long()
    bad = outside(name, "labels", labels, classes, ignore_index)
    counts = (labels != ignore_index) & ~bad
    logits = pred.movedim(1, -1).reshape(-1, classes) if pred.dim() > 1 else pred[None]
    # What such a row holds, NaN perhaps, must not reach the gradients of the parameters.
    logits = logits.to(accumulation_dtype(pred.dtype)).masked_fill(~counts[:, None], 0)
    return Samples(logits, labels.where(counts, 0), counts, bad, target.shape)
