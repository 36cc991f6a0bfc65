"""How two methods compare that had the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Value = float | None
CONFIDENCE = 0.95
# Differences that agree to this share of the values are equal but for rounding.
ROUNDING = 1e-12
# Squares of what is larger overflow: such a number has diverged.
LARGEST = 1e150


@dataclass(frozen=True)
class Summary:
    """The trials of one method.

    Attributes:
        count: of trials.
        mean: of those that did not diverge; None without any.
        deviation: sample standard deviation; None below two.
        diverged: how many did.
    """

    count: int
    mean: Value
    deviation: Value
    diverged: int


@dataclass(frozen=True)
class Comparison:
    """One method minus another, seed by seed.

    Where a trial diverged there is no difference to average: ``wins``, ``ties`` and ``wilcoxon`` count it as worse than
    every number, and what needs the mean is None.

    Attributes:
        count: of pairs.
        difference: mean.
        deviation: sample standard deviation of the differences.
        interval: 95 % confidence interval of the mean difference, Student's t.
        wins: pairs in which the method is better.
        ties: pairs in which both are equal.
        t_test: two-sided p of the paired t-test; None where all differences are equal.
        wilcoxon: two-sided p of Wilcoxon's signed-rank test, exact, without the ties; None where all are ties.
    """

    count: int
    difference: Value
    deviation: Value
    interval: tuple[float, float] | None
    wins: int
    ties: int
    t_test: Value
    wilcoxon: Value


def summary(values: Sequence[Value]) -> Summary:
    """Mean and deviation of what did not diverge."""
    finite = [value for value in values if value is not None]
    return Summary(
        len(values),
        statistics.fmean(finite) if finite else None,
        statistics.stdev(finite) if len(finite) > 1 else None,
        len(values) - len(finite),
    )


def compare(values: Sequence[Value], reference: Sequence[Value], *, higher_is_better: bool) -> Comparison:
    """Compares paired values; None is a trial that diverged.

    Args:
        values: of the method, one per seed.
        reference: of what it is compared with, in the same order.
        higher_is_better: decides who wins; differences keep their sign.

    Raises:
        ValueError: where the lengths differ.

    Example:
        >>> error = compare([0.10, 0.12, 0.11], [0.15, 0.13, 0.14], higher_is_better=False)
        >>> error.wins, round(error.difference, 3), round(error.t_test, 3), error.wilcoxon
        (3, -0.03, 0.122, 0.25)
    """
    both = list(zip(values, reference, strict=True))
    finite = [x for pair in both for x in pair if x is not None]
    unit = ROUNDING * max(map(abs, finite), default=0.0) or 1.0
    worst = -math.inf if higher_is_better else math.inf
    # In steps so small that only rounding is lost: equal differences shall have equal ranks.
    steps = [
        0 if a == b else worst if a is None else -worst if b is None else round((a - b) / unit)
        for a, b in both
    ]
    sign = 1 if higher_is_better else -1
    mean = deviation = interval = t_test = None
    differences = [a - b for a, b in both if a is not None and b is not None]
    if both and len(differences) == len(both):
        mean = statistics.fmean(differences)
        if len(both) > 1:
            deviation = statistics.stdev(differences)
            interval, t_test = _student(mean, deviation, len(both), constant=deviation <= unit)
    return Comparison(
        count=len(both),
        difference=mean,
        deviation=deviation,
        interval=interval,
        wins=sum(sign * step > 0 for step in steps),
        ties=steps.count(0),
        t_test=t_test,
        wilcoxon=_wilcoxon(steps),
    )


def holm(p_values: Sequence[Value]) -> list[Value]:
    r"""Corrects p values for their number, so that one below a level is due to chance no more often than that.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    of the m values in ascending order. What is None counts as 1, and stays None.

    Sources:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03, None])
        [0.04, 0.09, 0.09, None]
    """
    order = sorted(range(len(p_values)), key=lambda i: 1.0 if p_values[i] is None else p_values[i])  # type: ignore[arg-type,return-value]
    found: list[Value] = [None] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        p = p_values[i]
        if p is not None:
            largest = max(largest, min(1.0, (len(p_values) - place) * p))
            found[i] = largest
    return found


def _student(
    mean: float, deviation: float, count: int, *, constant: bool
) -> tuple[tuple[float, float], Value]:
    """The confidence interval of a mean, and p of its being 0, from Student's t distribution."""
    from scipy.special import stdtr, stdtrit

    error = deviation / math.sqrt(count)
    half = error * float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    interval = mean - half, mean + half
    return interval, None if constant else 2 * float(stdtr(count - 1, -abs(mean) / error))


def _wilcoxon(differences: Sequence[float]) -> Value:
    """Exact for any number of pairs and for equal ranks: all 2ⁿ signs are counted by the sum of ranks they give."""
    signed = sorted((d for d in differences if d), key=abs)
    if not signed:
        return None
    # Twice the ranks, so that the mean of neighbouring ranks stays whole.
    ranks: list[int] = []
    for d in signed:
        below = sum(abs(e) < abs(d) for e in signed)
        equal = sum(abs(e) == abs(d) for e in signed)
        ranks.append(2 * below + equal + 1)
    total = sum(ranks)
    ways = [1] + [0] * total
    for rank in ranks:
        for s in range(total, rank - 1, -1):
            ways[s] += ways[s - rank]
    positive = sum(rank for rank, d in zip(ranks, signed, strict=True) if d > 0)
    tail = sum(ways[: min(positive, total - positive) + 1])
    return min(1.0, 2 * tail / 2 ** len(ranks))
