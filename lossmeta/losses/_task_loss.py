"""The task losses that a learned loss is added to or compared with, and their slopes."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from lossmeta import _checks
from lossmeta.losses._labels import Labels, reduced
from lossmeta.losses._outputwise import OutputwiseLoss
from lossmeta.ops._precision import accumulation_dtype


def task_loss(loss: OutputwiseLoss, pred: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, binary too, or squared error, reduced like ``loss``. The arguments have been checked."""
    if loss.link == "sigmoid":
        x, y, scale, counted = loss._labels(pred, target)
        of_labels = F.binary_cross_entropy_with_logits(x, y, reduction="none").squeeze(1) * scale
        return reduced(of_labels, counted, pred.shape, loss.reduction)
    dtype = accumulation_dtype(pred.dtype)
    pred = pred.to(dtype)
    if target.is_floating_point():
        target = target.to(dtype)
    if loss.link == "identity":
        if loss.reduction == "mean":
            return F.mse_loss(pred, target)
        error = F.mse_loss(pred, target, reduction="none").reshape(len(pred), math.prod(pred.shape[1:]))
        error = error.mean(1)
        return error if loss.reduction == "none" else error.sum()
    if not (target.is_floating_point() or _checks.may_look(target)):
        # The network answers a label out of range by NaN; cross-entropy would end the CUDA context.
        classes = pred.shape[0 if pred.dim() == 1 else 1]
        bad = _checks.outside(loss.name, "labels", target, classes)
        target = target.masked_fill(bad, loss.ignore_index)
    return F.cross_entropy(
        pred,
        target,
        None if loss.weight is None else loss.weight.to(dtype),
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        reduction=loss.reduction,
    )


def as_rows(loss: OutputwiseLoss, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions ``[N, C]`` in the accumulation dtype, with as many targets or ``[N]`` labels."""
    dtype = accumulation_dtype(pred.dtype)
    if target.is_floating_point():
        target = target.to(dtype)
    if loss.link == "identity":
        rows = (len(pred), math.prod(pred.shape[1:]))
        return pred.to(dtype).reshape(rows), target.reshape(rows)
    classes = pred.shape[0 if pred.dim() == 1 else 1]
    if pred.dim() > 1:
        pred = pred.movedim(1, -1)
        target = target.movedim(1, -1) if target.is_floating_point() else target
    rows = (-1, classes)
    return pred.to(dtype).reshape(rows), target.reshape(rows if target.is_floating_point() else -1)


def task_slope(loss: OutputwiseLoss, f: Tensor, y: Tensor) -> Tensor:
    """The gradient of the task loss, summed where it is not reduced, in rows of predictions."""
    samples, classes = f.shape
    if loss.link == "identity":
        return 2 / classes * (f - y) / (samples if loss.reduction == "mean" else 1)
    ignored, scale = scale_of_rows(loss, f, y)
    weight = None if loss.weight is None else loss.weight.to(f.dtype)
    smoothing = loss.label_smoothing
    if ignored is None:
        y = (1 - smoothing) * y + smoothing / classes if smoothing else y
        y = y if weight is None else y * weight
        slope = f.softmax(1) * y.sum(1, keepdim=True) - y
        return slope / samples if loss.reduction == "mean" else slope
    denominator = scale.sum() if loss.reduction == "mean" else 1
    at = y.where(~ignored, 0).clamp(0, classes - 1)[:, None]
    on = ((1 - smoothing) / denominator * scale)[:, None]
    if smoothing:
        off = smoothing / classes / denominator * (f.new_ones(classes) if weight is None else weight)
        slope = f.softmax(1) * (on + off.sum()) - off
    else:
        slope = f.softmax(1) * on
    return slope.scatter_add(1, at, -on).masked_fill(ignored[:, None], 0)


def slope_of_labels(labels: Labels) -> Tensor:
    """The gradient of the sum of binary cross-entropies, ``[E]``."""
    return (labels.logits.sigmoid() - labels.target).squeeze(1) * labels.scale


def scale_of_rows(loss: OutputwiseLoss, f: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
    """Which rows are ignored, where class indices say so, and the weight of each."""
    weight = None if loss.weight is None else loss.weight.to(f.dtype)
    if y.is_floating_point():
        return None, f.new_ones(len(f)) if weight is None else (y * weight).sum(1)
    ignored = y == loss.ignore_index
    scale = (~ignored).to(f.dtype)
    return ignored, scale if weight is None else scale * weight[y.clamp(0, f.shape[1] - 1)]
