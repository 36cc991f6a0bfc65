"""Scikit-learn's digits, and what is measured on them."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from lossmeta import data
from lossmeta._batches import Batch
from lossmeta.experiments import Measure
from lossmeta.metrics import AveragePrecision, ErrorRate

PIXELS, CLASSES = 64, 10
ERROR = Measure("error", higher_is_better=False, percent=True, digits=2)
PRECISION = Measure("average precision", higher_is_better=True, percent=True, digits=2)


@cache
def digits() -> Batch:
    """The 1797 images as rows of 64 shades in [0, 1], and their labels."""
    try:
        images, labels = data.load("digits").train
    except ImportError as error:
        raise ImportError(
            "scikit-learn is needed for its digits; install it with `python -m pip install scikit-learn`"
        ) from error
    # There are 17 shades, k/16, which bytes only come close to.
    return (images.flatten(1) * (16 / 255)).round() / 16, labels


def network(hidden: int) -> nn.Module:
    """New weights, drawn from the global random numbers."""
    return nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Both measures."""
    inputs, labels = batch
    logits = model(inputs)
    error, precision = ErrorRate(), AveragePrecision()
    error.update(logits, labels)
    precision.update(logits.log_softmax(1), labels)
    return {ERROR.name: error.compute().item(), PRECISION.name: precision.compute().item()}
