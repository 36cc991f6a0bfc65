"""What trials say of their training over its steps, as means over the seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lossmeta.experiments.records import Record
from lossmeta.experiments.statistics import summary
from lossmeta.experiments.trial import Point

# How recipes named measures of a series before trials had series.
AFTER = re.compile(r"(.+) after (\d{1,15})")


@dataclass(frozen=True)
class Curve:
    """One row of a picture.

    Attributes:
        points: step, mean and sample deviation over the seeds; what is None is a hole.
        seeds: whose mean it is.
        left_out: steps at which some of the seeds have no number: a mean of the others would show another thing.
    """

    points: tuple[tuple[float, float | None, float | None], ...]
    seeds: int
    left_out: int

    def times(self, factor: float) -> Curve:
        """The same in another unit."""
        scaled = (
            (x, None if m is None else factor * m, None if d is None else factor * d)
            for x, m, d in self.points
        )
        return replace(self, points=tuple(scaled))


def curves(rows: Mapping[str, Mapping[int, Record]]) -> dict[str, dict[str, Curve]]:
    """By series and row; rows without the series are left out.

    Args:
        rows: trials by row and seed.
    """
    found: dict[str, dict[str, Curve]] = {}
    for label, trials in rows.items():
        of_trials = [series_of(trial) for trial in trials.values()]
        for name in dict.fromkeys(name for series in of_trials for name in series):
            found.setdefault(name, {})[label] = _mean([dict(s[name]) for s in of_trials if name in s])
    return found


def series_of(trial: Record) -> dict[str, list[Point]]:
    """The series of a trial, and measures called ``error after 400``, of trials that have none of that name."""
    found: dict[str, list[Point]] = {}
    for name, value in trial.measures.items():
        if match := AFTER.fullmatch(name):
            found.setdefault(match[1], []).append((int(match[2]), value))
    named = {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}
    return named | {name: list(points) for name, points in trial.series.items()}


def _mean(seeds: list[dict[float, float | None]]) -> Curve:
    points: list[tuple[float, float | None, float | None]] = []
    for step in sorted({step for of_seed in seeds for step in of_seed}):
        values = [of_seed.get(step) for of_seed in seeds]
        of_step = summary(values)
        points.append((step, None, None) if of_step.diverged else (step, of_step.mean, of_step.deviation))
    return Curve(tuple(points), len(seeds), sum(mean is None for _, mean, _ in points))
