from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lossmeta import data
from lossmeta.data import Dataset
from lossmeta.experiments import Trial, run_folder
from lossmeta.recipes import _adalfl_tasks, recipes
from lossmeta.recipes._adalfl_tables import PLAIN, TUNED, PaperTable, row
from lossmeta.recipes._adalfl_tasks import Drawn, Problem, Splits, augmented, problems, split
from lossmeta.recipes._adalfl_training import (
    LOSSES,
    Fixed,
    Offline,
    OfflineRate,
    Online,
    Training,
    Untrained,
)
from lossmeta.recipes.papers.adalfl import REPORTED, TASKS, reported

CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]


def regression(rows: int = 60) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    inputs = 5 + 3 * torch.randn(rows, 4, generator=generator)
    targets = 100 + inputs[:, :1] - 2 * inputs[:, 1:2] + torch.randn(rows, 1, generator=generator)
    return Dataset("toy", (inputs, targets), None, None)


def images(rows: int = 60) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (rows,), generator=generator)
    pixels = torch.randint(0, 60, (rows, 1, 6, 6), generator=generator)
    pixels[torch.arange(rows), 0, labels] += 150
    one = pixels.to(torch.uint8), labels
    return Dataset("toy", one, (one[0][:20], one[1][:20]), 3)


def linear(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, outputs))


TOY = Problem("toy", "toy", linear, batch=16, steps=12, rate=0.05, rates=(0.01, 0.05))


def drawn(dataset: Dataset, problem: Problem = TOY) -> Drawn:
    return Drawn(problem, split(dataset, 0, CPU, False), 3)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _adalfl_tasks._dataset.cache_clear()
    monkeypatch.setattr(data, "load", lambda name: images())
    monkeypatch.setattr(_adalfl_tasks, "problems", lambda size, *groups: [TOY])
    monkeypatch.setattr(_adalfl_tasks, "OFFLINE_STEPS", 3)
    yield
    _adalfl_tasks._dataset.cache_clear()


RECIPE = PaperTable(
    "toy",
    "a toy",
    ("toy",),
    (PLAIN, TUNED, row("offline", Offline(), Fixed()), row("online", Offline(), Online(1e-3))),
)


def start(output: Path, **options: Any) -> int:
    return RECIPE.run(**{"size": "small", "seeds": 2, "device": "cpu", "output": output, **options})


def without_times(trial: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in trial.items() if name != "seconds"}


# ---- Data.


@pytest.mark.parametrize("dataset", [regression(), images()], ids=["regression", "images"])
def test_parts_are_disjoint_and_complete(dataset: Dataset) -> None:
    # The target tells the row.
    tagged = replace(dataset, train=(dataset.train[0], torch.arange(60.0)[:, None]), classes=None)
    parts = split(tagged, 3, CPU, False).parts
    rows = [parts[name][1] for name in parts if not (name == "test" and dataset.test)]
    assert len(torch.cat(rows).unique()) == 60
    assert len(parts["validation"][1]) == len(parts["selection"][1]) == 6
    assert len(parts["test"][1]) == (20 if dataset.test else 12)
    other = split(tagged, 4, CPU, False).parts
    assert not torch.equal(parts["train"][1], other["train"][1])


def test_regression_is_scaled_by_what_is_not_tested_on() -> None:
    splits = split(regression(), 0, CPU, False)
    inputs, targets = splits.joined("train", "validation", "selection")
    torch.testing.assert_close(inputs.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(0), torch.ones(4))
    assert (targets.min(), targets.max()) == (0, 1)
    assert splits.regression and splits.outputs == 1 and splits.features == 4


def test_images_are_normalised_by_training_images() -> None:
    splits = split(images(), 0, CPU, False)
    x = splits.prepared(splits.parts["train"][0])
    assert x.mean().abs() < 1e-5
    assert x.std() == pytest.approx(1, abs=1e-5)
    assert splits.prepared(splits.parts["test"][0]).mean().abs() > 1e-5


