from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lossmeta import data
from lossmeta.data import Dataset
from lossmeta.recipes import _comparison, _problems, recipes
from lossmeta.recipes._comparison import PLAIN, TUNED, Recipe, Results, SettingsError, compared, spread
from lossmeta.recipes._methods import LOSSES, Method, Trials
from lossmeta.recipes._paper import REPORTED, TASKS, reported
from lossmeta.recipes._problems import Problem, Splits, augmented, problems, split

CPU = torch.device("cpu")


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


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda name: images())
    monkeypatch.setattr(_comparison, "problems", lambda size, *groups: [TOY])


RECIPE = Recipe(
    "toy",
    "a toy",
    ("toy",),
    (
        PLAIN,
        TUNED,
        Method("offline", loss="network", inner_steps=1),
        Method("online", loss="network", inner_steps=1, online=1e-3),
    ),
)


def start(output: Path, **options: Any) -> int:
    return RECIPE.run(**{"size": "small", "seeds": 2, "device": "cpu", "output": output, **options})


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
    drawn = splits.batches(part, 4, 1)
    first = torch.cat([next(drawn)[1] for _ in range(5)]).flatten()
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
@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_trial_is_repeatable(loss: str | None, dataset: Dataset) -> None:
    method = Method("m", loss=loss, inner_steps=int(loss is not None), online=1e-3 if loss else 0.0)
    results = []
    for _ in range(2):
        state = torch.get_rng_state()
        trial = Trials(TOY, split(dataset, 0, CPU, False), 0, CPU, 3).run(method, 0.05)
        assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers must not move"
        results.append({k: v for k, v in trial.items() if "seconds" not in k})
    assert results[0] == results[1]


def test_an_online_loss_that_stays_as_it_is_trains_as_the_fixed_one() -> None:
    trials = Trials(TOY, split(images(), 0, CPU, False), 0, CPU, 3)
    fixed = trials.run(Method("a", loss="network", inner_steps=1), 0.05)
    online = trials.run(Method("b", loss="network", inner_steps=1, online=1e-30), 0.05)
    assert fixed["test"] == online["test"]
    assert fixed["slope_ratio"] == pytest.approx(online["slope_ratio"])
    residual = trials.run(Method("c", loss="residual"), 0.05)
    assert residual["test"] == trials.run(Method("d"), 0.05)["test"]
    assert residual["slope_ratio"] == pytest.approx(1)


def test_learned_learning_rate_moves() -> None:
    trials = Trials(TOY, split(images(), 0, CPU, False), 0, CPU, 3)
    assert trials.run(Method("a", learning_rate=1e-3), 0.05)["final_rate"] != 0.05
    assert trials.run(Method("b"), 0.05)["final_rate"] == 0.05
    offline = trials.run(Method("c", inner_steps=1), 0.05)
    assert offline["rate"] == offline["final_rate"] != 0.05


def test_normalised_slope_is_the_task_loss_s() -> None:
    trials = Trials(TOY, split(images(), 0, CPU, False), 0, CPU, 3)
    plain = trials.run(Method("a", loss="network", inner_steps=1), 0.05)
    matched = trials.run(Method("b", loss="network", inner_steps=1, normalize=True), 0.05)
    assert matched["slope_ratio"] == pytest.approx(1, abs=1e-4)
    assert plain["slope_ratio"] != pytest.approx(1, abs=1e-2)


def test_divergence_is_a_result() -> None:
    trials = Trials(replace(TOY, steps=40), split(regression(), 0, CPU, False), 0, CPU, 3)
    for method in (Method("a"), Method("b", loss="residual", online=1e-3)):
        trial = trials.run(method, 1e6)
        assert trial["test"] is trial["selection"] is trial["slope_ratio"] is None
        assert bool(trials.history) == bool(method.loss), "what a figure of the divergence needs is kept"


def test_dropout_follows_from_the_seed() -> None:
    def dropout(features: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(features, outputs))

    results = []
    for _ in range(2):
        state = torch.get_rng_state()
        trials = Trials(replace(TOY, model=dropout), split(images(), 0, CPU, False), 0, CPU, 3)
        trial = trials.run(Method("m", loss="network", inner_steps=1, online=1e-3), 0.05)
        assert torch.equal(state, torch.get_rng_state())
        results.append({k: v for k, v in trial.items() if "seconds" not in k})
        torch.manual_seed(5)
    assert results[0] == results[1]


# ---- Results and tables.


def test_recipe_trains_every_method_with_every_seed(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    threads = torch.get_num_threads()
    assert start(tmp_path / "new") == 0
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "new" / "results.json").read_text())
    reported_trials = [t for t in report["results"] if t["seed"] < 100]
    assert [(t["method"], t["seed"]) for t in reported_trials] == [
        (method.label, seed) for seed in range(2) for method in RECIPE.methods
    ]
    tuning = [t for t in report["results"] if t["seed"] >= 100]
    assert {(t["rate"], t["seed"]) for t in tuning} == {(r, 10_000 + i) for r in TOY.rates for i in range(3)}
    best = min(TOY.rates, key=lambda r: sum(t["selection"] for t in tuning if t["rate"] == r))
    assert {t["rate"] for t in reported_trials if t["method"] == TUNED.label} == {best}
    shown = capsys.readouterr().out
    assert all(method.label in shown for method in RECIPE.methods)


