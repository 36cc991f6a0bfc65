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


@pytest.mark.parametrize("candidate", ["bare operators", "lossmeta"])
def test_python_layer(candidate: str, measure: Any) -> None:
    """What autograd and the Python function add to the two operators that they call, on the smallest size."""
    samples, classes = SIZES[0]
    torch.manual_seed(0)
    logits, target = torch.randn(samples, classes), torch.randint(classes, (samples,))
    phi, one = torch.eye(classes), torch.ones(())
    options = (None, -100, True, 1)  # weight, ignore_index, sigmoid, mean
    operators = torch.ops.lossmeta
    forward = operators.parametric_cross_entropy.default
    backward = operators.parametric_cross_entropy_backward.default

    def bare() -> None:
        _, statistics = forward(logits, target, phi, *options)
        backward(one, logits, target, phi, *options, statistics, True, False)

    def step() -> None:
        logits.grad = None
        parametric_cross_entropy(logits, target, phi).backward()

    if candidate == "lossmeta":
        logits.requires_grad_()
    measure(
        step if candidate == "lossmeta" else bare,
        operator="parametric_cross_entropy",
        size=f"{samples}×{classes}, Python layer",
        candidate=candidate,
        bytes_moved=4 * (3 * samples * classes + 2 * classes * classes),
    )
