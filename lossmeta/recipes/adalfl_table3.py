"""Table 3 of the AdaLFL paper: a learned learning rate (Meta-LR, Algorithms 3 and 4) against a learned loss, and both
together, which the paper leaves to future work."""

from __future__ import annotations

from lossmeta.recipes._comparison import Recipe, standard
from lossmeta.recipes._methods import Method

RECIPES = (
    Recipe(
        "adalfl-meta-lr",
        "AdaLFL, Table 3: learned learning rate, learned loss, and both",
        ("regression", "mnist", "cifar10", "cifar100", "svhn"),
        (
            *standard(),
            Method("Meta-LR, 1e-5", "meta-lr", inner_steps=1, learning_rate=1e-5),
            Method("Meta-LR, 1e-3", inner_steps=1, learning_rate=1e-3),
            Method(
                "AdaLFL, 1e-3, and Meta-LR, 1e-3",
                loss="network",
                inner_steps=1,
                online=1e-3,
                learning_rate=1e-3,
            ),
        ),
    ),
)
