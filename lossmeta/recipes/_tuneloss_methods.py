"""Ways to choose the parameters of a loss by training runs, each as good as its best run so far."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossmeta.experiments import Method, Trial
from lossmeta.recipes._softmax_regression import Coefficients, evaluate
from lossmeta.recipes._softmax_regression_adagrad import adagrad
from lossmeta.recipes._softmax_regression_measurements import measure
from lossmeta.recipes._softmax_regression_minimum import minimise
from lossmeta.recipes._tuneloss_tasks import ERROR, LOG_LOSS, VALIDATION, Drawn
from lossmeta.tuneloss import TPE, GaussianProcess, TuneLoss, TuneReg
from lossmeta.tuneloss._box import Box, Values

SEARCH = 1  # the stream of random numbers of whatever draws parameters; stream 0 draws the data
TOLERANCE = 1e-5  # of a gradient's entries


@dataclass
class Runs:
    """Training runs of one method on one trial, in their order.

    Attributes:
        trial: of them.
        found: for each the measures.
    """

    trial: Trial
    found: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drawn: Drawn = self.trial.data
        self.box = Box.of("recipe", self.drawn.source.box)
        self.last: Tensor | None = None

    def train(self, values: Sequence[Values]) -> Tensor:
        """Weights [B, C, D] for the values of B losses; the next of a single loss start from its last."""
        problem, coefficients = self.drawn.problem, Coefficients.of(values)
        if epochs := self.drawn.source.epochs:
            return adagrad(problem, coefficients, epochs=epochs)
        start = self.last if len(values) == 1 else None
        self.last = minimise(problem, coefficients, start, tolerance=TOLERANCE).weights
        return self.last

    def judge(self, weights: Tensor) -> None:
        valid, _ = evaluate(weights, self.drawn.valid)
        for v, loss, error in zip(valid, *evaluate(weights, self.drawn.test), strict=True):
            measures = {VALIDATION.name: v, LOG_LOSS.name: loss, ERROR.name: error}
            self.found.append({name: float(value) for name, value in measures.items()})

    def after(self, runs: int) -> dict[str, float]:
        """The measures of the run that is best on the validation part."""
        return min(self.found[:runs], key=lambda measures: measures[VALIDATION.name])


def shared(trial: Trial, key: Hashable, most: int, extend: Callable[[Runs], None], runs: int) -> Runs:
    """The runs of a method, which rows of fewer and of more runs share."""
    if key not in trial.scratch:
        trial.scratch[key] = Runs(trial)
    kept: Runs = trial.scratch[key]
    while len(kept.found) < runs:
        extend(kept)
        trial.progress(len(kept.found) / most)
    return kept


def label_of(name: str, runs: int) -> str:
    """Of a row."""
    return f"{name}, {runs} run{'s' * (runs > 1)}"


def random_search(runs: int, most: int) -> Method:
    """Even in the coordinates of the box, so over the logarithm where the lower bound is positive; all at once."""

    def train(trial: Trial) -> dict[str, float]:
        def extend(kept: Runs) -> None:
            generator = torch.Generator().manual_seed(trial.random_seed(SEARCH))
            unit = torch.rand(most, kept.box.size, generator=generator, dtype=torch.float64)
            for part in unit.split(20):
                kept.judge(kept.train([kept.box.named(kept.box.at(u.numpy())) for u in part]))

        return shared(trial, "random search", most, extend, runs).after(runs)

    return Method(label_of("random search", runs), train, {"runs": runs, "of": most})


Make = Callable[[Runs], Any]


def by_tuner(
    name: str, runs: int, most: int, make: Make, metric: str | None, settings: dict[str, Any]
) -> Method:
    """Whatever asks for parameters and is told what they led to."""

    def train(trial: Trial) -> dict[str, float]:
        def extend(kept: Runs) -> None:
            if not kept.found:
                trial.scratch[name, "tuner"] = make(kept)
            tuner = trial.scratch[name, "tuner"]
            values = tuner.ask()
            weights = kept.train([values])
            kept.judge(weights)
            told: Any = kept.found[-1][VALIDATION.name]
            if metric is not None:
                drawn = kept.drawn
                told = measure(drawn.problem, weights, Coefficients.of([values]), drawn.valid, metric)[0]
            tuner.tell(values, told)

        return shared(trial, name, most, extend, runs).after(runs)

    return Method(label_of(name, runs), train, {"runs": runs, "metric": metric, **settings})


def tuneloss(
    name: str, runs: int, most: int, metric: str = "full", *, method: str = "gauss_newton"
) -> Method:
    def make(kept: Runs) -> TuneLoss:
        return TuneLoss(kept.drawn.source.box, method=method)

    return by_tuner(name, runs, most, make, metric, {"method": method})


def tunereg(runs: int, most: int) -> Method:
    def make(kept: Runs) -> TuneReg:
        return TuneReg(kept.drawn.source.box)

    return by_tuner("TuneReg", runs, most, make, "gram", {})


def optuna(name: str, runs: int, most: int, kind: type[TPE] | type[GaussianProcess]) -> Method:
    def make(kept: Runs) -> TPE | GaussianProcess:
        return kind(kept.drawn.source.box, seed=kept.trial.random_seed(SEARCH))

    return by_tuner(name, runs, most, make, None, {"kind": kind.__name__})
