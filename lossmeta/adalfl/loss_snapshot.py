"""A learned loss and its meta-optimizer, as they were."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass
class LossSnapshot:
    """What an undone meta-update goes back to.

    Attributes:
        values: of the loss's parameters.
        state: of the meta-optimizer, without its groups: their rates are their owner's.
    """

    values: list[Tensor]
    state: dict[Any, Any]

    @classmethod
    @torch.no_grad()
    def of(cls, phi: list[Tensor], meta: Optimizer) -> LossSnapshot:
        state = meta.state_dict()["state"]
        copies = {
            i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in state.items()
        }
        return cls([p.clone() for p in phi], copies)

    @torch.no_grad()
    def bring_back(self, phi: list[Tensor], meta: Optimizer) -> None:
        torch._foreach_copy_(phi, self.values)
        # Copied: the optimizer keeps the tensors that it is given.
        meta.load_state_dict({**meta.state_dict(), "state": deepcopy(self.state)})
