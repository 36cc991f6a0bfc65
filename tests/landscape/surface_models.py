"""Small models and data whose surfaces are known or quickly made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def cnn() -> nn.Module:
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    model = nn.Sequential(*layers).double()
    model(torch.randn(16, 2, 6, 6).double())  # running statistics that are not those of the start
    return model


def samples(count: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(count, 4).double(), torch.randint(3, (count,))


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(12, 2, 6, 6).double(), torch.randint(3, (12,))


def by_hand(model: nn.Module, data: Any, directions: Any, a: float, b: float) -> float:
    """A copy that is moved and called."""
    moved = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in moved.named_parameters():
            for c, d in zip((a, b), directions, strict=False):
                p += c * d[name]
        return float(F.cross_entropy(moved(data[0]), data[1]))


class Observer(nn.Module):
    """Remembers the largest output that it has seen, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("largest", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        self.largest = torch.maximum(self.largest, found.detach().abs().max())
        return found / self.largest


class Graph(nn.Module):
    """Its prediction is a function of two weights."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.weight[0, 0], self.weight[1, 0]).expand(len(x))


def axes() -> list[dict[str, Tensor]]:
    return [{"weight": torch.tensor(v, dtype=torch.float64)} for v in ([[1.0], [0.0]], [[0.0], [1.0]])]
