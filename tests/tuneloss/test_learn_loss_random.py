"""LearnLoss on random problems: against CVXPY, and its choice of the argmin against linear programs."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest

from lossmeta.tuneloss import FiniteArgmin, finite_argmin, learn_loss
from lossmeta.tuneloss._cvxpy import solve
from lossmeta.tuneloss._inputs import gradient_factor
from lossmeta.tuneloss._statement import Statement

PROBLEMS, QUICK = 500, 60
KINDS = ("well scaled", "badly scaled", "near-equal models")
GRADIENTS = ("none", "raw", "grams")


def problem(seed: int, largest: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """All kinds with all gradients; m and k up to the largest, small ones in every second problem."""
    rng = np.random.default_rng(seed)
    kind, gradients = KINDS[seed % 3], GRADIENTS[seed // 3 % 3]
    small = seed % 2 == 0
    m = int(rng.integers(2, 1 + (12 if small else largest[0])))
    k = int(rng.integers(2, 1 + (8 if small else largest[1])))
    features, truth = rng.uniform(0.5, 2.0, (m, k)), rng.uniform(0.2, 1.0, k)
    if kind == "near-equal models":
        features = features[:1] * (1 + 1e-6 * rng.standard_normal((m, k)))
    errors = features @ truth
    noise = (0.02, 0.5, 30.0)[seed // 9 % 3]
    errors = errors + noise * errors.std() * rng.standard_normal(m)
    lower, upper = np.full(k, 0.1), np.full(k, 3.0)
    if seed % 5 == 0:
        lower[1:], upper[1:] = -np.inf, np.inf
    elif seed % 5 == 1:
        lower[1:] = 0.0
    if seed % 7:
        lower[0] = upper[0] = 1.0
    else:
        lower[0] = 0.5
    scale = 10.0 ** rng.uniform(-4, 4, k) if kind == "badly scaled" else np.ones(k)
    given = {"errors": errors, "features": features * scale, "lower": lower / scale, "upper": upper / scale}
    n = int(rng.integers(1, k + 3))
    jacobians = rng.standard_normal((m, n, k))
    slopes = jacobians @ truth + 0.5 * rng.standard_normal((m, n))
    jacobians = jacobians * scale
    if gradients == "raw":
        given |= {"gradients": slopes, "jacobians": jacobians}
    elif gradients == "grams":
        columns = np.concatenate([jacobians, slopes[:, :, None]], axis=2)
        given |= {"grams": np.einsum("inj,ink->ijk", columns, columns)}
    return given, kind


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=pytest.mark.slow if seed >= QUICK else ()) for seed in range(PROBLEMS)],
)
def test_as_cheap_as_by_cvxpy(seed: int) -> None:
    given, kind = problem(seed, (20, 24) if seed < QUICK else (100, 120))
    found = learn_loss(**given)
    assert found.solver == "daqp" or seed >= QUICK
    # The constraints, in the units of the caller.
    features, values = given["features"], found.values
    assert (values >= given["lower"]).all() and (values <= given["upper"]).all() and found.multiplier >= 0
    rows = features - features[found.matched]
    size = np.abs(rows) @ np.abs(values) + np.finfo(float).tiny
    assert (rows @ values >= -1e-8 * size).all(), kind
    # The cost, in scaled units.
    m, k = features.shape
    others = {name: given.get(name) for name in ("gradients", "jacobians", "grams")}
    second = gradient_factor("test", m, k, **others, eps="balanced")
    blocks = [np.column_stack([features, -given["errors"]]), *([] if second is None else [second])]
    statement = Statement.of(features, given["lower"], given["upper"], blocks)
    assert statement is not None
    program = statement.program(found.matched)
    assert program is not None
    unknowns = np.append(values, found.multiplier)
    direct = sum(float(np.sum((block @ unknowns) ** 2)) for block in blocks)
    assert found.cost == pytest.approx(direct, rel=1e-6, abs=1e-9 * statement.unit)
    assert found.cost / statement.unit == pytest.approx(solve(program).certificate.cost, rel=1e-6, abs=1e-9)


# ---- Theorems 2 and 3.


def finite_problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Errors that have nothing to do with the features: about half of the best models can be no argmin."""
    rng = np.random.default_rng(seed)
    m, k = int(rng.integers(2, 40)), int(rng.integers(2, 8))
    features = rng.uniform(0.1, 2.0, (m, k)) if seed % 2 else rng.standard_normal((m, k))
    lower, upper = np.full(k, 0.1), np.full(k, 5.0)
    if seed % 4 != 3:
        lower[0] = upper[0] = 1.0
    if seed % 4 == 2:
        lower[1:], upper[1:] = -np.inf, np.inf
    return rng.random(m), features, lower, upper


