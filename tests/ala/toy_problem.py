"""A small problem of three classes, and a metric of another library."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 3


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth, so that nothing ties."""
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


class Counted:
    """As metrics of torchmetrics are."""

    higher_is_better: bool | None = None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.wrong = self.all = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.wrong += int((prediction.argmax(1) != target).sum())
        self.all += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.wrong / self.all, dtype=torch.float64)
