"""Losses as criteria inside ``torch.compile(fullgraph=True, dynamic=True)``: one graph for batches of any size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lossmeta.losses import LossNetwork, LossWeighting, ParametricCrossEntropy, TaylorLoss, TransitionLoss

SIZES = [(8, 5), (1, 5), (700, 5)]


def labels(*shape: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(shape[1], shape[:1])
    if len(target) > 1:
        target[0] = -100
    return torch.randn(shape), target


def probabilities(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.rand(shape).softmax(1)


def values(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randn(shape)


def classes_vary(*shape: int) -> tuple[Tensor, Tensor]:
    return labels(shape[0], shape[0] % 7 + 3)


def network(**options: Any) -> LossNetwork:
    loss = LossNetwork(**options)
    with torch.no_grad():
        loss.output_weight.normal_(std=0.1)
    return loss


def weighting() -> LossWeighting:
    loss = LossWeighting()
    with torch.no_grad():
        loss.output_weight.normal_(std=0.1)
    return loss


CRITERIA: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "matrix": (lambda: ParametricCrossEntropy(5), labels),
    "matrix, smoothed": (
        lambda: ParametricCrossEntropy(5, learnable=True, weight=torch.rand(5), label_smoothing=0.1),
        labels,
    ),
    "matrix, soft": (lambda: ParametricCrossEntropy(5, weight=torch.rand(5)), probabilities),
    "low rank": (lambda: ParametricCrossEntropy(5, rank=2, learnable=True), labels),
    "low rank, smoothed": (lambda: ParametricCrossEntropy(5, rank=2, label_smoothing=0.1), labels),
    "network": (network, classes_vary),
    "network, soft": (lambda: network(label_smoothing=0.1), probabilities),
    "network, residual": (lambda: network(residual="cross_entropy", weight=torch.rand(5)), labels),
    "network, normalized": (lambda: network(residual="cross_entropy", normalize_slope=True), labels),
    "network, normalized and smoothed": (lambda: network(normalize_slope=True, label_smoothing=0.1), labels),
    "network, regression": (
        lambda: network(link="identity", residual="squared_error", normalize_slope=True),
        values,
    ),
    "transition": (lambda: TransitionLoss(5), labels),
    "transition, shape": (
        lambda: TransitionLoss(5, shape=network(residual="cross_entropy"), normalize_slope=True),
        labels,
    ),
    "weighting": (weighting, classes_vary),
    "Taylor": (TaylorLoss, classes_vary),
    "Taylor, soft": (lambda: TaylorLoss(2, weight=torch.rand(5)), probabilities),
    "Taylor, regression": (lambda: TaylorLoss(link="identity"), values),
}


# The backend, whether with sizes that vary, and the loss.
CASES = [
    *(("aot_eager", True, name) for name in CRITERIA),
    ("aot_eager", False, "matrix, smoothed"),
    ("aot_eager", False, "network, normalized"),
    ("eager", True, "low rank, smoothed"),
    *(
        pytest.param(backend, True, name, marks=pytest.mark.slow)
        for backend in ("eager", "inductor")
        for name in ("low rank", "network, normalized", "Taylor")
    ),
]


@pytest.mark.parametrize(("backend", "dynamic", "name"), CASES)
def test_compiles_whole(backend: str, dynamic: bool, name: str) -> None:
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    make, batch = CRITERIA[name]
    criterion = make()
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in SIZES if dynamic else SIZES[:1]:
        pred, target = batch(*size)
        pred.requires_grad_()
        results = []
        for loss in (criterion, compiled):
            value = loss(pred, target)
            wanted = [pred, *criterion.parameters()]
            results.append((value, torch.autograd.grad(value, wanted, allow_unused=True)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
