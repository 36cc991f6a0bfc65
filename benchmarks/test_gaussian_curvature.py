"""Gaussian curvature of a loss surface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import gaussian_curvature

SIZES = {"cpu": [256, 2048], "cuda": [8192, 2048], "dry": [20, 7]}


def eager(f: Tensor, dx: float, dy: float) -> Tensor:
    centre = f[1:-1, 1:-1]
    fx, fy = (f[2:, 1:-1] - f[:-2, 1:-1]) / (2 * dx), (f[1:-1, 2:] - f[1:-1, :-2]) / (2 * dy)
    fxx = (f[2:, 1:-1] - 2 * centre + f[:-2, 1:-1]) / dx**2
    fyy = (f[1:-1, 2:] - 2 * centre + f[1:-1, :-2]) / dy**2
    fxy = (f[2:, 2:] - f[2:, :-2] - f[:-2, 2:] + f[:-2, :-2]) / (4 * dx * dy)
    return (fxx * fyy - fxy**2) / (1 + fx**2 + fy**2) ** 2


@pytest.mark.parametrize("candidate", ["eager", "compile", "lossmeta"])
@pytest.mark.by_device("size", SIZES)
def test_curvature(size: int, candidate: str, device: Any, measure: Any) -> None:
    candidates = {
        "eager": eager,
        "compile": device.compile(eager, fullgraph=True),
        "lossmeta": gaussian_curvature,
    }
    # The surface is read once, the curvature written once.
    measure(
        candidates[candidate],
        lambda: (torch.randn(size, size), 0.1, 0.1),
        operator="gaussian_curvature",
        size=f"{size}×{size}",
        candidate=candidate,
        bytes_moved=4 * (size**2 + (size - 2) ** 2),
    )
