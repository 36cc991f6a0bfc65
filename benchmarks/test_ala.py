"""One window of ALA's population, 20 training steps and the judging of the children, against as many plain steps, and
against training copies of the model one after the other as a user would write it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from lossmeta.ala import LogitAdjustment, Population, Robust
from lossmeta.metrics import WorstClassRecall

RATE, WINDOW, CLASSES, VALIDATION = 0.01, 20, 10, 300


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def plain(model: nn.Module, train: Any, valid: Any) -> Callable[[], None]:
    optimizer = SGD(model.parameters(), RATE, momentum=0.9)

    def window() -> None:
        for _ in range(WINDOW):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()

    return window


def copies(model: nn.Module, train: Any, valid: Any) -> Callable[[], None]:
    """Eight, without judging them."""
    windows = [plain(copy.deepcopy(model), train, valid) for _ in range(8)]

    def window() -> None:
        for each in windows:
            each()

    return window


def population(children: int, head: str | None = None) -> Callable[..., Callable[[], None]]:
    def make(model: nn.Module, train: Any, valid: Any) -> Callable[[], None]:
        space = LogitAdjustment(torch.ones(CLASSES)) * Robust()
        optimizer = SGD(model.parameters(), RATE, momentum=0.9)
        found = Population(
            model, optimizer, space, WorstClassRecall(CLASSES), valid, children=children, head=head
        )

        def window() -> None:
            for _ in range(WINDOW):
                found.step(train)

        return window

    return make


CANDIDATES: dict[str, Callable[..., Callable[[], None]]] = {
    "plain steps": plain,
    "8 copies in turn": copies,
    "lossmeta": population(8),
    "lossmeta 4 children": population(4),
    "lossmeta 1 child": population(1),
    "lossmeta 8 heads": population(8, head="2"),
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("samples", {"cpu": [64], "cuda": [64], "dry": [8]})
@pytest.mark.filterwarnings("ignore:Population. all children had the same fitness")
def test_window(candidate: str, samples: int, device: Any, measure: Any) -> None:
    def make() -> Callable[[], None]:
        torch.manual_seed(0)
        train, valid = ((torch.randn(n, 196), torch.randint(CLASSES, (n,))) for n in (samples, VALIDATION))
        return CANDIDATES[candidate](mlp(), train, valid)

    # A plain run reads the weights twice a step, and writes their gradients and the step.
    moved = WINDOW * 4 * sum(p.numel() for p in mlp().parameters()) * 5
    measure(
        lambda window: window(),
        lambda: (make(),),
        operator="window of ALA's population",
        size="196-64-10, batch 64",
        candidate=candidate,
        bytes_moved=moved,
        no_graph="the host looks at the fitness" if candidate.startswith("lossmeta") else None,
        peak_bytes=device.peak_memory(make),
    )
