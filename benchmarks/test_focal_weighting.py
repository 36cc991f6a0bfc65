"""Forward + backward of the focal weighting with fixed Phi: what a training step pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import focal_weighting

COUNT, DIMS, CLASSES = 256, 128, 32


def log_sum(s: Tensor, pairs: Tensor) -> Tensor:
    """log(1 + sum of e^s over the pairs), safe from overflow."""
    masked = s.masked_fill(~pairs, -torch.inf)
    return torch.logsumexp(torch.cat([s.new_zeros(len(s), 1), masked], 1), 1)


def loss(d: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    return (log_sum(phi[0] * (d - 1), positive) / phi[0] + log_sum(-phi[1] * (d - 1), ~same) / phi[1]).mean()


def differences(x: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    return loss((x[:, None] - x).norm(dim=2), labels, phi)


def cdist(x: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    return loss(torch.cdist(x, x), labels, phi)


@pytest.mark.parametrize("candidate", ["differences", "compile", "cdist", "compile of cdist", "lossmeta"])
def test_forward_backward(candidate: str, measure: Any) -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(COUNT, DIMS)).requires_grad_()
    labels, phi = torch.arange(COUNT) * CLASSES // COUNT, torch.ones(2)
    candidates: dict[str, Callable[..., Tensor]] = {
        "differences": differences,
        "compile": torch.compile(differences),
        "cdist": cdist,
        "compile of cdist": torch.compile(cdist),
        "lossmeta": focal_weighting,
    }
    function = candidates[candidate]

    def step() -> None:
        x.grad = None
        function(x, labels, phi).backward()

    measure(
        step,
        operator="focal_weighting",
        size=f"{COUNT}×{DIMS}, {CLASSES} classes, forward + backward",
        candidate=candidate,
        # The embeddings are read twice, their gradient is written once.
        bytes_moved=4 * 3 * COUNT * DIMS,
    )
