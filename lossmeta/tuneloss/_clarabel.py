"""Clarabel: an interior-point method."""

from __future__ import annotations

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._refinement import Stopped


def nearest_point(constraints: Array, low: Array, high: Array, guess: Array) -> tuple[Array, Array]:
    """See :data:`lossmeta.tuneloss._refinement.NearestPoint`."""
    import clarabel
    from scipy import sparse

    n = constraints.shape[1]
    below, above = np.isfinite(low), np.isfinite(high)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    solver = clarabel.DefaultSolver(
        sparse.identity(n, format="csc"),
        np.zeros(n),
        sparse.csc_matrix(np.vstack([-constraints[below], constraints[above]])),
        np.concatenate([-low[below], high[above]]),
        [clarabel.NonnegativeConeT(int(below.sum() + above.sum()))],
        settings,
    )
    solution = solver.solve()
    if str(solution.status) not in ("Solved", "AlmostSolved", "InsufficientProgress"):
        raise Stopped(str(solution.status))
    dual = np.array(solution.z)
    multipliers = np.zeros(len(low))
    multipliers[below] += dual[: below.sum()]
    multipliers[above] -= dual[below.sum() :]
    return np.array(solution.x), multipliers
