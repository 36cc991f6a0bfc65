"""Table 3 of the AdaLFL paper: a learned learning rate (Meta-LR, Algorithms 3 and 4) against a learned loss, and both
together, which the paper leaves to future work."""

from __future__ import annotations

from lossmeta.recipes._adalfl_tables import PaperTable, row, standard
from lossmeta.recipes._adalfl_training import Offline, OfflineRate, Online

RECIPES = (
    PaperTable(
        "adalfl-meta-lr",
        "AdaLFL, Table 3: learned learning rate, learned loss, and both",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            *standard(),
            row("Meta-LR, 1e-5", OfflineRate(), Online(learning_rate=1e-5), "meta-lr"),
            row("Meta-LR, 1e-3", OfflineRate(), Online(learning_rate=1e-3)),
            row("AdaLFL, 1e-3, and Meta-LR, 1e-3", Offline(), Online(1e-3, learning_rate=1e-3)),
        ),
    ),
)
