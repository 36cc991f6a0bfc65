"""Table 6 of the AdaLFL paper: the meta-objective on training or on validation data (appendix D.4)."""

from __future__ import annotations

from lossmeta.recipes._comparison import Recipe, standard
from lossmeta.recipes._methods import Method


def _on_training_data(rate: str, column: str | None = None) -> Method:
    label = f"AdaLFL, {rate}, meta-objective on training data"
    return Method(label, column, loss="network", inner_steps=1, online=float(rate), objective=("train",))


RECIPES = (
    Recipe(
        "adalfl-objective",
        "AdaLFL, Table 6: meta-objective on training or validation data",
        ("regression",),
        (
            *standard(online="validation objective"),
            _on_training_data("1e-5", "training objective"),
            _on_training_data("1e-3"),
        ),
        tasks=("Crime + MLP", "Diabetes + MLP"),
    ),
)
