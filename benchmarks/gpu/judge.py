"""Compares an operator's results with float64 and with PyTorch's own composition, and bit for bit with one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0  # times the error of PyTorch's composition
# Of the largest element: where PyTorch's own error is a few roundings, which of two sums comes nearer is luck.
ROUNDINGS = 8
CHUNK = 2**26  # elements that are compared at once: the differences of a whole result may not fit into memory
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verdict:
    """Of one result: ``error`` and ``allowed`` are absolute, the largest over its elements."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not

    @property
    def share(self) -> float:
        """Of what is allowed; infinite where it is not, or the error is no number."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.allowed if self.allowed > 0 else math.inf if self.error > 0 else 0.0


def judge(
    names: Sequence[str],
    ours: Sequence[Tensor],
    theirs: Iterable[Sequence[Tensor]],
    expected: Sequence[Tensor],
    precision: torch.dtype,
    floors: Mapping[str, float],
) -> list[Verdict]:
    """A verdict on each result.

    Args:
        names: of the results.
        ours: of the operator.
        theirs: of PyTorch's composition in the same precision, several times: the largest error counts.
        expected: in float64.
        precision: the dtype in which both compute. Some roundings in it are always allowed, and one of the result.
        floors: by name, the relative error that the operator's documentation states, which is allowed too.
    """
    worst = [0.0] * len(names)
    for results in theirs:  # one at a time: they may be large
        errors = [largest(t, e)[0] for t, e in zip(results, expected, strict=True)]
        worst = [max(w, error) for w, error in zip(worst, errors, strict=True)]
    verdicts = []
    for name, o, their_error, e in zip(names, ours, worst, expected, strict=True):
        if o.shape != e.shape:
            verdicts.append(Verdict(f"{name} of shape {list(o.shape)}", math.nan, 0.0))
            continue
        error, scale = largest(o, e)
        allowed = FACTOR * max(their_error, roundings(o.dtype, precision) * scale)
        allowed = max(allowed, floors.get(name, 0.0) * scale) + half_spacing_at_zero(o.dtype)
        verdicts.append(Verdict(name, error, allowed))
    return verdicts


def roundings(result: torch.dtype, precision: torch.dtype) -> float:
    """The relative error of them; none where the result is counted."""
    if not result.is_floating_point:
        return 0.0
    return max(ROUNDINGS * torch.finfo(precision).eps, torch.finfo(result).eps)


def half_spacing_at_zero(result: torch.dtype) -> float:
    """The error of rounding to the nearest subnormal number, which a factor of PyTorch's own error may not cover."""
    if not result.is_floating_point:
        return 0.0
    limits = torch.finfo(result)
    return limits.smallest_normal * limits.eps / 2


def largest(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, NaN if one is, and the largest magnitude that is expected."""
    maxima = [
        torch.stack([(a.double() - e.double()).abs().max(), e.double().abs().max()])
        for a, e in zip(actual.reshape(-1).split(CHUNK), expected.reshape(-1).split(CHUNK), strict=True)
        if a.numel()
    ]
    if not maxima:
        return 0.0, 0.0
    error, scale = torch.stack(maxima).amax(0).tolist()
    return error, scale


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        a.dtype == e.dtype and torch.equal(a.view(BITS[a.element_size()]), e.view(BITS[e.element_size()]))
        for a, e in zip(actual, expected, strict=True)
    )
