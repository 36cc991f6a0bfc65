"""The sum of a piecewise-linear function over weights, and its slope, without an operator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmeta.ops._precision import accumulation_dtype


def pwl_penalty(theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    r""":math:`\sum_j r(\theta_j)` with r(0) = 0 and the slope ``slopes[i]`` between knots i - 1 and i.

    At a knot the slope is the mean of both sides. The sum is differentiable in ``theta``.

    Args:
        theta: [P].
        knots: [X], ascending.
        slopes: [X + 1].

    Returns:
        A number in the precision of ``theta``, float32 at least.
    """
    found: Tensor = _Penalty.apply(theta, knots, slopes)
    return found


@torch.no_grad()
def with_slope(
    theta: Tensor, knots: Tensor, slopes: Tensor, *, add_to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same without autograd, and its slope [P], which is added to a tensor where one is given."""
    dtype = accumulation_dtype(theta.dtype)
    x, knots, slopes = theta.to(dtype), knots.to(dtype), slopes.to(dtype)
    below, above = torch.searchsorted(knots, x), torch.searchsorted(knots, x, right=True)
    slope = (slopes[below] + slopes[above]) / 2
    # r(x) = offset + slope x in each interval; continuous, and 0 in the one that holds 0.
    rises = -(slopes.double().diff() * knots.double())
    offsets = torch.cat([rises.new_zeros(1), rises.cumsum(0)])
    offsets = offsets - offsets[torch.searchsorted(knots, knots.new_zeros(()))]
    value = (offsets[below] + slopes.double()[below] * x.double()).sum().to(dtype)
    if add_to is None:
        return value, slope
    return value, add_to.add_(slope.to(add_to.dtype))


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
        value, slope = with_slope(theta, knots, slopes)
        ctx.save_for_backward(slope)
        ctx.dtype = theta.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.dtype), None, None
