"""What a step of a population says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PopulationReport:
    """One step.

    Attributes:
        loss: on the training batch before the step, the mean over the children, each under its own values.
        fitness: of each child, ``[B]``, the higher the better, after the last step of a window; else ``None``.
    """

    loss: Tensor
    fitness: Tensor | None = None
