"""Reads what the miners of pytorch-metric-learning return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossmeta._checks import check_float, check_int64, check_same_device, check_tensors, outside

Pairs = tuple[Tensor, Tensor]


def mined_triplets(
    loss: str, indices: Tensor | Sequence[Tensor], embeddings: Tensor
) -> Tensor | Sequence[Tensor]:
    """Triplets as they are, or all that pairs (anchor, positive, anchor, negative) form."""
    parts = _checked(loss, indices, embeddings)
    if len(parts) == 3:
        return indices
    anchor, positive, other_anchor, negative = parts
    i, j = torch.where(anchor[:, None] == other_anchor)
    return anchor[i], positive[i], negative[j]


def mined_pairs(loss: str, indices: Tensor | Sequence[Tensor], embeddings: Tensor) -> tuple[Pairs, Pairs]:
    """The pairs (anchor, positive) and the pairs (anchor, negative), those of triplets once for each triplet."""
    parts = _checked(loss, indices, embeddings)
    if len(parts) == 3:
        return (parts[0], parts[1]), (parts[0], parts[2])
    return (parts[0], parts[1]), (parts[2], parts[3])


def _checked(loss: str, indices: Any, embeddings: Tensor) -> tuple[Tensor, ...]:
    """The three tensors of triplets or the four of pairs, fit to index the embeddings."""
    check_tensors(loss, embeddings=embeddings)
    check_float(loss, embeddings=embeddings)
    if embeddings.dim() != 2:
        raise ValueError(f"{loss}: embeddings must be [M, D], got {list(embeddings.shape)}")
    if isinstance(indices, Tensor):
        if indices.dim() != 2 or indices.shape[1] != 3:
            raise ValueError(
                f"{loss}: indices_tuple must be [T, 3] as one tensor, got {list(indices.shape)}; "
                "call the loss with (embeddings, labels) or (embeddings, labels, indices_tuple)"
            )
        named = {f"indices_tuple[:, {i}]": part for i, part in enumerate(indices.unbind(1))}
    elif isinstance(indices, Sequence):
        if len(indices) not in (3, 4):
            raise ValueError(
                f"{loss}: indices_tuple must hold 3 tensors (anchor, positive, negative) or 4 "
                f"(anchor, positive, anchor, negative), got {len(indices)}"
            )
        named = {f"indices_tuple[{i}]": part for i, part in enumerate(indices)}
    else:
        raise TypeError(
            f"{loss}: indices_tuple must be a tensor [T, 3] or a tuple of tensors, got {type(indices).__name__}"
        )
    check_tensors(loss, **named)
    check_int64(loss, **named)
    check_same_device(loss, **named, embeddings=embeddings)
    parts = tuple(named.values())
    groups = (parts,) if len(parts) == 3 else (parts[:2], parts[2:])
    if any(part.dim() != 1 or len(part) != len(group[0]) for group in groups for part in group):
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(
            f"{loss}: indices_tuple must hold tensors [T], [T], [T] or [P], [P], [Q], [Q], got {shapes}"
        )
    for argument, part in named.items():
        outside(loss, argument, part, len(embeddings))
    return parts
