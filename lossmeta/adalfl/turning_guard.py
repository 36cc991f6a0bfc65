"""What catches a learned loss that turns against the task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lossmeta.adalfl.loss_snapshot import LossSnapshot

SMOOTHING = 0.9
SLOWLY = 0.99  # that of the variance
WARM_UP = 10
"""Updates before the first level of the task loss counts, and from one kept state to the next."""
PATIENCE = 10
"""Updates for which the level must have been above its least."""
LOST = 0.25
"""Of the first level, by which the level must have risen."""
ERRORS = 8.0
"""Standard errors of the level, by which it must have risen."""
MEMORY = 500
"""Updates after which a least level is as good as forgotten."""
SLOWER = 10.0
"""What the meta rate is divided by."""
ALARMS = 3
"""After so many nothing is undone any more: then it is not the loss."""


class Stateful(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


class TurningGuard:
    r"""Goes back to an earlier state of loss and training where the task loss rises for long.

    The level is an exponential moving average of the task loss on validation batches,
    :math:`\bar L_t = 0.9\,\bar L_{t-1} + 0.1\,L_t`, corrected for its start. Its least is forgotten slowly: it moves to
    the level by a five-hundredth an update. Where the level has been above it for ten updates, and by more than a
    quarter of what it first was and eight of its standard errors, the loss, the meta-optimizer's state and the others
    go back to those of the least level, and the meta rate to a tenth. The variance of the task loss is half the mean
    square of the differences of neighbours, in which a trend hardly counts.

    Args:
        phi: the parameters of the loss.
        optimizer: of the model; its state goes back, its options are their owner's.
        others: what else goes back, such as the model.
    """

    def __init__(self, phi: list[Tensor], optimizer: Optimizer, others: Sequence[Stateful]) -> None:
        self.phi, self.optimizer, self.others = phi, optimizer, list(others)
        self.updates = self.rising = self.alarms = 0
        self.sum = self.squares = 0.0
        self.last: float | None = None
        self.first: float | None = None
        self.least = math.inf
        self.kept: tuple[LossSnapshot, list[Any]] | None = None
        self.kept_at = 0

    def turned(self, task_loss: float, meta: Optimizer) -> str | None:
        """To be called before each update, with the task loss after the step; what has happened, or ``None``."""
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
                self._keep(meta)
            return None
        self.rising += 1
        self.least += (level - self.least) / MEMORY
        # Of a moving average with factor a, the variance is (1 - a) / (1 + a) of that of its terms.
        variance = self.squares / (1 - SLOWLY**self.updates)
        error = math.sqrt(variance * (1 - SMOOTHING) / (1 + SMOOTHING))
        risen = level - self.least
        if self.rising < PATIENCE or risen <= max(LOST * abs(self.first), ERRORS * error):
            return None
        if self.alarms >= ALARMS:
            return None
        last = "; it is not watched any longer" if self.alarms + 1 == ALARMS else ""
        return (
            f"the task loss has risen from {self.least:.3g} to {level:.3g}: the learned loss and the model are again "
            f"those of {self.updates - self.kept_at} meta-updates ago, and the meta rate is a tenth{last}"
        )

    def undo(self, meta: Optimizer) -> None:
        """Goes back, where something has turned."""
        assert self.kept is not None
        loss, others = self.kept
        loss.bring_back(self.phi, meta)
        for group in meta.param_groups:
            group["lr"] = group["lr"] / SLOWER
        state, *others = others
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": deepcopy(state)})
        for one, kept in zip(self.others, others, strict=True):
            one.load_state_dict(deepcopy(kept))
        self.alarms += 1
        self.rising, self.last = 0, None
        self.sum = self.least * (1 - SMOOTHING**self.updates)

    def _keep(self, meta: Optimizer) -> None:
        others = [self.optimizer.state_dict()["state"], *(one.state_dict() for one in self.others)]
        self.kept, self.kept_at = (LossSnapshot.of(self.phi, meta), deepcopy(others)), self.updates

    def state(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("phi", "optimizer", "others", "kept")}
        if self.kept is None:
            return {**own, "kept": None}
        loss, others = self.kept
        return {**own, "kept": (loss.values, loss.state, others)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Takes what :meth:`state` gave; ``None`` starts anew."""
        if state is None:
            state = TurningGuard(self.phi, self.optimizer, self.others).state()
        for name, value in state.items():
            setattr(self, name, value)
        if state["kept"] is not None:
            values, own, others = state["kept"]
            self.kept = LossSnapshot(values, own), others
