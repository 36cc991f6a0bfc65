"""Lets the package be imported from the root of its repository after a plain ``pip install .``.

Python started there finds the bare source folder first, which has no compiled core. Importing this module then puts the
installed package, whole, in the place of the source folder; an editable install has its core here and stays.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _use_installed() -> None:
    if PathFinder.find_spec("lossmeta._core", [str(_HERE)]):
        return
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE.parent]
    spec = PathFinder.find_spec("lossmeta", elsewhere)
    if (
        spec is None
        or spec.loader is None
        or not PathFinder.find_spec("lossmeta._core", spec.submodule_search_locations)
    ):
        return
    source = sys.modules["lossmeta"]
    sys.modules["lossmeta"] = installed = module_from_spec(spec)
    try:
        spec.loader.exec_module(installed)
    except BaseException:
        sys.modules["lossmeta"] = source
        raise
    if f'__version__ = "{installed.__version__}"' not in (_HERE / "__init__.py").read_text():
        warnings.warn(
            f"lossmeta {installed.__version__} is imported from {installed.__file__}, but the source folder {_HERE} "
            "holds another version: run `python -m pip install .` again",
            stacklevel=2,
        )


_use_installed()
