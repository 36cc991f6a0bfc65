"""A worker of a study: ``optuna_worker.py STORAGE NAME TRIALS [FOLDER]``.

It stops in the middle of its second trial, if a folder is given, and says so by a file there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage

from lossmeta.integrations.optuna import TuneLossSampler, report
from lossmeta.tuneloss import Measurement

BOUNDS = {"l1": (0.01, 10.0), "l2": (np.full(3, 0.01), np.full(3, 10.0))}
BEST = np.array([0.5, 1.0, 1.0, 2.0])  # least error


def measurement(values: dict[str, Any]) -> Measurement:
    """Of the error |log(entries / best)|^2; with twice its curvature, so that nobody arrives and repeats itself."""
    entries = np.array([values["l1"], *values["l2"]])
    away = np.log(entries / BEST)
    return Measurement(
        float(away @ away), slope=2 * away / entries, curvature=np.diag(4 / entries**2), names=("l1", "l2")
    )


def storage_of(where: str) -> Any:
    if where.startswith("sqlite"):
        return where
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(where))


def main(where: str, name: str, trials: int, folder: Path | None) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = TuneLossSampler(BOUNDS)
    study = optuna.load_study(study_name=name, storage=storage_of(where), sampler=sampler)
    count = 0

    def objective(trial: Any) -> float:
        nonlocal count
        values = sampler.suggest(trial)
        count += 1
        if folder is not None and count == 2:
            (folder / "stopped.part").write_text(str(trial.number))
            (folder / "stopped.part").rename(folder / "stopped")
            time.sleep(600)
        return report(trial, measurement(values))

    study.optimize(objective, n_trials=trials)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
