"""The next parameters from a quadratic: the box problem, and the step in the trust region."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from lossmeta.tuneloss._box import Array, Box
from lossmeta.tuneloss.gauss_newton import box_qp, gauss_newton_step


def problem(seed: int) -> tuple[Array, Array, Array, Array]:
    """Curvatures of full and of low rank, badly scaled; the least point lies outside and inside of bounds."""
    r = np.random.default_rng(seed)
    k, m = int(r.integers(1, 30)), int(r.integers(1, 40))
    a = r.standard_normal((m, k)) * 10 ** r.uniform(-3, 3, k)
    b = a.T @ a
    size = np.sqrt(np.diag(b))
    c = r.standard_normal(k) * size * 10 ** r.uniform(-3, 2)
    return b, c, -r.random(k) / size, r.random(k) / size


@pytest.mark.parametrize("seed", range(60))
def test_optimality(seed: int) -> None:
    """In scaled entries no gradient step inside the box moves the point."""
    b, c, low, high = problem(seed)
    d = box_qp(b, c, low, high)
    assert (d >= low).all() and (d <= high).all()
    size = np.sqrt(np.diag(b))
    gradient = (b @ d + c) / size
    moved = d * size - np.clip(d * size - gradient, low * size, high * size)
    assert np.abs(moved).max() <= 1e-7 * max(1.0, np.abs(c / size).max())


@pytest.mark.parametrize("seed", range(15))
def test_same_value_as_an_interior_point_solver(seed: int) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    b, c, low, high = problem(seed)
    size = np.sqrt(np.diag(b))
    values, vectors = np.linalg.eigh(b / size / size[:, None])
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    x = cvxpy.Variable(len(c))
    cost = (c / size) @ x + cvxpy.sum_squares(root @ x) / 2
    cvxpy.Problem(cvxpy.Minimize(cost), [x >= low * size, x <= high * size]).solve(cvxpy.CLARABEL)
    reference = np.clip(x.value / size, low, high)

    def value(d: Array) -> float:
        return float(c @ d + d @ b @ d / 2)

    assert value(box_qp(b, c, low, high)) <= value(reference) + 1e-8 * max(1.0, abs(value(reference)))


@pytest.mark.parametrize("seed", range(10))
def test_against_every_active_set(seed: int) -> None:
    r = np.random.default_rng(seed)
    a = r.standard_normal((6, 4))
    b, c, low, high = a.T @ a, 3 * r.standard_normal(4), -r.random(4), r.random(4)
    best, best_value = None, np.inf
    for held in itertools.product((-1, 0, 1), repeat=4):
        d = np.where(np.array(held) < 0, low, np.where(np.array(held) > 0, high, 0.0))
        free = np.array(held) == 0
        if free.any():
            d[free] = np.linalg.solve(b[np.ix_(free, free)], -(c + b @ d)[free])
        if (d >= low - 1e-12).all() and (d <= high + 1e-12).all():
            value = c @ d + d @ b @ d / 2
            if value < best_value:
                best, best_value = d, value
    np.testing.assert_allclose(box_qp(b, c, low, high), best, atol=1e-7)


def test_special_cases() -> None:
    one = np.ones(1)
    assert box_qp(np.eye(1), -3 * one, -one, 0.5 * one).tolist() == [0.5]
    assert box_qp(np.zeros((2, 2)), np.array([1.0, -1.0]), -np.ones(2), np.ones(2)).tolist() == [-1, 1]
    assert box_qp(np.zeros((2, 2)), np.zeros(2), -np.ones(2), np.ones(2)).tolist() == [0, 0]
    assert box_qp(np.eye(2), np.array([1.0, 1.0]), np.zeros(2), np.zeros(2)).tolist() == [0, 0]
    # A coordinate of no effect stays; its neighbour is solved.
    found = box_qp(np.diag([0.0, 2.0]), np.array([0.0, -1.0]), -np.ones(2), np.ones(2))
    np.testing.assert_allclose(found, [0, 0.5], atol=1e-8)


@pytest.mark.parametrize("argument", range(4))
def test_numbers_that_are_none_are_refused(argument: int) -> None:
    arguments = [np.eye(2), np.ones(2), -np.ones(2), np.ones(2)]
    arguments[argument].flat[1] = np.nan
    with pytest.raises(ValueError, match="box_qp: curvature, slope and bounds must be finite"):
        box_qp(*arguments)


def test_negative_curvature_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive semidefinite, got a negative eigenvalue"):
        box_qp(np.array([[1.0, 2.0], [2.0, 1.0]]), np.ones(2), -np.ones(2), np.ones(2))


def test_step_of_numbers_is_linear_in_the_entries() -> None:
    box = Box.of("X", {"a": (0.01, 10.0), "b": (0.0, 1.0)})
    best = np.array([0.5, 0.4])
    # An optimum inside the trust region is met exactly.
    aim = np.array([0.8, 0.3])
    b = np.array([[3.0, 0.5], [0.5, 2.0]])
    np.testing.assert_allclose(gauss_newton_step(box, best, -b @ (aim - best), b, 0.35, 0.5), aim, rtol=1e-7)
    # One outside is met at its edge, in coordinates.
    far = gauss_newton_step(box, best, np.array([-1e3, 1e3]), b, 0.2, 0.5)
    np.testing.assert_allclose(box.unit(far), box.unit(best) + np.array([0.2, -0.2]), atol=1e-9)


def test_step_stays_inside_the_box() -> None:
    box = Box.of("X", {"a": (0.01, 10.0), "b": (0.0, 1.0)})
    found = gauss_newton_step(box, np.array([0.011, 0.99]), np.array([1e3, -1e3]), np.eye(2), 1.0, 0.5)
    assert found.tolist() == [0.01, 1.0]


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 3.0])
def test_step_of_groups_is_the_penalised_quadratic_in_coordinates(shrinkage: float) -> None:
    box = Box.of("X", {"a": (0.0, 2.0), "b": (np.full(3, 0.01), np.full(3, 10.0)), "c": ([0.0] * 2, 1.0)})
    r = np.random.default_rng(0)
    unit, root = r.uniform(0.2, 0.8, 6), r.standard_normal((8, 6))
    best, slope, curvature = box.at(unit), r.standard_normal(6), root.T @ root
    scale = box.slope(best)

    def cost(u: Array) -> float:
        d = scale * (u - unit)
        spread = sum(np.var(u[g]) for g in (slice(1, 4), slice(4, 6)))
        return float(slope @ d + d @ curvature @ d / 2 + shrinkage * spread)

    found = box.unit(gauss_newton_step(box, best, slope, curvature, 0.3, shrinkage))
    bounds = list(zip(np.maximum(0, unit - 0.3), np.minimum(1, unit + 0.3), strict=True))
    reference = minimize(cost, unit, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    assert cost(found) <= reference.fun + 1e-9
    np.testing.assert_allclose(found, reference.x, atol=1e-4)


def test_strong_shrinkage_makes_a_group_alike() -> None:
    box = Box.of("X", {"b": (np.full(3, 0.01), np.full(3, 10.0))})
    best = box.at(np.array([0.4, 0.5, 0.6]))
    found = box.unit(gauss_newton_step(box, best, np.zeros(3), np.zeros((3, 3)), 1.0, 1e3))
    np.testing.assert_allclose(found, 0.5, atol=1e-6)


def test_curvature_that_rounding_made_indefinite() -> None:
    """Gram matrices of float32 rows, more of them than dimensions."""
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    b = (rows @ rows.T).astype(np.float64)
    assert np.linalg.eigvalsh(b)[0] < 0
    d = box_qp(b, np.ones(30), -np.ones(30), np.ones(30))
    assert np.abs(d).max() <= 1 and (b @ d).sum() + 30 > -1
