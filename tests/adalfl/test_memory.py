"""Peak memory of an online step over that of a plain training step, by the allocator's events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak_memory import peak_memory
from torch import nn
from torch.optim import SGD

from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 10))


def peak(model: Callable[[], nn.Module], backend: str | None) -> int:
    def make() -> Callable[[], Any]:
        network = model()
        train, valid = ((torch.randn(128, 3, 16, 16), torch.randint(10, (128,))) for _ in range(2))
        optimizer = SGD(network.parameters(), 0.01)
        if backend is None:

            def step() -> None:
                optimizer.zero_grad()
                F.cross_entropy(network(train[0]), train[1]).backward()
                optimizer.step()

            return step
        learner = OnlineLearner(network, optimizer, LossNetwork(), F.cross_entropy, backend=backend)
        return lambda: learner.step(train, valid)

    return peak_memory(make)


@pytest.mark.parametrize("backend", ["jvp", "finite_difference"])
def test_activations_are_not_kept_twice(backend: str) -> None:
    assert peak(cnn, backend) <= 1.3 * peak(cnn, None)


@pytest.mark.parametrize(("backend", "copies"), [("jvp", 3), ("finite_difference", 2)])
def test_parameters_are_copied_twice(backend: str, copies: int) -> None:
    # Those before the step, and the gradient of the task loss; jvp also makes a temporary of a layer's tangent.
    size = sum(4 * p.numel() for p in mlp().parameters())
    batch = 4 * 128 * 768
    assert peak(mlp, backend) <= peak(mlp, None) + batch + copies * size + 0.21e6
