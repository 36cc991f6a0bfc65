"""What a pass over a model moves beside its weights, kept and brought back: buffers and random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lossmeta.adalfl._capture import is_capturing


def cloned(tensors: Any) -> list[Tensor]:
    return [t.clone() for t in tensors]


def copy_back(tensors: Iterable[Tensor], values: list[Tensor]) -> None:
    if values:
        with torch.no_grad():
            for t, value in zip(tensors, values, strict=True):
                t.copy_(value)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None] | None:
    if is_capturing(device):
        return None  # it cannot be read, and a captured step draws no random numbers
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def same(a: Any, b: Any) -> bool:
    return all(x is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None] | None) -> None:
    if state is None:
        return
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
