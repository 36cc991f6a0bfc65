"""Table 4 of the AdaLFL paper: Taylor polynomials in place of the loss network."""

from __future__ import annotations

from lossmeta.recipes._comparison import Recipe, standard
from lossmeta.recipes._methods import Method

RECIPES = (
    Recipe(
        "adalfl-taylor",
        "AdaLFL, Table 4: loss network against quadratic and cubic Taylor polynomials",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            *standard(),
            Method("quadratic polynomial, 1e-5", "quadratic", loss="quadratic", inner_steps=1, online=1e-5),
            Method("cubic polynomial, 1e-5", "cubic", loss="cubic", inner_steps=1, online=1e-5),
        ),
    ),
)
