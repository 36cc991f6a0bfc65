"""The recipe of TuneLoss's Figure 3: rows differ in the regulariser alone, and the test part decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lossmeta.experiments import Diverged, Trial, run_folder
from lossmeta.recipes import recipes
from lossmeta.recipes import tuneloss_regularizer as recipe
from lossmeta.recipes._tuneloss_methods import label_of
from lossmeta.recipes._tuneloss_tasks import LOG_LOSS, VALIDATION, Source, draw
from lossmeta.recipes._tuneloss_training import ABOVE, Course, Setting, fit, parts
from lossmeta.tuneloss import ConvexRegularizer

MakeTrial = Callable[..., Trial]
SOURCE = Source("digits", 60, 60, (0.1, 100.0), scale=1 / 255, test=200)


def overfits(parameters: list[nn.Parameter], decay: float) -> Optimizer:
    """Within few epochs."""
    return SGD(parameters, lr=0.3, momentum=0.9, weight_decay=decay)


SMALL = Setting(SOURCE, partial(recipe._mlp, 64, 10), overfits, 8, 12)


@pytest.fixture
def trial(make_trial: MakeTrial) -> Trial:
    return make_trial(draw(SOURCE, 0), epochs=SMALL.epochs)


def test_the_parts_and_their_sizes(trial: Trial) -> None:
    train, valid, test = parts(trial.data, torch.device("cpu"))
    assert [len(y) for _, y in (train, valid, test)] == [60, 60, 200]
    assert train[0].dtype == torch.float32 and train[0].shape == (60, 64)
    torch.testing.assert_close(train[0].mean(0), torch.zeros(64), atol=1e-6, rtol=0)


def test_trainings_are_the_same_until_the_regulariser_is_on(trial: Trial) -> None:
    plain, tuned = fit(trial, SMALL), fit(trial, SMALL, regularizer=ConvexRegularizer())
    on = [report.on for report in tuned.reports].index(True)
    assert len(tuned.test) == len(plain.test) == SMALL.epochs and 0 < on < SMALL.epochs - 1
    assert plain.valid[: on + 1] == tuned.valid[: on + 1] and plain.valid[on] > plain.valid[on - 1]
    assert plain.valid[on + 1] != tuned.valid[on + 1]
    assert plain.train[-1] < tuned.train[-1] and plain.test[-1] > tuned.test[-1]


def test_the_test_part_decides_nothing(make_trial: MakeTrial) -> None:
    drawn = draw(SOURCE, 0)
    for row in recipe.rows({"toy": SMALL}):
        trials = (make_trial(d, epochs=4) for d in (drawn, replace(drawn, test=drawn.valid)))
        first, second = (row.train(t) for t in trials)
        assert first[VALIDATION.name] == second[VALIDATION.name] == second[LOG_LOSS.name]
        assert first[LOG_LOSS.name] != second[LOG_LOSS.name]


def test_where_a_training_is_stopped() -> None:
    course = Course([0.3, 0.2, 0.1], [0.5, 0.4, 0.6], [0.4, 0.5, 0.8], [0.2, 0.1, 0.3])
    assert course.stopped() == pytest.approx({**course.at(1)}) and course.stopped()[LOG_LOSS.name] == 0.5
    assert course.stopped()[ABOVE.name] == pytest.approx(0.25)
    assert course.end()[LOG_LOSS.name] == 0.8 and course.end()[ABOVE.name] == pytest.approx(1.0)


def test_l2_is_the_best_of_the_first_runs(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(SOURCE, 0), epochs=3)
    rows = {row.label: row for row in recipe.rows({"toy": SMALL})}
    found = [rows[label_of("l2", n)].train(trial)[VALIDATION.name] for n in (1, 3, 10)]
    assert found == sorted(found, reverse=True) and len(trial.scratch["l2"]) == 10  # type: ignore[type-var]
    # From the start, without those of fewer runs, it is the same.
    again = make_trial(draw(SOURCE, 0), epochs=3)
    assert rows["l2, 3 runs"].train(again)[VALIDATION.name] == found[1]


def test_weight_decay_is_an_l2_of_the_matrices(trial: Trial) -> None:
    given: list[Optimizer] = []

    def sgd(parameters: list[nn.Parameter], decay: float) -> Optimizer:
        given.append(SGD(parameters, 0.1, weight_decay=decay))
        return given[-1]

    fit(trial, replace(SMALL, optimizer=sgd), decay=0.25)
    matrices, others = given[0].param_groups
    assert matrices["weight_decay"] == 0.25 and others["weight_decay"] == 0
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in others["params"]} == {1}


def test_a_training_that_diverges(trial: Trial) -> None:
    with pytest.raises(Diverged):
        fit(trial, replace(SMALL, optimizer=lambda p, decay: SGD(p, math.inf)))


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: None) -> None:
    assert "tuneloss-regularizer" in recipes()
    monkeypatch.setattr(recipe, "SMALL", {"digits, MLP": SMALL})
    status = recipe.Regularizers().run(size="small", seeds=2, device="cpu", output=tmp_path / "run", steps=12)
    assert status == 0
    run = run_folder.read(tmp_path / "run")
    assert len(run.trials) == 2 * len(recipe.rows({}))
    for name in ("log-loss-digits-mlp.png", "regulariser-digits-mlp.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000


@pytest.mark.parametrize("settings", [recipe.SMALL, recipe.PAPER])
def test_models_take_the_data(settings: dict[str, Setting]) -> None:
    for setting in settings.values():
        width = {"digits": 64, "mnist": 784, "flowers-features": 1280}[setting.source.name]
        classes = 5 if "flowers" in setting.source.name else 10
        assert setting.network()(torch.zeros(3, width)).shape == (3, classes)
