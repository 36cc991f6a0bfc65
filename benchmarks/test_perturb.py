"""Points of a loss surface, written into a buffer that is used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import perturb

SIZES = [(16, 2, 10**4), (16, 2, 10**6)]


def eager(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor) -> Tensor:
    return torch.addmm(base, coefficients, directions, out=out)


def fused(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor) -> Tensor:
    return out.copy_(base + (coefficients[:, :, None] * directions).sum(1))


def candidates() -> dict[str, Callable[..., Tensor]]:
    return {"eager": eager, "compile": torch.compile(fused, fullgraph=True), "lossmeta": perturb}


@pytest.mark.parametrize("candidate", ["eager", "compile", "lossmeta"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_perturb(size: tuple[int, int, int], candidate: str, measure: Any) -> None:
    points, count, parameters = size
    torch.manual_seed(0)
    base, directions = torch.randn(parameters), torch.randn(count, parameters)
    coefficients, out = torch.randn(points, count), torch.empty(points, parameters)
    function = candidates()[candidate]
    # Base and directions are read once, the points written once.
    measure(
        lambda: function(base, directions, coefficients, out=out),
        operator="perturb",
        size=f"{points} points, {count} directions, {parameters} parameters",
        candidate=candidate,
        bytes_moved=4 * (1 + count + points) * parameters,
    )
