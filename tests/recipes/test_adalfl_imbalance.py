"""The recipe of rare classes: the data is what it says, and every row trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_setting import methods

from lossmeta.experiments import Method, Trial, Tuned, run_folder
from lossmeta.recipes import _noise_methods, _noise_tasks, adalfl_imbalance, recipes
from lossmeta.recipes.adalfl_imbalance import DIGITS, SOURCES, draw, sizes

CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_sizes(source: Any) -> None:
    found = sizes(source)
    assert len(found) == source.classes and found[0] == source.train
    assert found == sorted(found, reverse=True)
    assert found[0] / found[-1] == pytest.approx(50, rel=0.15)


def test_data() -> None:
    drawn, again, other = draw(DIGITS, 3, CPU), draw(DIGITS, 3, CPU), draw(DIGITS, 4, CPU)
    parts = [drawn.train, drawn.clean, drawn.selection, drawn.test]
    assert drawn.train[1].bincount().tolist() == sizes(DIGITS)
    for (_, labels), count in zip(parts[1:], (10, 25, 50), strict=True):
        assert labels.bincount().tolist() == [count] * 10
    rows = [{tuple(x) for x in inputs.flatten(1).tolist()} for inputs, _ in parts]
    assert all(not rows[i] & rows[j] for i in range(4) for j in range(i))
    assert torch.equal(again.train[0], drawn.train[0]) and not torch.equal(other.train[0], drawn.train[0])


def test_an_official_test_part_is_the_same_in_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(2000) % 10
    monkeypatch.setattr(_noise_tasks, "pool", lambda name: (torch.arange(2000.0)[:, None], labels, 1500))
    source = replace(DIGITS, test=200, selection=100)
    one, two = draw(source, 0, CPU), draw(source, 1, CPU)
    assert torch.equal(one.test[0], two.test[0]) and one.test[1].bincount().tolist() == [20] * 10
    assert float(one.test[0].min()) >= 1500 > float(one.train[0].max())
    with pytest.raises(ValueError, match="needs 160 samples of class 0, got 150"):
        draw(replace(source, train=140), 0, CPU)
    with pytest.raises(ValueError, match="needs 60 test samples of class 0, got 50"):
        draw(replace(source, test=600), 0, CPU)


@pytest.mark.parametrize("method", methods(adalfl_imbalance.ROWS), ids=lambda m: m.label)
def test_rows(method: Method, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_noise_methods, "LAST_RATES", (0.03,))
    monkeypatch.setattr(_noise_methods, "LAST_STEPS", (5,))
    found = method.train(make_trial(draw(DIGITS, 0, CPU), steps=120))
    assert 0.02 < found["error"] < 0.6  # type: ignore[operator]


@pytest.mark.usefixtures("only_scikit_learn")
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On the digits alone, where there is nothing else."""
    rows = tuple(
        replace(r, candidates=r.candidates[:1], beside=None) if isinstance(r, Tuned) else r
        for r in adalfl_imbalance.ROWS
    )
    monkeypatch.setattr(_noise_methods, "LAST_RATES", (0.03,))
    monkeypatch.setattr(_noise_methods, "LAST_STEPS", (5,))
    recipe = replace(adalfl_imbalance.RECIPE, rows=rows)
    assert recipe.name == "adalfl-imbalance" in recipes()
    status = recipe.run(size="small", seeds=1, steps=6, device="cpu", output=tmp_path)
    trials = [t for t in run_folder.read(tmp_path).trials if t.seed == 0]
    assert {t.task for t in trials} == {"digits: 50 : 1"} and len(trials) == len(rows)
    assert status in (0, 2) and "mnist" in capsys.readouterr().err
