"""Table 7 of the AdaLFL paper: run time of the whole learning process."""

from __future__ import annotations

from dataclasses import replace

from lossmeta.recipes._comparison import PLAIN, Recipe
from lossmeta.recipes._methods import Method

RECIPES = (
    Recipe(
        "adalfl-run-time",
        "AdaLFL, Table 7: seconds of plain, offline and online training",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            replace(PLAIN, column="hours, baseline"),
            Method("offline loss (ML³)", "hours, offline", loss="network", inner_steps=1),
            Method("AdaLFL", "hours, online", loss="network", inner_steps=1, online=1e-5),
        ),
        seconds=True,
    ),
)
