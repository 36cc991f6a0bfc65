"""LearnLoss's quadratic program from Gram matrices, against the same program by CVXPY and by its solvers alone."""

from __future__ import annotations

from typing import Any

import clarabel
import cvxpy as cp
import numpy as np
import osqp
import pytest
from scipy import sparse

from lossmeta.tuneloss import learn_loss

# Models and features. It is the host's work wherever the model is.
SIZES: dict[str, list[tuple[int, int]]] = {"cpu": [(10, 5), (50, 101), (50, 501)], "cuda": [], "dry": []}
Given = tuple[np.ndarray, np.ndarray, np.ndarray, float]


def problem(models: int, k: int) -> Given:
    """Errors, features, Gram matrices and ε. About half of the components end at their bound, and one or two other
    models tie with the best. The columns are well scaled, as solvers want it."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 1, k) * (rng.random(k) < 0.5)
    truth[0] = 1.0
    features = rng.uniform(0.5, 1.5, (models, k))
    errors = features @ truth
    errors = errors + 10 * errors.std() * rng.standard_normal(models)
    columns = rng.standard_normal((models, 20, k + 1))
    columns[:, :, -1] = columns[:, :, :-1] @ truth + 0.5 * columns[:, :, -1]
    grams = np.einsum("inj,ink->ijk", columns, columns)
    diagonal = np.einsum("ijj->j", grams)
    return errors, features, grams, float(diagonal[-1] / diagonal[:-1].sum())


def lossmeta(errors: np.ndarray, features: np.ndarray, grams: np.ndarray, eps: float) -> np.ndarray:
    k = features.shape[1]
    lower, upper = np.zeros(k), np.full(k, np.inf)
    lower[0] = upper[0] = 1.0
    found = learn_loss(errors, features, lower, upper, grams=grams, eps=eps)
    assert found.feasible == (True,)  # the others solve it once
    return found.values


def by_cvxpy(errors: np.ndarray, features: np.ndarray, grams: np.ndarray, eps: float) -> np.ndarray:
    """As one would write it down."""
    values, multiplier = cp.Variable(features.shape[1], nonneg=True), cp.Variable(nonneg=True)
    losses = features @ values
    difference = cp.hstack([values, -multiplier])
    cost = cp.sum_squares(losses - multiplier * errors) + eps * cp.quad_form(
        difference, cp.psd_wrap(grams.sum(axis=0))
    )
    best = int(np.argmin(errors))
    cp.Problem(cp.Minimize(cost), [values[0] == 1, losses[best] <= losses]).solve()
    return np.asarray(values.value)


def matrices(
    errors: np.ndarray, features: np.ndarray, grams: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hessian, constraints and their bounds, in λ and α."""
    k = features.shape[1]
    rows = np.column_stack([features, -errors])
    sign = np.append(np.ones(k), -1.0)
    hessian = 2 * (rows.T @ rows + eps * grams.sum(axis=0) * np.outer(sign, sign))
    best = int(np.argmin(errors))
    is_argmin = np.column_stack([features - features[best], np.zeros(len(errors))])
    constraints = np.vstack([np.eye(k + 1), np.delete(is_argmin, best, axis=0)])
    low, high = np.zeros(len(constraints)), np.full(len(constraints), np.inf)
    low[0] = high[0] = 1.0
    return hessian, constraints, low, high


def by_clarabel(*given: Any) -> np.ndarray:
    hessian, constraints, low, _ = matrices(*given)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(len(low) - 1)]
    program = (
        sparse.csc_matrix(np.triu(hessian)),
        np.zeros(len(hessian)),
        sparse.csc_matrix(-constraints),
        -low,
    )
    return np.array(clarabel.DefaultSolver(*program, cones, settings).solve().x)[:-1]


def by_osqp(*given: Any) -> np.ndarray:
    """To the precision of the others."""
    hessian, constraints, low, high = matrices(*given)
    solver = osqp.OSQP()
    program = (
        sparse.csc_matrix(np.triu(hessian)),
        np.zeros(len(hessian)),
        sparse.csc_matrix(constraints),
        low,
        high,
    )
    solver.setup(*program, verbose=False, polishing=True, eps_abs=1e-8, eps_rel=1e-8, max_iter=20_000)
    return np.array(solver.solve(raise_error=False).x)[:-1]


CANDIDATES = {"cvxpy": by_cvxpy, "clarabel": by_clarabel, "osqp": by_osqp, "lossmeta": lossmeta}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("size", SIZES)
def test_learn_loss(size: tuple[int, int], candidate: str, measure: Any) -> None:
    models, k = size
    given = problem(models, k)
    np.testing.assert_allclose(CANDIDATES[candidate](*given), lossmeta(*given), atol=1e-3)
    # Features and Gram matrices are read once.
    measure(
        CANDIDATES[candidate],
        lambda: given,
        operator="learn_loss",
        size=f"{models} models, {k} features",
        candidate=candidate,
        bytes_moved=8 * models * ((k + 1) ** 2 + k + 1),
    )
