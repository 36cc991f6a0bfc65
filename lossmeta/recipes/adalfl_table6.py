"""Table 6 of the AdaLFL paper: the meta-objective on training or on validation data (appendix D.4)."""

from __future__ import annotations

from lossmeta.recipes._adalfl_tables import PaperTable, Row, row, standard
from lossmeta.recipes._adalfl_training import Offline, Online


def _on_training_data(rate: str, column: str | None = None) -> Row:
    online = Online(float(rate), objective=("train",))
    return row(f"AdaLFL, {rate}, meta-objective on training data", Offline(), online, column)


RECIPES = (
    PaperTable(
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
