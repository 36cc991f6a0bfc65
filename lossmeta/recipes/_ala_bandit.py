"""The contextual bandit of the ALA paper's supplement: a rule instead of a policy."""

from __future__ import annotations

import torch
from torch import Tensor


def confusing_pairs(confusion: Tensor) -> Tensor:
    r"""+1 for pairs of classes that are confused more than the mean pair, -1 for the others, ``[C, C]``.

    With the confusions of Eq. 7, which are mean negative logarithms of probabilities, a pair is confused by
    :math:`e^{-C_{ij}} + e^{-C_{ji}}`. The supplement (section B) raises :math:`\Phi` for pairs that are confused and
    lowers it for others, and does not say where the line is. The diagonal is 0.
    """
    likeness = (-confusion).exp()
    likeness = likeness + likeness.T
    other = ~torch.eye(len(confusion), dtype=torch.bool, device=confusion.device)
    direction = torch.where(likeness > likeness[other].mean(), 1.0, -1.0).to(confusion)
    return direction.where(other, 0)


def moved(phi: Tensor, confusion: Tensor, step: float) -> Tensor:
    """The matrix after one decision, off the diagonal in [-1, 1]."""
    found = phi + step * confusing_pairs(confusion)
    other = ~torch.eye(len(phi), dtype=torch.bool, device=phi.device)
    return torch.where(other, found.clamp(-1, 1), phi)
