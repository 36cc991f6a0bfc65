"""The learner's step as one CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE, DRY
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork

pytestmark = pytest.mark.cuda


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 1, 8, 8, device=DEVICE), torch.randint(3, (7,), device=DEVICE)


@pytest.mark.parametrize("backend", ["double_backward", "jvp", "finite_difference"])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_captured_steps_are_those_of_python(optimizer: Any, backend: str) -> None:
    def make(capture: bool) -> OnlineLearner:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)
        ).to(DEVICE)
        loss = LossNetwork(8).to(DEVICE)
        options = {"capturable": not DRY} if optimizer is Adam else {"momentum": 0.9}
        meta = Adam(loss.parameters(), 1e-2, capturable=not DRY)
        made = optimizer(model.parameters(), lr=0.01, **options)
        return OnlineLearner(
            model,
            made,
            loss,
            F.cross_entropy,
            meta_optimizer=meta,
            backend=backend,
            capture=capture and not DRY,
        )

    one, two = make(True), make(False)
    pairs = [[batch(), batch()] for _ in range(10)]
    pairs[6][1] = (torch.full_like(pairs[6][1][0], float("nan")), pairs[6][1][1])
    for i, pair in enumerate(pairs):
        if i == 8:  # the graph of the old rate must not be used
            for each in (one, two):
                each.optimizer.param_groups[0]["lr"] = 0.02
        reports = [each.step(*pair) for each in (one, two)]
        torch.testing.assert_close(reports[0].loss, reports[1].loss, rtol=1e-5, atol=1e-6)
    assert int(one.skipped) == two.skipped == 1
    for a, b in ((one._step.model.plain, two._step.model.plain), (one.loss, two.loss)):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    short = [(x[:5], y[:5]) for x, y in pairs[0]]
    assert one.step(*short).task_loss is not None


@pytest.mark.skipif(DRY, reason="a CPU captures nothing")
def test_capture_refuses_dropout() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).to(DEVICE)
    loss = LossNetwork(8).to(DEVICE)
    one = OnlineLearner(
        model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, backend="jvp", capture=True
    )
    with pytest.raises(ValueError, match="the model must draw no random numbers"):
        one.step(batch(), batch())
