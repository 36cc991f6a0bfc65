"""What catches a learned loss that turns against the task."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lossmeta.adalfl.loss_snapshot import LossSnapshot

SMOOTHING = 0.9
SLOWLY = 0.99  # that of the variance
WARM_UP = 10
"""Updates before the first level of the task loss counts, and from one kept loss to the next."""
PATIENCE = 10
"""Updates for which the level must have been above its least."""
LOST = 0.25
"""Of the first level, by which the level must have risen."""
ERRORS = 8.0
"""Standard errors of the level, by which it must have risen."""
SLOWER = 10.0
"""What the meta rate is divided by."""


class TurningGuard:
    r"""Goes back to an earlier loss where the task loss rises for long.

    The level is an exponential moving average of the task loss on validation batches,
    :math:`\bar L_t = 0.9\,\bar L_{t-1} + 0.1\,L_t`, corrected for its start. Where it has been above its least for ten
    updates, and by more than a quarter of what it first was and eight of its standard errors, the loss and the
    meta-optimizer's state go back to those of the least level, and the meta rate to a tenth. The variance of the task
    loss is half the mean square of the differences of neighbours, in which a trend hardly counts.

    Args:
        phi: the parameters of the loss.
    """

    def __init__(self, phi: list[Tensor]) -> None:
        self.phi = phi
        self.updates = self.rising = 0
        self.sum = self.squares = 0.0
        self.last: float | None = None
        self.first: float | None = None
        self.least = math.inf
        self.kept: LossSnapshot | None = None
        self.kept_at = 0

    def undo_if_turned(self, task_loss: float, meta: Optimizer) -> str | None:
        """To be called before each update, with the task loss after the step; what was undone, or ``None``."""
        self.updates += 1
        self.sum = SMOOTHING * self.sum + (1 - SMOOTHING) * task_loss
        difference = 0.0 if self.last is None else task_loss - self.last
        self.squares = SLOWLY * self.squares + (1 - SLOWLY) * difference**2 / 2
        self.last = task_loss
        level = self.sum / (1 - SMOOTHING**self.updates)
        if self.updates < WARM_UP:
            return None
        if self.first is None:
            self.first = level
        if level <= self.least:
            self.least, self.rising = level, 0
            if self.kept is None or self.updates - self.kept_at >= WARM_UP:
                self.kept, self.kept_at = LossSnapshot.of(self.phi, meta), self.updates
            return None
        self.rising += 1
        # Of a moving average with factor a, the variance is (1 - a) / (1 + a) of that of its terms.
        variance = self.squares / (1 - SLOWLY**self.updates)
        error = math.sqrt(variance * (1 - SMOOTHING) / (1 + SMOOTHING))
        risen = level - self.least
        if self.rising < PATIENCE or risen <= max(LOST * abs(self.first), ERRORS * error):
            return None
        assert self.kept is not None
        self.kept.bring_back(self.phi, meta)
        for group in meta.param_groups:
            group["lr"] = group["lr"] / SLOWER
        before, self.least, self.rising = self.least, level, 0
        return (
            f"the task loss has risen from {before:.3g} to {level:.3g}: the learned loss is that of {self.kept_at} "
            f"meta-updates again, and the meta rate {float(meta.param_groups[0]['lr']):.3g}"
        )

    def state(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("phi", "kept")}
        return {**own, "kept": None if self.kept is None else (self.kept.values, self.kept.state)}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.kept = None if state["kept"] is None else LossSnapshot(*state["kept"])
