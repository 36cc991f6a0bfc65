"""Table 7 of the AdaLFL paper: run time of the whole learning process."""

from __future__ import annotations

from dataclasses import replace

from lossmeta.recipes._adalfl_tables import PLAIN, PaperTable, row
from lossmeta.recipes._adalfl_training import Fixed, Offline, Online

RECIPES = (
    PaperTable(
        "adalfl-run-time",
        "AdaLFL, Table 7: seconds of plain, offline and online training",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            replace(PLAIN, column="hours, baseline"),
            row("offline loss (ML³)", Offline(), Fixed(), "hours, offline"),
            row("AdaLFL", Offline(), Online(1e-5), "hours, online"),
        ),
        seconds=True,
    ),
)
