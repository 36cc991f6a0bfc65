"""Rows that are probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def check_distributions(name: str, argument: str, rows: Tensor, remedy: str) -> None:
    """Refuses rows of which one is no distribution.

    Args:
        name: who asks, for errors.
        argument: what the rows are called.
        rows: ``[R, C]``.
        remedy: what to do.
    """
    if rows.is_meta:
        raise ValueError(f"{name}: {argument} must hold values, got a tensor on the meta device")
    p = rows.detach().cpu().double()
    sums, tolerance = p.sum(1), max(1e-3, 2 * torch.finfo(rows.dtype).eps)
    for row in (~((p >= 0).all(1) & ((sums - 1).abs() <= tolerance))).nonzero()[:1].flatten().tolist():
        raise ValueError(
            f"{name}: rows of {argument} must be at least 0 and sum to 1, got a least value of "
            f"{p[row].min().item():.6g} and a sum of {sums[row].item():.6g} in row {row}; {remedy}"
        )
