"""The recipe of TuneLoss's Figure 1: errors of one weight whose least value is known, and quadratic losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lossmeta.experiments import run_folder
from lossmeta.recipes import tuneloss_figure1 as recipe
from lossmeta.recipes.tuneloss_figure1 import LOSSES, REFERENCE, Problem, argmin

GRID = np.linspace(0, 1, 20001)


@pytest.mark.parametrize("seed", range(10))
def test_the_least_error_and_slopes(seed: int) -> None:
    problem = Problem.drawn(seed, 4)
    on_grid = problem.error(GRID)
    assert problem.least() <= on_grid.min() <= problem.least() + 1e-3
    assert (problem.weights >= 0).all() and (problem.weights <= 1).all() and len(problem.weights) == 4
    ahead, behind = (problem.error(problem.weights + d) for d in (1e-7, -1e-7))
    np.testing.assert_allclose(problem.slope(problem.weights), (ahead - behind) / 2e-7, atol=1e-6)


@pytest.mark.parametrize("label", LOSSES)
@pytest.mark.parametrize("models", [3, 8])
def test_where_a_loss_is_least(label: str, models: int) -> None:
    for seed in range(5):
        loss = LOSSES[label](Problem.drawn(seed, models))
        assert np.polyval(loss, argmin(loss)) <= np.polyval(loss, GRID).min() + 1e-9


def test_argmin_matching() -> None:
    """All but the closest values have the same best model as the error."""
    for seed in range(20):
        problem = Problem.drawn(seed, 4)
        best = problem.error(problem.weights).argmin()
        for label in ("same argmin", "LearnLoss", REFERENCE):
            values = np.polyval(LOSSES[label](problem), problem.weights)
            assert values[best] <= values.min() + 1e-8


def test_an_error_that_is_a_quadratic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.drawn(0, 3)
    monkeypatch.setattr(Problem, "error", lambda self, w: 3 * (np.asarray(w) - 0.4) ** 2 + 0.1)
    monkeypatch.setattr(Problem, "slope", lambda self, w: 6 * (w - 0.4))
    for label in ("closest values", "LearnLoss", REFERENCE):
        a, b, c = LOSSES[label](problem)
        assert (a, b, c) == pytest.approx((3, -2.4, 0.58), abs=1e-5)


def test_the_recipe(tmp_path: Path, figures: None) -> None:
    assert recipe.Figure1().run(size="small", seeds=2, device="cpu", output=tmp_path / "run") == 0
    run = run_folder.read(tmp_path / "run")
    assert len(run.trials) == 2 * len(LOSSES) * len(recipe.MODELS)
    assert all(t.measures[recipe.ABOVE.name] >= -1e-12 for t in run.trials)  # type: ignore[operator]
    assert len(list((tmp_path / "run").glob("losses-*-models.png"))) == len(recipe.MODELS)