def test_batches_are_whole_epochs_in_the_seed_s_order() -> None:
    splits = split(regression(), 0, CPU, False)
    part = (torch.arange(10.0)[:, None], torch.arange(10.0)[:, None])
    batches = splits.batches(part, 4, 1)
    first = torch.cat([next(batches)[1] for _ in range(5)]).flatten()
    assert sorted(first[:10].tolist()) == sorted(first[10:].tolist()) == list(range(10))
    again = splits.batches(part, 4, 1)
    assert torch.equal(first[:4], next(again)[1].flatten())
    assert not torch.equal(first[:4], next(splits.batches(part, 4, 2))[1].flatten())
    assert len(next(splits.batches(part, 64, 1))[1]) == 10


def test_augmentation_shifts_and_flips_whole_images() -> None:
    picture = torch.arange(1.0, 1 + 3 * 5 * 7).reshape(1, 3, 5, 7)
    many = augmented(picture.expand(200, -1, -1, -1), torch.Generator().manual_seed(0), padding=2)
    assert many.shape == (200, 3, 5, 7)
    padded = torch.nn.functional.pad(picture, (2,) * 4)[0]
    windows = [padded[:, t : t + 5, s : s + 7] for t in range(5) for s in range(5)]
    allowed = torch.stack(windows + [w.flip(2) for w in windows])
    found = [int((allowed == image).flatten(1).all(1).nonzero()[0]) for image in many]
    assert len(set(found)) > 40


def test_error_is_that_of_every_row() -> None:
    splits = Splits({"test": (torch.eye(3).repeat(400, 1), torch.arange(3).repeat(400))}, 3)
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3)[[0, 1, 1]])
    assert splits.evaluate(model, "test") == pytest.approx(1 / 3)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    assert splits.evaluate(model, "test") == math.inf


# ---- Trials.


@pytest.mark.parametrize("dataset", [regression(), images()], ids=["regression", "images"])
@pytest.mark.parametrize("loss", LOSSES)
def test_trial_is_repeatable(loss: str, dataset: Dataset, make_trial: MakeTrial) -> None:
    training = (
        Training("m", Untrained(), Fixed()) if loss == "task" else Training("m", Offline(loss), Online(1e-3))
    )
    results = []
    for _ in range(2):
        state = torch.get_rng_state()
        trial = training(make_trial(drawn(dataset)))
        assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers must not move"
        results.append(without_times(trial))
    assert results[0] == results[1]


def test_an_online_loss_that_stays_as_it_is_trains_as_the_fixed_one(make_trial: MakeTrial) -> None:
    trial = make_trial(drawn(images()))
    fixed = Training("a", Offline(), Fixed())(trial)
    online = Training("b", Offline(), Online(1e-30))(trial)
    assert fixed["test error"] == online["test error"]
    assert fixed["slope"] == pytest.approx(online["slope"])
    residual = Training("c", Untrained("residual"), Fixed())(trial)
    assert residual["test error"] == Training("d", Untrained(), Fixed())(trial)["test error"]
    assert residual["slope"] == pytest.approx(1)


def test_what_is_learned_offline_is_learned_once_for_a_seed(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = make_trial(drawn(images()))
    first = Training("a", Offline(), Fixed())(shared)
    monkeypatch.setattr("lossmeta.recipes._adalfl_training.initialize", None)
    assert without_times(Training("b", Offline(), Fixed())(shared)) == without_times(first)


def test_the_slope_of_the_loss_is_recorded_over_the_training(make_trial: MakeTrial) -> None:
    trial = make_trial(drawn(images()))
    found = Training("a", Offline(), Online(1e-2))(trial)
    points = trial.series["slope of the learned loss"]
    assert points[0][0] == 0 and points[-1] == (12, found["slope"]) and len(set(points)) > 5
    plain = make_trial(drawn(images()))
    Training("b", Untrained(), Online(learning_rate=1e-3))(plain)
    Training("c", Untrained(), Fixed())(plain)
    assert plain.series == {}


def test_learned_learning_rate_moves(make_trial: MakeTrial) -> None:
    trial = make_trial(drawn(images()))
    assert Training("a", Untrained(), Online(learning_rate=1e-3))(trial)["rate"] != 0.05
    assert Training("b", Untrained(), Fixed())(trial)["rate"] == 0.05
    assert Training("c", OfflineRate(), Fixed())(trial)["rate"] != 0.05


def test_normalised_slope_is_the_task_loss_s(make_trial: MakeTrial) -> None:
    trial = make_trial(drawn(images()))
    plain = Training("a", Offline(), Fixed())(trial)
    matched = Training("b", Offline(normalize=True), Fixed())(trial)
    assert matched["slope"] == pytest.approx(1, abs=1e-4)
    assert plain["slope"] != pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("begin", "advance"), [(Untrained(), Fixed()), (Untrained("residual"), Online(1e-3))]
)
def test_divergence_is_a_result(begin: Untrained, advance: Fixed | Online, make_trial: MakeTrial) -> None:
    trial = make_trial(drawn(regression(), replace(TOY, steps=20)))
    measures = Training("diverging", begin, advance, rate=1e6)(trial)
    assert measures["test error"] is measures["selection error"] is measures["slope"] is None
    assert measures["rate"] == 1e6


