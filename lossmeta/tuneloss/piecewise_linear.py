"""A convex, piecewise-linear function of one weight: what is learned online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossmeta.ops import pwl_penalty
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.tuneloss import _plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PiecewiseLinear:
    r"""The function r with r(0) = 0 whose slope is ``slopes[i]`` between knots i - 1 and i.

    At a knot the slope is the mean of both sides. Ascending slopes make it convex.

    Attributes:
        knots: [X], strictly ascending, float64 on the CPU. There may be none: r is then a line.
        slopes: [X + 1], float64 on the CPU.

    Raises:
        TypeError: for something that is no tensor.
        ValueError: for knots or slopes of another shape, that are not finite, or not ascending.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), Eq. 4.

    Example:
        >>> r = lossmeta.tuneloss.PiecewiseLinear(torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.5, 2.0]))
        >>> r.value(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([2.0000, 0.0000, 4.5000], dtype=torch.float64)
        >>> r.slope(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([-1.0000, -0.2500,  2.0000], dtype=torch.float64)
    """

    knots: Tensor
    slopes: Tensor

    def __post_init__(self) -> None:
        for name in ("knots", "slopes"):
            given = getattr(self, name)
            if not isinstance(given, Tensor):
                raise TypeError(f"PiecewiseLinear: {name} must be a tensor, got {type(given).__name__}")
            object.__setattr__(self, name, given.detach().to("cpu", torch.float64, copy=True))
        if self.knots.dim() != 1 or self.slopes.shape != (len(self.knots) + 1,):
            raise ValueError(
                f"PiecewiseLinear: knots must be [X] and slopes [X + 1], got {list(self.knots.shape)} and "
                f"{list(self.slopes.shape)}"
            )
        if not (self.knots.isfinite().all() and self.slopes.isfinite().all()):
            raise ValueError("PiecewiseLinear: knots and slopes must be finite, got NaN or infinity")
        if not (self.knots.diff() > 0).all() or not (self.slopes.diff() >= 0).all():
            raise ValueError("PiecewiseLinear: knots and slopes must ascend, got others")

    def value(self, weights: Tensor) -> Tensor:
        """r at each weight; of their shape, float64."""
        anchors = torch.cat([self.knots[:1], self.knots]) if len(self.knots) else self.knots.new_zeros(1)
        heights = torch.cat(
            [self.knots.new_zeros(min(2, len(anchors))), (self.slopes[1:-1] * self.knots.diff()).cumsum(0)]
        )

        def relative(x: Tensor) -> Tensor:
            at = torch.searchsorted(self.knots, x)
            return heights[at] + self.slopes[at] * (x - anchors[at])

        zero = self.knots.new_zeros(())
        return relative(weights.detach().to("cpu", torch.float64)) - relative(zero)

    def slope(self, weights: Tensor) -> Tensor:
        """r' at each weight; of their shape, float64."""
        x = weights.detach().to("cpu", torch.float64)
        below, above = (torch.searchsorted(self.knots, x, right=right) for right in (False, True))
        return (self.slopes[below] + self.slopes[above]) / 2

    def penalty(self, weights: Tensor) -> Tensor:
        """The sum of r over the weights, differentiable in them.

        Args:
            weights: of any shape; float32, float64, bfloat16 or float16.

        Returns:
            A number in the precision of the weights, float32 at least, and on their device.
        """
        knots, slopes = self.placed(weights.device, weights.dtype)
        return pwl_penalty(weights.reshape(-1), knots, slopes)

    def placed(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Knots and slopes as :func:`~lossmeta.ops.pwl_penalty` wants them for weights of that kind.

        Knots that rounding has made equal are one; the slopes between them are left out.
        """
        knots = self.knots.to(accumulation_dtype(dtype))
        last = torch.ones(len(knots), dtype=torch.bool, device="cpu")
        last[:-1] = knots.diff() > 0
        kept = torch.cat([torch.ones(1, dtype=torch.bool, device="cpu"), last])
        return knots[last].to(device), self.slopes[kept].to(device, knots.dtype)

    def plot(self, lowest: float, highest: float) -> Figure:
        """Draws r and its slope between two weights.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: for ends that do not ascend.

        Example:
            >>> r = lossmeta.tuneloss.PiecewiseLinear(torch.tensor([0.0]), torch.tensor([-1.0, 1.0]))
            >>> r.plot(-2.0, 2.0).savefig("regularizer.png")
        """
        span = _plot.checked_span("PiecewiseLinear", lowest, highest)
        return _plot.draw("PiecewiseLinear", {"r": [self]}, {"r": span}, [0])
