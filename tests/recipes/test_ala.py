"""ALA's recipes: the data is what it says, every row trains, and none sees what it may not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics
import torch
from torch import Tensor

from lossmeta.experiments import Diverged, Method, Trial, Tuned, run_folder
from lossmeta.recipes import _ala_methods, _ala_tasks, ala, recipes
from lossmeta.recipes._ala_methods import Fit, fixed_grid, plain, population, random_actions, stopped
from lossmeta.recipes._ala_tasks import BOTH, CLEAN, DIGITS, IMBALANCE, NOISE, Drawn, Problem, draw

CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]
PROBLEMS = (IMBALANCE, NOISE, BOTH, CLEAN)


def rows(part: tuple[Tensor, Tensor]) -> set[tuple[float, ...]]:
    return {tuple(row) for row in part[0].tolist()}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_data(problem: Problem) -> None:
    drawn = draw(DIGITS, problem, 3, CPU)
    assert not rows(drawn.train) & rows(drawn.valid)
    assert not rows(drawn.train) & rows(drawn.test)
    assert not rows(drawn.valid) & rows(drawn.test)
    assert (drawn.valid[1].bincount() == DIGITS.valid).all() and (
        drawn.test[1].bincount() == DIGITS.test
    ).all()
    true = {tuple(x): y for x, y in zip(*(t.tolist() for t in all_rows()), strict=True)}
    labels = torch.tensor([true[tuple(x)] for x in drawn.train[0].tolist()])
    wrong = (labels != drawn.train[1]).double().mean()
    assert float(wrong) == pytest.approx(problem.noise, abs=0.08)
    for part in (drawn.valid, drawn.test):
        assert part[1].tolist() == [true[tuple(x)] for x in part[0].tolist()]
    sizes = labels.bincount(minlength=10).sort().values
    assert sizes[-1] == DIGITS.rows(problem)
    assert sizes[0] == round(DIGITS.rows(problem) / problem.ratio)
    again, other = draw(DIGITS, problem, 3, CPU), draw(DIGITS, problem, 4, CPU)
    assert torch.equal(again.train[0], drawn.train[0]) and torch.equal(again.train[1], drawn.train[1])
    assert not torch.equal(other.test[0], drawn.test[0])


def test_the_metrics_of_rare_classes_are_those_of_scikit_learn(make_trial: MakeTrial) -> None:
    problems = (
        IMBALANCE,
        _ala_tasks.IMBALANCE_BY_BALANCED_ERROR,
        _ala_tasks.IMBALANCE_BY_AVERAGE_PRECISION,
    )
    found = []
    for problem in problems:
        drawn = draw(DIGITS, problem, 0, CPU)
        fit = Fit(make_trial(drawn, steps=40), 0.03)
        for _, x, y in fit.batches():
            fit.step(torch.nn.functional.cross_entropy(fit.model(x), y))
        found.append(fit.of(drawn.test))
        labels, scores = drawn.test[1], fit.model(drawn.test[0]).detach().softmax(1)
    recall = sklearn.metrics.recall_score(labels, scores.argmax(1), average=None)
    assert found[0] == pytest.approx(recall.min())
    assert found[1] == pytest.approx(1 - recall.mean())
    one_hot = torch.nn.functional.one_hot(labels)
    assert found[2] == pytest.approx(
        sklearn.metrics.average_precision_score(one_hot, scores, average="macro")
    )


def all_rows() -> tuple[Tensor, Tensor]:
    pixels, labels, _ = _ala_tasks._pixels("digits")
    return pixels, labels


def methods() -> list[Method]:
    """Every row, at one rate."""
    found = []
    for row in ala.ROWS:
        best = Method("", lambda trial: {}, {"rate": 0.05})
        found.append(row.then(best) if isinstance(row, Tuned) and row.then else row)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.label)
def test_rows(method: Method, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trains; the test part moves nothing, and the validation part only what it may."""
    monkeypatch.setattr(_ala_methods, "RATES", (0.05,))
    monkeypatch.setattr(_ala_methods, "GRID", 2)
    drawn = draw(DIGITS, BOTH, 0, CPU)
    hidden = replace(drawn, test=tuple(t.clone() for t in drawn.valid))
    weights: list[list[Tensor]] = []

    class Watched(Fit):
        def __post_init__(self) -> None:
            super().__post_init__()
            weights[-1] += list(self.model.parameters())

    monkeypatch.setattr(_ala_methods, "Fit", Watched)
    found = []
    for data in (drawn, hidden):
        weights.append([])
        found.append(method.train(make_trial(data, steps=60)))
    assert found[0]["validation"] == found[1]["validation"]
    assert 0 < found[0]["balanced error"] < 1  # type: ignore[operator]
    assert found[1]["balanced error"] == -found[1]["validation"]  # type: ignore[operator]
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_the_rows_without_an_adapted_loss_are_one_another(make_trial: MakeTrial) -> None:
    """One network, one order of batches: at a rate of 0 and without a search nothing differs."""
    trial = make_trial(draw(DIGITS, NOISE, 0, CPU), steps=40)
    same = plain("a", 0.05).train(trial)
    drawn: Drawn = trial.data
    fit = Fit(trial, 0.05)
    for _, x, y in fit.batches():
        fit.step(drawn.space()(fit.model(x), y, {"q": torch.tensor(0.0)}))
    assert fit.measures() == pytest.approx(dict(same), abs=1e-6)
    still = [make("b", 0.0).train(trial) for make in (plain, population, random_actions)]
    names = ("error", "validation")
    assert [{k: s[k] for k in names} for s in still[1:]] == [dict(still[0])] * 2


