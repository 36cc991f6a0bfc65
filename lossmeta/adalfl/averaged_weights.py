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
    weights are; what is no floating-point number, such as a count of batches, is copied. Averages of half-precision
    weights are kept in float32.

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
        pairs = self._pairs()
        half = (torch.float16, torch.bfloat16)
        self._exact: dict[str, Tensor] = {
            name: a.detach().float() for name, (a, _) in pairs.items() if a.dtype in half
        }

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the copy and of the model, by name; looked up anew, for a model may replace its tensors.

        Raises:
            ValueError: for a model whose parameters and buffers are others than those of the copy.
        """
        both = [
            {**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (self.model, self._trained)
        ]
        own, trained = both
        others = [
            n
            for n in {**own, **trained}
            if n not in own or n not in trained or own[n].shape != trained[n].shape
        ]
        if others:
            raise ValueError(
                f"AveragedWeights: the model must keep its parameters and buffers and their shapes, got a change of "
                f"{others[:3]}; make a new average"
            )
        return {name: (a, trained[name]) for name, a in own.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's weights of now into the average.

        Raises:
            ValueError: for a model that has got or lost parameters or buffers.
        """
        share = 1 - min(self.decay, (self.steps + 1) / (self.steps + 10))
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        copied = []
        for name, (a, b) in self._pairs().items():
            if not (a.is_floating_point() or a.is_complex()):
                copied.append((a, b))
            elif name in self._exact:
                averages.append(self._exact[name])
                weights.append(b.float())
                copied.append((a, self._exact[name]))
            else:
                averages.append(a)
                weights.append(b)
        if averages:
            torch._foreach_lerp_(averages, weights, share)
        for a, b in copied:
            a.copy_(b)
        self.steps += 1

    @torch.no_grad()
    def give(self) -> None:
        """Gives the trained model the averages."""
        for a, b in self._pairs().values():
            b.copy_(a)

    @torch.no_grad()
    def take(self) -> None:
        """Begins anew from the trained model as it is."""
        for name, (a, b) in self._pairs().items():
            a.copy_(b)
            if name in self._exact:
                self._exact[name].copy_(b)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "exact": self._exact, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for name, value in state["exact"].items():
            self._exact[name].copy_(value)
        self.steps = state["steps"]
