"""Reads what the miners of pytorch-metric-learning return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pairs = tuple[Tensor, Tensor]


def mined_triplets(loss: str, indices: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """Triplets as they are, or all that pairs (anchor, positive, anchor, negative) form."""
    if isinstance(indices, Tensor) or len(indices) == 3:
        return indices
    (anchor, positive), (other_anchor, negative) = mined_pairs(loss, indices)
    i, j = torch.where(anchor[:, None] == other_anchor)
    return anchor[i], positive[i], negative[j]


def mined_pairs(loss: str, indices: Tensor | Sequence[Tensor]) -> tuple[Pairs, Pairs]:
    """The pairs (anchor, positive) and the pairs (anchor, negative), those of triplets once for each triplet."""
    parts = tuple(indices.unbind(1) if isinstance(indices, Tensor) else indices)
    if len(parts) == 3:
        return (parts[0], parts[1]), (parts[0], parts[2])
    if len(parts) == 4:
        return (parts[0], parts[1]), (parts[2], parts[3])
    raise ValueError(
        f"{loss}: indices_tuple must hold 3 tensors (anchor, positive, negative) or 4 "
        f"(anchor, positive, anchor, negative), got {len(parts)}"
    )
