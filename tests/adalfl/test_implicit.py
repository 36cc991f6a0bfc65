"""Implicit differentiation: against the minimum in closed form, a dense solve, and unrolling at the minimum."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import relative_error
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from lossmeta.adalfl import initialize
from lossmeta.adalfl.implicit import conjugate_gradients, neumann
from lossmeta.adalfl.implicit import implicit as implicit_gradient
from lossmeta.adalfl.unrolled import unrolled
from lossmeta.losses import LossNetwork

F64 = torch.float64
DAMPING = 0.1


class Ridge(nn.Module):
    """exp(a) mean (f - b y)^2 + exp(c) mean f^2: the output is shrunk by a learned amount."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([0.3, 0.7, -0.5], dtype=F64))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        a, b, c = self.phi
        return a.exp() * F.mse_loss(pred, b * target) + c.exp() * pred.square().mean()


def batch(outputs: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(30, 4, dtype=F64), torch.randn(30, outputs, dtype=F64)


def linear(outputs: int = 1) -> nn.Module:
    return nn.Linear(4, outputs, bias=False, dtype=F64)


def implicit(
    loss: nn.Module, model: nn.Module, chain: Any, valid: Any, task: Any, **options: Any
) -> list[Tensor]:
    return implicit_gradient(loss, list(loss.parameters()), model, chain, valid, task, 0.2, **options)[1]


# As many terms as it takes: 4 parameters for conjugate gradients.
SOLVERS = {"neumann": (neumann, 400), "cg": (conjugate_gradients, 4)}


@pytest.mark.parametrize("name", SOLVERS)
def test_equals_the_derivative_of_the_minimum(name: str) -> None:
    loss, model = Ridge(), linear()
    train, (xv, yv) = batch(), batch()
    solver, terms = SOLVERS[name]
    actual = implicit(
        loss, model, 400 * [train], (xv, yv), F.mse_loss, solver=solver, terms=terms, damping=0.0
    )
    (x, y), (a, b, c) = train, loss.phi
    best = torch.linalg.solve((a.exp() + c.exp()) * x.mT @ x, a.exp() * b * x.mT @ y)
    torch.testing.assert_close(parameters_to_vector(model.parameters()), best.flatten())
    expected = torch.autograd.grad(F.mse_loss(xv @ best, yv), loss.phi)
    assert relative_error(actual, list(expected)) < 1e-8


@pytest.mark.parametrize("name", SOLVERS)
def test_equals_a_dense_solve_for_a_loss_network(name: str) -> None:
    loss, model = LossNetwork(8, link="identity", residual="squared_error", dtype=F64), linear(2)
    with torch.no_grad():
        loss.output_weight.normal_(std=0.1)
    chain, valid = [batch(2) for _ in range(3)], batch(2)
    solver, terms = SOLVERS[name]
    terms *= 3
    actual = implicit(loss, model, chain, valid, F.mse_loss, solver=solver, terms=terms, damping=DAMPING)

    theta = model.weight.detach().flatten().requires_grad_()  # type: ignore[operator]

    def learned(t: Tensor) -> Tensor:
        return loss(chain[-1][0] @ t.view(2, 4).mT, chain[-1][1])

    hessian = torch.autograd.functional.hessian(learned, theta)
    (v,) = torch.autograd.grad(F.mse_loss(valid[0] @ theta.view(2, 4).mT, valid[1]), theta)
    solution = torch.linalg.solve(hessian + DAMPING * torch.eye(8, dtype=F64), v)
    (g,) = torch.autograd.grad(learned(theta), theta, create_graph=True)
    expected = [-m for m in torch.autograd.grad(g, list(loss.parameters()), solution)]
    assert relative_error(actual, expected) < 1e-8


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_few_terms_equal_as_many_steps_at_the_minimum(terms: int) -> None:
    loss, model = Ridge(), linear()
    train, valid = batch(), batch()
    implicit(loss, model, 2000 * [train], valid, F.mse_loss, solver=neumann, terms=1, damping=0.0)
    other = copy.deepcopy(model)
    series = implicit(loss, model, [train], valid, F.mse_loss, solver=neumann, terms=terms, damping=0.0)
    _, steps, _ = unrolled(loss, [loss.phi], other, terms * [train], valid, F.mse_loss, 0.2)
    assert relative_error(series, steps) < 1e-8


def testconjugate_gradients_without_curvature() -> None:
    v = [torch.ones(2, dtype=F64), torch.ones(1, dtype=F64)]
    (a, b) = conjugate_gradients(lambda x: [-t for t in x], v, 5, 1.0)
    assert torch.cat([a, b]).isnan().all()
    # diag(1, 1, -0.1): the first direction is of positive curvature, the second is not.
    (a, b) = conjugate_gradients(lambda x: [x[0], -0.1 * x[1]], v, 5, 1.0)
    torch.testing.assert_close(torch.cat([a, b]), torch.full((3,), 3 / 1.9, dtype=F64))
    # Nothing to solve is no lack of curvature.
    (a, b) = conjugate_gradients(lambda x: x, [torch.zeros_like(t) for t in v], 5, 1.0)
    assert not torch.cat([a, b]).any()


@pytest.mark.parametrize("solver", ["neumann", "cg"])
def test_learns(solver: str) -> None:
    torch.manual_seed(0)
    truth = torch.randn(4, 1, dtype=F64)
    loss, (x, _) = Ridge(), batch()
    before = loss.phi.detach().clone()
    history = initialize(
        loss,
        linear,
        [(x, x @ truth)],
        [(x, x @ truth)],
        F.mse_loss,
        steps=60,
        inner_steps=50,
        learning_rate=0.1,
        method="implicit",
        implicit_solver=solver,
        meta_optimizer=torch.optim.Adam(loss.parameters(), 0.05),
    )
    # The minimum is b exp(a) / (exp(a) + exp(c)) times the truth.
    a, b, c = loss.phi.detach()
    assert not torch.equal(before, loss.phi)
    assert history[-1] < 0.05 * history[0]
    assert abs(b * a.exp() / (a.exp() + c.exp()) - 1) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "method must be one of 'unrolled', 'implicit', got 'exact'"),
        ({"implicit_solver": "lu"}, "implicit_solver must be one of 'neumann', 'cg', got 'lu'"),
        ({"implicit_terms": 0}, "implicit_terms must be at least 1, got 0"),
        ({"damping": -1.0}, "damping must be finite and not negative, got -1.0"),
        ({"damping": float("nan")}, "damping must be finite and not negative, got nan"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^initialize: {message}$"):
        initialize(Ridge(), linear, [batch()], [batch()], F.mse_loss, **{"method": "implicit", **options})


def test_a_meta_step_without_curvature_is_left_out() -> None:
    class Concave(Ridge):
        def forward(self, pred: Tensor, target: Tensor) -> Tensor:
            return -super().forward(pred, target)

    loss = Concave()
    before = loss.phi.detach().clone()
    history = initialize(
        loss, linear, [batch()], [batch()], F.mse_loss, steps=2, method="implicit", implicit_solver="cg"
    )
    assert all(value != value for value in history)
    assert torch.equal(before, loss.phi)
