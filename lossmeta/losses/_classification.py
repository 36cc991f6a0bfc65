"""What the losses that do not adapt share: logits, class indices, weights and reduction as in ``torch.nn``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossmeta._checks import REDUCTIONS, check_same_device, check_tensors, choice, may_look, outside
from lossmeta.losses._class_indices import check
from lossmeta.losses._class_indices import rows as as_rows
from lossmeta.losses._outputwise import with_labels_as_int64
from lossmeta.ops._precision import accumulation_dtype


class ClassificationLoss(nn.Module):
    """Base of losses that take the place of :class:`torch.nn.CrossEntropyLoss` with class indices.

    A subclass gives ``of_rows(logits [R, C], labels [R]) -> [R]``, which knows neither weights nor ignored labels.
    Samples that are ignored reach it as zeros, of class 0. The mean is that of ``CrossEntropyLoss``: over the weights.
    Where an operator computes the mean without weights in one pass, ``mean_of_rows`` calls it, with rows as they are.
    On a GPU, where looking would wait for the device, the loss of a label out of range is NaN.

    Args:
        num_classes: C, and the argument that fixes it, where one does.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        num_classes: tuple[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        choice(self.name, "reduction", reduction, REDUCTIONS)
        if not isinstance(ignore_index, int):
            raise TypeError(
                f"{self.name}: ignore_index must be an integer, got {type(ignore_index).__name__}"
            )
        if weight is not None:
            check_tensors(self.name, weight=weight)
            if weight.dim() != 1 or (num_classes and len(weight) != num_classes[0]):
                expected = num_classes[0] if num_classes else "C"
                raise ValueError(f"{self.name}: weight must be [{expected}], got {list(weight.shape)}")
            num_classes = num_classes or (len(weight), "weight")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self._num_classes = num_classes
        self.register_buffer("weight", weight)

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        classes = check(self.name, logits, target, self._num_classes, "logits")
        for argument, buffer in self.named_buffers(recurse=False):
            check_same_device(self.name, **{argument: buffer}, logits=logits)
        rows, labels = as_rows(logits, classes), with_labels_as_int64(target).reshape(-1)
        if self.reduction == "mean" and self.weight is None:
            return self.mean_of_rows(rows, labels)
        losses, scale = self._losses(rows, labels)
        if self.reduction == "none":
            return losses.reshape(target.shape)
        return losses.sum() if self.reduction == "sum" else losses.sum() / scale.sum()

    def mean_of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses, scale = self._losses(logits, labels)
        return losses.sum() / scale.sum()

    def _losses(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row, weighted, and its weight."""
        dtype = accumulation_dtype(rows.dtype)
        bad = outside(self.name, "labels", labels, rows.shape[1], self.ignore_index)
        left_out = bad | (labels == self.ignore_index)
        rows, scale = rows.to(dtype), (~left_out).to(dtype)
        masked = not may_look(labels) or bool(left_out.any())
        if masked:
            # What an ignored row holds, NaN perhaps, must not reach the gradients.
            rows, labels = rows.masked_fill(left_out[:, None], 0), labels.masked_fill(left_out, 0)
        losses = self.of_rows(rows, labels)
        if self.weight is not None:
            scale = scale * self.weight.to(dtype)[labels]
            losses = losses * scale
        if masked or self.weight is not None:
            # A weight of 0 leaves an infinite loss out too.
            losses = losses.masked_fill(scale == 0, 0).masked_fill(bad, torch.nan)
        return losses, scale

    def extra_repr(self) -> str:
        return (
            f"weighted={self.weight is not None}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )
