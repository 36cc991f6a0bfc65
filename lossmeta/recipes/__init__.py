"""Experiments: the quickstart, and one file per table or figure of the papers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lossmeta.recipes._comparison import Recipe

# Files that hold recipes; each has a tuple RECIPES.
MODULES = (
    "adalfl_table1",
    "adalfl_table2",
    "adalfl_table3",
    "adalfl_table4",
    "adalfl_table5",
    "adalfl_table6",
    "adalfl_table7",
)


def recipes() -> dict[str, Recipe]:
    """All recipes of ``lossmeta run`` by name."""
    modules = (import_module(f"lossmeta.recipes.{name}") for name in MODULES)
    return {recipe.name: recipe for module in modules for recipe in module.RECIPES}
