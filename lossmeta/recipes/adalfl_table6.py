"""Table 6 of the AdaLFL paper: the meta-objective on training or on validation data (appendix D.4)."""

from __future__ import annotations

from lossmeta.recipes._comparison import PLAIN, Recipe
from lossmeta.recipes._methods import Method


def _adalfl(rate: float, objective: str, column: str | None) -> Method:
    label = f"AdaLFL, {rate:g}, meta-objective on {'training' if objective == 'train' else objective} data"
    return Method(label, column, loss="network", inner_steps=1, online=rate, objective=(objective,))


RECIPES = (
    Recipe(
        "adalfl-objective",
        "AdaLFL, Table 6: meta-objective on training or validation data",
        ("regression",),
        (
            PLAIN,
            _adalfl(1e-5, "train", "training objective"),
            _adalfl(1e-5, "validation", "validation objective"),
            _adalfl(1e-3, "train", None),
            _adalfl(1e-3, "validation", None),
        ),
        tasks=("Crime + MLP", "Diabetes + MLP"),
    ),
)
