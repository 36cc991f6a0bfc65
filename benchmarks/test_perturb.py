"""Points of a loss surface, written into a buffer that is used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import perturb

SIZES = {
    "cpu": [(16, 2, 10**4), (16, 2, 10**6)],
    "cuda": [(16, 2, 10**8), (16, 2, 10**6)],
    "dry": [(16, 2, 300), (16, 2, 3)],
}


def eager(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor) -> Tensor:
    return torch.addmm(base, coefficients, directions, out=out)


def fused(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor) -> Tensor:
    return out.copy_(base + (coefficients[:, :, None] * directions).sum(1))


@pytest.mark.parametrize("candidate", ["eager", "compile", "lossmeta"])
@pytest.mark.by_device("size", SIZES)
def test_perturb(size: tuple[int, int, int], candidate: str, device: Any, measure: Any) -> None:
    points, count, parameters = size
    candidates = {"eager": eager, "compile": device.compile(fused, fullgraph=True), "lossmeta": perturb}

    def make() -> tuple[Tensor, ...]:
        base, directions = torch.randn(parameters), torch.randn(count, parameters)
        return base, directions, torch.randn(points, count), torch.empty(points, parameters)

    # Base and directions are read once, the points written once.
    measure(
        candidates[candidate],
        make,
        operator="perturb",
        size=f"{points} points, {count} directions, {parameters} parameters",
        candidate=candidate,
        bytes_moved=4 * (1 + count + points) * parameters,
    )
