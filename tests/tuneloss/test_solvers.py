"""The solvers behind LearnLoss: every one of them, what certificates catch, and what happens when they fail."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lossmeta.tuneloss import NotCertified, _refinement, learn_loss, solvers
from lossmeta.tuneloss._least_squares import SumOfSquares, factor_of_gram, triangle
from lossmeta.tuneloss._margin import margin
from lossmeta.tuneloss._program import Answer, Program, Proposal, certified
from lossmeta.tuneloss._refinement import Stopped

ERRORS = np.array([0.9, 1.0, 1.2, 1.5])
FEATURES = np.array([[1.0, 0.4, 0.2], [0.5, 0.9, 0.3], [0.4, 2.0, 1.1], [0.3, 1.0, 2.0]])
LOWER, UPPER = np.array([1.0, 0.0, 0.0]), np.array([1.0, 9.0, np.inf])
GIVEN = ERRORS, FEATURES, LOWER, UPPER


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_solver_finds_the_same(name: str) -> None:
    wanted, found = learn_loss(*GIVEN), learn_loss(*GIVEN, solver=name)
    assert found.solver == name
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)
    assert found.cost == pytest.approx(wanted.cost, rel=1e-6)
    assert found.certificate.holds


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_solver_passes_over_a_model_that_cannot_be_the_argmin(name: str) -> None:
    features = np.array([[0.6, 0.6], [1.0, 0.0], [0.0, 1.0]])
    found = learn_loss([0.1, 0.2, 0.3], features, [1.0, 0.5], [1.0, 4.0], solver=name)
    assert found.feasible == (False, True) and found.matched == 1


# ---- Failures.


def stopped(program: Program) -> Answer:
    raise Stopped("it is tired")


def broken(program: Program) -> Answer:
    raise ZeroDivisionError("broken")


def wrong(program: Program) -> Answer:
    """The cheapest point, constraints aside: not the answer where they matter."""
    y = np.clip(np.ones(len(program.lower)), program.lower, program.upper)
    return certified(program, Proposal(y, np.zeros(len(program.right))))


def nothing(program: Program) -> Answer:
    return certified(program, Proposal(np.full(len(program.lower), np.nan), np.zeros(len(program.right))))


@pytest.mark.parametrize("failing", [stopped, broken, wrong, nothing])
def test_after_a_failure_comes_the_next(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = learn_loss(*GIVEN)
    assert wanted.solver == "daqp"
    monkeypatch.setitem(solvers.SOLVERS, "daqp", failing)
    found = learn_loss(*GIVEN)
    assert found.solver == "clarabel" and found.feasible == wanted.feasible
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)


def test_when_all_fail_it_says_what_each_did(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, failing in (("daqp", stopped), ("clarabel", broken), ("osqp", wrong)):
        monkeypatch.setitem(solvers.SOLVERS, name, failing)
    message = (
        "learn_loss: .* daqp says it is tired; clarabel raised ZeroDivisionError: broken; osqp left violation"
    )
    with pytest.raises(NotCertified, match=message):
        learn_loss(*GIVEN)
    with pytest.raises(NotCertified, match="osqp left violation"):
        learn_loss(*GIVEN, solver="osqp")


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["auto", "daqp"])
def test_an_interrupt_passes_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "daqp", SimpleNamespace(solve=interrupted))
    with pytest.raises(KeyboardInterrupt):
        learn_loss(*binding(), solver=name)


def test_an_interrupt_that_osqp_has_taken_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import osqp

    class Interrupted:
        def __init__(self) -> None:
            pass

        def setup(self, *_: Any, **__: Any) -> None:
            pass

        def warm_start(self, **_: Any) -> None:
            pass

        def solve(self, **_: Any) -> Any:
            return SimpleNamespace(info=SimpleNamespace(status="interrupted"))

    monkeypatch.setattr(osqp, "OSQP", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn_loss(*binding(), solver="osqp")


def binding() -> tuple[np.ndarray, ...]:
    """A problem with a constraint that matters, which needs a solver."""
    return np.array([0.1, 0.2, 0.9]), np.array([[1.0, 1.2], [1.0, 1.0], [0.3, 2.0]]), LOWER[:2], UPPER[:2]


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if they were not installed."""
    real = builtins.__import__

    def imported(name: str, *args: Any, **options: Any) -> Any:
        if name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", imported)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_missing_solver_is_an_error_when_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, name)
    with pytest.raises(
        ImportError, match=f"learn_loss: solver must be installed, got '{name}' .* let solver='auto'"
    ):
        learn_loss(*GIVEN, solver=name)


