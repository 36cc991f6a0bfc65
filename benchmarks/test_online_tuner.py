"""One epoch with a regulariser that is learned online, and with fixed ones, against an epoch without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adagrad

from lossmeta.tuneloss import OnlineTuner

STEPS = 50
Epoch = Callable[[], None]
Data = tuple[torch.Tensor, torch.Tensor]


def epoch(
    model: nn.Module, data: Data, batch: int, penalty: Callable[[], Any], after: Callable[[], object]
) -> Epoch:
    optimizer = Adagrad(model.parameters(), 0.01)
    batches = list(zip(*(x.split(batch) for x in data), strict=True))

    def run() -> None:
        for inputs, labels in batches:
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) + penalty()).backward()
            optimizer.step()
            after()

    return run


def plain(model: nn.Linear, train: Data, valid: Data, batch: int) -> Epoch:
    return epoch(model, train, batch, lambda: 0.0, lambda: None)


def elastic_net(model: nn.Linear, train: Data, valid: Data, batch: int) -> Epoch:
    def penalty() -> torch.Tensor:
        return 1e-4 * model.weight.abs().sum() + 1e-4 * model.weight.square().sum()

    return epoch(model, train, batch, penalty, lambda: None)


def tuned(model: nn.Linear, train: Data, valid: Data, batch: int, rounds: bool = True) -> Epoch:
    tuner = OnlineTuner(model, train, valid, every=STEPS, start="now")
    run = epoch(model, train, batch, tuner.penalty, tuner.step)
    run()
    assert tuner.on
    return run if rounds else epoch(model, train, batch, tuner.penalty, lambda: None)


def added(model: nn.Linear, train: Data, valid: Data, batch: int) -> Epoch:
    tuner = OnlineTuner(model, train, valid, every=STEPS, start="now")
    optimizer = Adagrad(model.parameters(), 0.01)
    batches = list(zip(*(x.split(batch) for x in train), strict=True))

    def run() -> None:
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            tuner.add_gradient()
            optimizer.step()
            tuner.step()

    run()
    assert tuner.on
    return run


CANDIDATES: dict[str, Callable[..., Epoch]] = {
    "plain": plain,
    "l1 and l2": elastic_net,
    "lossmeta": tuned,
    "lossmeta, add_gradient": added,
    "lossmeta, between rounds": lambda *a: tuned(*a, rounds=False),
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("batch", {"cpu": [1, 32, 128], "cuda": [32, 128], "dry": [32]})
@pytest.mark.by_device("features", {"cpu": [2048], "cuda": [2048], "dry": [16]})
def test_epoch(candidate: str, batch: int, features: int, device: Any, measure: Any) -> None:
    classes, samples = 100, STEPS * batch

    def make() -> Epoch:
        torch.manual_seed(0)
        model = nn.Linear(features, classes)
        train, valid = (
            (torch.randn(n, features), torch.randint(classes, (n,))) for n in (samples, samples // 4 + 1)
        )
        return CANDIDATES[candidate](model, train, valid, batch)

    measure(
        lambda run: run(),
        lambda: (make(),),
        operator="epoch of the online tuner",
        size=f"{features}×{classes} weights, {STEPS} batches of {batch}, a quarter for validation",
        candidate=candidate,
        bytes_moved=STEPS * 4 * features * classes * 6,  # weights, gradient and state, read and written
        no_graph=None if candidate in ("plain", "l1 and l2") else "the host looks at the losses",
        peak_bytes=device.peak_memory(make),
    )
