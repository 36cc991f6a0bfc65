"""Figures 1 and 5 of the ALA paper: losses against the metric, over a training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from lossmeta import plot
from lossmeta._files import write_json
from lossmeta.experiments import Diverged, Measure
from lossmeta.recipes._ala_images import ImageFit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, FIGURE = "loss-against-metric.json", "loss-against-metric.png"
POINTS = 50
# Called after every step with its number and its loss; and what makes one for a training that somebody wants to see.
Watch = Callable[[int, Tensor], None]
Watching = Callable[[ImageFit], Watch | None]


@dataclass
class Curve:
    """One training.

    Attributes:
        steps: where it was measured.
        trained: mean of the loss that it minimises, since the last of them.
        validation: cross-entropy on the validation part.
        metric: on the test part, which only the figure shows.
    """

    steps: list[int] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)


def watch_first_seed(fit: ImageFit, row: str) -> Watch | None:
    """Measures now and then, and draws at the end; of the first seed only, where matplotlib is installed.

    The curves of all rows stand in one file of the run's folder, from which the figure is drawn anew. The training is
    the same as without.
    """
    if fit.trial.seed or not plot.installed():
        return None
    curve, since = Curve(), list[Tensor]()

    def watch(step: int, loss: Tensor) -> None:
        since.append(loss.detach())
        done = step + 1
        if done % math.ceil(fit.steps / POINTS) and done < fit.steps:
            return
        with suppress(Diverged):
            held_out = F.cross_entropy(fit.predicted(fit.drawn.valid), fit.drawn.valid[1]).item()
            curve.metric.append(fit.of(fit.drawn.test))
            curve.validation.append(held_out)
            curve.trained.append(sum(value.item() for value in since) / len(since))
            curve.steps.append(done)
        since.clear()
        if done == fit.steps and curve.steps:
            _draw(fit.trial.folder, row, curve, fit.drawn.problem.measure)

    return watch


def _draw(folder: Path, row: str, curve: Curve, measure: Measure) -> None:
    path = folder / CURVES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[row] = asdict(curve)
    write_json(path, known)
    curves = {name: Curve(**values) for name, values in known.items()}
    plot.save(loss_against_metric(curves, measure), folder / FIGURE)


def loss_against_metric(curves: Mapping[str, Curve], measure: Measure) -> Figure:
    """Three panels, with a line for each row.

    Validation loss and test metric over the training (Figure 5), and the metric against the loss that is minimised
    (Figure 1), each of which goes from 0, its least value, to 1: losses of different kinds have no common scale.
    """
    figure, (held_out, tested, mismatch) = plot.figure("ala", columns=3, size=(12.0, 3.4))
    factor, unit = (100, " (%)") if measure.percent else (1, "")
    for row, curve in curves.items():
        metric = [factor * value for value in curve.metric]
        least, most = min(curve.trained), max(curve.trained)
        scaled = [(value - least) / ((most - least) or 1) for value in curve.trained]
        held_out.plot(curve.steps, curve.validation, label=row)
        tested.plot(curve.steps, metric, label=row)
        mismatch.plot(scaled, metric, label=row)
    for axes in (held_out, tested):
        axes.set_xlabel("training step")
    held_out.set_ylabel("cross-entropy, validation")
    mismatch.set_xlabel("loss that is minimised, scaled to [0, 1]")
    for axes in (tested, mismatch):
        axes.set_ylabel(f"test {measure.name}{unit}")
    held_out.legend(frameon=False)
    return figure
