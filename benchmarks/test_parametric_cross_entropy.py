"""Forward + backward of the parametric cross-entropy with fixed Phi: what a training step pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import parametric_cross_entropy

SIZES = [(128, 10), (1024, 100), (1024, 1000), (8192, 1000)]


def eager(logits: Tensor, target: Tensor, phi: Tensor) -> Tensor:
    z = (phi[target] * torch.log_softmax(logits, 1)).sum(1)
    return -torch.sigmoid(z).mean()


def candidates() -> dict[str, Callable[..., Tensor]]:
    return {"eager": eager, "compile": torch.compile(eager), "lossmeta": parametric_cross_entropy}


@pytest.mark.parametrize("candidate", ["eager", "compile", "lossmeta"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_forward_backward(size: tuple[int, int], candidate: str, measure: Any) -> None:
    samples, classes = size
    torch.manual_seed(0)
    logits = torch.randn(size, requires_grad=True)
    target = torch.randint(classes, (samples,))
    phi = torch.eye(classes) + 0.1 * torch.randn(classes, classes)
    loss = candidates()[candidate]

    def step() -> None:
        logits.grad = None
        loss(logits, target, phi).backward()

    # The logits are read twice (forward, backward), their gradient is written once; a row of Phi goes with each read.
    moved = 4 * (3 * samples * classes + 2 * min(samples, classes) * classes)
    measure(
        step,
        operator="parametric_cross_entropy",
        size=f"{samples}×{classes}, forward + backward",
        candidate=candidate,
        bytes_moved=moved,
    )
