"""LearnLoss's quadratic program for one guess of the argmin, and what proves an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._least_squares import SumOfSquares

VIOLATION = 1e-8  # of a constraint that is allowed
RELATIVE_GAP = 1e-7  # that is allowed, of the cost
ABSOLUTE_GAP = 1e-11  # that is allowed besides
# How far from an answer cheaper points are looked for, in sizes of the answer, where the box does not end before.
REACH = 1e3


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise cost(y) subject to rows y >= right and lower <= y <= upper, all of it well scaled.

    Attributes:
        cost: of n unknowns.
        rows: [r, n].
        right: [r].
        lower: [n]; -inf for none.
        upper: [n]; inf for none.
    """

    cost: SumOfSquares
    rows: Array
    right: Array
    lower: Array
    upper: Array

    @property
    def nearest(self) -> Array:
        """The point of the box that is nearest to 0, [n]."""
        return np.clip(0.0, self.lower, self.upper)

    def relaxed(self, slack: float) -> Program:
        """With rows y >= right - slack."""
        return replace(self, right=self.right - slack)


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a solver says: unknowns [n] inside the box, and multipliers [r] of the rows, which prove it."""

    values: Array
    multipliers: Array


@dataclass(frozen=True)
class Certificate:
    """What was verified of an answer, whichever solver gave it, in scaled units: columns of the cost and rows of the
    constraints have length 1, and the least point of the box has size 1.

    Attributes:
        violation: of the constraint that is violated most; at most 1e-8.
        gap: by how much a point that satisfies the constraints can be cheaper at most; 1e-7 of the cost and 1e-11. It
            is proven within a distance of 1000 sizes of the answer, or to the ends of the box.
        cost: in scaled units.
        unknowns: that are not fixed; α is one.
        rank: of the cost in those. Where it is lower, several answers may cost the same; the one near the point of the
            box that is nearest to 0 was taken.
    """

    violation: float
    gap: float
    cost: float
    unknowns: int
    rank: int

    @property
    def holds(self) -> bool:
        return self.violation <= VIOLATION and self.gap <= RELATIVE_GAP * self.cost + ABSOLUTE_GAP


@dataclass(frozen=True, eq=False)
class Answer:
    """A proposal, and what was verified of it."""

    values: Array
    certificate: Certificate


def certified(program: Program, proposal: Proposal) -> Answer:
    """The proposal with its certificate, whatever that says."""
    y, cost = proposal.values, program.cost(proposal.values)
    slack = program.rows @ y - program.right
    certificate = Certificate(
        violation=float(-slack.min(initial=0.0)),
        gap=min(cost, _gap(program, proposal, slack)),  # no cost is negative
        cost=cost,
        unknowns=len(y),
        rank=program.cost.rank,
    )
    return Answer(y, certificate)


def _gap(program: Program, proposal: Proposal, slack: Array) -> float:
    r"""A bound of f(y) - f(x) over all x that satisfy the constraints.

    With multipliers :math:`\mu \ge 0` of the rows and the residual :math:`r = \nabla f(y) - A' \mu`, and p = x - y,

    .. math:: f(x) - f(y) = \nabla f(y)' p + |F p|^2 \ge -\mu' (A y - b) + r' p + |F p|^2.

    What r' p can be at least follows from the box, or, without its help, from :math:`|F p|^2`.
    """
    y, multipliers = proposal.values, proposal.multipliers.clip(0)
    residual = program.cost.slope(y) - program.rows.T @ multipliers
    reach = REACH * max(1.0, float(np.abs(y).max(initial=0.0)))
    room = np.where(residual > 0, y - program.lower, program.upper - y)
    least = np.where(residual == 0, 0.0, np.abs(residual) * np.minimum(room, reach))
    found = float(least.sum())
    inverse = program.cost.exact_inverse_root
    if inverse is not None:
        # Components that the bounds hold need no help: their part of r' p is not negative.
        loose = inverse.T @ np.where(least == 0, 0.0, residual)
        found = min(found, float(loose @ loose) / 4)
    return found + float(multipliers @ np.abs(slack))
