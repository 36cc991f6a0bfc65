"""Answers to a program from a solver of its simplest form, which is to find the nearest point of a polyhedron."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._least_squares import Root
from lossmeta.tuneloss._program import RELATIVE_GAP, Answer, Program, Proposal, certified

# nearest_point(B [r, n], low [r], high [r], guess [r]): the z [n] of least length with low <= B z <= high, and
# multipliers [r] with B' multipliers = z, positive at low and negative at high. The guess is of the multipliers; 0 is
# none. It raises Stopped.
NearestPoint = Callable[[Array, Array, Array, Array], tuple[Array, Array]]

# An ill-conditioned cost takes damping, of which repetition leaves nothing.
DAMPINGS = (0.0, 1e-6, 1e-4)
REPETITIONS = 6
# So exact that another repetition would be waste: of the cost, and besides.
EXACT = 1e-2 * RELATIVE_GAP, 1e-16


class Stopped(Exception):
    """A solver says why it has no answer."""


def refined(program: Program, nearest_point: NearestPoint) -> Answer:
    """The program's answer, from as many steps as it takes to be certain of it.

    Raises:
        Stopped: where nearest_point did, before there was an answer. An answer need not be certified.
    """
    best: Answer | None = None
    reason = "that the cost has no root"
    for damping in DAMPINGS:
        root = program.cost.root(damping) if damping else program.cost.exact_root
        if root is None:
            continue
        try:
            for answer in islice(_proximal_steps(program, root, nearest_point), REPETITIONS):
                before, best = best, answer if best is None else min(best, answer, key=_worth)
                gap, cost = best.certificate.gap, best.certificate.cost
                stalls = before is not None and answer.certificate.gap > before.certificate.gap / 2
                if best.certificate.holds and (stalls or gap <= EXACT[0] * cost + EXACT[1]):
                    return best
        except Stopped as stopped:
            reason = str(stopped)
        if best is not None and best.certificate.holds:
            return best
    if best is None:
        raise Stopped(reason)
    return best


def _proximal_steps(program: Program, root: Root, nearest_point: NearestPoint) -> Iterator[Answer]:
    r"""Each minimises :math:`f(x) + \delta^2 |x - y|^2` over x, where y is the answer before.

    With R'R = F'F + δ² I and z = R (x - c), where c is the minimiser without constraints, that is the least |z|² under
    the constraints.
    """
    n = len(program.lower)
    constraints = np.vstack([root.inverse, program.rows @ root.inverse])
    y, multipliers = program.nearest, np.zeros(len(constraints))
    while True:
        centre = root.minimiser(y)
        low = np.concatenate([program.lower - centre, program.right - program.rows @ centre])
        high = np.concatenate([program.upper - centre, np.full(len(program.right), np.inf)])
        if (low <= 0).all() and (high >= 0).all():
            z, multipliers = np.zeros(n), np.zeros(len(constraints))
        else:
            z, multipliers = nearest_point(constraints, low, high, multipliers)
        proposed = np.clip(centre + root.solve(z), program.lower, program.upper)
        answer = certified(program, Proposal(proposed, 2 * multipliers[n:]))
        y = answer.values
        yield answer


def _worth(answer: Answer) -> tuple[bool, float]:
    return not answer.certificate.holds, answer.certificate.gap
