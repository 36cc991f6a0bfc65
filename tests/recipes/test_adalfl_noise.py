"""The recipe of wrong labels: the data is what it says, every row trains, and none sees what it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_setting import methods
from torch import Tensor

from lossmeta.experiments import Diverged, Method, Trial, Tuned, run_folder
from lossmeta.recipes import _noise_methods, _noise_tasks, adalfl_noise, recipes
from lossmeta.recipes._noise_tasks import ALIKE, DIGITS, NONE, PAIRS, UNIFORM, Drawn, Noise, draw

CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]


@pytest.mark.parametrize("noise", [*UNIFORM, *PAIRS, NONE], ids=lambda n: n.name)
def test_data(noise: Noise) -> None:
    drawn, right = draw(DIGITS, noise, 3, CPU), draw(DIGITS, NONE, 3, CPU)
    parts = [right.train, drawn.clean, drawn.selection, drawn.test]
    assert [len(y) for _, y in parts] == [900, 100, 250, 500]
    rows = [{tuple(x) for x in inputs.flatten(1).tolist()} for inputs, _ in parts]
    assert all(not rows[i] & rows[j] for i in range(4) for j in range(i))
    assert (drawn.clean[1].bincount() == 10).all()
    assert torch.equal(drawn.train[0], right.train[0])
    wrong = drawn.train[1] != right.train[1]
    share = noise.rate * (1 if noise.flips else 0.9)
    assert float(wrong.double().mean()) == pytest.approx(share, abs=0.05)
    if noise.flips:
        assert torch.equal(drawn.train[1][wrong], (right.train[1][wrong] + 1) % 10)
    for a, b in ((drawn.clean, right.clean), (drawn.selection, right.selection), (drawn.test, right.test)):
        assert torch.equal(a[1], b[1])


def test_classes_that_are_alike() -> None:
    plane, car, bird, cat, deer, dog, _, horse, _, truck = range(10)
    found = ALIKE.flips(torch.arange(10), 10).tolist()  # type: ignore[misc]
    assert {truck: car, bird: plane, deer: horse, cat: dog, dog: cat} == {
        i: to for i, to in enumerate(found) if i != to
    }


@pytest.mark.parametrize("method", methods(adalfl_noise.ROWS), ids=lambda m: m.label)
def test_rows(method: Method, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trains; the test part moves nothing, and the selection part the rivals alone."""
    monkeypatch.setattr(_noise_methods, "LAST_RATES", (0.03,))
    monkeypatch.setattr(_noise_methods, "LAST_STEPS", (5,))
    drawn = draw(DIGITS, UNIFORM[1], 0, CPU)
    first = method.train(make_trial(drawn, steps=120))
    assert 0.02 < first["error"] < 0.6  # type: ignore[operator]
    hidden = replace(drawn, test=drawn.selection)
    second = method.train(make_trial(hidden, steps=120))
    assert second["error"] == second["selection error"] == first["selection error"]
    blind = replace(drawn, selection=(drawn.selection[0] * 0, drawn.selection[1]))
    third = method.train(make_trial(blind, steps=120))
    if "nothing tuned" in method.label:
        assert third["error"] == first["error"]
    else:
        assert {"stop", "averaged"} <= set(first)


def test_the_rivals_end_as_their_best_stop_or_the_last_stage(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(DIGITS, UNIFORM[1], 0, CPU), steps=100)
    found = _noise_methods.fixed("a", _noise_methods.cross_entropy, 0.1, 0.0, 1.0).train(trial)
    seen: list[float] = []
    best = _noise_methods.Best()
    see = _noise_methods.Best.see

    def watched(self: Any, model: Any, drawn: Drawn, **about: float) -> None:
        seen.append(_noise_tasks.error(model, drawn.selection))
        see(self, model, drawn, **about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_noise_methods.Best, "see", watched)
        _noise_methods.fixed("a", _noise_methods.cross_entropy, 0.1, 0.0, 1.0).train(trial)
    assert len(seen) == 2 * 6 + len(_noise_methods.LAST_RATES) * len(_noise_methods.LAST_STEPS)
    assert found["selection error"] == min(seen)
    assert best.model is None


def test_errors_over_the_training_are_recorded(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(DIGITS, UNIFORM[1], 0, CPU), steps=40)
    found = _noise_methods.learned("learned").train(trial)
    assert trial.series["error"] == [
        (10, found["error after 10"]),
        (20, found["error after 20"]),
        (40, found["error"]),
    ]
    _noise_methods.fixed("plain", _noise_methods.cross_entropy, 0.1, 0.0, 0.0).train(trial)
    (name,) = set(trial.series) - {"error"}
    assert name == "selection error, averaged weights"
    assert [step for step, _ in trial.series[name]] == [1, 2, 5, 10, 20, 40]


def test_training_that_diverges_is_said(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(DIGITS, UNIFORM[1], 0, CPU), steps=100)
    trial.data.train[0][:] = torch.nan
    with pytest.raises(Diverged):
        _noise_methods.fixed("a", _noise_methods.cross_entropy, 0.1, 0.0, 1.0).train(trial)
    with pytest.raises(Diverged):
        _noise_methods.learned("a").train(trial)


@pytest.mark.usefixtures("only_scikit_learn")
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On the digits alone, where there is nothing else."""
    rows = tuple(
        replace(r, candidates=r.candidates[:2]) if isinstance(r, Tuned) else r for r in adalfl_noise.ROWS
    )  # type: ignore[index]
    monkeypatch.setattr(_noise_methods, "LAST_RATES", (0.03,))
    monkeypatch.setattr(_noise_methods, "LAST_STEPS", (5,))
    recipe = replace(adalfl_noise.RECIPE, rows=rows)
    assert recipe.name == "adalfl-noise" in recipes()
    status = recipe.run(size="small", seeds=1, steps=6, device="cpu", output=tmp_path)
    trials = [t for t in run_folder.read(tmp_path).trials if t.seed == 0]
    assert {t.task for t in trials} == {f"digits: {n.name}" for n in (*UNIFORM, *PAIRS, NONE)}
    assert status in (0, 2) and "mnist" in capsys.readouterr().err


def test_batches_are_whole_and_go_through_all() -> None:
    part = torch.arange(150.0)[:, None], torch.arange(150)
    found = list(_noise_tasks.batches(part, 0, 4))
    assert [len(y) for _, y in found] == [64] * 4
    first: Tensor = torch.cat([y for _, y in found[:2]])
    assert len(first.unique()) == 128
    few = torch.arange(9.0)[:, None], torch.arange(9)
    assert all(len(y) == 9 for _, y in _noise_tasks.batches(few, 0, 3))
