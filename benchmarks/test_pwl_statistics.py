"""Statistics of the piecewise-linear features: what a step of TuneLoss asks of a model's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import pwl_statistics

SIZES = {
    "cpu": [(10**4, 50, 2), (10**6, 50, 2)],
    "cuda": [(10**6, 50, 2), (10**8, 50, 2)],
    "dry": [(100, 50, 2), (300, 50, 2)],
}
COMPILED_FIRST = [{"size": (10**6, 50, 2)}]


def dense(theta: Tensor, gradients: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Jacobian [P, 2X] and its products, in float32."""
    distance = theta[:, None] - knots
    features = torch.cat([distance.clamp(min=0).sum(0), (-distance).clamp(min=0).sum(0)])
    jacobian = torch.cat([(distance > 0).float(), -(distance < 0).float()], 1)
    return features, jacobian.T @ jacobian, jacobian.T @ gradients.T


def bucketize(theta: Tensor, gradients: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
    """Counts and sums per interval, in float32, which is faster; without the small assembly that follows."""
    interval = torch.bucketize(theta, knots)
    size = len(knots) + 1
    counts = torch.bincount(interval, minlength=size)
    sums = theta.new_zeros(size).index_add_(0, interval, theta)
    return counts, sums, gradients.new_zeros(len(gradients), size).index_add_(1, interval, gradients)


@pytest.mark.parametrize("candidate", ["dense", "compile", "bucketize", "lossmeta"])
@pytest.mark.by_device("size", SIZES)
def test_statistics(size: tuple[int, int, int], candidate: str, device: Any, measure: Any) -> None:
    parameters, knots, count = size
    candidates = {
        "dense": dense,
        "compile": device.compile(dense, fullgraph=True),
        "bucketize": bucketize,
        "lossmeta": pwl_statistics,
    }
    # Parameters and gradients are read once.
    measure(
        candidates[candidate],
        lambda: (torch.randn(parameters), torch.randn(count, parameters), torch.linspace(-2, 2, knots)),
        operator="pwl_statistics",
        size=f"{parameters} parameters, {knots} knots, {count} gradients",
        candidate=candidate,
        bytes_moved=4 * (1 + count) * parameters,
        no_graph="bincount waits for the GPU" if candidate == "bucketize" else None,
    )
