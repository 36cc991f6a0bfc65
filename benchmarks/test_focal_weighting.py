"""Forward + backward of the focal weighting with fixed Phi: what a training step pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import focal_weighting

# Embeddings, their dimensions, classes.
SIZES = {"cpu": [(256, 128, 32)], "cuda": [(1000, 128, 32)], "dry": [(8, 4, 2)]}


def log_sum(s: Tensor, pairs: Tensor) -> Tensor:
    """log(1 + sum of e^s over the pairs), safe from overflow."""
    masked = s.masked_fill(~pairs, -torch.inf)
    return torch.logsumexp(torch.cat([s.new_zeros(len(s), 1), masked], 1), 1)


def loss(d: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return (log_sum(phi[0] * (d - 1), positive) / phi[0] + log_sum(-phi[1] * (d - 1), ~same) / phi[1]).mean()


def differences(x: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    return loss((x[:, None] - x).norm(dim=2), labels, phi)


def cdist(x: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    return loss(torch.cdist(x, x), labels, phi)


@pytest.mark.parametrize("candidate", ["differences", "compile", "cdist", "compile of cdist", "lossmeta"])
@pytest.mark.by_device("size", SIZES)
def test_forward_backward(size: tuple[int, int, int], candidate: str, device: Any, measure: Any) -> None:
    count, dims, classes = size
    candidates = {
        "differences": differences,
        "compile": device.compile(differences),
        "cdist": cdist,
        "compile of cdist": device.compile(cdist),
        "lossmeta": focal_weighting,
    }
    function = candidates[candidate]

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.nn.functional.normalize(torch.randn(count, dims)).requires_grad_()
        return x, torch.arange(count) * classes // count, torch.ones(2)

    def step(x: Tensor, labels: Tensor, phi: Tensor) -> None:
        x.grad = None
        function(x, labels, phi).backward()

    measure(
        step,
        make,
        operator="focal_weighting",
        size=f"{count}×{dims}, {classes} classes, forward + backward",
        candidate=candidate,
        # The embeddings are read twice, their gradient is written once.
        bytes_moved=4 * 3 * count * dims,
    )
