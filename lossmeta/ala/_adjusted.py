"""What the spaces for classes do to the cross-entropy."""

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


def generalised(surprise: Tensor, q: Tensor) -> Tensor:
    """``(1 - exp(-q s)) / q``, and s itself for q = 0."""
    q = q.clamp_min(1e-12)
    return -torch.expm1(-q * surprise) / q
