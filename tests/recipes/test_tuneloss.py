"""TuneLoss's recipes: the data is what it says, rows share their runs, and the test part decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lossmeta.experiments import Trial, run_folder
from lossmeta.recipes import _tuneloss_methods as methods
from lossmeta.recipes import recipes
from lossmeta.recipes import tuneloss_hyperparameters as recipe
from lossmeta.recipes._tuneloss_figure2 import against_runs
from lossmeta.recipes._tuneloss_tasks import DIGITS, ERROR, JUNK, LOG_LOSS, VALIDATION, Source, draw

MakeTrial = Callable[..., Trial]
SMALL = Source("digits", 40, 40, (0.1, 10.0), components=6, scale=4 / 255)


def test_parts_do_not_overlap_and_are_those_of_the_seed() -> None:
    drawn, again, other = draw(DIGITS, 0), draw(DIGITS, 0), draw(DIGITS, 1)
    train = drawn.problem.inputs[0, : drawn.problem.count, :-1]
    parts = [{tuple(row) for row in part.tolist()} for part in (train, drawn.valid[0], drawn.test[0])]
    assert [len(part) for part in parts] == [200, 200, 1397]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    torch.testing.assert_close(train.mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(drawn.problem.inputs, again.problem.inputs)
    assert not torch.equal(drawn.problem.inputs, other.problem.inputs)


def test_junk_says_nothing_of_the_labels() -> None:
    """It is the same numbers in another order of the samples."""
    drawn = draw(JUNK, 0)
    rows = torch.cat([drawn.problem.inputs[0, : drawn.problem.count, :-1], drawn.valid[0], drawn.test[0]])
    own, junk = rows[:, :64], rows[:, 64:]
    assert not torch.equal(own, junk)
    torch.testing.assert_close(own.sort(0).values, junk.sort(0).values)
    low, high = JUNK.box["l2"]
    assert low.shape == (128,) and (low < high).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_are_the_best_of_their_first_runs(make_trial: MakeTrial) -> None:
    trial = make_trial(draw(SMALL, 0), steps=0)
    rows = {row.label: row for row in recipe.rows("full", 5, optuna=False)}
    found = {label: row.train(trial) for label, row in rows.items()}
    for name in ("TuneLoss", "random search"):
        values = [found[methods.label_of(name, k)][VALIDATION.name] for k in (1, 2, 3, 5)]
        assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    runs = trial.scratch["TuneLoss"].found
    assert len(runs) == 10 and len(trial.scratch["random search"].found) == 5
    assert found["TuneLoss, 3 runs"] == min(runs[:3], key=lambda m: m[VALIDATION.name])
    alone = rows["TuneLoss, 3 runs"].train(make_trial(draw(SMALL, 0), steps=0))
    assert alone == pytest.approx(dict(found["TuneLoss, 3 runs"]))
    # The middle of the box comes first, for the paper's method too.
    assert trial.scratch["the paper's"].found[0] == pytest.approx(runs[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_test_part_decides_nothing(make_trial: MakeTrial) -> None:
    drawn = draw(SMALL, 0)
    hidden = replace(drawn, test=drawn.valid)
    for method in (
        methods.tuneloss("TuneLoss", 3, 3),
        methods.random_search(3, 3),
    ):
        first, second = (method.train(make_trial(d, steps=0)) for d in (drawn, hidden))
        assert first[VALIDATION.name] == second[VALIDATION.name] == second[LOG_LOSS.name]
        assert first[LOG_LOSS.name] != second[LOG_LOSS.name]


def test_random_search_is_even_over_logarithms(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(self: methods.Runs, values: list[dict[str, float]]) -> torch.Tensor:
        tried.extend(values)
        return torch.zeros(len(values), 10, self.drawn.problem.width, dtype=torch.float64)

    monkeypatch.setattr(methods.Runs, "train", train)
    methods.random_search(1, 400).train(make_trial(draw(SMALL, 0), steps=0))
    for name, low, high in (("l1", 0.1, 10.0), ("l2", 0.1, 10.0)):
        logs = np.log([v[name] / low for v in tried]) / np.log(high / low)
        assert abs(np.mean(logs) - 0.5) < 0.05 and min(logs) < 0.02 and max(logs) > 0.98
    assert abs(np.mean([v["dropout"] for v in tried]) - 0.5) < 0.05


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: None) -> None:
    assert {"tuneloss-hyperparameters", "tuneloss-adagrad", "tuneloss-many"} <= recipes().keys()
    monkeypatch.setattr(recipe, "STOPS", (1, 2, 3))
    small = recipe.Hyperparameters("tuneloss-small", "small", {"digits": SMALL})
    assert small.run(size="small", seeds=1, device="cpu", output=tmp_path / "run", steps=2) == 0
    run = run_folder.read(tmp_path / "run")
    assert {t.method for t in run.trials} >= {recipe.REFERENCE, "random search, 2 runs"}
    assert all(t.measures[LOG_LOSS.name] > 0 and 0 <= t.measures[ERROR.name] <= 1 for t in run.trials)  # type: ignore[operator]
    lines = against_runs(run, "digits").axes[0].get_lines()
    (tuned,) = (line for line in lines if line.get_label() == "TuneLoss")
    rows = [t.measures[LOG_LOSS.name] for t in run.trials if t.method.startswith("TuneLoss,")]
    assert tuned.get_xdata().tolist() == [1, 2, 3] and tuned.get_ydata().tolist() == pytest.approx(rows)
    assert (tmp_path / "run" / "by-runs-digits.png").stat().st_size > 1000


def test_adagrad_and_groups(make_trial: MakeTrial) -> None:
    """The other trainer, and an l2 for each feature."""
    few = replace(SMALL, epochs=2, groups=6)
    found = methods.tuneloss("TuneLoss", 2, 2, "hyper").train(make_trial(draw(few, 0), steps=0))
    assert 0 < found[LOG_LOSS.name] < 5  # type: ignore[operator]
