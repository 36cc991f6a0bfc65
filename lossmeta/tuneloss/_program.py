"""LearnLoss's quadratic program for one guess of the argmin, and what proves an answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._least_squares import SumOfSquares

VIOLATION = 1e-8  # of a constraint that is allowed
RELATIVE_GAP = 1e-6  # that is allowed, of the cost
ABSOLUTE_GAP = 1e-10  # that is allowed besides
# How far from an answer cheaper points are looked for, in sizes of the answer, where the box does not end before.
REACH = 1e3
AT_BOUND = 1e-12  # is what is as near to it, in sizes of the answer


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
        gap: by how much a point that satisfies the constraints can be cheaper at most; 1e-6 of the cost and 1e-10. It
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
        """Whether violation and gap are small enough."""
        return self.violation <= VIOLATION and self.gap <= RELATIVE_GAP * self.cost + ABSOLUTE_GAP


@dataclass(frozen=True, eq=False)
class Answer:
    """A proposal, and what was verified of it."""

    values: Array
    certificate: Certificate


def certified(program: Program, proposal: Proposal) -> Answer:
    """The proposal, improved in what costs nothing, with its certificate, whatever that says."""
    proposal = replace(proposal, values=_best_alone(program, proposal.values))
    y, cost = proposal.values, program.cost(proposal.values)
    slack = program.rows @ y - program.right
    certificate = Certificate(
        violation=max(0.0, float(-slack.min(initial=0.0))),
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
    size = max(1.0, float(np.abs(y).max(initial=0.0)))
    room = np.where(residual > 0, y - program.lower, program.upper - y)
    least = np.abs(residual) * np.minimum(room, REACH * size)
    found = float(least.sum())
    root = program.cost.exact_root
    if root is not None:
        held = room <= AT_BOUND * size
        loose = root.solve(np.where(held, 0.0, residual), transposed=True)
        found = min(found, float(least[held].sum() + loose @ loose / 4))
    return found + float(multipliers @ np.abs(slack))


def _best_alone(program: Program, y: Array) -> Array:
    """With those unknowns at their best that no row constrains, as α: rounding counts where their bound is infinite."""
    moved, residual = y.copy(), program.cost.factor @ y + program.cost.offset
    for j in np.flatnonzero(~program.rows.any(axis=0)):
        column = program.cost.factor[:, j]
        best = moved[j] - column @ residual / (column @ column)
        best = min(max(best, program.lower[j]), program.upper[j])
        residual += column * (best - moved[j])
        moved[j] = best
    return moved
