"""What a run consists of, once it is finished or read: its header and its trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmeta.experiments.trial import Measure, Point

REMEDY = "choose another --output or remove it"

Identity = tuple[str, str, int, str]


class FolderError(ValueError):
    """A folder that a run cannot go on with; says why, and what to do."""


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        role: ``"report"``, or ``"tuning"`` for what only serves to choose.
        task: its name.
        method: label of the row.
        seed: of the trial.
        candidate: what was trained, where the row is a tuned one.
        series: numbers over the training, by name; there may be none.
        failure: why the method failed; None where it did not.
        settings: of the task and of the method that was trained.
        measures: and further numbers; None where training diverged.
        seconds: of training.
        peak_memory: in bytes, of the process or, on a GPU, of tensors; None where it is not known.
    """

    role: str
    task: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    measures: Mapping[str, float | None]
    seconds: float
    peak_memory: int | None
    candidate: str | None = None
    series: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    failure: str | None = None

    @property
    def identity(self) -> Identity:
        """What decides the outcome: two trials with the same need to be trained once."""
        return self.task, self.candidate or self.method, self.seed, canonical(self.settings)


@dataclass(frozen=True)
class TaskHeader:
    """What a table needs to know of a task."""

    name: str
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Header:
    """What a run is.

    Attributes:
        recipe: its name.
        about: one line.
        settings: of the run; those of a folder never change.
        tasks: one table each.
        rows: labels.
        references: labels of the rows that others are compared with.
        seeds: all that were ever asked for.
        legend: below the tables.
        reported: columns beside ours: heading, task, row, text.
        environment: where it began.
        corrected: labels of the rows among which p is corrected for their number, and one is recommended or none.
    """

    recipe: str
    about: str
    settings: Mapping[str, Any]
    tasks: tuple[TaskHeader, ...]
    rows: tuple[str, ...]
    references: tuple[str, ...]
    seeds: tuple[int, ...]
    legend: str
    reported: Mapping[str, Mapping[str, Mapping[str, str]]]
    environment: Mapping[str, Any]
    corrected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A folder as it was read.

    Attributes:
        path: of the folder.
        header: of the run.
        trials: that are finished.
        cut: whether the file of trials ends with half a line, as a process leaves it that is killed.
    """

    path: Path
    header: Header
    trials: list[Record] = field(default_factory=list)
    cut: bool = False


def canonical(settings: Mapping[str, Any]) -> str:
    """Settings as text: the same for the same settings, whatever their order and whether they come from a file."""
    return json.dumps(settings, sort_keys=True, allow_nan=False)
