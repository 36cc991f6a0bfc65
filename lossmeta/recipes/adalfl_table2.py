"""Table 2 of the AdaLFL paper: does a longer horizon mend the offline loss?"""

from __future__ import annotations

from lossmeta.recipes._comparison import PLAIN, Recipe
from lossmeta.recipes._methods import Method

RECIPES = (
    Recipe(
        "adalfl-inner-steps",
        "AdaLFL, Table 2: offline losses learned over 1 to 20 inner steps",
        ("cifar10",),
        (
            PLAIN,
            *(
                Method(
                    f"offline loss, {n} inner step{'s' if n > 1 else ''}",
                    f"inner {n}",
                    loss="network",
                    inner_steps=n,
                )
                for n in (1, 5, 10, 15, 20)
            ),
            Method("AdaLFL, 1e-5", "adalfl", loss="network", inner_steps=1, online=1e-5),
        ),
        tasks=("CIFAR-10 + AllCNN-C",),
    ),
)
