from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from lossmeta.adalfl import AveragedWeights, Relabelling
from lossmeta.adalfl._clean_batches import CleanBatches
from lossmeta.experiments import Trial, run_folder
from lossmeta.losses import GeneralizedCrossEntropy
from lossmeta.recipes import _digits, _noisy_digits, quickstart, quickstart_tuning, recipes
from lossmeta.recipes._digits import CLASSES, digits
from lossmeta.recipes._noisy_digits import (
    LOSS,
    NoisyDigits,
    WithClean,
    batch_rows,
    batches,
    cross_entropy,
    draw,
    fixed,
    learned,
    new_model,
)

CPU = torch.device("cpu")
MakeTrial = Callable[..., Trial]


def start(output: Path, name: str = "quickstart", **options: Any) -> int:
    settings = {"size": "small", "seeds": 2, "steps": 3, "device": "cpu", "output": output}
    return recipes()[name].run(**{**settings, **options})


def parts(drawn: NoisyDigits) -> dict[str, _digits.Batch]:
    return {name: getattr(drawn, name) for name in ("train", "clean", "selection", "test")}


@pytest.fixture
def tagged(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Images that tell their row; gives the true labels."""
    labels = digits()[1]
    rows = torch.arange(len(labels), dtype=torch.float32)[:, None]
    monkeypatch.setattr(_noisy_digits, "digits", lambda: (rows, labels))
    return labels


# ---- Data.


def test_parts_are_disjoint_and_of_the_sizes_that_are_kept(tagged: torch.Tensor) -> None:
    for seed in (0, 1, quickstart_tuning.FIRST_SEED):
        rows = {name: inputs[:, 0].long() for name, (inputs, _) in parts(draw(seed, CPU)).items()}
        assert {name: len(r) for name, r in rows.items()} == _noisy_digits.SETTINGS["sizes"]
        together = torch.cat(list(rows.values()))
        assert len(together.unique()) == len(together)


def test_only_training_labels_are_wrong(tagged: torch.Tensor) -> None:
    drawn = draw(3, CPU)
    for name in ("clean", "selection", "test"):
        inputs, labels = parts(drawn)[name]
        assert torch.equal(labels, tagged[inputs[:, 0].long()])
    assert torch.equal(drawn.true_labels, tagged[drawn.train[0][:, 0].long()])
    assert drawn.clean[1].bincount().tolist() == [10] * CLASSES
    draws = [draw(seed, CPU) for seed in range(20)]
    wrong = torch.stack([(d.train[1] != d.true_labels).float().mean() for d in draws]).mean()
    assert wrong.item() == pytest.approx(0.4 * 0.9, abs=0.015), "a redrawn label is right in one of ten cases"


def test_the_test_part_is_the_same_in_every_seed_and_in_no_other_part(tagged: torch.Tensor) -> None:
    draws = [draw(seed, CPU) for seed in (*range(4), *range(10_000, 10_004))]
    test = set(draws[0].test[0][:, 0].tolist())
    for drawn in draws:
        assert set(drawn.test[0][:, 0].tolist()) == test
        assert test.isdisjoint(drawn.train[0][:, 0].tolist() + drawn.selection[0][:, 0].tolist())
    assert not torch.equal(draws[0].train[0], draws[1].train[0])


def test_shades_are_exact() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    assert torch.equal(digits()[0], torch.tensor(images, dtype=torch.float32) / 16)
    assert torch.equal(digits()[1], torch.tensor(labels))


def test_batches_are_whole_epochs_and_the_same_for_every_method() -> None:
    drawn = draw(0, CPU)
    ten, twenty = list(batch_rows(drawn, 0, 10)), list(batch_rows(drawn, 0, 20))
    assert all(
        torch.equal(a, b) for x, y in zip(ten, twenty, strict=False) for a, b in zip(x, y, strict=True)
    )
    epoch = torch.cat([noisy for noisy, _ in twenty[:14]])
    assert len(epoch) == len(epoch.unique()) == 14 * 64
    assert all(len(clean.unique()) == 64 and clean.max() < 100 for _, clean in twenty)
    assert not torch.equal(ten[0][0], next(iter(batch_rows(drawn, 1, 1)))[0])


# ---- What the rows are made of.


def test_clean_rows_stand_behind_the_noisy_ones() -> None:
    logits = torch.randn(7, CLASSES)
    noisy, clean = torch.randint(CLASSES, (4,)), torch.randint(CLASSES, (3,))
    loss = WithClean(GeneralizedCrossEntropy(0.5), 3.0)(logits, (noisy, clean))
    expected = GeneralizedCrossEntropy(0.5)(logits[:4], noisy) + 3 * F.cross_entropy(logits[4:], clean)
    torch.testing.assert_close(loss, expected)


def test_methods_start_from_the_same_weights_and_learn(make_trial: MakeTrial) -> None:
    drawn = draw(0, CPU)
    assert torch.equal(new_model(0, CPU)[0].weight, new_model(0, CPU)[0].weight)  # type: ignore[index]
    trial = make_trial(drawn, steps=None)
    nothing, some = (fixed("a", cross_entropy, rate=rate, steps=40).train(trial) for rate in (1e-9, 0.03))
    assert some["error"] < 0.5 < nothing["error"]


def test_without_a_learned_difference_the_learned_row_is_a_plain_loop(make_trial: MakeTrial) -> None:
    """At a meta rate of next to nothing the loss stays cross-entropy. Clean batches weigh in one step later."""
    trial = make_trial(draw(0, CPU), steps=None)
    drawn = trial.data
    found: dict[str, nn.Module] = {}
    learned(
        "b", rate=0.03, steps=30, meta_rate=1e-12, finally_=lambda t, model, loss: found.update(model=model)
    ).train(trial)
    model = new_model(0, CPU)
    optimizer, average = SGD(model.parameters(), 0.03, momentum=0.9), AveragedWeights(model)
    clean = CleanBatches(drawn.clean, 64, trial.random_seed(LOSS), lambda inputs, labels: CLASSES)
    relabelling = Relabelling(CLASSES, seed=trial.random_seed(LOSS))
    before = None
    for inputs, (noisy, _) in batches(trial, 30):
        now = next(clean)
        x, y = before or now
        drawn_labels = relabelling.draw(average.model(inputs[: len(noisy)]), noisy)
        relabelling.learn(drawn_labels)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[: len(noisy)]), drawn_labels.labels)
        (loss + F.cross_entropy(model(x), y)).backward()
        optimizer.step()
        average.update()
        before = now
    for a, b in zip(found["model"].parameters(), average.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", quickstart.METHODS, ids=lambda m: m.label)
def test_training_sees_neither_true_labels_nor_test_nor_selection(
    method: Any, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a method may not see is put out of the way: the trained weights stay the same."""
    drawn = draw(0, CPU)
    hidden = replace(drawn, true_labels=None, selection=None, test=(torch.empty(0), torch.empty(0)))
    weights = []

    def keep(model: nn.Module, batch: Any) -> dict[str, float]:
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
        return {}

    monkeypatch.setattr(_noisy_digits, "evaluate", keep)
    for data in (drawn, hidden):
        method.train(make_trial(data, steps=3))
    assert torch.equal(*weights)


# ---- The recipe.


def test_quickstart_trains_every_row_with_every_seed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    assert start(tmp_path / "a") == start(tmp_path / "b") == 0
    assert torch.get_num_threads() == threads
    runs = [run_folder.read(tmp_path / name) for name in "ab"]
    assert [(t.method, t.seed) for t in runs[0].trials] == [
        (method.label, seed) for seed in range(2) for method in quickstart.METHODS
    ]
    assert [t.measures for t in runs[0].trials] == [t.measures for t in runs[1].trials]
    assert runs[0].header.references == (quickstart.LEARNED,)
    out = capsys.readouterr().out
    for words in ("average precision", quickstart.LEARNED, 'install "lossmeta[plot]"'):
        assert words in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)