def test_a_missing_solver_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = learn_loss(*binding())
    missing(monkeypatch, "daqp")
    found = learn_loss(*binding())
    assert found.solver == "clarabel"
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-5)
    missing(monkeypatch, "daqp", "clarabel", "osqp")
    with pytest.raises(
        NotCertified, match="daqp is not installed; clarabel is not installed; osqp is not installed"
    ):
        learn_loss(*binding())


# ---- Certificates.


def small_program() -> Program:
    """Distance from (2, 1) under y_0 + y_1 <= 2 in the first quadrant: (1.5, 0.5), cost 0.5."""
    row = np.array([[-1.0, -1.0]]) / np.sqrt(2)
    cost = SumOfSquares(np.eye(2), np.array([-2.0, -1.0]))
    return Program(cost, row, np.array([-2.0]) / np.sqrt(2), np.zeros(2), np.full(2, np.inf))


def answer(program: Program, *values: float, multiplier: float = np.sqrt(2)) -> Answer:
    return certified(program, Proposal(np.array(values), np.array([multiplier])))


def test_the_certificate_of_an_optimum_holds() -> None:
    certificate = answer(small_program(), 1.5, 0.5).certificate
    assert certificate.holds and certificate.gap < 1e-15 and certificate.cost == pytest.approx(0.5)


@pytest.mark.parametrize(("values", "cost"), [((1.4, 0.5), 0.61), ((1.0, 1.0), 1.0), ((0.0, 0.0), 5.0)])
def test_the_gap_bounds_what_is_lost(values: tuple[float, float], cost: float) -> None:
    certificate = answer(small_program(), *values).certificate
    assert certificate.cost == pytest.approx(cost) and cost - 0.5 <= certificate.gap <= cost
    assert not certificate.holds


def test_wrong_multipliers_prove_nothing() -> None:
    assert not answer(small_program(), 1.5, 0.5, multiplier=0.0).certificate.holds
    assert not answer(small_program(), 1.5, 0.5, multiplier=2.0).certificate.holds


def test_a_violation_is_seen() -> None:
    certificate = answer(small_program(), 1.5 + 1e-7, 0.5 + 1e-7).certificate
    assert certificate.violation == pytest.approx(np.sqrt(2) * 1e-7, rel=1e-6) and not certificate.holds


def test_a_flat_cost_is_certified_by_the_box() -> None:
    """|y_0 + y_1 - 1|² with rank 1: every point of the line costs nothing; what is far from it is not certified."""
    cost = SumOfSquares(np.array([[1.0, 1.0]]), np.array([-1.0]))
    program = Program(cost, np.zeros((0, 2)), np.zeros(0), np.zeros(2), np.full(2, 5.0))
    found = solvers.SOLVERS["daqp"](program)
    assert found.certificate.holds and found.certificate.rank == 1
    np.testing.assert_allclose(found.values, [0.5, 0.5], atol=1e-6)  # the nearest to 0
    held = Program(cost, np.array([[1.0, -1.0]]), np.array([3.0]), np.zeros(2), np.full(2, 5.0))
    moved = certified(held, Proposal(np.array([4.0, 1.0]), np.zeros(1)))
    assert moved.certificate.gap > 1 and not moved.certificate.holds


