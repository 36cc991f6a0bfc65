"""Table 5 of the AdaLFL paper: the loss network's activation, offline."""

from __future__ import annotations

from lossmeta.recipes._comparison import Recipe, standard
from lossmeta.recipes._methods import Method

RECIPES = (
    Recipe(
        "adalfl-activation",
        "AdaLFL, Table 5: ReLU and softplus (ML³) against smooth leaky ReLU",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            *standard(offline="offline, smooth"),
            Method("offline loss, ReLU + softplus", "offline, ReLU", loss="relu", inner_steps=1),
        ),
    ),
)
