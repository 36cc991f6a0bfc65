"""Draws learned losses as functions of one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmeta.losses._outputwise import OutputwiseLoss

POINTS = 201
TARGETS = (1.0, 0.0)


@torch.no_grad()
def curves(
    name: str, loss: OutputwiseLoss, predictions: tuple[float, float] | None, num_classes: int | None
) -> tuple[Tensor, Tensor]:
    """Predictions ``[P]``, and what one output adds to the loss there if its target is 1, and 0, ``[2, P]``."""
    if loss.link == "softmax":
        if predictions is not None:
            raise ValueError(f"{name}: predictions are for link='identity', got {predictions}")
        predictions = (0.0, 1.0)
    elif predictions is None or not predictions[0] < predictions[1]:
        raise ValueError(
            f"{name}: predictions must be (lowest, highest) with link='identity', got {predictions}"
        )
    parameter = next(loss.parameters())
    f = torch.linspace(*predictions, POINTS, device=parameter.device, dtype=parameter.dtype)
    return f.cpu(), torch.stack(
        [loss.of_output(f, torch.full_like(f, y), num_classes) for y in TARGETS]
    ).cpu()


def draw(
    name: str, loss: OutputwiseLoss, drawn: Sequence[tuple[Tensor, Tensor]], steps: Sequence[int]
) -> Figure:
    """One panel per target; with several steps, from dark to bright."""
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'{name}: matplotlib must be installed to draw, got none; pip install "lossmeta[plot]"'
        ) from error
    # Not pyplot: its figures stay until closed.
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(TARGETS))
    colour, scale = colormaps["viridis"], Normalize(steps[0], steps[-1])
    for row, (y, axis) in enumerate(zip(TARGETS, axes, strict=True)):
        for (f, values), step in zip(drawn, steps, strict=True):
            axis.plot(f.tolist(), values[row].tolist(), color=colour(scale(step)), linewidth=1)
        axis.set_title(f"target {y:g}")
        axis.set_xlabel("predicted probability" if loss.link == "softmax" else "prediction")
    axes[0].set_ylabel("learned loss")
    if len(steps) > 1:
        figure.colorbar(ScalarMappable(scale, colour), ax=axes, label="training step")
    return figure
