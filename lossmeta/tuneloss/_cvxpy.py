"""CVXPY: LearnLoss's program as one would write it down."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from lossmeta.tuneloss._program import Answer, Program, Proposal, certified
from lossmeta.tuneloss._refinement import Stopped


def solve(program: Program) -> Answer:
    """By Clarabel.

    Raises:
        Stopped: for a status that is not optimal. An answer need not be certified.
    """
    import cvxpy

    cp: Any = cvxpy  # its annotations do not know that comparing expressions makes constraints

    y = cp.Variable(len(program.lower))
    cost = cp.sum_squares(program.cost.factor @ y + program.cost.offset)
    is_argmin = program.rows @ y >= program.right
    below, above = np.isfinite(program.lower), np.isfinite(program.upper)
    in_box = [y[below] >= program.lower[below], y[above] <= program.upper[above]]
    problem = cp.Problem(cp.Minimize(cost), [is_argmin, *in_box])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")  # its certificate will say
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    except cp.SolverError as error:
        raise Stopped(str(error)) from error
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise Stopped(problem.status)
    values = np.clip(y.value, program.lower, program.upper)
    return certified(program, Proposal(values, np.asarray(is_argmin.dual_value)))
