"""Answers to a program from a solver of its simplest form, which is to find the nearest point of a polyhedron."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._program import RELATIVE_GAP, Answer, Program, Proposal, certified

# nearest_point(B [r, n], low [r], high [r]): the z [n] of least length with low <= B z <= high, and multipliers [r],
# positive at low and negative at high, of which B' multipliers = z. It raises Stopped.
NearestPoint = Callable[[Array, Array, Array], tuple[Array, Array]]

# An ill-conditioned cost takes damping, of which repetition leaves nothing.
DAMPINGS = (0.0, 1e-6, 1e-4)
REPETITIONS = 6
# So exact that another repetition would be waste.
EXACT = 1e-3 * RELATIVE_GAP, 1e-16


class Stopped(Exception):
    """A solver says why it has no answer."""


def refined(program: Program, nearest_point: NearestPoint) -> Answer:
    r"""Minimises the program's cost by proximal steps.

    A step from y minimises :math:`f(y + p) + \delta^2 |p|^2`. With R'R = F'F + δ² I and z = R (p - p₀), where p₀ is the
    minimiser without constraints, this is the least |z|² under the constraints. The gradient that p₀ comes from is that
    of F at y, so that another step also mends what rounding has left.

    Raises:
        Stopped: where nearest_point did, before there was an answer. An answer need not be certified.
    """
    cost, n = program.cost, len(program.lower)
    best: Answer | None = None
    reason = "no root of the cost"
    for damping in DAMPINGS:
        root = cost.root(damping) if damping else cost.exact_root
        if root is None:
            continue
        constraints = np.vstack([root.inverse, program.rows @ root.inverse])
        y = program.nearest
        for _ in range(REPETITIONS):
            centre = y - root.solve(root.solve(cost.slope(y), transposed=True)) / 2
            low = np.concatenate([program.lower - centre, program.right - program.rows @ centre])
            high = np.concatenate([program.upper - centre, np.full(len(program.right), np.inf)])
            try:
                z, multipliers = _nearest_point(constraints, low, high, nearest_point)
            except Stopped as stopped:
                reason = str(stopped)
                break
            proposed = np.clip(centre + root.solve(z), program.lower, program.upper)
            answer = certified(program, Proposal(proposed, 2 * multipliers[n:]))
            y = answer.values
            if best is None or _worth(answer) < _worth(best):
                best = answer
            if best.certificate.holds and best.certificate.gap <= EXACT[0] * best.certificate.cost + EXACT[1]:
                return best
        if best is not None and best.certificate.holds:
            return best
    if best is None:
        raise Stopped(reason)
    return best


def _nearest_point(
    constraints: Array, low: Array, high: Array, nearest_point: NearestPoint
) -> tuple[Array, Array]:
    if (low <= 0).all() and (high >= 0).all():
        return np.zeros(constraints.shape[1]), np.zeros(len(low))
    return nearest_point(constraints, low, high)


def _worth(answer: Answer) -> tuple[bool, float]:
    return not answer.certificate.holds, answer.certificate.gap