def test_figure_of_a_divergence_is_drawn(figures: None, make_trial: MakeTrial) -> None:
    trial = make_trial(drawn(regression(), replace(TOY, steps=20)))
    Training("diverging", Untrained("residual"), Online(1e-3), rate=1e6)(trial)
    assert (trial.folder / "toy-diverging.png").exists()


def test_dropout_follows_from_the_seed(make_trial: MakeTrial) -> None:
    def dropout(features: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(features, outputs))

    results = []
    for _ in range(2):
        state = torch.get_rng_state()
        trial = make_trial(drawn(images(), replace(TOY, model=dropout)))
        results.append(without_times(Training("m", Offline(), Online(1e-3))(trial)))
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(5)
    assert results[0] == results[1]


# ---- Tables.


def test_recipe_trains_every_row_with_every_seed(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    threads = torch.get_num_threads()
    assert start(tmp_path / "new") == 0
    assert torch.get_num_threads() == threads
    trials = run_folder.read(tmp_path / "new").trials
    shown = [t for t in trials if t.role == "report"]
    assert [(t.method, t.seed) for t in shown] == [(r.label, seed) for seed in range(2) for r in RECIPE.rows]
    tuning = [t for t in trials if t.role == "tuning"]
    assert {(t.measures["rate"], t.seed) for t in tuning} == {
        (rate, 10_000 + i) for rate in TOY.rates for i in range(3)
    }
    errors = {
        rate: sum(t.measures["selection error"] or 0 for t in tuning if t.measures["rate"] == rate)
        for rate in TOY.rates
    }
    best = min(TOY.rates, key=errors.__getitem__)
    assert {t.measures["rate"] for t in shown if t.method == TUNED.label} == {best}
    out = capsys.readouterr().out
    assert all(r.label in " ".join(out.split()) for r in RECIPE.rows)


def test_rows_at_the_tuned_rate_take_it_from_plain_training(toy: None, tmp_path: Path) -> None:
    tuned = row("residual, tuned rate", Untrained("residual"), Online(1e-3), tuned=True)
    recipe = replace(RECIPE, rows=(PLAIN, TUNED, tuned))
    assert recipe.run(size="small", seeds=1, device="cpu", output=tmp_path) == 0
    rates = {t.method: t.measures["rate"] for t in run_folder.read(tmp_path).trials if t.role == "report"}
    assert rates[tuned.label] == rates[TUNED.label]


def test_run_goes_on_where_it_was_stopped(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def finished(name: str) -> list[tuple[Any, ...]]:
        trials = run_folder.read(tmp_path / name).trials
        return [(t.method, t.seed, without_times(dict(t.measures))) for t in trials]

    assert start(tmp_path / "whole") == 0
    real, calls = Training.__call__, []

    def limited(self: Training, trial: Trial) -> dict[str, float | None]:
        calls.append(self.label)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, trial)

    monkeypatch.setattr(Training, "__call__", limited)
    assert start(tmp_path / "parts") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(finished("parts")) == 8
    assert start(tmp_path / "parts") == 0
    assert finished("whole") == finished("parts")
    count = len(calls)
    assert count == 9 + len(finished("whole")) - 8
    assert start(tmp_path / "parts", seeds=1) == 0
    assert len(calls) == count, "fewer seeds train nothing anew"


def test_results_of_other_settings_are_refused(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(tmp_path, steps=2, seeds=1) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert start(tmp_path, steps=3, seeds=1) == 2
    assert "steps is 2 there and 3 now" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tasks_without_data_are_left_out(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def load(name: str) -> Dataset:
        if name == "absent":
            raise data.MissingDataError("put it there")
        if name == "torn":
            raise ValueError("file.gz is cut off")
        return images()

    monkeypatch.setattr(data, "load", load)
    tasks = [replace(TOY, name="other", data="absent"), replace(TOY, name="third", data="torn"), TOY]
    monkeypatch.setattr(_adalfl_tasks, "problems", lambda size, *groups: tasks)
    assert start(tmp_path, seeds=1) == 0
    captured = capsys.readouterr()
    assert "lossmeta toy: other was left out. put it there" in captured.err
    assert "lossmeta toy: third was left out. file.gz is cut off" in captured.err
    assert "toy, 1 seed" in captured.out
    del tasks[2]
    assert start(tmp_path / "none", seeds=1) == 2
    assert not (tmp_path / "none").exists()


def test_figures_of_learned_losses(figures: None, toy: None, tmp_path: Path) -> None:
    assert start(tmp_path, seeds=1) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["toy-online.png", "toy.png"]
    assert (tmp_path / "toy-online.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_are_of_all_that_training_needed(toy: None, tmp_path: Path) -> None:
    rows = (PLAIN, row("offline", Offline(), Fixed(), "hours, offline"))
    recipe = PaperTable("toy", "a toy", ("toy",), rows, seconds=True)
    assert recipe.run(size="small", seeds=1, device="cpu", output=tmp_path) == 0
    plain, offline = run_folder.read(tmp_path).trials
    assert 0 < (plain.measures["seconds"] or 0) < (offline.measures["seconds"] or 0)
    page = (tmp_path / "tables.md").read_text()
    times = (offline.measures["seconds"] or 0) / (plain.measures["seconds"] or 1)
    assert "times plain, base rate" in page and f" {times:.2f} |" in page


# ---- The paper.


def test_paper_s_rows() -> None:
    assert len(TASKS) == 12
    assert reported("adalfl", "SVHN + WRN 16-8") == "0.0441 ± 0.0014"
    assert reported("baseline", "Crime + MLP") == "0.0274 ± 0.0017"
    assert reported("hours, online", "CIFAR-100 + WRN 28-10") == "50.49"
    assert reported("quadratic", "Crime + MLP") == reported("nothing", "Crime + MLP") == ""
    assert reported("inner 20", "CIFAR-10 + AllCNN-C") == "0.0974 ± 0.0061"


def test_recipes_fit_together() -> None:
    assert [p.name for p in problems("paper")] == list(TASKS)
    for recipe in (r for r in recipes().values() if isinstance(r, PaperTable)):
        assert recipe.problems("small") and recipe.problems("paper")
        labels = [row.label for row in recipe.rows]
        assert len(set(labels)) == len(labels)
        assert all(row.column is None or row.column in REPORTED for row in recipe.rows)
        assert set(recipe.tasks or ()) <= set(TASKS)


@pytest.mark.parametrize(
    "problem", [p for group in _adalfl_tasks.SMALL.values() for p in group], ids=lambda p: p.name
)
def test_small_models_fit_their_data(problem: Problem) -> None:
    features = {"communities": 100, "diabetes": 10, "california": 8, "mnist": 784}.get(problem.data, 3072)
    shape = {784: (1, 28, 28), 3072: (3, 32, 32)}.get(features, (features,))
    outputs = {8: 1, 10: 1, 100: 1}.get(features, 10)
    assert problem.model(features, outputs)(torch.randn(2, *shape)).shape == (2, outputs)
