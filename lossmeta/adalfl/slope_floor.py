"""What keeps a learned loss from stopping the training early."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SlopeFloor:
    """Undoes the updates of a loss under which its slope ratio fell too low.

    Loss and meta-optimizer go back to those with which the ratio was last large enough. A loss whose ratio never was is
    left alone.

    Args:
        phi: the parameters of the loss.

    Attributes:
        accepted: the last parameters and state with which the ratio was large enough, or ``None``.
    """

    def __init__(self, phi: list[Tensor]) -> None:
        self.phi = phi
        self.accepted: tuple[list[Tensor], dict[Any, Any]] | None = None

    @torch.no_grad()
    def undo_if_below(self, bound: float, slope_ratio: Tensor, meta: Optimizer) -> str | None:
        """What was undone, or ``None``."""
        if slope_ratio >= bound:
            self.accepted = [p.clone() for p in self.phi], deepcopy(meta.state_dict()["state"])
        if self.accepted is None or not slope_ratio < bound:
            return None
        values, state = self.accepted
        torch._foreach_copy_(self.phi, values)
        # Copied: the optimizer keeps the tensors that it is given.
        meta.load_state_dict({**meta.state_dict(), "state": deepcopy(state)})
        return f"the slope fell to {slope_ratio:.3g} of the task loss's; the last update is undone"
