"""Trains every method on every task with every seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lossmeta.experiments.trial import Method, Task, Tuned

Reported = Mapping[str, Mapping[str, Mapping[str, str]]]


def run(
    recipe: str,
    tasks: Sequence[Task],
    methods: Sequence[Method | Tuned],
    *,
    seeds: int | Sequence[int],
    device: str,
    folder: Path,
    settings: Mapping[str, Any],
    reference: str | Sequence[str] | None = None,
    about: str = "",
    legend: str = "",
    reported: Reported | None = None,
    threads: int | None = None,
) -> int:
    """Trains what is not yet in the folder, shows the tables and returns the exit status.

    Every finished trial is written at once. A run that was stopped goes on where it was; more seeds, tasks and methods
    may be asked for than before.

    Args:
        recipe: its name, for messages and for the folder.
        tasks: one table each. Those whose data cannot be had are left out and named.
        methods: one row each.
        seeds: to be reported; a number stands for 0, 1, ...
        device: as a user writes it, ``"cpu"`` or ``"cuda"``.
        folder: of the results.
        settings: of the run, of JSON's types. A folder with others is refused.
        reference: label of the row that the others are compared with; several give several comparisons.
        about: one line.
        legend: below the tables: what the rows are.
        reported: columns beside ours, what a paper reports: heading, task, label of the row, text.
        threads: on the CPU, while this runs; None leaves them as they are. 1 is fastest for small models.

    Returns:
        0; 1 where the results could not be written; 2 for what the user must change; 130 after Ctrl-C.
    """
    raise NotImplementedError
