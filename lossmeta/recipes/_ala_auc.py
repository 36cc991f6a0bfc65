"""Surrogates of areas under curves, for classes as one against the rest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pairwise_auc_roc(scores: Tensor, labels: Tensor) -> Tensor:
    r"""Hinge of all pairs of a positive and a negative sample, which bounds one minus the area under the ROC curve.

    .. math:: \frac{1}{|P| |N|} \sum_{i \in P} \sum_{j \in N} \max(0, 1 - (s_i - s_j))

    for each class that has both in the batch, and then their mean (Rakotomamonjy, "Optimizing Area Under ROC Curve with
    SVMs", 2004).

    Args:
        scores: of each class against the rest, ``[N, C]``.
        labels: ``[N]``.
    """
    positive = F.one_hot(labels, scores.shape[1]).T.to(scores.dtype)  # [C, N]
    s = scores.T
    pairs = positive[:, :, None] * (1 - positive)[:, None, :]
    hinge = (1 - (s[:, :, None] - s[:, None, :])).clamp_min(0)
    count = pairs.sum((1, 2))
    each = (hinge * pairs).sum((1, 2)) / count.clamp_min(1)
    return each.sum() / (count > 0).sum().clamp_min(1)


class AreaUnderPrecisionRecall(nn.Module):
    r"""The area under the precision-recall curve as recalls at fixed precisions, each a saddle point.

    A precisions :math:`\alpha` lie evenly between the share of positives :math:`\pi` and 1, each with a threshold b of
    its own. There the share of positives that are missed is lowered subject to the precision, which
    holds where :math:`\alpha \, \mathrm{FP} \le (1 - \alpha) \, \mathrm{TP}`. With
    :math:`\ell(z) = \log_2(1 + e^{-z})` above the step function,
    :math:`L^+ = \frac1n \sum_{y=1} \ell(s - b)` and :math:`L^- = \frac1n \sum_{y=0} \ell(b - s)`

    .. math:: \min_{s, b} \max_{\lambda \ge 0} \; L^+ + \lambda \bigl(\alpha L^- + (1 - \alpha) (L^+ - \pi)\bigr)

    and of classes and precisions the mean (Eban et al., "Scalable Learning of Non-Decomposable Objectives", 2017; their
    code has the same constraint and surrogate).

    Args:
        shares: of the positives of each class, ``[C]``.
        precisions: A.

    Attributes:
        threshold: b, ``[C, A]``; trains with the model.
        multiplier: :math:`\lambda`, ``[C, A]``; moved by :meth:`ascend`.
    """

    shares: Tensor
    precisions: Tensor
    multiplier: Tensor

    def __init__(self, shares: Tensor, precisions: int = 10) -> None:
        super().__init__()
        steps = torch.arange(1, precisions + 1, dtype=shares.dtype, device=shares.device) / (precisions + 1)
        self.register_buffer("shares", shares[:, None])
        self.register_buffer("precisions", self.shares + (1 - self.shares) * steps)
        self.register_buffer("multiplier", torch.ones_like(self.precisions))
        self.threshold = nn.Parameter(torch.zeros_like(self.precisions))
        self.violation: Tensor | None = None

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Of scores of each class against the rest ``[N, C]`` and labels ``[N]``."""
        positive = F.one_hot(labels, scores.shape[1]).to(scores.dtype)[:, :, None]
        beyond = scores[:, :, None] - self.threshold
        missed = (positive * F.softplus(-beyond)).mean(0) / math.log(2)
        false = ((1 - positive) * F.softplus(beyond)).mean(0) / math.log(2)
        violation = self.precisions * false + (1 - self.precisions) * (missed - self.shares)
        self.violation = violation.detach()
        return (missed + self.multiplier * violation).mean()

    @torch.no_grad()
    def ascend(self, rate: float) -> None:
        """Moves the multipliers along their derivative at the last batch."""
        if self.violation is not None:
            self.multiplier.add_(rate * self.violation).clamp_(min=0)
