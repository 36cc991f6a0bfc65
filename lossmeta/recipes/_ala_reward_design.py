"""Figure 3 of the ALA paper: what a controller is rewarded by, and what that does to training and test errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lossmeta import plot
from lossmeta.experiments.records import Run
from lossmeta.experiments.statistics import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reward_design(run: Run, rows: Mapping[str, str]) -> Figure:
    """Mean and deviation over the seeds of every measure, a panel each and a line per row.

    Args:
        run: finished, of one task.
        rows: what the figure calls them, by their labels in the table.
    """
    (task,) = run.header.tasks
    # Of several trials of a row and seed the last counts.
    trials = {(t.method, t.seed): t for t in run.trials if t.role == "report" and t.seed in run.header.seeds}
    measures = [m for m in task.measures if m.shown]
    figure, panels = plot.figure(run.header.recipe, columns=len(measures), size=(5.5 * len(measures), 3.0))
    for axes, measure in zip(panels, measures, strict=True):
        factor = 100 if measure.percent else 1
        points = {}
        for label, name in rows.items():
            found = summary([t.measures.get(measure.name) for (row, _), t in trials.items() if row == label])
            if found.mean is not None:
                points[name] = factor * found.mean, factor * (found.deviation or 0.0)
        if points:
            plot.intervals(axes, list(points), *zip(*points.values(), strict=True))
        axes.set_ylabel("rewarded by")
        axes.set_xlabel(f"{measure.name}{' (%)' if measure.percent else ''}, mean ± sd")
    return figure
