"""The tables of the ALA paper on CIFAR-10: which rows, and what the paper has beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lossmeta import experiments, plot
from lossmeta.experiments import Measure, Method, Tuned, run_folder
from lossmeta.experiments.records import Run
from lossmeta.recipes._ala_images import SETTINGS, Setting, task
from lossmeta.recipes._ala_tasks import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PaperTable:
    """A recipe: one table of the paper.

    Attributes:
        name: for ``lossmeta run``.
        about: one line for ``lossmeta list``.
        problem: by what models are judged.
        rows: of a size, by their labels.
        reference: labels of the rows that the others are compared with.
        legend: below the table.
        reported: the paper's figures by the rows' labels; they are those of the paper's size and model.
        measures: further ones.
        figures: of a finished run, by the names of their files.
    """

    name: str
    about: str
    problem: Problem
    rows: Callable[[Setting], list[Method | Tuned]]
    reference: tuple[str, ...]
    legend: str
    reported: Mapping[str, str]
    measures: tuple[Measure, ...] = ()
    figures: Mapping[str, Callable[[Run], Figure]] = field(default_factory=dict)

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        setting = SETTINGS[size]
        table = task(self.problem, setting, steps, *self.measures)
        status = experiments.run(
            self.name,
            [table],
            self.rows(setting),
            seeds=seeds,
            device=device,
            folder=output,
            settings={"size": size, "steps": steps, "device": device},
            reference=self.reference,
            about=self.about,
            legend=self.legend,
            reported={"paper": {table.name: dict(self.reported)}},
            # The small model is small: a second thread would cost more than it does.
            threads=1 if size == "small" else None,
        )
        if status == 0 and self.figures and plot.installed():
            finished = run_folder.read(output)
            for name, draw in self.figures.items():
                plot.save(draw(finished), output / name)
        return status
