"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._checks import check_fraction


class AveragedWeights:
    r"""An exponential moving average of a model's weights and buffers over the steps of its training.

    .. math:: \bar\theta_t = d_t\,\bar\theta_{t-1} + (1 - d_t)\,\theta_t, \qquad
              d_t = \min\Bigl(d, \frac{t + 1}{t + 10}\Bigr)

    with steps counted from 0, so that it follows closely at first. BatchNorm's running statistics are averaged as the
    weights are; what is no floating-point number, such as a count of batches, is copied.

    Args:
        model: that is trained; not wrapped in ``DistributedDataParallel``.
        decay: :math:`d`, in [0, 1].

    Attributes:
        model: a copy with the averages, in evaluation mode, for predictions at any time.
        steps: averaged so far.

    Raises:
        TypeError: for a model that cannot be copied.
        ValueError: for a decay outside [0, 1].

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> averaged = lossmeta.adalfl.AveragedWeights(model)
        >>> averaged.update()  # after every optimizer.step()
        >>> averaged.model(torch.randn(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        check_fraction("AveragedWeights", "decay", decay)
        self.decay, self.steps, self._trained = decay, 0, model
        try:
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
        except Exception as error:
            raise TypeError(
                f"AveragedWeights: the model must be one that copy.deepcopy copies, got {type(model).__name__}: {error}"
            ) from error

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's weights of now into the average."""
        decay = min(self.decay, (self.steps + 1) / (self.steps + 10))
        pairs = _pairs(self.model, self._trained)
        averaged = [(a, b) for a, b in pairs if a.is_floating_point()]
        if averaged:
            torch._foreach_lerp_([a for a, _ in averaged], [b for _, b in averaged], 1 - decay)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)
        self.steps += 1

    @torch.no_grad()
    def give(self) -> None:
        """Gives the trained model the averages."""
        for a, b in _pairs(self.model, self._trained):
            b.copy_(a)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [
        *zip(a.parameters(), b.parameters(), strict=True),
        *zip(a.buffers(), b.buffers(), strict=True),
    ]
