"""The population on the device: as on the CPU, and without waiting inside a window."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE, DRY
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.ala import LogitAdjustment, Population, Robust
from lossmeta.metrics import ErrorRate

pytestmark = pytest.mark.cuda


def judged(prediction: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(prediction, target)


def data(
    device: torch.device, seed: int, n: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=dtype)
    return x.to(device), ((x[:, 0] > 0).long() + (x[:, 1] > 0)).to(device)


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_as_on_the_cpu(optimizer: type[torch.optim.Optimizer]) -> None:
    # In float64 but for the values, and without a bias before BatchNorm, whose gradient is rounding alone: Adam makes
    # steps of it.
    dtype = torch.float64
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(
        dtype
    )
    found = []
    for device in (torch.device("cpu"), DEVICE):
        model = copy.deepcopy(start).to(device)
        space = LogitAdjustment(torch.tensor([5, 3, 1])) * Robust()
        population = Population(
            model,
            optimizer(model.parameters(), lr=0.02),  # type: ignore[call-arg]
            space,
            judged,
            data(device, 99, dtype=dtype),
            window=4,
            children=4,
        )
        reports = [population.step(data(device, i, dtype=dtype)) for i in range(8)]
        assert reports[-1].loss.device.type == device.type and population.in_turn is None
        found.append((population.values, [p.cpu() for p in model.parameters()]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(DRY, reason="a CPU is never waited for")
def test_the_host_does_not_wait_inside_a_window() -> None:
    model = nn.Linear(6, 3).to(DEVICE)
    population = Population(
        model, SGD(model.parameters(), 0.1), Robust(), ErrorRate(), data(DEVICE, 1), window=6, children=4
    )
    batch = data(DEVICE, 2)
    for _ in range(6):  # what is looked at once
        population.step(batch)
    population.step(batch)  # brings the values of its window
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            population.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
