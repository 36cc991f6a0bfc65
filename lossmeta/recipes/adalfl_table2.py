"""Table 2 of the AdaLFL paper: does a longer horizon mend the offline loss?"""

from __future__ import annotations

from lossmeta.recipes._adalfl_tables import PaperTable, row, standard
from lossmeta.recipes._adalfl_training import Fixed, Offline

RECIPES = (
    PaperTable(
        "adalfl-inner-steps",
        "AdaLFL, Table 2: offline losses learned over 1 to 20 inner steps",
        ("cifar10",),
        (
            *standard(offline="inner 1"),
            *(
                row(f"offline loss, {n} inner steps", Offline(inner_steps=n), Fixed(), f"inner {n}")
                for n in (5, 10, 15, 20)
            ),
        ),
        tasks=("CIFAR-10 + AllCNN-C",),
    ),
)
