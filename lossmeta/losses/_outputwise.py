"""What the learned losses share: they compare every output with its target and average over the outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossmeta.ops._arguments import REDUCTIONS, choice

LINKS = {"softmax": "softmax", "identity": "identity"}
IGNORED = -100


class OutputwiseLoss(nn.Module):
    """Base of losses ``(1/C) sum_i l(y_i, f_i)``: targets, weights and reduction as in ``torch.nn``.

    A subclass gives ``outputwise(pred [N, C], target [N] or [N, C]) -> [N]``; the label of a sample to be left out
    is ``IGNORED`` there.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        link: str,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.link = choice(self.name, "link", link, LINKS)
        choice(self.name, "reduction", reduction, REDUCTIONS)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"{self.name}: label_smoothing must lie in [0, 1], got {label_smoothing}")
        if link == "identity" and (weight is not None or label_smoothing != 0.0 or ignore_index != IGNORED):
            raise ValueError(
                f"{self.name}: weight, ignore_index and label_smoothing are for link='softmax', "
                "got link='identity'"
            )
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def outputwise(self, pred: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.link == "identity":
            return self._regression(pred, target)
        if pred.dim() == 1:
            loss = self(pred[None], target[None])
            return loss[0] if self.reduction == "none" else loss
        return self._classification(pred, target)

    def _regression(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.dim() == 0 or target.shape != pred.shape:
            raise ValueError(
                f"{self.name}: pred and target must both be [N] or [N, d...], "
                f"got {list(pred.shape)} and {list(target.shape)}"
            )
        rows = (len(pred), -1) if pred.numel() else (len(pred), 1)
        loss = self.outputwise(pred.reshape(rows), target.reshape(rows))
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.mean()

    def _classification(self, pred: Tensor, target: Tensor) -> Tensor:
        probabilities = target.is_floating_point()
        samples = (*pred.shape[:1], *pred.shape[2:])
        expected = pred.shape if probabilities else samples
        if target.shape != expected:
            kind = "probabilities" if probabilities else "class indices"
            raise ValueError(
                f"{self.name}: {kind} must be {list(expected)} for logits {list(pred.shape)}, "
                f"got {list(target.shape)}"
            )
        classes = pred.shape[1]
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"{self.name}: weight must be [{classes}], got {list(self.weight.shape)}")
        pred = pred.movedim(1, -1).reshape(-1, classes)
        if probabilities:
            target = target.movedim(1, -1).reshape(-1, classes)
            scale = (
                pred.new_ones(len(pred))
                if self.weight is None
                else target.to(self.weight.dtype) @ self.weight
            )
        else:
            target = target.reshape(-1)
            counted = target != self.ignore_index
            target = target.where(counted, IGNORED)
            scale = (
                counted
                if self.weight is None
                else self.weight[target.clamp(0, classes - 1)].where(counted, 0)
            )
        if self.label_smoothing:
            if not probabilities:
                pred, target = densify(self.name, pred, target)
            target = (1 - self.label_smoothing) * target + self.label_smoothing / classes
        loss = self.outputwise(pred, target)
        scale = scale.to(loss.dtype)
        loss = (loss * scale).where(scale != 0, 0)
        if self.reduction == "none":
            return loss.reshape(samples)
        return loss.sum() if self.reduction == "sum" else loss.sum() / scale.sum()

    def extra_repr(self) -> str:
        text = f"link={self.link!r}, reduction={self.reduction!r}"
        if self.link == "softmax":
            text += (
                f", weighted={self.weight is not None}, ignore_index={self.ignore_index}, "
                f"label_smoothing={self.label_smoothing}"
            )
        return text


def densify(loss: str, pred: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [N] as float32 [N, C], and ``pred`` with 0 in ignored rows, whose NaN would reach the parameters.

    A label out of range is an error; on a GPU, where looking would wait for the device, it is a row of NaN.
    """
    classes = pred.shape[1]
    ignored = labels == IGNORED
    outside = ((labels < 0) | (labels >= classes)) & ~ignored
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and outside.any():
        index = int(outside.nonzero()[0])
        raise ValueError(
            f"{loss}: labels must lie in [0, {classes}), got {labels[index].item()} at index {index}"
        )
    dense = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    return pred.masked_fill(ignored[:, None], 0), dense.masked_fill(outside[:, None], torch.nan)
