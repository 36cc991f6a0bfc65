"""The recipe of lossmeta.diagnose: what it draws, and that its measures are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lossmeta.diagnosis import diagnose
from lossmeta.experiments import run_folder
from lossmeta.recipes import diagnose as recipe
from lossmeta.recipes import recipes

CPU = torch.device("cpu")


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lossmeta.plot.installed", lambda: False)
    monkeypatch.setattr(recipe, "TASKS", recipe.TASKS[2:3])
    monkeypatch.setattr(recipe, "TREES", 5)
    options: dict[str, Any] = {"size": "small", "device": "cpu", "output": tmp_path, "steps": 20}
    assert recipes()["diagnose"].run(seeds=1, **options) == 0
    logistic, forest, _, seen = [t.measures for t in run_folder.read(tmp_path).trials]
    assert logistic["true"] == forest["true"] == pytest.approx(0.36, abs=0.03)
    assert abs(logistic["estimated minus true"]) < 0.06 and abs(forest["estimated minus true"]) < 0.2
    assert seen["estimated"] < 0.15  # a forest knows what it has seen
    assert logistic["suspects that are wrong"] > 0.85 and logistic["wrong ones found"] > 0.7
    assert logistic["even"] == 1


@pytest.mark.parametrize("number", [1, 4])
def test_what_is_drawn(number: int) -> None:
    drawn, again = (recipe.TASKS[number].prepare(seed, CPU) for seed in (3, 3))
    assert torch.equal(drawn.labels, again.labels)
    assert not torch.equal(drawn.labels, recipe.TASKS[number].prepare(4, CPU).labels)
    assert len(drawn.labels) <= recipe.ROWS and len(drawn.clean[1]) == recipe.CLEAN
    wrong = drawn.labels != drawn.true_labels
    moved = (drawn.labels - drawn.true_labels)[wrong] % 10
    if number == 4:
        assert bool((moved == 1).all()) and float(wrong.double().mean()) == pytest.approx(0.2, abs=0.03)
    else:
        assert float(wrong.double().mean()) == pytest.approx(0.18, abs=0.03)
        assert moved.bincount(minlength=10)[1:].min() > 10
    rows = {tuple(row) for row in drawn.inputs.tolist()}
    assert not rows & {tuple(row) for row in drawn.clean[0].tolist()}


def test_measures_of_a_model_that_is_right() -> None:
    drawn = recipe.TASKS[2].prepare(0, CPU)
    p = torch.nn.functional.one_hot(drawn.true_labels, 10) * 0.9 + 0.01
    clean = torch.nn.functional.one_hot(drawn.clean[1], 10).double()
    found = recipe.judged(drawn, diagnose(p, drawn.labels, clean=(clean, drawn.clean[1])))
    assert found["estimated minus true"] == pytest.approx(0) and found["in the interval"] == 1
    assert found["suspects that are wrong"] == found["wrong ones found"] == 1
    assert found["error on clean samples"] == 0
    assert found["at least, by clean samples"] == pytest.approx(found["true"])
