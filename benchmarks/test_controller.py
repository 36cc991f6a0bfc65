"""The paper's controller: one window of training with it and without, and what it does at a window's end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from lossmeta.ala import ClassCorrelation, Controller
from lossmeta.metrics import ErrorRate
from lossmeta.models import wide_resnet

WINDOW, CLASSES, SAMPLES = 200, 10, 32


def images(count: int, side: int) -> Any:
    return torch.randn(count, 3, side, side), torch.randint(CLASSES, (count,))


def plain(model: nn.Module, train: Any, valid: Any) -> Callable[[], None]:
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)

    def window() -> None:
        for _ in range(WINDOW):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()

    return window


def controlled(model: nn.Module, train: Any, valid: Any) -> Callable[[], None]:
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    controller = Controller(ClassCorrelation(CLASSES), ErrorRate(), valid, steps=64_000)

    def window() -> None:
        for _ in range(WINDOW):
            optimizer.zero_grad()
            controller(model(train[0]), train[1]).backward()
            optimizer.step()
            controller.step(model)

    return window


CANDIDATES: dict[str, Callable[..., Callable[[], None]]] = {"plain steps": plain, "lossmeta": controlled}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("side", {"cpu": [32], "smoke": [8], "cuda": [32], "dry": [8]})
@pytest.mark.filterwarnings("ignore:Controller. the metric has not changed")
def test_window(candidate: str, side: int, device: Any, measure: Any) -> None:
    def make() -> Callable[[], None]:
        torch.manual_seed(0)
        return CANDIDATES[candidate](wide_resnet(10, 1, CLASSES), images(SAMPLES, side), images(256, side))

    measure(
        lambda window: window(),
        lambda: (make(),),
        operator="window of ALA's controller",
        size=f"wide ResNet 10-1, {WINDOW} batches of {SAMPLES}, 256 for validation",
        candidate=candidate,
        bytes_moved=WINDOW * 4 * sum(p.numel() for p in wide_resnet(10, 1, CLASSES).parameters()) * 5,
        no_graph="the host looks at the metric" if candidate == "lossmeta" else None,
        peak_bytes=device.peak_memory(make),
    )


@pytest.mark.by_device("classes", {"cpu": [10, 1000], "smoke": [10], "cuda": [10, 1000], "dry": [3]})
@pytest.mark.filterwarnings("ignore:Controller. the metric has not changed")
def test_step(classes: int, device: Any, measure: Any) -> None:
    """A step that is the end of a window: statistics, reward, an update of the policy, and actions."""

    def make() -> Callable[[], None]:
        torch.manual_seed(0)
        model = nn.Linear(8, classes)
        valid = torch.randn(2000, 8), torch.randint(classes, (2000,))
        controller = Controller(
            ClassCorrelation(classes), ErrorRate(), valid, steps=10_000, window=1, evaluations=1, record=False
        )
        for _ in range(40):  # until there is as much to remember as an update takes
            controller.step(model)

        def step() -> None:
            controller.step(model)

        return step

    pairs = classes * (classes + 1) // 2
    measure(
        lambda step: step(),
        lambda: (make(),),
        operator="step of ALA's controller",
        size=f"{classes} classes, {pairs} pairs, 2000 for validation",
        candidate="lossmeta",
        bytes_moved=pairs * 4 * (24 + 2),  # what the policy sees, and the statistics
        no_graph="the host looks at the metric",
        peak_bytes=device.peak_memory(make),
    )
