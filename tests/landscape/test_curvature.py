"""Curvature: of surfaces where it is known, and exactly beside autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from surface_models import Graph, axes, mlp, samples
from torch import Tensor, nn

from lossmeta.landscape import LossSurface, exact_curvature, loss_surface, random_directions

GRAPHS = {
    "plane": (lambda a, b: 2 * a - b + 1, lambda a, b: 0 * a),
    "paraboloid": (lambda a, b: (a**2 + b**2) / 2, lambda a, b: 1 / (1 + a**2 + b**2) ** 2),
    "saddle": (lambda a, b: a * b, lambda a, b: -1 / (1 + a**2 + b**2) ** 2),
    "sphere": (lambda a, b: (4 - a**2 - b**2).sqrt(), lambda a, b: 0.25 + 0 * a),
    "monge": (
        lambda a, b: a**3 - 3 * a * b**2,
        lambda a, b: -36 * (a**2 + b**2) / (1 + 9 * (a**2 + b**2) ** 2) ** 2,
    ),
}


def graph_surface(name: str, points: int) -> LossSurface:
    pair = torch.zeros(1, 1), torch.zeros(1)
    return loss_surface(
        Graph(GRAPHS[name][0]), lambda f, y: f.mean(), pair, directions=axes(), span=0.4, points=points
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_curvature_of_known_surfaces(name: str) -> None:
    errors = []
    for points in (41, 81):
        surface = graph_surface(name, points)
        a, b = surface.x[1:-1, None], surface.y[None, 1:-1]  # type: ignore[index]
        errors.append(float((surface.curvature() - GRAPHS[name][1](a, b)).abs().max()))
    assert errors[1] < 1e-9 or errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # of second order
    assert surface.nonconvexity() == pytest.approx(float(surface.curvature().mean()))
    assert surface.mean_absolute_curvature() == pytest.approx(float(surface.curvature().abs().mean()))
    assert surface.saddle_share() == pytest.approx(float((surface.curvature() < 0).double().mean()))


@pytest.mark.parametrize("name", GRAPHS)
def test_exact_curvature_of_known_surfaces(name: str) -> None:
    at = torch.tensor([[0.0, 0.0], [0.3, -0.2], [0.1, 0.4]])
    pair = torch.zeros(1, 1), torch.zeros(1)
    found = exact_curvature(Graph(GRAPHS[name][0]), lambda f, y: f.mean(), pair, axes(), at)
    expected = GRAPHS[name][1](at[:, 0].double(), at[:, 1].double())
    torch.testing.assert_close(found.gaussian, expected, atol=1e-12, rtol=1e-12)


def test_exact_derivatives_are_those_of_autograd() -> None:
    model, pair = mlp(), samples()
    directions = random_directions(model, seed=4)
    names = dict(model.named_parameters())

    def f(c: Tensor) -> Tensor:
        weights = {
            n: p.detach() + c[0] * directions[0][n] + c[1] * directions[1][n] for n, p in names.items()
        }
        return F.cross_entropy(torch.func.functional_call(model, weights, (pair[0],)), pair[1])

    at = torch.tensor([[0.0, 0.0], [0.5, -0.7]], dtype=torch.float64)
    found = exact_curvature(model, F.cross_entropy, pair, directions, at)
    for i, c in enumerate(at):
        torch.testing.assert_close(found.loss[i], f(c).detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradient[i], torch.func.grad(f)(c), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.hessian[i], torch.func.hessian(f)(c), rtol=1e-8, atol=1e-12)
    batches = [(pair[0][:3], pair[1][:3]), (pair[0][3:], pair[1][3:])]
    torch.testing.assert_close(
        exact_curvature(model, F.cross_entropy, batches, directions, at).gaussian, found.gaussian
    )


def test_a_line_has_no_curvature() -> None:
    model = mlp()
    surface = loss_surface(
        model, F.cross_entropy, samples(), directions=random_directions(model, 1), points=5
    )
    with pytest.raises(ValueError, match=r"curvature needs a plane of at least 3 × 3 points, got \[5\]"):
        surface.curvature()
    with pytest.raises(ValueError, match=r"got \[2, 2\]"):
        loss_surface(model, F.cross_entropy, samples(), points=2).nonconvexity()


def test_infinite_losses_make_no_curvature() -> None:
    losses = torch.zeros(3, 3, dtype=torch.float64)
    losses[0, 0] = torch.inf
    line = torch.arange(3.0, dtype=torch.float64)
    surface = LossSurface(losses, line, line, losses.isfinite(), 1)
    assert surface.holes == 1 and bool(surface.curvature().isnan().all())
    assert np.isnan(surface.saddle_share())


def test_bad_input_of_exact_curvature() -> None:
    model, pair = mlp(), samples()
    with pytest.raises(ValueError, match="exact_curvature: directions must be two, got 1"):
        exact_curvature(model, F.cross_entropy, pair, random_directions(model, 1))
    with pytest.raises(ValueError, match=r"at must have shape \[K, 2\], got \[2\]"):
        exact_curvature(model, F.cross_entropy, pair, random_directions(model), torch.zeros(2))
    with pytest.raises(ValueError, match="exact_curvature: directions must have a tensor like each"):
        exact_curvature(model, F.cross_entropy, pair, random_directions(nn.Linear(2, 2)))
