"""The learned loss with its slope, and the mixed second derivative that its meta-gradient needs.

Everybody gets the loss and the slope with respect to the logits, then the gradient of <slope, u> with respect to the
weights. Eager PyTorch takes the slope by autograd and the mixed derivative by double backward; the compiled candidate
is the strongest that a user could write, the slope by a forward tangent, which torch.compile can differentiate once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from lossmeta.ops import loss_network

# MNIST and CIFAR-100 at the paper's batch size, ImageNet.
SIZES = [(128, 10), (128, 100), (256, 1000)]
WIDTH, LEAK, SMOOTHNESS = 40, 0.01, 10.0


def value(logits: Tensor, labels: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    def activation(x: Tensor) -> Tensor:
        return (1 - LEAK) * softplus(x, SMOOTHNESS) + LEAK * x

    y = one_hot(labels, logits.shape[1]).to(logits.dtype)
    x = torch.stack([y, logits.softmax(1)], -1)
    return (activation(activation(x @ w1.mT) @ w2.mT) @ w3.mT).squeeze(-1).mean(1)


def eager(logits: Tensor, labels: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    loss = value(logits, labels, *w)
    return loss, torch.autograd.grad(loss.sum(), logits, create_graph=w[0].requires_grad)[0]


def tangent(logits: Tensor, labels: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    def activation(x: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.exp(-SMOOTHNESS * x.abs())
        value = (1 - LEAK) / SMOOTHNESS * (torch.relu(SMOOTHNESS * x) + torch.log1p(e)) + LEAK * x
        return value, (1 - LEAK) * torch.where(x > 0, 1, e) / (1 + e) + LEAK

    f, y = logits.softmax(1), one_hot(labels, logits.shape[1]).to(logits.dtype)
    h1, d1 = activation(torch.stack([y, f], -1) @ w1.mT)
    h2, d2 = activation(h1 @ w2.mT)
    slope = ((d2 * ((d1 * w1[:, 1]) @ w2.mT)) @ w3.mT).squeeze(-1) / logits.shape[1]
    return (h2 @ w3.mT).squeeze(-1).mean(1), f * (slope - (f * slope).sum(1, keepdim=True))


def exact(logits: Tensor, labels: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    return loss_network(logits, labels, *w, link="softmax", exact=True)


def tabulated(logits: Tensor, labels: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    return loss_network(logits, labels, *w, link="softmax")


def candidates() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    compiled = torch.compile(tangent, fullgraph=True)
    return {"eager": eager, "compile": compiled, "lossmeta exact": exact, "lossmeta": tabulated}


@pytest.mark.parametrize("candidate", ["eager", "compile", "lossmeta exact", "lossmeta"])
@pytest.mark.parametrize("what", ["value and slope", "and mixed derivative"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_loss_network(size: tuple[int, int], what: str, candidate: str, measure: Any) -> None:
    samples, classes = size
    torch.manual_seed(0)
    mixed = what == "and mixed derivative"
    logits, u = torch.randn(samples, classes), torch.randn(samples, classes)
    labels = torch.randint(classes, (samples,))
    shapes = [(WIDTH, 2), (WIDTH, WIDTH), (1, WIDTH)]
    weights = [(torch.randn(s) / s[1] ** 0.5).requires_grad_(mixed) for s in shapes]
    logits.requires_grad_(candidate == "eager")
    function = candidates()[candidate]

    def run() -> Any:
        _, slope = function(logits, labels, *weights)
        return torch.autograd.grad(slope, weights, u) if mixed else slope

    # Logits are read and the slope is written; then logits and u are read again.
    measure(
        run,
        operator="loss_network",
        size=f"{samples} x {classes}, {what}",
        candidate=candidate,
        bytes_moved=4 * samples * classes * (4 if mixed else 2),
    )
