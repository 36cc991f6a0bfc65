"""DAQP: a dense dual active-set method."""

from __future__ import annotations

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._refinement import Stopped

INFINITE = 1e30  # what DAQP takes for it
AT_HIGH, AT_LOW = 1, 3  # a constraint that it should begin with
FLAGS = {
    -1: "infeasible",
    -2: "cycling",
    -3: "unbounded",
    -4: "iteration limit",
    -5: "not convex",
    -7: "time limit",
}


def nearest_point(constraints: Array, low: Array, high: Array, guess: Array) -> tuple[Array, Array]:
    """See :data:`lossmeta.tuneloss._refinement.NearestPoint`."""
    import daqp

    z, _, flag, info = daqp.solve(
        np.eye(constraints.shape[1]),
        np.zeros(constraints.shape[1]),
        np.ascontiguousarray(constraints),
        np.minimum(high, INFINITE),
        np.maximum(low, -INFINITE),
        np.where(guess > 0, AT_LOW, np.where(guess < 0, AT_HIGH, 0)).astype(np.int32),
        primal_tol=1e-11,
    )
    if flag != 1:
        raise Stopped(FLAGS.get(flag, f"exit flag {flag}"))
    return z, -info["lam"]
