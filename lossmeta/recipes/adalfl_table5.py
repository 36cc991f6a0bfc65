"""Table 5 of the AdaLFL paper: the loss network's activation, offline."""

from __future__ import annotations

from lossmeta.recipes._adalfl_tables import PaperTable, row, standard
from lossmeta.recipes._adalfl_training import Fixed, Offline

RECIPES = (
    PaperTable(
        "adalfl-activation",
        "AdaLFL, Table 5: ReLU and softplus (ML³) against smooth leaky ReLU",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            *standard(offline="offline, smooth"),
            row("offline loss, ReLU + softplus", Offline("relu"), Fixed(), "offline, ReLU"),
        ),
    ),
)
