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

        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        self._has_buffers = any(True for _ in model.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's weights of now into the average."""
        share = 1 - min(self.decay, (self.steps + 1) / (self.steps + 10))
        if self._averages:
            torch._foreach_lerp_(self._averages, self._weights, share)
        for a, b in self._buffers():
            if a.is_floating_point():
                a.lerp_(b, share)
            else:
                a.copy_(b)
        self.steps += 1

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Of the copy and of the model; looked up anew, for a model may replace them."""
        if not self._has_buffers:
            return []
        return list(zip(self.model.buffers(), self._trained.buffers(), strict=True))

    @torch.no_grad()
    def give(self) -> None:
        """Gives the trained model the averages."""
        for a, b in [*zip(self._averages, self._weights, strict=True), *self._buffers()]:
            b.copy_(a)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
