"""The recipes of one run against many: rows differ in what they say, and the test part decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lossmeta.experiments import Trial, run_folder
from lossmeta.recipes import recipes, tuneloss_against_search, tuneloss_online
from lossmeta.recipes._tuneloss_tasks import ERROR, LOG_LOSS, VALIDATION, Source, draw
from lossmeta.recipes._tuneloss_training import Setting, fit
from lossmeta.recipes.tuneloss_regularizer import softmax_regression

MakeTrial = Callable[..., Trial]
SOURCE = Source("digits", 40, 40, (0.1, 10.0), components=4, scale=4 / 255, test=100)
BOTH = pytest.mark.parametrize("recipe", [tuneloss_online, tuneloss_against_search])


def sgd(parameters: list[nn.Parameter], decay: float) -> Optimizer:
    return SGD(parameters, lr=0.1, weight_decay=decay)


SMALL = Setting(SOURCE, partial(softmax_regression, 4, 10), sgd, 20, 3)


@BOTH
def test_the_test_part_decides_nothing(
    recipe: ModuleType, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "RUNS", (1, 2))
    drawn = draw(SOURCE, 0)
    seen = set()
    for row in recipe.rows({"toy": SMALL}):
        trials = (make_trial(d, epochs=3) for d in (drawn, replace(drawn, test=drawn.valid)))
        first, second = (row.train(t) for t in trials)
        assert first[VALIDATION.name] == second[VALIDATION.name]
        assert second[LOG_LOSS.name] == pytest.approx(second[VALIDATION.name])
        assert first[LOG_LOSS.name] != second[LOG_LOSS.name]
        seen.add(row.label)
    assert "random search, 2 runs" in seen


def test_coefficients_move_after_an_epoch(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(SOURCE, 0), epochs=SMALL.epochs)
    online, middle = (tuneloss_online.tuned(trial, SMALL, online=on) for on in (True, False))
    assert len(online.valid) == len(middle.valid) == SMALL.epochs
    assert online.valid[0] == middle.valid[0] and online.valid[1] != middle.valid[1]
    # They see the same batches as a plain training from the same weights, whose loss is another.
    assert fit(trial, SMALL).valid[0] != middle.valid[0]
    assert tuneloss_online.tuned(trial, SMALL, online=True).test == online.test


@BOTH
def test_the_recipe(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = recipe.RECIPES
    assert made.name in recipes()
    monkeypatch.setattr(recipe, "SETTINGS", {"toy": SMALL})
    monkeypatch.setattr(recipe, "RUNS", (1, 2))
    assert made.run(size="small", seeds=1, device="cpu", output=tmp_path / "run", steps=2) == 0
    run = run_folder.read(tmp_path / "run")
    assert len(run.trials) == len(recipe.rows({})) and run.header.references == (recipe.REFERENCE,)
    assert all(t.measures[LOG_LOSS.name] > 0 and 0 <= t.measures[ERROR.name] <= 1 for t in run.trials)  # type: ignore[operator]


@BOTH
def test_models_take_the_data(recipe: ModuleType) -> None:
    width = {"digits": 64, "flowers-features": 1280}
    for setting in recipe.SETTINGS.values():
        inputs = width[setting.source.name] * (1 + setting.source.junk)
        classes = 5 if "flowers" in setting.source.name else 10
        assert setting.network()(torch.zeros(3, inputs)).shape == (3, classes)
