"""Confidence intervals of shares and of differences of means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Interval = tuple[float, float]
QUANTILE = 1.959963984540054  # of the normal distribution, for 95 % on both sides


def wilson(share: float, count: float) -> Interval:
    """Of a binomial share, Wilson (1927); ``count`` need not be whole."""
    z = QUANTILE**2 / count
    centre = (share + z / 2) / (1 + z)
    half = math.sqrt(z * share * (1 - share) + z**2 / 4) / (1 + z)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_of_means(first: Tensor, second: Tensor) -> tuple[float, Interval]:
    """First minus second, with Welch's variance and the normal's quantile; (-inf, inf) below two samples."""
    difference = float(first.mean() - second.mean())
    if min(len(first), len(second)) < 2:
        return difference, (-math.inf, math.inf)
    half = QUANTILE * math.sqrt(float(first.var() / len(first) + second.var() / len(second)))
    return difference, (difference - half, difference + half)


def z_score(values: Tensor) -> float:
    """How many standard errors the mean lies above 0; 0 where it cannot be told."""
    if len(values) < 2:
        return 0.0
    error = float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    rounding = torch.finfo(values.dtype).eps
    return mean / max(error, rounding) if abs(mean) > rounding else 0.0
