"""What a step of a population or a controller says."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PopulationReport:
    """One step.

    Attributes:
        loss: on the training batch before the step, the mean over the children (of this process), each under its
            own values.
        fitness: of each child, ``[B]``, the higher the better, after the last step of a window; else ``None``.
    """

    loss: Tensor
    fitness: Tensor | None = None


@dataclass(frozen=True)
class ControllerReport:
    """The end of a window.

    Attributes:
        metric: the means of the metrics over the window, with its weights, ``[metrics, children]``, the higher the
            better.
        reward: of the actions at the window's start, ``[children]``; ``None`` of the first window, and NaN where
            a metric was not finite. Of siblings it is the advantage.
        entropy: mean of the policy over entries, in nats; NaN where no entry moved.
    """

    metric: Tensor
    reward: Tensor | None
    entropy: float
