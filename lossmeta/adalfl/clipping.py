"""Clipping of gradients, and its derivative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta._checks import check_positive


@dataclass
class Clipped:
    """What one clipping did, for its derivative.

    Attributes:
        inside: which elements the bound on values left as they were; ``None`` without that bound.
        scale: the factor of all gradients, []; ``None`` without a bound on the norm.
        norm: of all gradients before it, [].
        direction: the gradients before it, divided by that norm.
    """

    inside: list[Tensor] | None = None
    scale: Tensor | None = None
    norm: Tensor | None = None
    direction: list[Tensor] | None = None

    def transposed(self, w: list[Tensor]) -> list[Tensor]:
        """The transposed derivative of the clipping, times w."""
        if self.scale is not None and self.norm is not None and self.direction is not None:
            # clip / (n + e) g: its derivative is s (I - g g' / (n (n + e))), where it clips.
            along = sum((d * x).sum() for d, x in zip(self.direction, w, strict=True))
            clipped = self.scale < 1
            back = along * (self.norm + 1e-6) / self.norm.where(self.norm > 0, 1)
            w = [
                self.scale * (x - (back * d).where(clipped, 0))
                for x, d in zip(w, self.direction, strict=True)
            ]
        if self.inside is not None:
            w = [x * inside for x, inside in zip(w, self.inside, strict=True)]
        return w


class Clipping:
    """Bounds the elements of the gradients, then the norm of all together.

    Args:
        norm: largest norm, or ``None``; as :func:`torch.nn.utils.clip_grad_norm_`.
        value: largest absolute value of an element, or ``None``.
    """

    def __init__(self, norm: float | None, value: float | None) -> None:
        for name, bound in (("clip_norm", norm), ("clip_value", value)):
            if bound is not None:
                check_positive("AdaLFL", name, bound)
        self.norm, self.value = norm, value

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor]) -> Clipped:
        """Clips in place."""
        inside = None
        if self.value is not None:
            inside = [g.abs() <= self.value for g in gradients]
            torch._foreach_clamp_min_(gradients, -self.value)
            torch._foreach_clamp_max_(gradients, self.value)
        if self.norm is None:
            return Clipped(inside)
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        scale = (self.norm / (norm + 1e-6)).clamp(max=1.0)
        direction = [g / (norm + 1e-6) for g in gradients]
        torch._foreach_mul_(gradients, scale)
        return Clipped(inside, scale, norm, direction)
