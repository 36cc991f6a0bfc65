"""The cross-entropy of all children at once, with what the spaces for classes do to it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lossmeta.ops.adjusted_cross_entropy import adjusted_cross_entropy, with_slope

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


def fused(logits: Tensor, labels: Tensor, adjusted: Adjusted) -> Tensor:
    """The mean loss of logits ``[N, C]`` with labels ``[N]``, in one pass."""
    return adjusted_cross_entropy(
        logits,
        labels,
        shift=adjusted.shift,
        exponent=adjusted.exponent,
        smoothing=adjusted.smoothing,
        ignore_index=IGNORED,
    )


def value_and_slope(logits: Tensor, labels: Tensor, adjusted: Adjusted) -> tuple[Tensor, Tensor]:
    """The mean losses ``[B]`` of logits ``[B, N, C]`` with labels ``[N]``, and their derivative, in one pass."""
    losses, slope = with_slope(
        logits,
        labels,
        shift=adjusted.shift,
        exponent=adjusted.exponent,
        smoothing=adjusted.smoothing,
        ignore_index=IGNORED,
    )
    return losses, slope.to(logits.dtype)


def generalised(surprise: Tensor, q: Tensor) -> Tensor:
    """``(1 - exp(-q s)) / q``, and s itself for q = 0."""
    q = q.clamp_min(1e-12)
    return -torch.expm1(-q * surprise) / q