def test_run_goes_on_where_it_was_stopped(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert start(tmp_path / "whole") == 0
    real, calls = Trials.run, []

    def limited(self: Trials, method: Method, rate: float) -> dict[str, Any]:
        calls.append(method.label)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, method, rate)

    monkeypatch.setattr(Trials, "run", limited)
    assert start(tmp_path / "parts") == 130
    assert "run again to go on" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "parts" / "results.json").read_text())["results"]) == 8
    assert start(tmp_path / "parts") == 0
    whole, parts = (
        [
            {k: v for k, v in t.items() if "seconds" not in k}
            for t in json.loads((tmp_path / name / "results.json").read_text())["results"]
        ]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert len(calls) == 9 + len(whole) - 8
    assert start(tmp_path / "parts", seeds=1) == 0
    assert len(calls) == 9 + len(whole) - 8, "fewer seeds train nothing anew"


def test_results_of_other_settings_are_refused(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(tmp_path, steps=2, seeds=1) == 0
    before = (tmp_path / "results.json").read_bytes()
    assert start(tmp_path, steps=3, seeds=1) == 2
    assert "'steps': 2}, expected " in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    for text in ("{", "[]", '{"settings": {}}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(SettingsError, match="must hold results of a recipe"):
            Results(tmp_path / "results.json", {})


def test_a_method_that_has_changed_is_trained_anew(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", {})
    key = {"task": "t", "method": "m", "seed": 0}
    assert results.get(key, {"online": (1,)}, lambda: {"test": 1})["test"] == 1
    results = Results(tmp_path / "results.json", {})
    assert results.get(key, {"online": (1,)}, lambda: {"test": 2})["test"] == 1
    assert results.get(key, {"online": (2,)}, lambda: {"test": 3})["test"] == 3
    assert [t["test"] for t in Results(tmp_path / "results.json", {}).report["results"]] == [3]


def test_bad_places_are_said(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert start(tmp_path, device="nonsense") == 2
    assert "--device nonsense cannot be used" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert start(tmp_path / "file") == 1
    assert "the results could not be written" in capsys.readouterr().err


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
    monkeypatch.setattr(_comparison, "problems", lambda size, *groups: tasks)
    assert start(tmp_path, seeds=1) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "lossmeta run toy: other was left out. put it there",
        "lossmeta run toy: third was left out. file.gz is cut off",
    ]
    assert "toy, 1 seed" in captured.out
    del tasks[2]
    assert start(tmp_path / "none", seeds=1) == 2
    assert not (tmp_path / "none").exists()


def test_spread_and_comparison() -> None:
    assert spread([0.1, 0.3]) == "0.2000 ± 0.1414"
    assert spread([0.1, None]) == "0.1000, 1 diverged"
    assert spread([None]) == "diverged"
    trials, reference = ([{"test": v} for v in values] for values in ((0.1, 0.2, 0.3), (0.2, 0.4, 0.35)))
    difference, wins, p = compared(trials, reference)
    assert difference == "-0.1167 ± 0.0764"
    assert wins == "3/3"
    assert float(p) == pytest.approx(0.118, abs=5e-3)
    assert compared([{"test": None}], [{"test": 0.1}]) == ("", "0/1", "")


def test_paper_s_rows() -> None:
    assert len(TASKS) == 12
    assert reported("adalfl", "SVHN + WRN 16-8") == "0.0441 ± 0.0014"
    assert reported("baseline", "Crime + MLP") == "0.0274 ± 0.0017"
    assert reported("hours, online", "CIFAR-100 + WRN 28-10") == "50.49"
    assert reported("quadratic", "Crime + MLP") == reported("nothing", "Crime + MLP") == ""
    assert reported("inner 20", "CIFAR-10 + AllCNN-C") == "0.0974 ± 0.0061"


def test_recipes_fit_together() -> None:
    names = [p.name for p in problems("paper")]
    assert names == list(TASKS)
    for recipe in recipes().values():
        assert recipe.problems("small") and recipe.problems("paper")
        labels = [m.label for m in recipe.methods]
        assert len(set(labels)) == len(labels)
        for method in recipe.methods:
            assert method.column is None or method.column in REPORTED
            assert method.loss is None or method.loss in LOSSES
        assert set(recipe.tasks or ()) <= set(TASKS)


@pytest.mark.parametrize(
    "problem", [p for group in _problems.SMALL.values() for p in group], ids=lambda p: p.name
)
def test_small_models_fit_their_data(problem: Problem) -> None:
    features = {"communities": 100, "diabetes": 10, "california": 8, "mnist": 784}.get(problem.data, 3072)
    shape = {784: (1, 28, 28), 3072: (3, 32, 32)}.get(features, (features,))
    outputs = {8: 1, 10: 1, 100: 1}.get(features, 10)
    assert problem.model(features, outputs)(torch.randn(2, *shape)).shape == (2, outputs)


def test_figures_of_learned_losses(toy: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert start(tmp_path, seeds=1) == 0
    assert [p.name for p in tmp_path.glob("*.png")] == ["toy-online.png"]
    assert (tmp_path / "toy-online.png").read_bytes().startswith(b"\x89PNG")
