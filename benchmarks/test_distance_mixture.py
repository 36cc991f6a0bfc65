"""Forward + backward of the distance mixture with fixed Phi: what a training step pays, by triplets and by labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import distance_mixture

# Embeddings, their dimensions, classes, and triplets drawn among all.
TRIPLETS = {"cpu": [(128, 128, 16, 8192)], "cuda": [(128, 128, 16, 8192)], "dry": [(8, 4, 2, 5)]}

# All triplets of 1000 embeddings are 57 million: only what does not list them takes part.
LISTED, UNLISTED = ["compile of triplets", "lossmeta triplets"], ["pairs", "compile of pairs", "lossmeta"]
LABELS = {
    "cpu": [((128, 128, 16), candidate) for candidate in (*LISTED, "lossmeta")],
    "cuda": [
        *(((1000, 128, 16), candidate) for candidate in UNLISTED),
        *(((128, 128, 16), candidate) for candidate in (*LISTED, *UNLISTED)),
    ],
    "dry": [((8, 4, 2), candidate) for candidate in (*LISTED, *UNLISTED)],
}


def increasing(near: Tensor) -> list[Tensor]:
    return [
        near**2,
        near**2.5,
        near**1.5,
        0.5 * (0.6 * near**2).exp() - 0.5,
        0.5 * (0.6 * near).exp() - 0.5,
    ]


def decreasing(far: Tensor) -> list[Tensor]:
    far = far.clamp(min=1e-3)
    return [0.5 / far, 0.2 / far, 0.1 / far**2, -far.log(), -2 * far.log()]


def mixture(near: Tensor, far: Tensor, phi: Tensor) -> Tensor:
    terms = torch.stack(increasing(near) + decreasing(far), 1)
    return (terms @ phi).mean() + 0 * terms.mean(0).detach().sum()


def eager(x: Tensor, triplets: Tensor, phi: Tensor) -> Tensor:
    anchor, positive, negative = x[triplets[:, 0]], x[triplets[:, 1]], x[triplets[:, 2]]
    return mixture((anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1), phi)


def cdist(x: Tensor, triplets: Tensor, phi: Tensor) -> Tensor:
    d = torch.cdist(x, x)
    return mixture(d[triplets[:, 0], triplets[:, 1]], d[triplets[:, 0], triplets[:, 2]], phi)


def pairs(x: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    """All triplets as sums over pairs, each times the triplets that it is part of."""
    d, negative = torch.cdist(x, x), labels[:, None] != labels
    positive = ~negative & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    positives, negatives = positive.sum(1, keepdim=True), negative.sum(1, keepdim=True)
    near = [(negatives * f.where(positive, 0)).sum() for f in increasing(d.where(positive, 1))]
    far = [(positives * f.where(negative, 0)).sum() for f in decreasing(d.where(negative, 1))]
    return torch.stack(near + far) @ phi / (positives * negatives).sum()


def by_triplets(x: Tensor, triplets: Tensor, phi: Tensor) -> Tensor:
    return distance_mixture(x, triplets, phi)[0]


def by_labels(x: Tensor, labels: Tensor, phi: Tensor) -> Tensor:
    return distance_mixture(x, None, phi, labels=labels)[0]


def embeddings(count: int, dims: int, classes: int) -> tuple[Tensor, Tensor]:
    """The embeddings and their labels."""
    x = torch.nn.functional.normalize(torch.randn(count, dims)).requires_grad_()
    return x, torch.arange(count) * classes // count


def all_triplets(labels: Tensor) -> Tensor:
    same = labels[:, None] == labels
    others = ~torch.eye(len(labels), dtype=torch.bool)
    return ((same & others)[:, :, None] & ~same[:, None]).nonzero()


def number_of_triplets(count: int, classes: int) -> int:
    sizes = (torch.arange(count) * classes // count).bincount()
    return int((sizes * (sizes - 1) * (count - sizes)).sum())


def run(
    measure: Any, loss: Callable[..., Tensor], make: Callable[[], Any], size: str, candidate: str, moved: int
) -> None:
    def step(x: Tensor, which: Tensor, phi: Tensor) -> None:
        x.grad = None
        loss(x, which, phi).backward()

    measure(
        step,
        make,
        operator="distance_mixture",
        size=f"{size}, forward + backward",
        candidate=candidate,
        bytes_moved=moved,
    )


# The embeddings are read twice (forward, backward), their gradient is written once; and so often the triplets are read.


@pytest.mark.parametrize("candidate", ["eager", "compile", "cdist", "compile of cdist", "lossmeta"])
@pytest.mark.by_device("size", TRIPLETS)
def test_triplets(size: tuple[int, int, int, int], candidate: str, device: Any, measure: Any) -> None:
    count, dims, classes, drawn = size
    candidates = {
        "eager": eager,
        "compile": device.compile(eager),
        "cdist": cdist,
        "compile of cdist": device.compile(cdist),
        "lossmeta": by_triplets,
    }

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x, labels = embeddings(count, dims, classes)
        everything = all_triplets(labels)
        return x, everything[torch.randperm(len(everything))[:drawn]].contiguous(), torch.rand(10)

    moved = 4 * 3 * count * dims + 2 * 24 * drawn
    run(measure, candidates[candidate], make, f"{drawn} triplets of {count}×{dims}", candidate, moved)


@pytest.mark.by_device("size, candidate", LABELS)
def test_labels(size: tuple[int, int, int], candidate: str, device: Any, measure: Any) -> None:
    count, dims, classes = size
    candidates = {
        "compile of triplets": device.compile(eager),
        "lossmeta triplets": by_triplets,
        "pairs": pairs,
        "compile of pairs": device.compile(pairs),
        "lossmeta": by_labels,
    }

    def make() -> tuple[Tensor, Tensor, Tensor]:
        x, labels = embeddings(count, dims, classes)
        return x, all_triplets(labels) if candidate in LISTED else labels, torch.rand(10)

    name = f"all {number_of_triplets(count, classes)} triplets of {count}×{dims}, {classes} classes"
    run(measure, candidates[candidate], make, name, candidate, 4 * 3 * count * dims + 2 * 8 * count)
