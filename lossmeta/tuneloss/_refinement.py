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
EXACT = 1e-2 * RELATIVE_GAP, 1e-16


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
        inverse = cost.inverse_root(damping) if damping else cost.exact_inverse_root
        if inverse is None:
            continue
        constraints = np.vstack([inverse, program.rows @ inverse])
        y = program.nearest
        for _ in range(REPETITIONS):
            centre = y - inverse @ (inverse.T @ cost.slope(y)) / 2
            low = np.concatenate([program.lower - centre, program.right - program.rows @ centre])
            high = np.concatenate([program.upper - centre, np.full(len(program.right), np.inf)])
            try:
                z, multipliers = nearest_point(constraints, low, high)
            except Stopped as stopped:
                reason = str(stopped)
                break
            y = np.clip(centre + inverse @ z, program.lower, program.upper)
            answer = certified(program, Proposal(y, 2 * multipliers[n:]))
            if best is None or _worth(answer) < _worth(best):
                best = answer
            if best.certificate.holds and best.certificate.gap <= EXACT[0] * best.certificate.cost + EXACT[1]:
                return best
        if best is not None and best.certificate.holds:
            return best
    if best is None:
        raise Stopped(reason)
    return best


def _worth(answer: Answer) -> tuple[bool, float]:
    return not answer.certificate.holds, answer.certificate.gap
