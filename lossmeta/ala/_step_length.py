"""Steps of an optimizer whose length is adapted."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta.ala.space import LEARNING_RATE, Values


@torch.no_grad()
def before_step(values: Values, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The parameters and what they are before a step, where its length is adapted."""
    return [(p, p.clone()) for p in parameters] if LEARNING_RATE in values else []


@torch.no_grad()
def scale_step(before: list[tuple[Tensor, Tensor]], values: Values) -> None:
    """By the factor of each child, or of the only one."""
    for p, start in before:
        factor = values[LEARNING_RATE].exp().to(p.dtype)
        p.copy_(
            start + factor.view(-1, *[1] * (p.dim() - 1)) * (p - start)
            if factor.dim()
            else start + factor * (p - start)
        )
