"""Labels that are on or off on their own, several for each sample: what the losses with ``link="sigmoid"`` share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lossmeta._checks import FLOAT_NAMES, FLOATS, check_same_device, dtype_name, may_look, outside, refuse
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
    counted: Tensor
    """how many are not ignored"""


def check_ignore_index(name: str, ignore_index: int) -> None:
    if ignore_index in (0, 1):
        raise ValueError(
            f"{name}: ignore_index must not be 0 or 1 with link='sigmoid', where these are off and on, "
            f"got {ignore_index}"
        )


def check(name: str, pred: Tensor, target: Tensor, weight: Tensor | None) -> None:
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
    """All labels, and how each counts.

    With ``whole``, labels that are not smoothed are left for an operator that can ignore and refuse them.
    """
    dtype = accumulation_dtype(pred.dtype)
    floats = target.is_floating_point()
    whole = whole and not label_smoothing and not floats
    target = target.to(dtype if floats else torch.int64)
    counted = target != ignore_index
    bad = _refused(name, target, ignore_index)
    x, y, scale = pred, target, pred.new_ones((), dtype=dtype)
    if not whole:
        # What an ignored label comes with, NaN perhaps, must not reach the gradients of the parameters.
        uncounted = bad | ~counted
        x, y = pred.to(dtype).masked_fill(uncounted, 0), target.to(dtype).masked_fill(uncounted, 0)
        scale = counted.to(dtype).masked_fill(bad, torch.nan)
    if label_smoothing:
        y = (1 - label_smoothing) * y + label_smoothing / 2
    if weight is not None:
        scale = scale * weight.to(dtype).reshape(-1, *[1] * (pred.dim() - 2))
    if scale.dim():
        scale = scale.expand(pred.shape).reshape(-1)
    return Labels(x.reshape(-1, 1), y.reshape(-1, 1), scale, counted.sum())


def _refused(name: str, target: Tensor, ignore_index: int) -> Tensor:
    """Which are neither on, off, in between nor ignored: an error, where they may be looked at."""
    if not target.is_floating_point():
        return outside(name, "labels", target, 2, ignore_index)
    bad = ~((target >= 0) & (target <= 1)) & (target != ignore_index)
    if may_look(target):
        refuse(name, f"target must lie in [0, 1] or be ignore_index = {ignore_index}", target, bad)
    return bad


def reduced(loss: Tensor, counted: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    """Of the losses of labels ``[E]``: the mean over labels, or of each sample ``[N]``, or the sum of these."""
    if reduction == "mean":
        return loss.sum() / counted
    loss = loss.reshape(shape[0], math.prod(shape[1:])).mean(1)
    return loss.sum() if reduction == "sum" else loss
