"""Options that several operators share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
ACTIVATIONS = {"sigmoid": True, "identity": False}


def choice(operator: str, argument: str, value: str, choices: Mapping[str, T]) -> T:
    """The native value of an option that is given by name."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        names = ", ".join(map(repr, choices))
        raise ValueError(f"{operator}: {argument} must be one of {names}, got {value!r}") from None


def check_tensors(operator: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(value).__name__}")
