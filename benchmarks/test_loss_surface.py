"""A loss surface, against loss-landscapes and against moving the weights in place, on the same plane and samples.

``loss_surface`` lets glibc keep freed memory, for the whole process: what is measured after it has no page faults
either, which are half of the time of the CNN on 1,000 samples. Run a candidate alone to see it as it is for itself:
``-k "CNN and loss-landscapes"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.landscape import loss_surface, random_directions

Samples = tuple[Tensor, Tensor]
Surface = Callable[[], object]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """Of 8 × 8 pixels."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )


NETWORKS = {"MLP 64-64-10": mlp, "CNN of 8 × 8 pixels": cnn}


def in_place(model: nn.Module, samples: Samples, points: int) -> Surface:
    """As one would by hand, without a graph."""
    axis = torch.linspace(-1, 1, points).tolist()
    one, two = random_directions(model)

    def run() -> None:
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for a in axis:
                for b in axis:
                    for (name, p), old in zip(model.named_parameters(), kept, strict=True):
                        p.copy_(old + a * one[name] + b * two[name])
                    F.cross_entropy(model(samples[0]), samples[1]).item()
            for p, old in zip(model.parameters(), kept, strict=True):
                p.copy_(old)

    return run


def loss_landscapes(model: nn.Module, samples: Samples, points: int) -> Surface:
    library = pytest.importorskip("loss_landscapes")
    metrics = pytest.importorskip("loss_landscapes.metrics")
    metric = metrics.Loss(F.cross_entropy, *samples)
    return lambda: library.random_plane(
        model, metric, 1, steps=points, normalization="filter", deepcopy_model=True
    )


def ours(model: nn.Module, samples: Samples, points: int, **options: Any) -> Surface:
    directions = random_directions(model)
    return lambda: loss_surface(
        model, F.cross_entropy, samples, directions=directions, points=points, **options
    )


CANDIDATES: dict[str, Callable[..., Surface]] = {
    "in place": in_place,
    "loss-landscapes": loss_landscapes,
    "lossmeta": ours,
    "lossmeta, refine=0.01": lambda *a: ours(*a, refine=0.01),
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.by_device("samples", {"cpu": [128, 1000], "cuda": [1000], "dry": [16], "smoke": [16]})
@pytest.mark.by_device("points", {"cpu": [21], "cuda": [21], "dry": [3], "smoke": [3]})
def test_surface(candidate: str, network: str, samples: int, points: int, device: Any, measure: Any) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    data = torch.randn(samples, 64), torch.randint(10, (samples,))
    weights = sum(p.numel() for p in model.parameters())
    surface = CANDIDATES[candidate](model, data, points)
    measure(
        lambda run: run(),
        lambda: (surface,),
        operator="loss surface",
        size=f"{network}, {samples} samples, {points} × {points} points",
        candidate=candidate,
        bytes_moved=points**2 * 4 * (4 * weights + data[0].numel()),  # three read and one written; the inputs
        no_graph="the host reads every loss",
    )
