"""What the recipes share in which a few clean samples teach a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lossmeta import experiments
from lossmeta.experiments import Method, Task, Tuned

LEARNED = "learned loss, nothing tuned"


@dataclass(frozen=True)
class CleanRecipe:
    """A recipe whose rows are compared with the learned loss.

    Attributes:
        name: for ``lossmeta run``.
        about: one line for ``lossmeta list``.
        tasks: one table each; of the steps that are asked for, or ``None`` for their own.
        rows: of each table; one is called :data:`LEARNED`.
        legend: below the tables.
    """

    name: str
    about: str
    tasks: Callable[[int | None], Sequence[Task]]
    rows: tuple[Method | Tuned, ...]
    legend: str

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        return experiments.run(
            self.name,
            self.tasks(steps),
            self.rows,
            seeds=seeds,
            device=device,
            folder=output,
            settings={"steps": steps, "device": device},
            reference=LEARNED,
            about=self.about,
            legend=self.legend,
            threads=1,  # the tensors are small: a second thread would cost more than it does
        )