def test_learned_loss_is_drawn_beside_cross_entropy(
    figures: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start(tmp_path, seeds=1) == 0
    assert (tmp_path / quickstart.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / quickstart.FIGURE) in capsys.readouterr().out


def test_missing_scikit_learn_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    digits.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    assert start(tmp_path / "new") == 2
    assert "install it with `python -m pip install scikit-learn`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- Tuning.


def test_networks_trained_at_once_are_those_trained_one_by_one(make_trial: MakeTrial) -> None:
    seeds = (10_000, 10_001)
    stack = quickstart_tuning.Stack(seeds, tuple(draw(seed, CPU) for seed in seeds))
    loss, rate, weight = GeneralizedCrossEntropy(0.5), 0.03, 3.0
    found = {(step, averaged): error for step, averaged, error in stack.errors(loss, rate, weight, (10, 20))}
    for steps, averaged in itertools.product((10, 20), (False, True)):
        method = fixed("m", loss, rate=rate, steps=steps, clean_weight=weight, averaged=averaged)
        errors = []
        for seed, drawn in zip(seeds, stack.drawn, strict=True):
            trial = make_trial(replace(drawn, test=drawn.selection), seed, steps=None)
            errors.append(method.train(trial)["error"])
        assert found[steps, averaged] == pytest.approx(sum(errors) / 2, abs=1e-6)


def test_tuning_never_sees_the_test_part() -> None:
    drawn = draw(10_000, CPU)
    hidden = replace(drawn, true_labels=None, test=None)
    errors = [
        list(quickstart_tuning.Stack((10_000,), (d,)).errors(cross_entropy, 0.1, 1.0, (2, 4)))
        for d in (drawn, hidden)
    ]
    assert errors[0] == errors[1]


def test_tuning_picks_the_best_of_its_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(self: Any, loss: Any, rate: float, weight: float, stops: tuple[int, ...]) -> Any:
        for step, averaged in itertools.product(stops, (False, True)):
            yield step, averaged, abs(rate - 0.03) + abs(weight - 1) + abs(step - 200) + averaged

    monkeypatch.setattr(quickstart_tuning.Stack, "errors", errors)
    assert start(tmp_path, "quickstart-tuning", steps=None) == 0
    for trial in run_folder.read(tmp_path).trials:
        found = trial.measures
        assert (found["rate"], found["steps"], found["averaged"]) == (0.03, 200, 0)
        assert found["clean weight"] == (0 if trial.method == "cross-entropy" else 1)


def test_tuned_settings_are_on_the_grid_and_seeds_apart() -> None:
    for method in quickstart.METHODS:
        if "tuned" in method.label and method.label != quickstart.LEARNED:
            assert method.settings["rate"] in quickstart_tuning.RATES
            assert method.settings["steps"] in quickstart_tuning.STOPS
    assert quickstart_tuning.FIRST_SEED >= 10_000


# ---- TuneLoss's table.


def test_few_runs(tmp_path: Path) -> None:
    assert start(tmp_path / "run", "quickstart-tuneloss", seeds=1, steps=10) == 0
    run = run_folder.read(tmp_path / "run")
    assert [t.method for t in run.trials] == [
        "TuneLoss, 2 runs",
        "TuneLoss, 3 runs",
        "random search, 3 runs",
        "random search, 10 runs",
    ]
    assert all(0 < t.measures["log loss"] < 2.4 for t in run.trials)  # type: ignore[operator]
