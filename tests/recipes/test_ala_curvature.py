"""The recipe of Figure 4: every row trains, and its curves are those of its surfaces."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmeta import plot
from lossmeta.experiments import Method, Trial, run_folder
from lossmeta.recipes import _ala_tasks as tasks
from lossmeta.recipes import ala_curvature, recipes

MakeTrial = Callable[..., Trial]
SMALL = replace(tasks.DIGITS, valid=5)


@pytest.mark.parametrize("method", ala_curvature.ROWS, ids=lambda m: m.label)
@pytest.mark.filterwarnings(
    "ignore:Controller. the metric has not changed", "ignore:Population. all children"
)
def test_rows(method: Method, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the surface changes no training, and the test part moves nothing."""
    monkeypatch.setattr(ala_curvature, "POINTS", 3)
    drawn = tasks.draw(SMALL, tasks.NOISE, 0, torch.device("cpu"))
    found = method.train(make_trial(drawn, steps=80))
    assert found["error"] < 0.7  # type: ignore[operator]
    steps = [int(n.removeprefix(ala_curvature.AFTER)) for n in found if n.startswith(ala_curvature.AFTER)]
    assert steps == [10, 20, 30, 40, 50, 60, 70, 80]
    assert found["mean curvature"] == found[f"{ala_curvature.AFTER}80"] != found[f"{ala_curvature.AFTER}10"]
    monkeypatch.setattr(ala_curvature, "RECORDS", 1)
    again = method.train(make_trial(replace(drawn, test=drawn.valid), steps=80))
    assert again["mean curvature"] == found["mean curvature"]
    assert again["validation"] == found["validation"] == -again["error"]  # type: ignore[operator]


@pytest.mark.usefixtures("figures")
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ala_curvature, "SOURCES", (SMALL,))
    monkeypatch.setattr(ala_curvature, "POINTS", 3)
    recipe = recipes()["ala-curvature"]
    assert recipe.run(size="small", seeds=2, steps=24, device="cpu", output=tmp_path) == 0
    trials = run_folder.read(tmp_path).trials
    assert len(trials) == 2 * 2 * len(ala_curvature.ROWS)
    assert (tmp_path / "curvature-digits-40-wrong-labels.png").stat().st_size > 5000
    drawn: list[Any] = []
    monkeypatch.setattr(
        ala_curvature, "plot_index", lambda histories, **k: drawn.append(histories) or plot.figure("t")[0]
    )
    last = [t for t in trials if t.method == "AdaLFL" and t.task == "digits: right labels"]
    with (tmp_path / run_folder.TRIALS).open("a") as file:  # trained again, with other settings
        for trial in last:
            measures = {**trial.measures, f"{ala_curvature.AFTER}24": 7.0}
            file.write(
                json.dumps({**dataclasses.asdict(trial), "measures": measures, "settings": {"other": 1}})
                + "\n"
            )
    ala_curvature.draw(tmp_path)
    steps, values = drawn[0]["AdaLFL"]
    assert steps[-1] == 24 and values[-1] == 7.0