@pytest.mark.parametrize("name", ["daqp", "clarabel", "osqp"])
def test_nearest_points(name: str) -> None:
    """Of random polyhedra: the point is feasible, and a combination of the constraints that it touches."""
    nearest_point = {
        "daqp": solvers._daqp.nearest_point,
        "clarabel": solvers._clarabel.nearest_point,
        "osqp": solvers._osqp.nearest_point,
    }[name]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        constraints, inside = rng.standard_normal((12, 5)), rng.standard_normal(5)
        low, high = constraints @ inside - rng.random(12), constraints @ inside + rng.random(12)
        low[:3], high[3:6] = -np.inf, np.inf
        z, multipliers = nearest_point(constraints, low, high, np.zeros(12))
        assert (constraints @ z >= low - 1e-8).all() and (constraints @ z <= high + 1e-8).all()
        np.testing.assert_allclose(constraints.T @ multipliers, z, atol=1e-6)
        touched = np.where(multipliers > 0, low, high)[np.abs(multipliers) > 1e-6]
        np.testing.assert_allclose((constraints @ z)[np.abs(multipliers) > 1e-6], touched, atol=1e-6)
        again, _ = nearest_point(constraints, low, high, multipliers)
        np.testing.assert_allclose(again, z, atol=1e-7)
        with pytest.raises(Stopped):
            nearest_point(
                np.vstack([constraints, constraints[:1]]),
                np.append(low, high[0] + 1),
                np.append(high, np.inf),
                np.zeros(13),
            )


def test_points_that_hardly_exist_are_found() -> None:
    """Two rows that only one line satisfies, and which rounding makes infeasible: constraints give way by 5e-9."""
    program = small_program()
    rows = np.vstack([program.rows, -program.rows])
    right = np.append(program.right, -program.right + 2e-9)
    found = solvers.solve("test", replace(program, rows=rows, right=right), ["daqp"])
    assert found is not None
    np.testing.assert_allclose(found[1].values, [1.5, 0.5], atol=1e-7)
    assert 0 < found[1].certificate.violation <= 1e-8
    right = np.append(program.right, -program.right + 2e-8)
    assert solvers.solve("test", replace(program, rows=rows, right=right), ["daqp"]) is None


def test_margins_are_proven_on_both_sides() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows, right = rng.standard_normal((9, 4)), rng.standard_normal(9)
        found = margin(rows, right, -np.ones(4), np.ones(4))
        assert found is not None
        assert found.reached <= found.bound + 1e-12 and found.bound - found.reached < 1e-9
        assert (rows @ found.values >= right + found.reached - 1e-12).all()
        assert (np.abs(found.values) <= 1).all()


# ---- Factors.


def test_a_triangle_has_the_same_squares() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((rows, 6)) for rows in (2, 1, 9, 30)]
    found, stacked = triangle(blocks), np.vstack(blocks)
    assert found.shape == (6, 6)
    np.testing.assert_allclose(found.T @ found, stacked.T @ stacked, atol=1e-12)
    assert triangle(blocks[:2]).shape == (3, 6)


@pytest.mark.parametrize("rank", [0, 1, 4, 6])
def test_a_factor_of_a_gram_matrix_has_its_rank(rank: int) -> None:
    rng = np.random.default_rng(rank)
    columns = rng.standard_normal((rank, 6)) * 10.0 ** rng.uniform(-6, 6, 6)
    found = factor_of_gram(columns.T @ columns)
    assert found is not None and found.shape == (rank, 6)
    np.testing.assert_allclose(found.T @ found, columns.T @ columns, rtol=1e-9, atol=1e-30)


def test_an_ill_conditioned_cost_needs_damping_of_which_nothing_is_left() -> None:
    """Columns that differ by 1e-12 have no root without it; the minimum is reached all the same."""
    rng = np.random.default_rng(0)
    column = rng.standard_normal(8)
    factor = np.column_stack([column, column + 1e-12 * rng.standard_normal(8), rng.standard_normal(8)])
    cost = SumOfSquares(factor, rng.standard_normal(8))
    assert cost.exact_root is None and cost.root(_refinement.DAMPINGS[1]) is not None
    program = Program(cost, np.zeros((0, 3)), np.zeros(0), np.full(3, -9.0), np.full(3, 9.0))
    found = solvers.SOLVERS["daqp"](program)
    least = np.linalg.lstsq(factor[:, 1:], -cost.offset, rcond=None)[0]
    assert found.certificate.holds
    assert found.certificate.cost == pytest.approx(cost(np.append(0.0, least)), rel=1e-9)
