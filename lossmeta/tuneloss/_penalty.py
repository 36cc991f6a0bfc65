"""The sum of a piecewise-linear function over weights, and its gradient, without an operator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pwl_penalty(theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    r""":math:`\sum_j r(\theta_j)` with r(0) = 0 and the slope ``slopes[i]`` between knots i - 1 and i.

    At a knot the slope is the mean of both sides. The sum is differentiable in ``theta``.

    Args:
        theta: [P].
        knots: [X], strictly ascending.
        slopes: [X + 1].

    Returns:
        A number in the precision of ``theta``, float32 at least.
    """
    found: Tensor = _Penalty.apply(theta, knots, slopes)
    return found


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
        dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
        x, knots, slopes = theta.detach().to(dtype), knots.to(dtype), slopes.to(dtype)
        below = torch.searchsorted(knots, x)
        above = torch.searchsorted(knots, x, right=True)
        slope = (slopes[below] + slopes[above]) / 2
        ctx.save_for_backward(slope)
        ctx.dtype = theta.dtype
        # r(x) = offset + slope x in each interval; continuous, and 0 in the one that holds 0.
        rises = -(slopes.double().diff() * knots.double())
        offsets = torch.cat([rises.new_zeros(1), rises.cumsum(0)])
        offsets = offsets - offsets[torch.searchsorted(knots, knots.new_zeros(()))]
        values = offsets[below] + slopes.double()[below] * x.double()
        return values.sum().to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.dtype), None, None
