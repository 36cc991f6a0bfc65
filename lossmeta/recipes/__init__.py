"""Experiments by name: the quickstart, and one file per table of the papers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

# Files that hold recipes; each has a tuple RECIPES.
MODULES = (
    "quickstart",
    "quickstart_tuneloss",
    "quickstart_tuning",
    "clean_digits",
    "diagnose",
    "adalfl_table1",
    "adalfl_table2",
    "adalfl_table3",
    "adalfl_table4",
    "adalfl_table5",
    "adalfl_table6",
    "adalfl_table7",
    "adalfl_noise",
    "adalfl_imbalance",
    "adalfl_outliers",
    "ala",
    "ala_retrieval",
    "ala_cifar10_error",
    "ala_cifar10_aucpr",
    "ala_ablations",
    "ala_curvature",
    "tuneloss_against_search",
    "tuneloss_figure1",
    "tuneloss_hyperparameters",
    "tuneloss_online",
    "tuneloss_regularizer",
)


class Recipe(Protocol):
    """An experiment that can be run.

    Attributes:
        name: for ``lossmeta run``.
        about: one line for ``lossmeta list``.
    """

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    def run(self, *, size: str, seeds: int, device: str, output: Path, steps: int | None = None) -> int:
        """Trains, shows and keeps the results; returns the exit status.

        Args:
            size: ``"small"``, minutes on a CPU, or ``"paper"``.
            seeds: how many.
            device: ``"cpu"`` or ``"cuda"``.
            output: folder of the results; a run that was stopped goes on there.
            steps: training steps, instead of the recipe's own.
        """
        ...


def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    modules = (import_module(f"lossmeta.recipes.{name}") for name in MODULES)
    return {recipe.name: recipe for module in modules for recipe in module.RECIPES}
