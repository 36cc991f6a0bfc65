"""Figure 2 of the TuneLoss paper: log loss and error of the best run so far, against the number of runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from lossmeta import plot
from lossmeta.experiments.records import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def against_runs(run: Run, task: str) -> Figure:
    """A panel for each measure that is shown, with a line for each method: the mean over the seeds.

    Rows are named ``"METHOD, N runs"``.
    """
    measures = next(t.measures for t in run.header.tasks if t.name == task)
    shown = [measure for measure in measures if measure.shown]
    figure, panels = plot.figure("tuneloss", columns=len(shown), size=(5.0 * len(shown), 3.6))
    for panel, measure in zip(panels, shown, strict=True):
        factor, unit = (100, " (%)") if measure.percent else (1, "")
        means: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in run.header.rows:
            found = [t.measures[measure.name] for t in run.trials if t.task == task and t.method == row]
            known = [factor * value for value in found if value is not None]
            if known:
                name, runs = row.rsplit(", ", 1)
                means[name].append((int(runs.split()[0]), statistics.fmean(known)))
        for name, points in means.items():
            panel.plot(*zip(*sorted(points), strict=True), marker=".", label=name)
        panel.set_xscale("log")
        panel.set_xlabel("training runs")
        panel.set_ylabel(f"{measure.name}{unit}, test part")
    panels[0].legend(frameon=False)
    return figure
