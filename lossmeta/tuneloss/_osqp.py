"""OSQP: the alternating direction method of multipliers."""

from __future__ import annotations

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._refinement import Stopped


def nearest_point(constraints: Array, low: Array, high: Array, guess: Array) -> tuple[Array, Array]:
    """See :data:`lossmeta.tuneloss._refinement.NearestPoint`."""
    import osqp
    from scipy import sparse

    n = constraints.shape[1]
    solver = osqp.OSQP()
    solver.setup(
        sparse.identity(n, format="csc"),
        np.zeros(n),
        sparse.csc_matrix(constraints),
        low,
        high,
        verbose=False,
        polishing=True,
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=20_000,
    )
    solver.warm_start(y=-guess)
    result = solver.solve(raise_error=False)
    status = str(result.info.status)
    if "interrupted" in status:  # it takes the signal for itself
        raise KeyboardInterrupt
    if not status.startswith("solved"):
        raise Stopped(status)
    return np.array(result.x), -np.array(result.y)
