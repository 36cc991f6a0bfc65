"""Draws losses as functions of one prediction, probability or distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lossmeta import plot
from lossmeta.ops._precision import accumulation_dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 201
TARGETS = (1.0, 0.0)


class LossOfOutputs(Protocol):
    """A loss that adds up what each output says."""

    link: str

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def of_output(self, f: Tensor, y: Tensor, num_classes: int | None) -> Tensor: ...


@torch.no_grad()
def curves(
    name: str, loss: LossOfOutputs, predictions: tuple[float, float] | None, num_classes: int | None
) -> tuple[Tensor, Tensor]:
    """Predictions ``[P]``, and what one output adds to the loss there if its target is 1, and 0, ``[2, P]``."""
    if loss.link != "identity":
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
    name: str, loss: LossOfOutputs, drawn: Sequence[tuple[Tensor, Tensor]], steps: Sequence[int]
) -> Figure:
    """One panel per target; with several steps, from dark to bright."""
    figure, axes = plot.figure(name, columns=len(TARGETS))
    colours, scale = plot.shades(steps)
    for row, (y, axis) in enumerate(zip(TARGETS, axes, strict=True)):
        for (f, values), colour in zip(drawn, colours, strict=True):
            axis.plot(f.tolist(), values[row].tolist(), color=colour, linewidth=1)
        axis.set_title(f"target {y:g}")
        axis.set_xlabel("prediction" if loss.link == "identity" else "predicted probability")
    axes[0].set_ylabel("learned loss")
    if len(steps) > 1:
        figure.colorbar(scale, ax=axes, label="training step")
    return figure


def distances(name: str, span: tuple[float, float], like: Tensor) -> Tensor:
    """Equally spaced distances ``[P]``."""
    if not 0 <= span[0] < span[1] < math.inf:
        raise ValueError(f"{name}: distances must be (lowest, highest), finite and from 0 on, got {span}")
    return torch.linspace(*span, POINTS, device=like.device, dtype=accumulation_dtype(like.dtype))


def panels(name: str, x: Tensor, label: str, values: Mapping[str, Tensor]) -> Figure:
    """One panel with one line over ``x`` for each of the values ``[P]``."""
    figure, axes = plot.figure(name, columns=len(values))
    for axis, (title, y) in zip(axes, values.items(), strict=True):
        axis.plot(x.tolist(), y.tolist(), linewidth=1)
        axis.set_title(title)
        axis.set_xlabel(label)
    return figure
