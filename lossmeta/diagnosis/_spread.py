"""Whether wrong labels spread evenly over the classes, or each class is taken for certain others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the way from what chance gives to one target per class: even noise lay at 0.09 at most, pairs of classes at 0.33 at
# least, and right labels of which a weak model confuses some at 0.20 to 0.34 (docs/results/diagnose.md).
EVEN, CLASS_TO_CLASS = 0.15, 0.3


def spread(joint: Tensor, transition: Tensor, size: int) -> tuple[float, str]:
    """The concentration of wrong labels, and ``"even"``, ``"class to class"``, ``"mixed"`` or ``"unknown"``.

    The concentration is the share of wrong labels in the largest cell of their row; for two classes, whose rows have
    one cell, the larger of the two rates over their sum. The largest of K equal cells has by chance at most about 1/K +
    sqrt(2 ln K / (K n)) of n counts, the bound of a maximum of K Gaussians. Where that comes near one target per class,
    nothing is said.
    """
    if len(joint) == 2:
        rates = transition.fliplr().diagonal()
        total = float(joint.fliplr().diagonal().sum())
        wrong = (rates / rates.sum())[None] * total  # one row of two cells
    else:
        wrong = joint - torch.diag(joint.diagonal())
    total = float(wrong.sum())
    if not total > 0:
        return math.nan, "unknown"
    cells = 2 if len(joint) == 2 else len(joint) - 1
    of_row = wrong.sum(1)
    by_chance = 1 / cells + (2 * math.log(cells) / (cells * size * of_row)).sqrt()
    floor = float((of_row * by_chance.clamp(max=1)).nan_to_num(0).sum()) / total
    concentration = float(wrong.max(1).values.sum()) / total
    if floor - 1 / cells > CLASS_TO_CLASS * (1 - 1 / cells):
        return concentration, "unknown"
    place = (concentration - floor) / (1 - floor)
    return (
        concentration,
        "even" if place <= EVEN else "class to class" if place >= CLASS_TO_CLASS else "mixed",
    )
