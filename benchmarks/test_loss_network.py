"""The learned loss with its slope, and the mixed second derivative that its meta-gradient needs.

Everybody gets the loss and the slope with respect to the logits, then the gradient of <slope, u> with respect to the
weights. Weights do not learn in "value and slope", where lossmeta keeps its table from call to call; they do in "and
mixed derivative". Eager PyTorch takes the slope by autograd and the mixed derivative by double backward; the compiled
candidate is the strongest that a user could write, the slope by a forward tangent, which torch.compile can
differentiate once.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from device import DTYPES
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from lossmeta.ops import loss_network

CANDIDATES = ["lossmeta", "lossmeta exact", "eager", "compile"]
CASES = {
    # MNIST and CIFAR-100 at the paper's batch size, ImageNet.
    "cpu": list(itertools.product([(128, 10), (128, 100), (256, 1000)], CANDIDATES)),
    # At a language model's vocabulary only the table is fit: the hidden layers would be 40 times the logits.
    "cuda": [*itertools.product([(8192, 1000), (128, 10)], CANDIDATES), ((8192, 32000), "lossmeta")],
    "dry": [*itertools.product([(8, 10), (4, 3)], CANDIDATES), ((2000, 5), "lossmeta")],
}
# Labels on their own, with the sigmoid link: one in twenty is on.
LABELS = {
    "cpu": list(itertools.product([(128, 100), (256, 1000)], CANDIDATES)),
    "cuda": list(itertools.product([(8192, 1000)], CANDIDATES)),
    "dry": list(itertools.product([(8, 10)], CANDIDATES)),
}
COMPILED_FIRST = [{"size": (8192, 1000)}]
WIDTH, LEAK, SMOOTHNESS = 40, 0.01, 10.0


def link(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and predictions."""
    if labels.dim() == 2:
        return labels.to(logits.dtype), logits.sigmoid()
    return one_hot(labels, logits.shape[1]).to(logits.dtype), logits.softmax(1)


def value(logits: Tensor, labels: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    def activation(x: Tensor) -> Tensor:
        return (1 - LEAK) * softplus(x, SMOOTHNESS) + LEAK * x

    x = torch.stack(link(logits, labels), -1)
    loss = (activation(activation(x @ w1.mT) @ w2.mT) @ w3.mT).squeeze(-1)
    return loss if labels.dim() == 2 else loss.mean(1)


def eager(logits: Tensor, labels: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
    x = logits.float().requires_grad_()
    loss = value(x, labels, *w)
    return loss, torch.autograd.grad(loss.sum(), x, create_graph=w[0].requires_grad)[0]


def tangent(logits: Tensor, labels: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    def activation(x: Tensor) -> tuple[Tensor, Tensor]:
        e = torch.exp(-SMOOTHNESS * x.abs())
        value = (1 - LEAK) / SMOOTHNESS * (torch.relu(SMOOTHNESS * x) + torch.log1p(e)) + LEAK * x
        return value, (1 - LEAK) * torch.where(x > 0, 1, e) / (1 + e) + LEAK

    y, f = link(logits.float(), labels)
    h1, d1 = activation(torch.stack([y, f], -1) @ w1.mT)
    h2, d2 = activation(h1 @ w2.mT)
    loss, slope = (h2 @ w3.mT).squeeze(-1), ((d2 * ((d1 * w1[:, 1]) @ w2.mT)) @ w3.mT).squeeze(-1)
    if labels.dim() == 2:
        return loss, slope * f * (1 - f)
    slope = slope / logits.shape[1]
    return loss.mean(1), f * (slope - (f * slope).sum(1, keepdim=True))


def ours(logits: Tensor, labels: Tensor, *w: Tensor, exact: bool = False) -> tuple[Tensor, Tensor]:
    return loss_network(logits, labels, *w, link="sigmoid" if labels.dim() == 2 else "softmax", exact=exact)


@pytest.mark.by_device("size, candidate", CASES)
@pytest.mark.parametrize("what", ["value and slope", "and mixed derivative"])
@pytest.mark.by_device("dtype", DTYPES)
def test_loss_network(
    size: tuple[int, int], what: str, candidate: str, dtype: torch.dtype, device: Any, measure: Any
) -> None:
    compare(size, what, candidate, dtype, device, measure, several=False)


@pytest.mark.by_device("size, candidate", LABELS)
@pytest.mark.parametrize("what", ["value and slope", "and mixed derivative"])
@pytest.mark.by_device("dtype", DTYPES)
def test_labels(
    size: tuple[int, int], what: str, candidate: str, dtype: torch.dtype, device: Any, measure: Any
) -> None:
    compare(size, what, candidate, dtype, device, measure, several=True)


def compare(
    size: tuple[int, int],
    what: str,
    candidate: str,
    dtype: torch.dtype,
    device: Any,
    measure: Any,
    *,
    several: bool,
) -> None:
    samples, classes = size
    mixed = what == "and mixed derivative"
    candidates = {
        "eager": eager,
        "compile": device.compile(tangent, fullgraph=True),
        "lossmeta exact": partial(ours, exact=True),
        "lossmeta": ours,
    }
    function = candidates[candidate]

    def make() -> tuple[Tensor, ...]:
        logits, u = torch.randn(size, dtype=dtype), torch.randn(size)
        labels = (torch.rand(size) < 0.05).long() if several else torch.randint(classes, (samples,))
        shapes = [(WIDTH, 2), (WIDTH, WIDTH), (1, WIDTH)]
        weights = [(torch.randn(s) / s[1] ** 0.5).requires_grad_(mixed) for s in shapes]
        return logits, u, labels, *weights

    def run(logits: Tensor, u: Tensor, labels: Tensor, *weights: Tensor) -> Any:
        _, slope = function(logits, labels, *weights)
        return torch.autograd.grad(slope, weights, u) if mixed else slope

    # Logits are read and the slope, in float32, is written; then logits and u are read again.
    measure(
        run,
        make,
        operator="loss_network",
        size=f"{samples} x {classes}{' labels' if several else ''}, {what}",
        candidate=candidate,
        bytes_moved=(dtype.itemsize + 4) * samples * classes * (2 if mixed else 1),
        dtype=dtype,
    )
