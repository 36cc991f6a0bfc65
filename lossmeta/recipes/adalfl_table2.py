"""Table 2 of the AdaLFL paper: does a longer horizon mend the offline loss?"""

from __future__ import annotations

from lossmeta.recipes._comparison import Recipe, standard
from lossmeta.recipes._methods import Method

RECIPES = (
    Recipe(
        "adalfl-inner-steps",
        "AdaLFL, Table 2: offline losses learned over 1 to 20 inner steps",
        ("cifar10",),
        (
            *standard(offline="inner 1"),
            *(
                Method(f"offline loss, {n} inner steps", f"inner {n}", loss="network", inner_steps=n)
                for n in (5, 10, 15, 20)
            ),
        ),
        tasks=("CIFAR-10 + AllCNN-C",),
    ),
)
