"""Coarse to fine: fewer points, and no error that is not said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from surface_models import Graph, axes, mlp, samples
from torch import Tensor

from lossmeta.landscape import loss_surface, random_directions


@pytest.mark.parametrize("points", [17, 51, (20, 33)])
def test_refining_evaluates_less_and_is_off_by_less_than_asked(points: Any) -> None:
    model, pair = mlp(), samples(100)
    whole = loss_surface(model, F.cross_entropy, pair, points=points, span=2.0)
    fine = loss_surface(model, F.cross_entropy, pair, points=points, span=2.0, refine=0.01)
    spread = float(whole.losses.max() - whole.losses.min())
    off = float((whole.losses - fine.losses).abs().max())
    assert off <= fine.error <= 0.01 * spread
    assert torch.equal(whole.losses[fine.evaluated], fine.losses[fine.evaluated])
    if points == 51:
        assert float(fine.evaluated.double().mean()) <= 0.25


def test_refining_finds_what_is_steep() -> None:
    """A ridge that bends in a few places alone."""
    pair = torch.zeros(1, 1), torch.zeros(1)
    model = Graph(lambda a, b: torch.sigmoid(60 * (a + 0.5 * b)))
    whole, fine = (
        loss_surface(model, lambda f, y: f.mean(), pair, directions=axes(), points=49, refine=r)
        for r in (None, 0.02)
    )
    assert float((whole.losses - fine.losses).abs().max()) < 0.02
    assert 0.1 < float(fine.evaluated.double().mean()) < 0.9


def test_refining_sees_by_chance_what_the_coarse_grid_misses() -> None:
    """A basin between the first points, which is flat outside."""
    pair = torch.zeros(1, 1), torch.zeros(1)
    model = Graph(lambda a, b: -torch.exp(-((a - 0.12) ** 2 + (b - 0.12) ** 2) / 0.02))
    whole, fine = (
        loss_surface(model, lambda f, y: f.mean(), pair, directions=axes(), points=51, refine=r)
        for r in (None, 0.01)
    )
    off = float((whole.losses - fine.losses).abs().max())
    assert off <= fine.error + 1e-12 or bool(fine.evaluated.all())


def test_refining_predicts_nothing_outside_the_range() -> None:
    pair = torch.zeros(1, 1), torch.zeros(1)
    model = Graph(
        lambda a, b: (
            torch.nn.functional.softplus(40 * (a - 0.03)) + torch.nn.functional.softplus(40 * (b - 0.1))
        )
    )
    fine = loss_surface(
        model, lambda f, y: f.mean(), pair, directions=axes(), span=3.0, points=51, refine=0.02
    )
    assert float(fine.losses.min()) >= 0


def test_refining_on_a_line_and_on_few_points() -> None:
    model = mlp()
    options: Any = {"directions": random_directions(model, 1), "points": 41}
    fine = loss_surface(model, F.cross_entropy, samples(), refine=0.01, **options)
    whole = loss_surface(model, F.cross_entropy, samples(), **options)
    assert float((whole.losses - fine.losses).abs().max()) < 0.01 * float(
        whole.losses.max() - whole.losses.min()
    )
    assert float(fine.evaluated.double().mean()) < 0.6
    few = loss_surface(model, F.cross_entropy, samples(), points=3, refine=0.01)
    assert bool(few.evaluated[::2, ::2].all())


# ---- Holes.


def holey(prediction: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(prediction, target)
    return torch.where(loss > 1.5, torch.nan, loss)


@pytest.mark.parametrize("refine", [None, 0.01])
def test_losses_that_are_not_finite_are_kept_and_counted(refine: float | None) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"loss must be finite to be drawn, got \d+ points of 81 at which"
    ):
        surface = loss_surface(mlp(), holey, samples(), points=9, span=3.0, refine=refine)
    whole = loss_surface(mlp(), F.cross_entropy, samples(), points=9, span=3.0)
    high = whole.losses > 1.5
    assert 0 < surface.holes == int(high.sum()) < 81
    assert torch.equal(surface.losses.isnan(), high)
    assert bool(surface.evaluated.all())
    curvature = surface.curvature()
    assert 0 < int(curvature.isnan().sum()) < curvature.numel() and np.isfinite(surface.nonconvexity())
