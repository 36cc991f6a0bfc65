"""Labels that are on or off on their own, several for each sample: what the losses with ``link="sigmoid"`` share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lossmeta._checks import FLOAT_NAMES, FLOATS, check_same_device, dtype_name, outside
from lossmeta.ops._precision import accumulation_dtype

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Labels(NamedTuple):
    """All labels of a batch, E of them, in the order of memory."""

    logits: Tensor
    """``[E, 1]``; in the accumulation dtype, and 0 where the label does not count, unless the target is left whole"""
    target: Tensor
    """``[E, 1]``, from 0 (off) to 1 (on); left whole, int64 with those that are ignored or bad"""
    scale: Tensor
    """``[E]`` or ``[]``: the label's weight, 0 where it is ignored, NaN where it is neither on, off nor ignored; left
    whole, the weight alone"""
    counted: Tensor | int
    """how many are not ignored"""


def check_ignore_index(name: str, ignore_index: int) -> None:
    if ignore_index in (0, 1):
        raise ValueError(
            f"{name}: ignore_index must not be 0 or 1 with link='sigmoid', where these are off and on, "
            f"got {ignore_index}"
        )


def check(name: str, pred: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    """Shapes, dtypes and devices; the values are looked at by :func:`flat`."""
    if target.dtype not in (*FLOATS, *INTEGERS):
        raise ValueError(
            f"{name}: target must be 0 or 1 (bool or integers) or in between ({FLOAT_NAMES}), got {dtype_name(target)}"
        )
    if pred.dim() == 0 or target.shape != pred.shape:
        raise ValueError(
            f"{name}: with link='sigmoid' logits and target must both be [N], [N, C] or [N, C, d...], "
            f"got {list(pred.shape)} and {list(target.shape)}"
            + ("; class indices are for link='softmax'" if target.dim() < pred.dim() else "")
        )
    if math.prod(pred.shape[1:]) == 0:
        raise ValueError(f"{name}: pred must hold at least one label for each sample, got {list(pred.shape)}")
    if weight is not None:
        check_same_device(name, weight=weight, pred=pred)
        classes = pred.shape[1] if pred.dim() > 1 else 1
        if weight.shape != (classes,):
            raise ValueError(f"{name}: weight must be [{classes}], got {list(weight.shape)}")


def flat(
    name: str,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    *,
    whole: bool = False,
) -> Labels:
    """With ``whole``, labels that are not smoothed are left for an operator that can ignore and refuse them."""
    dtype = accumulation_dtype(pred.dtype)
    whole = whole and not label_smoothing and not target.is_floating_point()
    x, y, scale = pred, target, pred.new_ones((), dtype=dtype)
    count: Tensor | int
    if whole:
        y = target.to(torch.int64)
        outside(name, "labels", y, 2, ignore_index)
        count = (y != ignore_index).sum()
    elif target.is_floating_point():
        x, y, count = pred.to(dtype), target.to(dtype), pred.numel()
    else:
        x, target = pred.to(dtype), target.to(torch.int64)
        counted = target != ignore_index
        bad = outside(name, "labels", target, 2, ignore_index)
        # What an ignored label comes with, NaN perhaps, must not reach the gradients of the parameters.
        x = x.masked_fill(bad | ~counted, 0)
        y, count = (target == 1).to(dtype), counted.sum()
        scale = counted.to(dtype).masked_fill(bad, torch.nan)
    if label_smoothing:
        y = (1 - label_smoothing) * y + label_smoothing / 2
    if weight is not None:
        scale = scale * weight.to(dtype).reshape(-1, *[1] * (pred.dim() - 2))
    if scale.dim():
        scale = scale.expand(pred.shape).reshape(-1)
    return Labels(x.reshape(-1, 1), y.reshape(-1, 1), scale, count)


def reduced(loss: Tensor, count: Tensor | int, shape: torch.Size, reduction: str) -> Tensor:
    """Of the losses of labels ``[E]``: the mean over labels, or of each sample ``[N]``, or the sum of these."""
    if reduction == "mean":
        return loss.sum() / count
    loss = loss.reshape(len(loss) if len(shape) == 1 else shape[0], -1).mean(1) if loss.numel() else loss
    return loss.sum() if reduction == "sum" else loss
