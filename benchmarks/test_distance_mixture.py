"""Forward + backward of the distance mixture with fixed Phi: what a training step pays, by triplets and by labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import distance_mixture

COUNT, DIMS, CLASSES = 128, 128, 16


def mixture(near: Tensor, far: Tensor, phi: Tensor) -> Tensor:
    far = far.clamp(min=1e-3)
    increasing = [
        near**2,
        near**2.5,
        near**1.5,
        0.5 * (0.6 * near**2).exp() - 0.5,
        0.5 * (0.6 * near).exp() - 0.5,
    ]
    decreasing = [0.5 / far, 0.2 / far, 0.1 / far**2, -far.log(), -2 * far.log()]
    terms = torch.stack(increasing + decreasing, 1)
    return (terms @ phi).mean() + 0 * terms.mean(0).detach().sum()


def eager(x: Tensor, triplets: Tensor, phi: Tensor) -> Tensor:
    anchor, positive, negative = x[triplets[:, 0]], x[triplets[:, 1]], x[triplets[:, 2]]
    return mixture((anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1), phi)


def cdist(x: Tensor, triplets: Tensor, phi: Tensor) -> Tensor:
    d = torch.cdist(x, x)
    return mixture(d[triplets[:, 0], triplets[:, 1]], d[triplets[:, 0], triplets[:, 2]], phi)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(COUNT, DIMS)).requires_grad_()
    labels = torch.arange(COUNT) * CLASSES // COUNT
    same = labels[:, None] == labels
    positive = (same & ~torch.eye(COUNT, dtype=torch.bool))[:, :, None] & ~same[:, None]
    return x, positive.nonzero(), torch.rand(10), labels


def run(measure: Any, x: Tensor, loss: Callable[[], Tensor], size: str, candidate: str, moved: int) -> None:
    def step() -> None:
        x.grad = None
        loss().backward()

    measure(
        step,
        operator="distance_mixture",
        size=f"{size}, forward + backward",
        candidate=candidate,
        bytes_moved=moved,
    )


# The embeddings are read twice (forward, backward), their gradient is written once; and so often the triplets are read.
EMBEDDINGS = 4 * 3 * COUNT * DIMS


@pytest.mark.parametrize("candidate", ["eager", "compile", "cdist", "compile of cdist", "lossmeta"])
def test_triplets(candidate: str, measure: Any) -> None:
    x, everything, phi, _ = problem()
    triplets = everything[torch.randperm(len(everything))[:8192]].contiguous()
    candidates: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: eager(x, triplets, phi),
        "cdist": lambda: cdist(x, triplets, phi),
        "lossmeta": lambda: distance_mixture(x, triplets, phi)[0],
    }
    if candidate.startswith("compile"):
        compiled = torch.compile(cdist if "cdist" in candidate else eager)
        candidates[candidate] = lambda: compiled(x, triplets, phi)
    size = f"{len(triplets)} triplets of {COUNT}×{DIMS}"
    run(measure, x, candidates[candidate], size, candidate, EMBEDDINGS + 2 * 24 * len(triplets))


@pytest.mark.parametrize("candidate", ["compile of triplets", "lossmeta triplets", "lossmeta"])
def test_labels(candidate: str, measure: Any) -> None:
    x, everything, phi, labels = problem()
    compiled = torch.compile(eager)
    candidates: dict[str, Callable[[], Tensor]] = {
        "compile of triplets": lambda: compiled(x, everything, phi),
        "lossmeta triplets": lambda: distance_mixture(x, everything, phi)[0],
        "lossmeta": lambda: distance_mixture(x, None, phi, labels=labels)[0],
    }
    size = f"all {len(everything)} triplets of {COUNT}×{DIMS}, {CLASSES} classes"
    run(measure, x, candidates[candidate], size, candidate, EMBEDDINGS + 2 * 8 * COUNT)
