"""Losses that adapt while a PyTorch model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lossmeta._source_folder  # noqa: F401 - first: from the bare source folder it leads to the installed one
from lossmeta import ops

if TYPE_CHECKING:  # loaded when first used
    from lossmeta import (
        adalfl,
        ala,
        comparison,
        data,
        diagnosis,
        experiments,
        integrations,
        landscape,
        losses,
        metrics,
        models,
        recipes,
        tuneloss,
    )
    from lossmeta._info import info
    from lossmeta.comparison import compare
    from lossmeta.diagnosis import diagnose

__all__ = [
    "adalfl",
    "ala",
    "compare",
    "comparison",
    "data",
    "diagnose",
    "diagnosis",
    "experiments",
    "info",
    "integrations",
    "landscape",
    "losses",
    "metrics",
    "models",
    "ops",
    "recipes",
    "tuneloss",
]
__version__ = "0.1.0"
FUNCTIONS = {
    "compare": "lossmeta.comparison",
    "diagnose": "lossmeta.diagnosis",
    "info": "lossmeta._info",
}  # and where they are


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = FUNCTIONS.get(name)
    found = getattr(import_module(where), name) if where else import_module(f"lossmeta.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
