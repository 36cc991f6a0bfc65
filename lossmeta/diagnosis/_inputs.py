"""What a diagnosis is given: probabilities, labels, or a model that gives probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossmeta._checks import dtype_name, outside, refuse

# Rows of float16 probabilities sum to 1 within about this.
SUM_TOLERANCE = 1e-2
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_tensor(name: str, argument: str, values: Any) -> Tensor:
    """On the CPU, without a graph."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{name}: {argument} must be numbers, got dtype {values.dtype}")
        # A copy in native order with positive strides and a type that torch has.
        return torch.from_numpy(np.array(values, dtype=np.float64 if values.dtype.kind == "f" else np.int64))
    raise TypeError(f"{name}: {argument} must be a tensor or a NumPy array, got {type(values).__name__}")


def checked_probabilities(name: str, values: Any, argument: str = "probabilities") -> Tensor:
    """``[N, C]``, float64, rows that sum to 1 exactly but for rounding."""
    p = as_tensor(name, argument, values)
    if not p.is_floating_point():
        raise ValueError(f"{name}: {argument} must be floating, got {dtype_name(p)}")
    if p.dim() != 2:
        raise ValueError(f"{name}: {argument} must be [N, C], got {list(p.shape)}")
    if not len(p):
        raise ValueError(f"{name}: {argument} must have at least one sample, got {list(p.shape)}")
    if p.shape[1] < 2:
        raise ValueError(
            f"{name}: {argument} must have at least 2 classes, got {list(p.shape)}; "
            "for a yes-or-no model stack [1 - p, p]"
        )
    p = p.double()
    refuse(name, f"{argument} must be finite", p, ~p.isfinite())
    hint = "; for logits take .softmax(1) first"
    sums = p.sum(1)
    if bool((p < 0).any()):
        smallest = float(p.min())
        raise ValueError(f"{name}: {argument} must not be negative, got {smallest:.6g}{hint}")
    wrong = (sums - 1).abs() > SUM_TOLERANCE
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: {argument} must sum to 1 in every row, got a sum of {float(sums[row]):.6g} in row {row}{hint}"
        )
    return p / sums[:, None]


def checked_class_labels(name: str, labels: Tensor, argument: str = "labels") -> Tensor:
    """``[N]``, int64, not negative."""
    if labels.dtype not in INTEGERS:
        raise ValueError(f"{name}: {argument} must be integers, got {dtype_name(labels)}")
    if labels.dim() != 1:
        raise ValueError(f"{name}: {argument} must be [N], got {list(labels.shape)}")
    if not len(labels):
        raise ValueError(f"{name}: {argument} must have at least one sample, got none")
    labels = labels.long()
    refuse(name, f"{argument} must not be negative", labels, labels < 0)
    return labels


def checked_labels(name: str, values: Any, p: Tensor, argument: str = "labels") -> Tensor:
    """``[N]``, int64, in [0, C), for probabilities ``[N, C]``."""
    labels = checked_class_labels(name, as_tensor(name, argument, values), argument)
    if len(labels) != len(p):
        raise ValueError(
            f"{name}: {argument} must be [{len(p)}], one for each row of probabilities, got {list(labels.shape)}"
        )
    outside(name, argument, labels, p.shape[1])
    return labels
