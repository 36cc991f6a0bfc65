"""The tables of the AdaLFL paper: which tasks, which rows, and what the paper has beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lossmeta import experiments
from lossmeta.experiments import Method, Task, Tuned
from lossmeta.recipes import _adalfl_tasks as tasks
from lossmeta.recipes._adalfl_tasks import Problem
from lossmeta.recipes._adalfl_training import Fixed, Offline, OfflineRate, Online, Training, Untrained
from lossmeta.recipes.papers import adalfl as paper

# The rate of the tuned rows is chosen by the selection error of these seeds, which no comparison reports.
# Where a data set has no test set of its own, they test on other rows, so that the tuned rate has seen some of the
# others' test rows: to the advantage of plain training.
TUNING_SEEDS = tuple(range(10_000, 10_003))

Start = Untrained | Offline | OfflineRate
Advance = Fixed | Online


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        training: of a trial.
        column: the paper's, see ``papers.adalfl``.
        tuned: whether the learning rate is the one that is best for plain training, or the task's base rate.
    """

    training: Training
    column: str | None = None
    tuned: bool = False

    @property
    def label(self) -> str:
        return self.training.label

    def method(self, problems: list[Problem]) -> Method | Tuned:
        """For the runner."""
        if not self.tuned:
            return _method(self.training)
        rates = {problem.name: problem.rates for problem in problems}

        def candidates(task: Task) -> tuple[Method, ...]:
            return tuple(_plain(rate) for rate in rates[task.name])

        def then(best: Method) -> Method:
            return _method(replace(self.training, rate=best.settings["rate"]))

        by = tasks.SELECTION.name
        return Tuned(self.label, candidates, by, TUNING_SEEDS, None if self == TUNED else then)


def _plain(rate: float) -> Method:
    return _method(Training(f"plain, rate {rate:g}", Untrained(), Fixed(), rate))


def _method(training: Training) -> Method:
    return Method(training.label, training, training.settings)


def row(label: str, start: Start, advance: Advance, column: str | None = None, *, tuned: bool = False) -> Row:
    """A row of a table, from its pieces."""
    return Row(Training(label, start, advance), column, tuned)


PLAIN = row("plain, base rate", Untrained(), Fixed(), "baseline")
TUNED = row("plain, tuned rate", Untrained(), Fixed(), tuned=True)
ALL = ("train", "validation")
WITH_VALIDATION = row(
    "plain, tuned rate, training + validation data", Untrained(), Fixed(parts=ALL), tuned=True
)


def standard(offline: str = "offline", online: str = "adalfl") -> tuple[Row, ...]:
    """The rows of every comparison; the paper's columns for its own two may be another table's."""
    return (
        PLAIN,
        TUNED,
        WITH_VALIDATION,
        row("offline loss (ML³)", Offline(), Fixed(), offline),
        row("offline loss, slope of the task loss", Offline(normalize=True), Fixed()),
        row("AdaLFL, 1e-5", Offline(), Online(1e-5), online),
        row("AdaLFL, 1e-4", Offline(), Online(1e-4)),
        row("AdaLFL, 1e-3", Offline(), Online(1e-3)),
    )


LEGEND = """\
Test error: mean squared error, or share of wrong classes. Base rate: the paper's learning rate; in small regressions \
ten times that, for a tenth of the width. Differences are to plain training at its tuned rate, and to plain training \
on training and validation data, as a loss that learns from validation batches has seen those too. Slope: how many \
times steeper the loss is than the task loss when training ends, that is how much of a difference is only a learning \
rate. Small sizes train smaller models for fewer steps than the paper: compare within a table."""
SECONDS_LEGEND = "Seconds: all that training needed, learning the loss beforehand included."


@dataclass(frozen=True)
class PaperTable:
    """A recipe: one table of the paper.

    Attributes:
        name: for ``lossmeta run``.
        about: one line for ``lossmeta list``.
        groups: of tasks, see ``_adalfl_tasks``.
        rows: of the table.
        tasks: names of the tasks, if not all of the groups' that there are at a size.
        seconds: whether the table is about time rather than error.
    """

    name: str
    about: str
    groups: tuple[str, ...]
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] | None = None
    seconds: bool = False

    def problems(self, size: str) -> list[Problem]:
        found = tasks.problems(size, *self.groups)
        return [p for p in found if p.name in (self.tasks or ())] or found

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """Trains every row with every seed, shows and keeps the results; returns the exit status."""
        problems = self.problems(size)
        errors = (tasks.ERROR, tasks.SELECTION, tasks.SLOPE, tasks.RATE)
        measures = (tasks.SECONDS,) if self.seconds else errors
        return experiments.run(
            self.name,
            [tasks.as_task(problem, steps, measures) for problem in problems],
            [row.method(problems) for row in self.rows],
            seeds=seeds,
            device=device,
            folder=output,
            settings={"size": size, "steps": steps, "device": device},
            reference=self._references,
            about=self.about,
            legend=SECONDS_LEGEND if self.seconds else LEGEND,
            reported={"paper, hours" if self.seconds else "paper": self._reported(problems)},
            # The small models are small: a second thread would cost more than it does.
            threads=1 if size == "small" else None,
        )

    @property
    def _references(self) -> list[str]:
        """What the others are compared with: plain training at its tuned rate, or the first row."""
        usual = [row.label for row in (TUNED, WITH_VALIDATION) if row in self.rows]
        return usual or [self.rows[0].label]

    def _reported(self, problems: list[Problem]) -> dict[str, dict[str, str]]:
        return {
            problem.name: {
                row.label: text for row in self.rows if (text := paper.reported(row.column, problem.name))
            }
            for problem in problems
        }
