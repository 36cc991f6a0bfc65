"""Draws learned regularisers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lossmeta import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 401


class Function(Protocol):
    """Piecewise linear."""

    @property
    def knots(self) -> Tensor: ...

    def value(self, weights: Tensor) -> Tensor: ...

    def slope(self, weights: Tensor) -> Tensor: ...


def draw(
    name: str,
    rows: Mapping[str, Sequence[Function]],
    spans: Mapping[str, tuple[float, float]],
    steps: Sequence[int],
) -> Figure:
    """A row for each group of weights: r, and its slope; several from dark to bright by their steps."""
    figure, axes = plot.figure(name, rows=len(rows), columns=2, size=(8.0, 3.2 * len(rows)))
    colours, scale = plot.shades(steps)
    for i, (group, functions) in enumerate(rows.items()):
        left, right = axes[2 * i : 2 * i + 2]
        low, high = spans[group]
        if not low < high:
            low, high = low - 1, high + 1
        x = torch.linspace(low, high, POINTS, dtype=torch.float64, device="cpu")
        for r, colour in zip(functions, colours, strict=True):
            left.plot(x.tolist(), r.value(x).tolist(), color=colour, linewidth=1)
            inside = r.knots[(r.knots > low) & (r.knots < high)]
            ends = torch.cat([x[:1], inside, x[-1:]])
            right.stairs(
                r.slope((ends[1:] + ends[:-1]) / 2).tolist(), ends.tolist(), baseline=None, color=colour
            )
        for axis, label in ((left, "regulariser"), (right, "its slope")):
            axis.set_xlabel("weight")
            axis.set_ylabel(label)
            axis.set_title(group)
    if len(steps) > 1:
        figure.colorbar(scale, ax=axes, label="training step")
    return figure


def checked_span(name: str, lowest: float, highest: float) -> tuple[float, float]:
    if not -math.inf < lowest < highest < math.inf:
        raise ValueError(f"{name}: weights must be (lowest, highest), finite, got ({lowest}, {highest})")
    return lowest, highest