def test_parameters_and_policy_over_the_training_are_recorded(make_trial: MakeTrial) -> None:
    drawn = draw(DIGITS, NOISE, 0, CPU)
    trial = make_trial(drawn, steps=60)
    found = _ala_methods.controller("controller", 0.03).train(trial)
    assert [step for step, _ in trial.series["policy entropy (nats)"]] == [20, 40, 60]
    assert all(
        value is not None and 0 < value <= 1.0987 for _, value in trial.series["policy entropy (nats)"]
    )
    assert trial.series["q"][-1] == (60, pytest.approx(found["q"]))
    trial = make_trial(drawn, steps=60)
    found = _ala_methods.population("population", 0.03).train(trial)
    assert [step for step, _ in trial.series["q"]] == [0, 20, 40]
    rates = [value for _, value in trial.series["learning rate, times the start's"]]
    assert rates[-1] == pytest.approx(math.exp(found["learning_rate"]))


def test_biases_and_stops_are_the_best_of_the_validation_part(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ala_methods, "RATES", (0.03, 0.3))
    trial = make_trial(draw(DIGITS, IMBALANCE, 0, CPU), steps=80)
    without, with_biases = (plain("a", 0.03, biases=b).train(trial) for b in (False, True))
    assert with_biases["validation"] > without["validation"]  # type: ignore[operator]
    found = stopped("b").train(trial)
    ends = [plain("a", rate).train(trial)["validation"] for rate in (0.03, 0.3)]
    assert found["validation"] >= max(ends)  # type: ignore[type-var]
    assert found["stop"] in (20, 40, 60, 80)


@pytest.mark.parametrize("name", ["ala-imbalance", "ala-noise", "ala-both", "ala-clean"])
def test_the_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On the digits alone, where there is nothing else."""
    monkeypatch.setattr(_ala_methods, "GRID", 2)
    monkeypatch.setattr(ala.tasks, "MNIST", replace(_ala_tasks.MNIST, name="mnist"))

    def load(name: str, *args: Any, **options: Any) -> Any:
        if name == "digits":
            return original(name, *args, **options)
        raise FileNotFoundError("mnist: not here")

    original = _ala_tasks.data.load
    monkeypatch.setattr(_ala_tasks.data, "load", load)
    _ala_tasks._pixels.cache_clear()
    options: dict[str, Any] = {"size": "small", "seeds": 1, "steps": 20, "device": "cpu"}
    status = recipes()[name].run(**options, output=tmp_path)
    run = run_folder.read(tmp_path)
    reported = [t for t in run.trials if t.seed == 0 and t.method in {row.label for row in ala.ROWS}]
    assert {t.method for t in reported} == {row.label for row in ala.ROWS}
    problems = next(recipe.problems for recipe in ala.RECIPES if recipe.name == name)
    assert {t.task for t in run.trials} == {f"digits: {problem.name}" for problem in problems}
    assert status in (0, 2) and "mnist" in capsys.readouterr().err


def test_training_that_diverges_is_said_and_left_out(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some metrics refuse predictions that are not finite; a rate that leads to them must not end the recipe."""
    trial = make_trial(draw(DIGITS, IMBALANCE, 0, CPU), steps=40)
    with pytest.raises(Diverged):
        plain("a", 1e30).train(trial)
    monkeypatch.setattr(_ala_methods, "RATES", (0.05, 1e30))
    assert stopped("b").train(trial)["rate"] == 0.05
    monkeypatch.setattr(_ala_methods, "RATES", (1e30,))
    monkeypatch.setattr(_ala_methods, "GRID", 2)
    with pytest.raises(Diverged):
        fixed_grid("c", 1e30, rates=True).train(trial)
