"""The options of a controller, refused where they are of another type, out of range or contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lossmeta._checks import check_at_least_one, check_fraction, check_positive_and_finite, choice

SHARED = {
    "children": "{} children",
    "space": "parameters whose names, sizes, bounds, scales and defaults are {}",
    "window": "windows of {} steps",
    "step_size": "actions of a step size of {}",
    "reward": "the reward {!r}",
}
"""What runs must share to go on with each other's state."""


def check_numbers(
    *,
    counts: dict[str, Any],
    seed: Any,
    discount: float,
    step_size: float,
    learning_rate: float,
) -> None:
    """Refuses numbers of another type by a TypeError, and those out of range by a ValueError."""
    for name, count in counts.items():
        _check_integer(name, count)
        check_at_least_one("Controller", name, count)
    _check_integer("seed", seed)
    if counts["evaluations"] > counts["window"]:
        raise ValueError(
            f"Controller: evaluations must be at most the window's {counts['window']}, got {counts['evaluations']}"
        )
    check_fraction("Controller", "discount", discount)
    check_positive_and_finite("Controller", "discount", discount)
    check_positive_and_finite("Controller", "step_size", step_size)
    check_positive_and_finite("Controller", "learning_rate", learning_rate)


def are_siblings(reward: str, children: int, episode: int) -> bool:
    """Whether the reward is over siblings, which it must then be possible to compare."""
    if not choice("Controller", "reward", reward, {"sign": False, "advantage": True}):
        return False
    if children < 2:
        raise ValueError(
            f'Controller: children must be 2 or more for reward="advantage", which is over siblings, got {children}'
        )
    if episode > 1:
        raise ValueError(
            'Controller: episode must be 1 for reward="advantage", whose children are made alike after each window, '
            f"got {episode}"
        )
    return True


def check_models(models: list[Any], children: int) -> None:
    """Refuses what is no model by a TypeError, and another number of them by a ValueError."""
    for one in models:
        if not isinstance(one, nn.Module):
            raise TypeError(f"Controller: model must be a torch.nn.Module, got {type(one).__name__}")
    if len(models) != children:
        raise ValueError(f"Controller: model must be {children} models, one of each child, got {len(models)}")


def check_same_run(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses the state of a run of another kind by a ValueError."""
    for what, described in SHARED.items():
        if given.get(what) != own[what]:
            raise ValueError(
                f"Controller: the state must be of {described.format(own[what])}, got {given.get(what)!r}"
            )


def _check_integer(argument: str, number: Any) -> None:
    if not isinstance(number, int):
        raise TypeError(f"Controller: {argument} must be an int, got {type(number).__name__}")
