"""Self-paced learning: easy samples first."""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 1.3  # of the threshold with every round
ROUNDS = 20


def chosen(losses: Tensor, threshold: float) -> Tensor:
    r"""The mean loss of the samples that are easy enough, ``[]``.

    .. math:: \frac{\sum_i v_i \ell_i}{\sum_i v_i}, \qquad v_i = [\ell_i < \lambda]

    which minimises :math:`\sum_i v_i \ell_i - \lambda \sum_i v_i` over v (Kumar et al., "Self-Paced Learning for Latent
    Variable Models", 2010, with :math:`\lambda = 1 / K`). 0 where no sample is.
    """
    easy = (losses.detach() < threshold).to(losses.dtype)
    return easy @ losses / easy.sum().clamp_min(1)


def threshold(first: float, share: float) -> float:
    """At this share of the training: the first one, times 1.3 in each of 20 rounds.

    Kumar et al. take the first such that half of the samples are chosen, and the same factor.
    """
    return float(first * GROWTH ** int(share * ROUNDS))


def median(losses: Tensor) -> float:
    """Half of the samples lie below it."""
    return float(torch.quantile(losses.detach().double().cpu(), 0.5))
