"""Images in the place of CIFAR-10, and a setting so small that every row of a table trains in a moment."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lossmeta.data import Dataset
from lossmeta.recipes._ala_images import SMALL

TINY = replace(
    SMALL,
    rows=(160, 80),
    test=90,
    batch=16,
    rates=(0.03,),
    bounded_rates=(0.1,),
    step_sizes=(0.5,),
    least_eases=(5.0,),
    children=2,
    episodes=2,
    teacher_rate=0.1,
    meta_rates=(1e-3,),
    window=4,
    tuning_seeds=1,
)


def images() -> Dataset:
    """Noise around a pattern of each class."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (10, 3, 32, 32), generator=generator)

    def part(rows: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(rows) % 10
        noise = torch.randint(256, (rows, 3, 32, 32), generator=generator)
        return ((patterns[labels] + 3 * noise) // 4).to(torch.uint8), labels

    return Dataset("cifar10", part(300), part(100), 10)
