"""The cross-entropy of many models and its derivative, and one model's forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.ops import adjusted_cross_entropy
from lossmeta.ops.adjusted_cross_entropy import with_slope

# Models, samples, classes.
MODELS = {
    "cpu": [(8, 64, 10), (8, 512, 100), (1, 8192, 1000)],
    "cuda": [(8, 64, 10), (8, 8192, 100), (8, 8192, 1000)],
    "dry": [(2, 8, 10), (1, 6, 40)],
}
SIZES = {"cpu": [(128, 10), (8192, 1000)], "cuda": [(8192, 1000), (8192, 32000)], "dry": [(8, 10)]}
COMPILED_FIRST = [
    {"size": (8, 64, 10), "candidate": "compile"},
    {"size": (8192, 1000), "candidate": "compile"},
]


def losses(logits: Tensor, labels: Tensor, shift: Tensor, exponent: Tensor, smoothing: Tensor) -> Tensor:
    log_p = (logits + shift.unsqueeze(-2)).log_softmax(-1)
    surprise = -log_p.gather(-1, labels[:, None].expand(*logits.shape[:-1], 1)).squeeze(-1)
    q = exponent.unsqueeze(-1).clamp_min(1e-12)
    robust = -torch.expm1(-q * surprise) / q
    return (robust + smoothing.unsqueeze(-1) * (-log_p.mean(-1) - surprise)).mean(-1)


def differentiated(
    logits: Tensor, labels: Tensor, shift: Tensor, exponent: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    """By autograd; models do not meet, so that the derivative of their sum is that of each."""
    leaf = logits.detach().requires_grad_()
    values = losses(leaf, labels, shift, exponent, smoothing)
    return values, torch.autograd.grad(values.sum(), leaf)[0]


def by_hand(
    logits: Tensor, labels: Tensor, shift: Tensor, exponent: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivative as one writes it down: for few classes autograd costs more than the arithmetic."""
    x = logits + shift[:, None]
    x = x - x.amax(2, keepdim=True)
    p = x.exp()
    norm = p.sum(2, keepdim=True)
    p /= norm
    log_p = x - norm.log()
    at = labels.expand(len(x), -1)[..., None]
    surprise = -log_p.gather(2, at)[..., 0]
    q, epsilon = exponent[:, None].clamp_min(1e-12), smoothing[:, None]
    weight = (-q * surprise).exp()
    values = -torch.expm1(-q * surprise) / q + epsilon * (-log_p.mean(2) - surprise)
    slope = p * weight[..., None] - epsilon[..., None] / x.shape[2]
    slope.scatter_add_(2, at, -(weight - epsilon)[..., None])
    return values.mean(1), slope / len(labels)


def fused(
    logits: Tensor, labels: Tensor, shift: Tensor, exponent: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    return with_slope(logits, labels, shift=shift, exponent=exponent, smoothing=smoothing)


CANDIDATES: dict[str, Callable[..., Any]] = {
    "eager": differentiated,
    "eager, by hand": by_hand,
    "compile": by_hand,
    "lossmeta": fused,
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("size", MODELS)
def test_value_and_slope(size: tuple[int, int, int], candidate: str, device: Any, measure: Any) -> None:
    models, samples, classes = size
    function = CANDIDATES[candidate]

    def make() -> tuple[Tensor, ...]:
        return (
            torch.randn(size),
            torch.randint(classes, (samples,)),
            torch.randn(models, classes),
            torch.rand(models),
            torch.rand(models) / 2,
        )

    measure(
        device.compile(function) if candidate == "compile" else function,
        make,
        operator="adjusted_cross_entropy",
        size=f"{models} models, {samples}×{classes}, value and slope",
        candidate=candidate,
        bytes_moved=4 * 2 * models * samples * classes + 8 * samples,
    )


@pytest.mark.parametrize("candidate", ["eager", "compile", "cross_entropy alone", "lossmeta"])
@pytest.mark.by_device("size", SIZES)
def test_passes(size: tuple[int, int], candidate: str, device: Any, measure: Any) -> None:
    samples, classes = size
    candidates: dict[str, Callable[..., Tensor]] = {
        "eager": losses,
        "compile": device.compile(losses),
        "cross_entropy alone": lambda x, y, *_: F.cross_entropy(x, y),
        "lossmeta": lambda x, y, m, q, e: adjusted_cross_entropy(x, y, shift=m, exponent=q, smoothing=e),
    }
    loss = candidates[candidate]

    def make() -> tuple[Tensor, ...]:
        logits, labels = torch.randn(size, requires_grad=True), torch.randint(classes, (samples,))
        return logits, labels, torch.randn(classes), torch.tensor(0.5), torch.tensor(0.1)

    def step(logits: Tensor, *others: Tensor) -> None:
        logits.grad = None
        loss(logits, *others).backward()

    measure(
        step,
        make,
        operator="adjusted_cross_entropy",
        size=f"{samples}×{classes}, forward + backward",
        candidate=candidate,
        bytes_moved=4 * 4 * samples * classes,  # the slope is written, and read again
    )
