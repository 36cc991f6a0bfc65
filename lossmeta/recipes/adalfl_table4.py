"""Table 4 of the AdaLFL paper: Taylor polynomials in place of the loss network."""

from __future__ import annotations

from lossmeta.recipes._adalfl_tables import PaperTable, row, standard
from lossmeta.recipes._adalfl_training import Offline, Online

RECIPES = (
    PaperTable(
        "adalfl-taylor",
        "AdaLFL, Table 4: loss network against quadratic and cubic Taylor polynomials",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            *standard(),
            row("quadratic polynomial, 1e-5", Offline("quadratic"), Online(1e-5), "quadratic"),
            row("cubic polynomial, 1e-5", Offline("cubic"), Online(1e-5), "cubic"),
        ),
    ),
)
