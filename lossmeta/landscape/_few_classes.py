"""Predictions of few classes, class by class: on a CPU, rows that are shorter than a vector register are slow.

Of 1,000 samples of 10 classes torch 2.13 has the cross-entropy in 154 µs row by row, and in 13 µs where all samples of
a class lie side by side; the linear layer before it in 60 µs and in 27 µs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.landscape._objective import Objective

CLASSES = 16
"""That a prediction of few classes has fewer of: the float32 of the widest register."""
SAMPLES = 64
"""That it has at least."""


@contextmanager
def by_class(objective: Objective) -> Iterator[None]:
    """Within, an objective whose loss is torch's cross-entropy computes it class by class; the value is the same.

    So does a layer with few outputs, which leaves them for the loss as it takes them.
    """
    loss = objective.loss_fn
    if loss is None or (loss is not F.cross_entropy and type(loss) is not nn.CrossEntropyLoss):
        yield
        return
    layers = [m for m in objective.model.modules() if _has_few_outputs(m)]
    try:
        for layer in layers:
            layer.forward = lambda input, layer=layer: _linear(layer, input)
        objective.loss_fn = _Loss(loss)
        yield
    finally:
        objective.loss_fn = loss
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _has_few_outputs(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.out_features < CLASSES and "forward" not in module.__dict__


def _linear(layer: Any, x: Tensor) -> Tensor:
    held = layer._parameters  # without a look-up of the module's
    weight, bias = held["weight"], held["bias"]
    if not _is_slow(x, layer.out_features) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(bias.unsqueeze(1), weight, x.t()).t()


class _Loss:
    """The cross-entropy of N samples, ``[N, C]``, as that of N places of a single one, ``[1, C, N]``."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.dim() != 2 or not _is_slow(prediction, prediction.shape[1]):
            return self.loss(prediction, target)
        if target.dim() == 2:  # probabilities
            target = target.t()
        return self.loss(prediction.t().contiguous().unsqueeze(0), target.unsqueeze(0))


def _is_slow(rows: Tensor, classes: int) -> bool:
    few = classes < CLASSES and rows.dim() == 2 and rows.shape[0] >= SAMPLES
    # In half precision the value would be another.
    return few and rows.is_cpu and rows.dtype in (torch.float32, torch.float64)
