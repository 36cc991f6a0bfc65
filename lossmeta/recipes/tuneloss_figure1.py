"""TuneLoss, Figure 1: which quadratic loss of one weight leads to a low error, from a few models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lossmeta import experiments, plot
from lossmeta.experiments import Measure, Method, Task, Trial
from lossmeta.tuneloss import learn_loss
from lossmeta.tuneloss._box import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS, LINES = (2, 3, 4, 8), 5
ABOVE = Measure("above the least", higher_is_better=False)
REFERENCE = "LearnLoss, with slopes"
LEGEND = """\
The error is the greatest of five random lines on [0, 1], and is known at some random weights. The loss is a quadratic
of the weight. Above the least: the error at the weight of least loss, less the least error that there is. Closest
values: the quadratic that is closest to the known errors. Same argmin: the distance to the best of these weights.
LearnLoss: Eq. 6 with Appendix B.2's eps, from the values of the errors, or from their slopes too."""


@dataclass(frozen=True, eq=False)
class Problem:
    """An error of one weight, and what is known of it.

    Attributes:
        slopes: of its lines.
        heights: of them at 0.
        weights: of the models.
    """

    slopes: Array
    heights: Array
    weights: Array

    @classmethod
    def drawn(cls, seed: int, models: int) -> Problem:
        random = np.random.default_rng(seed)
        slopes, touches = random.normal(size=LINES), random.random(LINES)
        # Tangents of slope s of a parabola, so that several of them are the greatest somewhere.
        centre = random.uniform(0.2, 0.8)
        slopes = 4 * (touches - centre) + 0.2 * slopes
        heights = 2 * (touches - centre) ** 2 - slopes * touches
        return cls(slopes, heights, np.sort(random.random(models)))

    def error(self, weights: Any) -> Array:
        found: Array = (np.asarray(weights)[..., None] * self.slopes + self.heights).max(-1)
        return found

    def slope(self, weights: Array) -> Array:
        found: Array = self.slopes[(weights[:, None] * self.slopes + self.heights).argmax(-1)]
        return found

    def least(self) -> float:
        """Where lines meet, or at an end."""
        slopes, heights = self.slopes, self.heights
        i, j = np.triu_indices(LINES, 1)
        meet = (heights[j] - heights[i]) / (slopes[i] - slopes[j])
        corners = np.concatenate([[0.0, 1.0], meet[(meet > 0) & (meet < 1)]])
        return float(self.error(corners).min())


# A quadratic a w² + b w + c.
Quadratic = tuple[float, float, float]


def closest_values(problem: Problem) -> Quadratic:
    powers = np.vander(problem.weights, 3)
    (a, b, c), *_ = np.linalg.lstsq(powers, problem.error(problem.weights), rcond=None)
    return float(a), float(b), float(c)


def same_argmin(problem: Problem) -> Quadratic:
    best = float(problem.weights[problem.error(problem.weights).argmin()])
    return 1.0, -2 * best, best**2


def learned(problem: Problem, *, slopes: bool) -> Quadratic:
    """w² has the coefficient 1, for a loss may be multiplied by any number."""
    w = problem.weights
    features = np.stack([w**2, w, np.ones_like(w)], 1)
    jacobians = np.stack([2 * w, np.ones_like(w), np.zeros_like(w)], 1)[:, None, :]
    gradients = problem.slope(w)[:, None]
    known: dict[str, Any] = {"gradients": gradients, "jacobians": jacobians} if slopes else {}
    infinite = np.inf
    found = learn_loss(
        problem.error(w), features, [1.0, -infinite, -infinite], [1.0, infinite, infinite], **known
    )
    # Near the scale of the error, where it has one.
    a, b, c = (float(v) / max(found.multiplier, 1e-3) for v in found.values)
    return a, b, c


def argmin(loss: Quadratic) -> float:
    """On [0, 1]."""
    a, b, _ = loss
    if a > 0:
        return min(max(-b / (2 * a), 0.0), 1.0)
    return 0.0 if a + b > 0 else 1.0


LOSSES: Mapping[str, Callable[[Problem], Quadratic]] = {
    "closest values": closest_values,
    "same argmin": same_argmin,
    "LearnLoss": lambda problem: learned(problem, slopes=False),
    REFERENCE: lambda problem: learned(problem, slopes=True),
}


def task(models: int) -> Task:
    def prepare(seed: int, device: torch.device) -> Problem:
        return Problem.drawn(seed, models)

    return Task(f"{models} models", prepare, (ABOVE,), {"models": models, "lines": LINES})


def row(label: str) -> Method:
    def train(trial: Trial) -> dict[str, float]:
        problem: Problem = trial.data
        at = argmin(LOSSES[label](problem))
        if not trial.seed and label == REFERENCE and plot.installed():
            plot.save(drawn(problem), trial.folder / f"losses-{len(problem.weights)}-models.png")
        return {ABOVE.name: float(problem.error(at)) - problem.least()}

    return Method(label, train)


def drawn(problem: Problem) -> Figure:
    """The error, the models, and the quadratics with their minima."""
    figure, (axes,) = plot.figure("tuneloss", size=(6.0, 4.0))
    at = np.linspace(0, 1, 201)
    error = problem.error(at)
    axes.plot(at, error, color="black", label="error")
    axes.plot(problem.weights, problem.error(problem.weights), "o", color="black", label="models")
    for label, make in LOSSES.items():
        loss = make(problem)
        (line,) = axes.plot(at, np.polyval(loss, at), label=label)
        least = argmin(loss)
        axes.plot(least, np.polyval(loss, least), "v", color=line.get_color())
    margin = 0.5 * (error.max() - error.min())
    axes.set_ylim(error.min() - margin, error.max() + margin)
    axes.set_xlabel("weight")
    axes.set_ylabel("error, loss")
    axes.legend(frameon=False)
    return figure


class Figure1:
    """The recipe."""

    name = "tuneloss-figure1"
    about = "TuneLoss, Figure 1: which quadratic loss of one weight leads to a low error"

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """As all recipes, but there are no steps, and nothing for a device to do."""
        return experiments.run(
            self.name,
            [task(models) for models in MODELS],
            [row(label) for label in LOSSES],
            seeds=seeds,
            device="cpu",
            folder=output,
            settings={"device": "cpu"},
            reference=REFERENCE,
            about=self.about,
            legend=LEGEND,
            threads=1,
        )


RECIPES = (Figure1(),)
