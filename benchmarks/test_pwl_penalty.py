"""A piecewise-linear regulariser with its gradient, alone and in a training step of softmax regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.ops import pwl_penalty
from lossmeta.ops.pwl_penalty import with_slope

# Weights, knots.
SIZES = {
    "cpu": [(204_800, 2), (204_800, 20), (204_800, 200), (10**7, 200)],
    "cuda": [(204_800, 200), (10**8, 2), (10**8, 200)],
    "dry": [(100, 2), (300, 50)],
}
# Batch, features, classes, knots.
STEPS = {
    "cpu": [(32, 2048, 100, 2), (32, 2048, 100, 20), (32, 2048, 100, 200), (128, 2048, 100, 200)],
    "cuda": [(32, 2048, 100, 200), (1024, 2048, 100, 200)],
    "dry": [(4, 10, 3, 5)],
}
COMPILED_FIRST = [{"size": (204_800, 200)}, {"size": (10**8, 200)}]


def table(count: int) -> tuple[Tensor, Tensor]:
    """Knots at powers of two, the more the closer, and slopes that grow with them."""
    half = count // 2
    sizes = torch.logspace(-10, 0, half, base=2.0)
    return torch.cat([-sizes.flip(0), sizes]), torch.linspace(-1e-4, 1e-4, 2 * half + 1)


def by_search(theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    """The interval of each weight, and its line: autograd goes through the product alone."""
    interval = torch.bucketize(theta.detach(), knots)
    steps = (slopes[:-1] - slopes[1:]) * knots
    offsets = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    offsets = offsets - offsets.index_select(0, (knots < 0).sum()[None])
    return (slopes[interval] * theta + offsets[interval]).sum()


def by_hinges(theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    """A ramp for each knot, which a compiler fuses: no search, but as many operations for each weight as knots."""
    middle = slopes.index_select(0, (knots < 0).sum()[None])[0]
    distance = torch.where(knots >= 0, theta[:, None] - knots, knots - theta[:, None])
    return middle * theta.sum() + ((slopes[1:] - slopes[:-1]) * distance.relu()).sum()


def weights(count: int) -> Tensor:
    return 0.1 * torch.randn(count)


@pytest.mark.parametrize(
    "candidate",
    ["eager", "compile", "compile, ramps", "lossmeta", "lossmeta, without autograd", "lossmeta, added"],
)
@pytest.mark.by_device("size", SIZES)
def test_passes(size: tuple[int, int], candidate: str, device: Any, measure: Any) -> None:
    parameters, count = size
    if candidate == "compile, ramps" and parameters * count > 10**8:
        pytest.skip("each of its passes would take more than 10⁸ operations: seconds")

    def backward(penalty: Callable[..., Tensor]) -> Callable[..., Any]:
        def run(theta: Tensor, knots: Tensor, slopes: Tensor, gradient: Tensor) -> None:
            theta.grad = None
            penalty(theta, knots, slopes).backward()

        return run

    def added(theta: Tensor, knots: Tensor, slopes: Tensor, gradient: Tensor) -> None:
        with_slope(theta, knots, slopes, add_to=gradient)

    candidates = {
        "eager": backward(by_search),
        "compile": backward(device.compile(by_search)),
        "compile, ramps": backward(device.compile(by_hinges)),
        "lossmeta": backward(pwl_penalty),
        "lossmeta, without autograd": lambda theta, knots, slopes, _: with_slope(theta, knots, slopes),
        "lossmeta, added": added,
    }
    measure(
        candidates[candidate],
        lambda: (weights(parameters).requires_grad_(), *table(count), torch.zeros(parameters)),
        operator="pwl_penalty",
        size=f"{parameters} weights, {count} knots, value and gradient",
        candidate=candidate,
        bytes_moved=8 * parameters,
    )


@pytest.mark.parametrize("candidate", ["no penalty", "eager", "compile", "lossmeta", "lossmeta, added"])
@pytest.mark.by_device("size", STEPS)
def test_training_step(size: tuple[int, int, int, int], candidate: str, device: Any, measure: Any) -> None:
    """Forward and backward pass and a step of AdaGrad of softmax regression, whose weights alone are penalised."""
    batch, features, classes, count = size
    penalties = {"eager": by_search, "compile": device.compile(by_search), "lossmeta": pwl_penalty}

    def make() -> tuple[Any, ...]:
        model = torch.nn.Linear(features, classes)
        optimizer = torch.optim.Adagrad(model.parameters(), 0.01)
        x, y = torch.randn(batch, features), torch.randint(classes, (batch,))
        return model, optimizer, x, y, *table(count)

    def step(model: Any, optimizer: Any, x: Tensor, y: Tensor, knots: Tensor, slopes: Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if candidate in penalties:
            loss = loss + penalties[candidate](model.weight.flatten(), knots, slopes)
        loss.backward()
        if candidate == "lossmeta, added":
            with_slope(model.weight.flatten(), knots, slopes, add_to=model.weight.grad.view(-1))
        optimizer.step()

    measure(
        step,
        make,
        operator="pwl_penalty",
        size=f"{features}×{classes} weights, {count} knots, training step of {batch} samples",
        candidate=candidate,
        bytes_moved=4 * (2 * batch * features + 6 * features * classes),
        no_graph="the optimizer's state is of its own",
    )
