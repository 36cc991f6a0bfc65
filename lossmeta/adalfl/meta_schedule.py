"""How often a loss is updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lossmeta._checks import check_at_least_one

Every = int | Callable[[int], int]
"""Training steps per meta-update; or a function of the steps done so far that gives those until the next one."""


def seldom_later(period: int = 100, most: int = 10) -> Callable[[int], int]:
    r"""A schedule for ``meta_every``: in every step at first, where the loss changes most, and seldom later.

    .. math:: n(t) = \min\bigl(1 + \lfloor t / \mathrm{period} \rfloor,\; \mathrm{most}\bigr)

    With the defaults a training of 1,600 steps has 354 updates.

    Args:
        period: steps t after which there is one more from each update to the next.
        most: steps from one update to the next in the end.

    Raises:
        ValueError: for a number below 1.

    Example:
        >>> schedule = seldom_later()
        >>> [schedule(t) for t in (0, 99, 100, 450, 5000)]
        [1, 1, 2, 5, 10]
    """
    check_at_least_one("seldom_later", "period", period)
    check_at_least_one("seldom_later", "most", most)
    return lambda step: min(1 + step // period, most)


class MetaSchedule:
    """Says in which training steps a meta-update is due.

    Args:
        every: see :data:`Every`.

    Attributes:
        next: the step of the next update, where ``every`` is a function.
    """

    def __init__(self, every: Every) -> None:
        if not callable(every):
            check_at_least_one("OnlineLearner", "meta_every", every)
        self.every = every
        self.next = 0

    def is_due(self, step: int) -> bool:
        return step >= self.next if callable(self.every) else step % self.every == 0

    def after(self, step: int) -> int:
        """The step of the next update, if there is one in this step.

        Raises:
            ValueError: for a function that gives less than 1.
            TypeError: for one that does not give an integer.
        """
        if not callable(self.every):
            return 0
        found: Any = self.every(step)
        if isinstance(found, bool) or not isinstance(found, int):
            raise TypeError(
                "OnlineLearner: meta_every must give an int, the steps until the next meta-update, got "
                f"{type(found).__name__} for step {step}"
            )
        check_at_least_one("OnlineLearner", f"what meta_every gives for step {step}", found)
        return step + found
