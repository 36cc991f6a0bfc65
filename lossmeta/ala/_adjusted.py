"""The cross-entropy of all children at once, with what the spaces for classes do to it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Adjusted:
    """A cross-entropy of logits, moved, made robust and smoothed; each for one child, or with a dimension B before.

    Attributes:
        shift: added to the logits, ``[C]``.
        exponent: q of the generalised cross-entropy, ``[]``.
        smoothing: of the labels, ``[]``.
    """

    shift: Tensor | None = None
    exponent: Tensor | None = None
    smoothing: Tensor | None = None

    def joined(self, other: Adjusted) -> Adjusted | None:
        """Both, unless they do the same."""
        found = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None:
                return None
            found[field.name] = theirs if mine is None else mine
        return Adjusted(**found)


@torch.no_grad()
def value_and_slope(logits: Tensor, labels: Tensor, adjusted: Adjusted) -> tuple[Tensor, Tensor]:
    r"""The mean losses ``[B]`` of logits ``[B, N, C]`` with labels ``[N]``, and their derivative.

    With :math:`p = \mathrm{softmax}(x + \mathrm{shift})` and :math:`s = -\log p_y` a sample costs
    :math:`(1 - e^{-qs}) / q + \varepsilon (\frac1C \sum_c -\log p_c - s)`, and its derivative in the logits is
    :math:`e^{-qs} p - (e^{-qs} - \varepsilon) 1_y - \varepsilon / C`.
    """
    x = logits.float() if logits.dtype != torch.float64 else logits
    if adjusted.shift is not None:
        x = x + adjusted.shift[:, None]
    # Not log_softmax, which is slow for few classes, and whose exponentials would be taken again.
    x = x - x.amax(2, keepdim=True)
    p = x.exp()
    norm = p.sum(2, keepdim=True)
    p /= norm
    log_p = x - norm.log()
    counts = labels != IGNORED
    place = labels.where(counts, 0).expand(len(x), -1)[..., None]
    surprise = -log_p.gather(2, place)[..., 0]
    losses, weight = surprise, torch.ones_like(surprise)
    if adjusted.exponent is not None:
        q = adjusted.exponent[:, None]
        weight = (-q * surprise).exp()
        losses = generalised(surprise, q)
    slope = p * weight[..., None]
    if adjusted.smoothing is not None:
        epsilon = adjusted.smoothing[:, None]
        losses = losses + epsilon * (-log_p.mean(2) - surprise)
        weight = weight - epsilon
        slope -= epsilon[..., None] / x.shape[2]
    slope.scatter_add_(2, place, -weight[..., None])
    share = counts / counts.sum()
    slope *= share[:, None]
    return (losses.where(counts, 0) * share).sum(1), slope.to(logits.dtype)


def generalised(surprise: Tensor, q: Tensor) -> Tensor:
    """``(1 - exp(-q s)) / q``, and s itself for q = 0."""
    q = q.clamp_min(1e-12)
    return -torch.expm1(-q * surprise) / q