def by_linear_programs(
    errors: np.ndarray, features: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> list[int]:
    """The models that were tried, the last of which can be the argmin."""
    from scipy.optimize import linprog

    order = np.argsort(errors, kind="stable")
    for place, model in enumerate(order):
        rows = features[model] - features
        bounds = np.column_stack([lower, upper])
        if linprog(np.zeros(len(lower)), rows, np.zeros(len(rows)), bounds=bounds).status == 0:
            return [int(i) for i in order[: place + 1]]
    raise AssertionError("some model is the argmin")


@pytest.fixture(scope="module")
def infeasible() -> list[bool]:
    return []


@pytest.mark.parametrize("seed", range(200))
def test_chooses_the_argmin_that_linear_programs_do(seed: int, infeasible: list[bool]) -> None:
    errors, features, lower, upper = given = finite_problem(seed)
    tried = by_linear_programs(*given)
    infeasible.append(len(tried) > 1)
    exact, learned = finite_argmin(*given), learn_loss(*given)
    for found in (exact, learned):
        assert found.feasible == (False,) * (len(tried) - 1) + (True,)
        assert (found.values >= lower).all() and (found.values <= upper).all()
    assert exact.model == learned.matched == tried[-1]
    assert exact.margin > 0 and int(np.argmin(features @ exact.values)) == exact.model
    losses, size = features @ learned.values, np.abs(features) @ np.abs(learned.values)
    assert losses[learned.matched] <= losses.min() + 1e-8 * size.max()


def test_half_of_them_were_infeasible_for_the_best_model(infeasible: list[bool]) -> None:
    if len(infeasible) < 200:
        pytest.skip("not all of them ran")
    assert 80 <= sum(infeasible) <= 120


@pytest.mark.parametrize("seed", range(20))
def test_brute_force_over_directions_finds_no_better_model(seed: int) -> None:
    """Two free components, looked at in 20,000 points; the best model that is an argmin there is the one found."""
    rng = np.random.default_rng(seed)
    features, errors = rng.standard_normal((8, 3)), rng.random(8)
    lower, upper = np.array([1.0, 0.0, -2.0]), np.array([1.0, 3.0, 2.0])
    points = np.column_stack([np.ones(20_000), rng.uniform(0, 3, 20_000), rng.uniform(-2, 2, 20_000)])
    seen = set(np.argmin(points @ features.T, axis=1).tolist())
    found = finite_argmin(errors, features, lower, upper)
    assert errors[found.model] <= min(errors[i] for i in seen)
    assert found.model in seen or found.margin < 0.05  # else its part of the box is small
    assert learn_loss(errors, features, lower, upper).matched == found.model


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_model_that_is_best_for_no_loss_is_passed_over(order: tuple[int, ...]) -> None:
    """The second lies above the line between the others."""
    place = list(order)
    features = np.array([[1.0, 0.0], [0.6, 0.6], [0.0, 1.0]])[place]
    errors = np.array([0.3, 0.1, 0.2])[place]
    found: FiniteArgmin = finite_argmin(errors, features, [1.0, 0.0], [1.0, 4.0])
    assert found.model == place.index(2) and found.feasible == (False, True)
    assert found.margin == pytest.approx(np.sqrt(0.5))  # λ = (1, 0): 0 against 1, at a distance of √2
