"""Figure 3 of the TuneLoss paper: log losses over a training, and the regularisers that were learned in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lossmeta import plot
from lossmeta.recipes._tuneloss_training import Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPOCHS = (10, 100, 1000)  # whose regularisers are drawn, beside the last one


def log_losses(courses: Mapping[str, Course]) -> Figure:
    """A panel for each part of the data, with a line for each row."""
    figure, panels = plot.figure("tuneloss", columns=3, size=(12.0, 3.4))
    for panel, part in zip(panels, ("train", "valid", "test"), strict=True):
        for row, course in courses.items():
            losses = getattr(course, part)
            panel.plot(range(1, len(losses) + 1), losses, label=row)
        panel.set_xlabel("epoch")
        panel.set_xscale("log")
        panel.set_ylabel(f"log loss, {part}")
    panels[0].legend(frameon=False)
    return figure


def regularizers(course: Course) -> Figure | None:
    """Those after some of the epochs, or nothing where none was learned."""
    if course.tuner is None or not course.tuner.on:
        return None
    learned = [report for report in course.reports if report.on]
    steps = [epoch * course.tuner.every for epoch in EPOCHS]
    # Of each of the epochs the one that was in force, and the last one.
    at = {max((i for i, r in enumerate(learned) if r.step <= step), default=0) for step in steps}
    return course.tuner.plot([learned[i] for i in sorted({*at, len(learned) - 1})])
