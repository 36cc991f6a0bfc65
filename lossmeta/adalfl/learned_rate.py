"""Learning rates that are learned by their own gradients (AdaLFL, Algorithms 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossmeta.adalfl.step_jacobian import StepJacobian


class LearnedRates:
    """The learning rates of an optimizer's groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def check_start(self, where: str) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if not float(group["lr"]) > 0:
                raise ValueError(
                    f"{where}: with a learning_rate every group of optimizer must have a positive lr to start "
                    f"from, got {float(group['lr'])} in group {i}"
                )

    def gradients(self, v: list[Tensor], jacobian: StepJacobian, before: list[Tensor]) -> list[Tensor]:
        """-<v, d step / d lr> per group: every step is proportional to its learning rate."""
        groups = self.optimizer.param_groups
        sums = [torch.zeros((), device=v[0].device, dtype=v[0].dtype) for _ in groups]
        index = {id(group): i for i, group in enumerate(groups)}
        for g, old, (parameter, group, *_) in zip(v, before, jacobian.stepped, strict=True):
            sums[index[id(group)]] -= (g * (old - parameter)).sum() / group["lr"]
        return sums

    def descend(self, gradients: list[Tensor], step_size: float) -> None:
        """A rate that is a tensor is filled in place."""
        rates = self.state_dict()["rates"]
        self.load_state_dict(
            {"rates": [descended(r, g, step_size) for r, g in zip(rates, gradients, strict=True)]}
        )

    def state_dict(self) -> dict[str, list[float]]:
        return {"rates": [float(group["lr"]) for group in self.optimizer.param_groups]}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def descended(rate: float, gradient: Tensor, step_size: float) -> float:
    """The rate after a step, to a thousandth of itself at most: a rate of 0 could not be left again."""
    return max(rate - step_size * gradient.item(), 1e-3 * rate)
