"""What the learned losses share: they compare every output with its target and average over the outputs."""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossmeta._checks import (
    FLOAT_NAMES,
    FLOATS,
    REDUCTIONS,
    check_float,
    check_fraction,
    check_same_device,
    check_tensors,
    choice,
    dtype_name,
    outside,
)
from lossmeta.losses import _labels as labels
from lossmeta.losses import _plot
from lossmeta.losses._saved import SavedLoss
from lossmeta.ops._precision import accumulation_dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINKS = {"softmax": "softmax", "sigmoid": "sigmoid", "identity": "identity"}
IGNORED = -100


class OutputwiseLoss(SavedLoss):
    """Base of losses ``(1/C) sum_i l(y_i, f_i)``: targets, weights and reduction as in ``torch.nn``.

    A subclass gives ``outputwise(pred [N, C], target [N, C]) -> [N]``; with the sigmoid link C is 1. With
    ``takes_labels`` it is given class indices ``[N]``, or labels, as they are; it leaves out ``ignore_index`` and
    refuses labels out of range. Without, labels out of range are refused here. On a GPU, where looking would wait for
    the device, the loss of such a row is NaN.
    """

    takes_labels = False
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
        check_fraction(self.name, "label_smoothing", label_smoothing)
        if link == "identity" and (weight is not None or label_smoothing != 0.0 or ignore_index != IGNORED):
            raise ValueError(
                f"{self.name}: weight, ignore_index and label_smoothing are for link='softmax' and link='sigmoid', "
                "got link='identity'"
            )
        if link == "sigmoid":
            labels.check_ignore_index(self.name, ignore_index)
        if weight is not None:
            check_tensors(self.name, weight=weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def outputwise(self, pred: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        loss = self._plain(pred, target)
        if self._unlearned:
            self._say_unlearned(pred)
        return loss

    def _say_unlearned(self, pred: Tensor, remedy: str = "") -> None:
        """Warns once of training with parameters as they were drawn; called by ``forward``."""
        backward = pred.requires_grad and torch.is_grad_enabled()
        if not (self.training and backward) or torch.compiler.is_compiling():
            return
        self._unlearned = False
        warnings.warn(
            f"{self.name}: a loss must be learned before it is minimised, got parameters as they were drawn; use "
            f"{remedy}lossmeta.adalfl.initialize(loss, ...) or OnlineLearner, or load one",
            stacklevel=5,  # this, forward and two of torch's own
        )

    def _plain(self, pred: Tensor, target: Tensor) -> Tensor:
        self._check(pred, target)
        target = with_labels_as_int64(target)
        if self.link == "identity":
            return self._regression(pred, target)
        if self.link == "sigmoid":
            return self._per_label(pred, target)
        if pred.dim() == 1:
            loss = self._classification(pred[None], target[None])
            return loss[0] if self.reduction == "none" else loss
        return self._classification(pred, target)

    def _check(self, pred: Tensor, target: Tensor) -> None:
        check_tensors(self.name, pred=pred, target=target)
        check_float(self.name, pred=pred)
        check_same_device(self.name, target=target, pred=pred)
        if self.link == "sigmoid":
            labels.check(self.name, pred, target, self.weight)
            return
        if self.link == "identity":
            check_float(self.name, target=target)
            if pred.dim() == 0 or target.shape != pred.shape:
                raise ValueError(
                    f"{self.name}: pred and target must both be [N] or [N, d...], "
                    f"got {list(pred.shape)} and {list(target.shape)}"
                )
            if math.prod(pred.shape[1:]) == 0:
                raise ValueError(
                    f"{self.name}: pred must hold at least one output for each sample, got {list(pred.shape)}"
                )
            return
        if target.dtype not in (*FLOATS, torch.int64, torch.uint8):
            raise ValueError(
                f"{self.name}: target must be class indices (int64 or uint8) or probabilities ({FLOAT_NAMES}), "
                f"got {dtype_name(target)}"
            )
        samples, classes = _sizes(pred)
        if classes == 0:
            raise ValueError(
                f"{self.name}: pred must be [C], [N, C] or [N, C, d...] with C at least 1, got {list(pred.shape)}"
            )
        probabilities = target.is_floating_point()
        expected = list(pred.shape) if probabilities else samples
        if list(target.shape) != expected:
            kind = "probabilities" if probabilities else "class indices"
            hint = (
                "; class indices are int64: target.long()"
                if probabilities and target.dim() < pred.dim()
                else ""
            )
            raise ValueError(
                f"{self.name}: {kind} must be {expected} for logits {list(pred.shape)}, "
                f"got {list(target.shape)}{hint}"
            )
        if probabilities and self.ignore_index >= 0:
            raise ValueError(
                f"{self.name}: ignore_index must be negative with probabilities, which it cannot ignore, "
                f"got {self.ignore_index}"
            )
        if self.weight is not None:
            check_same_device(self.name, weight=self.weight, pred=pred)
            if self.weight.shape != (classes,):
                raise ValueError(f"{self.name}: weight must be [{classes}], got {list(self.weight.shape)}")

    def _regression(self, pred: Tensor, target: Tensor) -> Tensor:
        rows = (len(pred), math.prod(pred.shape[1:]))
        loss = self.outputwise(pred.reshape(rows), target.reshape(rows))
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.mean()

    def _per_label(self, pred: Tensor, target: Tensor) -> Tensor:
        x, y, scale, counted = self._labels(pred, target, whole=self.takes_labels)
        return labels.reduced(self.outputwise(x, y) * scale, counted, pred.shape, self.reduction)

    def _labels(self, pred: Tensor, target: Tensor, *, whole: bool = False) -> labels.Labels:
        options = (self.weight, self.ignore_index, self.label_smoothing)
        return labels.flat(self.name, pred, target, *options, whole=whole)

    def _classification(self, pred: Tensor, target: Tensor) -> Tensor:
        samples, classes = _sizes(pred)
        dtype = accumulation_dtype(pred.dtype)
        weight = None if self.weight is None else self.weight.to(dtype)
        if pred.dim() > 2:
            pred = pred.movedim(1, -1).reshape(-1, classes)
        if (
            self.takes_labels
            and weight is None
            and not self.label_smoothing
            and not target.is_floating_point()
        ):
            # The common case, in few calls: ignored labels have loss 0 already.
            loss = self.outputwise(pred, target.reshape(-1))
            if self.reduction == "none":
                return loss.reshape(samples)
            return loss.sum() if self.reduction == "sum" else loss.sum() / (target != self.ignore_index).sum()
        counted = bad = None
        if target.is_floating_point():
            target = target.movedim(1, -1).reshape(-1, classes).to(dtype)
            # Not a matrix product: autocast would round it.
            scale = pred.new_ones(len(pred), dtype=dtype) if weight is None else (target * weight).sum(1)
        else:
            target = target.reshape(-1)
            counted = target != self.ignore_index
            scale = counted.to(dtype)
            if weight is not None:
                scale = scale * weight[target.clamp(0, classes - 1)]
            if self.label_smoothing or not self.takes_labels:
                bad = outside(self.name, "labels", target, classes, self.ignore_index)
                # What an ignored row holds, NaN perhaps, must not reach the gradients of the parameters.
                pred = pred.masked_fill((bad | ~counted)[:, None], 0)
                target = (target[:, None] == torch.arange(classes, device=target.device)).to(dtype)
        if self.label_smoothing:
            target = (1 - self.label_smoothing) * target + self.label_smoothing / classes
        loss = self.outputwise(pred, target)
        if bad is not None:
            loss = loss.masked_fill(bad, torch.nan)
        if weight is not None:
            loss = loss * scale
        if counted is not None:
            loss = loss.where(counted, 0)
        if self.reduction == "none":
            return loss.reshape(samples)
        return loss.sum() if self.reduction == "sum" else loss.sum() / scale.sum()

    def of_output(self, f: Tensor, y: Tensor, num_classes: int | None) -> Tensor:
        """The loss of outputs on their own, ``[P]``: f are probabilities but with the identity link."""
        raw = copy.copy(self)
        raw.link = "identity"
        return raw.outputwise(f[:, None], y[:, None])

    def plot(
        self, predictions: tuple[float, float] | None = None, *, num_classes: int | None = None
    ) -> Figure:
        r"""Draws the loss of one output, :math:`\ell_\phi(y, f)`, as a function of the prediction for y = 1 and y = 0.

        Args:
            predictions: lowest and highest, with ``link="identity"``; probabilities are drawn from 0 to 1.
            num_classes: C, with ``residual="cross_entropy"``, to which each class adds only 1/C of the network.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: for arguments that do not fit the link or the residual.
        """
        return _plot.draw(self.name, self, [_plot.curves(self.name, self, predictions, num_classes)], [0])

    def extra_repr(self) -> str:
        text = f"link={self.link!r}, reduction={self.reduction!r}"
        if self.link != "identity":
            text += (
                f", weighted={self.weight is not None}, ignore_index={self.ignore_index}, "
                f"label_smoothing={self.label_smoothing}"
            )
        return text


def with_labels_as_int64(target: Tensor) -> Tensor:
    """Cross-entropy also takes class indices of one byte."""
    return target.long() if target.dtype == torch.uint8 else target


def _sizes(pred: Tensor) -> tuple[list[int], int]:
    """The shape of the samples, and the number of classes (0 without a dimension for them)."""
    if pred.dim() < 2:
        return [], pred.shape[0] if pred.dim() else 0
    return [*pred.shape[:1], *pred.shape[2:]], pred.shape[1]
