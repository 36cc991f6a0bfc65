"""The back-end that needs nothing of the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta.adalfl.backends import Backend, TrainingPass, Vectors, holding
from lossmeta.adalfl.learned_loss import LearnedLoss
from lossmeta.adalfl.trained_model import TrainedModel


class FiniteDifference(Backend):
    """The difference of two predictions, a short way along w apart.

    It needs nothing of the model, compiled ones included. It costs one forward pass without a graph. A model without
    kinks gets two, for an error of second order, and under autocast there is one more, in full precision. How far apart
    they are is decided in the steps that are checked, by what a longer way changes.

    Attributes:
        central: whether it takes two passes.
        factor: of the distance, against that of a model that bends over a distance as long as its weights.
    """

    name = "finite_difference"
    needs_size = True

    def __init__(self, model: TrainedModel, loss: LearnedLoss) -> None:
        super().__init__(model, loss)
        self.central = not has_kinks(model.plain)
        self.factor = 1.0

    def push_forward(
        self,
        trained: TrainingPass,
        inputs: Any,
        w: Vectors,
        before: Vectors,
        size: Any,
        kept: bool,
        look: bool,
    ) -> Tensor:
        # Of the output itself: after the loss float32 would have cancelled. Rounding, eps / e of the output, then
        # costs as much as curvature, e or for two passes e^2.
        model, start, along = self.model, [before[p] for p in w], list(w.values())
        half = model.dtype is not None  # then the prediction is rounded too coarsely for a difference
        eps = torch.finfo(start[0].dtype if half else trained.prediction.dtype).eps
        # Weights may all be 0, and so may w: u is then 0.
        unit = size / norm(along, 1e-30) * eps ** (1 / 3 if self.central else 1 / 2)

        def at(step: Any, *, last: bool = False) -> Tensor:
            points = _scaled(along, step, in_place=last and not kept)
            torch._foreach_add_(points, start)
            trained.start.bring_back()
            with holding(w, points):
                return model.predict_in_full_precision(inputs)

        middle = trained.prediction
        if half and (look or not self.central):
            middle = at(0.0)

        def difference(step: Any, *, last: bool = False) -> Tensor:
            if not self.central:
                return (at(step, last=last) - middle) / step
            behind = at(-step)
            return (at(step, last=last) - behind) / (2 * step)

        if not look:
            return difference(unit * self.factor, last=True)
        step = unit * self.factor
        u = difference(step)
        better = self._better_factor(u, difference(4 * step), float(step), eps * _norm(middle))
        if 0.5 < better / self.factor < 2:
            return u
        self.factor = better
        return difference(unit * better, last=True)

    def _better_factor(self, u: Tensor, longer: Tensor, step: float, rounding: float) -> float:
        """The factor with which rounding and curvature cost least together.

        Relative to u, rounding costs r / e, and curvature a e^k, k = 2 for two passes and 1 for one; at four times the
        distance u is then off by (4^k - 1) a e^k more.
        """
        k = 2 if self.central else 1
        size, change = _norm(u), _norm(longer.double() - u.double())
        if not (0 < size < math.inf and change < math.inf and rounding > 0):
            return self.factor
        rounded = 2 * rounding / (step * size)
        curved = max(change / size - 1.25 * rounded, 0.1 * rounded) / (4**k - 1)
        return min(max(self.factor * (rounded / (k * curved)) ** (1 / (k + 1)), 1 / 256), 16.0)

    def state(self) -> Any:
        return self.factor

    def load(self, state: Any) -> None:
        self.factor = state


# Piecewise linear, where a second pass of finite differences gains nothing.
_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def has_kinks(model: nn.Module) -> bool:
    return any(isinstance(m, _KINKED) for m in model.modules())


def norm(tensors: list[Tensor], least: float) -> Any:
    """Of all elements, but not below ``least``: a number, or on a GPU, where reading it would wait, a tensor."""
    norms = torch._foreach_norm(tensors)
    if norms[0].device.type != "cpu":
        return torch.stack(norms).norm().clamp(min=least)
    return max(math.hypot(*map(float, norms)), least)


def _scaled(tensors: list[Tensor], factor: Any, *, in_place: bool = False) -> list[Tensor]:
    if not in_place:
        return list(torch._foreach_mul(tensors, factor))
    torch._foreach_mul_(tensors, factor)
    return tensors


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
