"""Losses of embeddings that ALA's are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 0.2


def _distances(x: Tensor) -> Tensor:
    """Between embeddings ``[N, D]`` of length 1, ``[N, N]``."""
    # At least 1e-4: the root has no slope at 0.
    return (2 - 2 * x @ x.T).clamp_min(1e-8).sqrt()


def triplet(x: Tensor, labels: Tensor) -> Tensor:
    r"""The mean of :math:`[d_+^2 - d_-^2 + 0.2]_+` over all triplets of a batch for which it is positive.

    Args:
        x: embeddings ``[N, D]`` of length 1.
        labels: ``[N]``.

    Sources:
        Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering" (2015).
    """
    squares = _distances(x).square()
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    hinge = (squares[:, :, None] - squares[:, None, :] + MARGIN).clamp_min(0)
    hinge = hinge * (positive[:, :, None] & ~same[:, None, :])
    return hinge.sum() / (hinge > 0).sum().clamp_min(1)


def margin(x: Tensor, labels: Tensor, generator: torch.Generator, beta: float = 1.2) -> Tensor:
    r"""Margin loss with distance-weighted sampling: :math:`[0.2 + d_+ - \beta]_+` and :math:`[0.2 + \beta - d_-]_+`.

    For each positive pair a negative of its anchor is drawn with weights :math:`1 / q(d)` where
    :math:`q(d) \propto d^{D-2} (1 - d^2/4)^{(D-3)/2}` is the density of distances on the sphere. Distances below 0.5
    count as 0.5, and negatives beyond 1.4 are not drawn. The mean is over the terms that are positive.

    Args:
        x: embeddings ``[N, D]`` of length 1.
        labels: ``[N]``.
        generator: that draws, on the CPU.
        beta: the boundary.

    Sources:
        Wu et al., "Sampling Matters in Deep Embedding Learning" (2017).
    """
    d = _distances(x)
    same = labels[:, None] == labels
    dimension = x.shape[1]
    with torch.no_grad():
        near = d.clamp(0.5, 1.99)
        log_weight = -(dimension - 2) * near.log() - (dimension - 3) / 2 * (1 - near.square() / 4).log()
        log_weight = log_weight.masked_fill(same | (d > 1.4), -torch.inf)
        none = log_weight.isinf().all(1)
        weight = torch.where(none[:, None], (~same).float(), (log_weight - log_weight.amax(1, True)).exp())
    eye = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    anchor, positive = (same & ~eye).nonzero(as_tuple=True)
    usable = weight[anchor].sum(1) > 0
    anchor, positive = anchor[usable], positive[usable]
    if not len(anchor):
        return d.sum() * 0
    drawn = torch.multinomial(weight[anchor].cpu(), 1, generator=generator)[:, 0].to(x.device)
    terms = torch.cat([MARGIN + d[anchor, positive] - beta, MARGIN + beta - d[anchor, drawn]]).clamp_min(0)
    return terms.sum() / (terms > 0).sum().clamp_min(1)
