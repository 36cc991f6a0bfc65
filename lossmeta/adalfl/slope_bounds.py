"""What keeps a learned loss from stopping the training early, and from running away with it."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from lossmeta.adalfl.loss_snapshot import LossSnapshot


class SlopeBounds:
    """Undoes the updates of a loss under which its slope ratio left its bounds.

    Loss and meta-optimizer go back to those with which the ratio was last within them. A loss whose ratio never was is
    left alone.

    Args:
        phi: the parameters of the loss.

    Attributes:
        accepted: the last loss whose ratio was within the bounds, or ``None``.
    """

    def __init__(self, phi: list[Tensor]) -> None:
        self.phi = phi
        self.accepted: LossSnapshot | None = None

    def undo_if_outside(
        self, low: float | None, high: float | None, slope_ratio: Tensor, meta: Optimizer
    ) -> str | None:
        """What was undone, or ``None``."""
        ratio = float(slope_ratio)
        if math.isnan(ratio):
            return None
        too_low, too_high = low is not None and ratio < low, high is not None and ratio > high
        if not (too_low or too_high):
            self.accepted = LossSnapshot.of(self.phi, meta)
            return None
        if self.accepted is None:
            return None
        self.accepted.bring_back(self.phi, meta)
        verb = "fell" if too_low else "rose"
        return f"the slope {verb} to {ratio:.3g} of the task loss's; the last update is undone"
