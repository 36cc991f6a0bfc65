"""Comparisons on a user's task: what is trained, what is shown, and what goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import draw, new_model, parts, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner, Result

import lossmeta
from lossmeta.cli import app
from lossmeta.comparison import OwnTask, _rows, load, run
from lossmeta.comparison._rows import BOTH, CLEAN, LEARNED, OWN, TUNED, TUNER, Fit, rows, task_of
from lossmeta.comparison._task import Plan, plan_of
from lossmeta.experiments import Trial
from lossmeta.experiments.run_folder import read

POPULATIONS = ["population, margins and robustness", "population, smoothing", "population, class pairs"]
CPU = torch.device("cpu")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def text_of(result: Result) -> str:
    return " ".join(result.output.split())


def trials(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def own_task(**options: Any) -> OwnTask:
    return OwnTask(
        **{"where": "test", "name": "tiny", "model": new_model, "data": parts, "epochs": 2, **options}
    )


def fit(plan: Plan, factor: float = 1.0, seed: int = 0) -> Fit:
    task = task_of(plan)
    with lossmeta.experiments.trial.seeded(seed, CPU):
        prepared = task.prepare(seed, CPU)
    trial = Trial(task, seed, CPU, prepared, {}, lambda share: None, Path())
    return Fit(plan, trial, factor)


def test_every_row_is_trained_and_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shown = command("compare", write(tmp_path), "--seeds", 2, "--output", folder)
    assert shown.exit_code == 0, shown.output
    reported = [trial for trial in trials(folder) if trial["role"] == "report"]
    labels = [OWN, TUNED, BOTH, LEARNED, CLEAN, *POPULATIONS, TUNER]
    assert [trial["method"] for trial in reported] == 2 * labels
    assert all(trial["measures"]["error"] is not None for trial in reported)
    assert all("failure" not in trial for trial in reported)
    text = text_of(shown)
    assert "tiny, 2 seeds" in text and "Holm" in text and "Recommended: none" in text
    assert all(f"error: difference to {label}" in text for label in (TUNED, BOTH, OWN))
    again = text_of(command("report", folder))
    assert "Recommended: none" in again and text.startswith(again.split("Recommended")[0].strip())
    page = tmp_path / "page.html"
    assert command("report", folder, "--html", page).exit_code == 0
    assert "Recommended: none" in page.read_text(encoding="utf-8")


def test_a_second_call_trains_what_is_missing(tmp_path: Path) -> None:
    path, folder = write(tmp_path), tmp_path / "run"
    assert command("compare", path, "--seeds", 1, "--output", folder).exit_code == 0
    first = trials(folder)
    assert command("compare", path, "--seeds", 2, "--output", folder).exit_code == 0
    assert trials(folder)[: len(first)] == first
    assert {trial["seed"] for trial in trials(folder)[len(first) :]} == {1}


def test_rows_share_their_start_and_their_batches() -> None:
    plan = plan_of(own_task(batch_size=7), 0, CPU)
    one, other, third = fit(plan), fit(plan, 3.0), fit(plan, seed=1)
    assert torch.equal(one.model.weight, other.model.weight)  # type: ignore[arg-type]
    assert not torch.equal(one.model.weight, third.model.weight)  # type: ignore[arg-type]
    assert [g["lr"] for g in other.optimizer.param_groups] == pytest.approx([3 * 0.03])
    batches = [list(f.batches()) for f in (one, other, third)]
    assert len(batches[0]) == one.steps == 2 * (24 // 7)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[0], batches[1], strict=True))
    assert not torch.equal(batches[0][0][0], batches[2][0][0])
    assert not torch.equal(one.parts.test[0], third.parts.test[0])  # data() draws a split of its own
    held_out = next(one.validation_batches())
    assert all(any(torch.equal(x, v) for v in one.parts.validation[0]) for x in held_out[0])


def test_the_harsh_rival_sees_the_validation_samples_too() -> None:
    plan = plan_of(own_task(epochs=6, batch_size=8), 0, CPU)
    one = fit(plan)
    seen = torch.cat([x for x, _ in one.batches(one.parts.both)])
    assert len(seen) == one.steps * 8 == 6 * 24
    assert {tuple(x.tolist()) for x in one.parts.validation[0]} <= {tuple(x.tolist()) for x in seen}
    assert not {tuple(x.tolist()) for x in one.parts.test[0]} & {tuple(x.tolist()) for x in seen}


def test_an_epoch_goes_through_whole_batches() -> None:
    x = torch.arange(10.0)
    found = list(_rows.batches((x, x), 4, 5, 0))
    assert [len(inputs) for inputs, _ in found] == 5 * [4]
    assert len(set(torch.cat([found[0][0], found[1][0]]).tolist())) == 8
    assert [len(inputs) for inputs, _ in _rows.batches((x, x), 64, 2, 0)] == [10, 10]


def test_a_rate_at_the_edge_is_tried_once_beyond(tmp_path: Path) -> None:
    # Where steps are that small, the larger rate always lowers this.
    metric = "HIGHER_IS_BETTER = False\ndef metric(p, y):\n    return nn.functional.cross_entropy(p, y)\n"
    path = write(tmp_path, ("lr=0.1", "lr=1e-5"), more=metric)
    assert command("compare", path, "--seeds", 1, "--output", tmp_path / "run").exit_code == 0
    found = trials(tmp_path / "run")
    tuning = {trial["method"] for trial in found if trial["role"] == "tuning"}
    assert tuning == {OWN, *(f"plain, rate x {x:g}" for x in (0.1, 0.3, 3, 10, 30))}
    factors = {trial["method"]: trial["settings"]["method"]["factor"] for trial in found}
    assert factors[OWN] == 1
    assert {factors[label] for label in (TUNED, BOTH, LEARNED, *POPULATIONS, TUNER)} == {30.0}
    assert {trial["seed"] for trial in found if trial["role"] == "tuning"} == set(_rows.TUNING_SEEDS)


def test_a_method_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def failing(fit: Fit) -> nn.Module:
        calls.append(fit.trial.seed)
        if fit.trial.seed == 0:
            raise RuntimeError("it \x1b[31mdoes\nnot fit")
        return _rows.plain(fit)

    monkeypatch.setattr(_rows, "learned", failing)
    path, folder = write(tmp_path), tmp_path / "run"
    for _ in range(2):
        shown = command("compare", path, "--seeds", 2, "--output", folder)
        assert shown.exit_code == 0
        assert f"{LEARNED} failed with seed 0: RuntimeError: it [31mdoes not fit" in text_of(shown)
        assert ", 1 failed" in text_of(shown)
    assert calls == [0, 1]
    assert sum(trial["method"] == TUNER for trial in trials(folder)) == 2
    page = tmp_path / "page.html"
    command("report", folder, "--html", page)
    assert "failed with seed 0" in page.read_text(encoding="utf-8")
    assert f"{LEARNED}: diverged" not in page.read_text(encoding="utf-8")


def test_failed_everywhere_is_failed_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fit: Fit) -> nn.Module:
        raise MemoryError

    monkeypatch.setattr(_rows, "regularised", failing)
    result = lossmeta.compare(model=new_model, data=parts, epochs=1, seeds=1, folder=tmp_path / "run")
    row = next(line for line in result.text.splitlines() if line.startswith(TUNER))
    assert row.split()[2] == "failed"
    assert f"{TUNER} failed with seed 0: MemoryError\n" in result.text


def test_diverged_is_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(fit: Fit) -> nn.Module:
        with torch.no_grad():
            next(fit.model.parameters()).fill_(torch.inf)
        return fit.model

    monkeypatch.setattr(_rows, "learned", diverging)
    result = lossmeta.compare(model=new_model, data=parts, epochs=1, seeds=1, folder=tmp_path / "run")
    row = next(line for line in result.text.splitlines() if line.startswith(f"{LEARNED}   "))
    assert row.split()[2] == "diverged" and "failed" not in result.text


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(fit: Fit) -> nn.Module:
        raise KeyboardInterrupt

    path, folder = write(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(_rows, "learned_with_clean", interrupted)
        stopped = command("compare", path, "--seeds", 1, "--output", folder)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in text_of(stopped)
    assert "Recommended: none yet, for trials are missing." in text_of(command("report", folder))
    kept = trials(folder)
    assert kept[-1]["method"] == LEARNED
    assert command("compare", path, "--seeds", 1, "--output", folder).exit_code == 0
    assert trials(folder)[: len(kept)] == kept
    with monkeypatch.context() as patch:
        patch.setattr(_rows, "learned_with_clean", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lossmeta.compare(model=new_model, data=parts, epochs=1, seeds=1, folder=tmp_path / "other")


def test_an_edited_task_is_refused(tmp_path: Path) -> None:
    path, folder = write(tmp_path), tmp_path / "run"
    assert command("compare", path, "--seeds", 1, "--output", folder).exit_code == 0
    before = trials(folder)
    refused = command("compare", write(tmp_path, more="# edited\n"), "--seeds", 1, "--output", folder)
    assert refused.exit_code == 2
    text = text_of(refused)
    assert "source of the task is" in text and "choose another --output or remove it" in text
    assert trials(folder) == before


def test_folder_is_named_after_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("compare", write(tmp_path), "--seeds", 1).exit_code == 0
    assert read(Path("runs/compare-tiny")).header.recipe == "compare"


# ---- From Python.


def accuracy(prediction: Tensor, target: Tensor) -> float:
    return (prediction.argmax(1) == target).double().mean().item()


def test_the_result_in_python(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = lossmeta.compare(
        model=new_model,
        data=parts,
        metric=accuracy,
        higher_is_better=True,
        epochs=1,
        seeds=2,
        folder=folder,
        name="points",
    )
    assert result.folder == folder and result.text == str(result)
    assert result.text.startswith("points, 2 seeds") and "Higher is better for accuracy." in result.text
    assert result.recommendation in " ".join(result.text.split()) and result.recommended is None
    assert read(folder).header.settings["source of the task"]
    by_seed = {
        t["seed"]: t["measures"] for t in trials(folder) if t["method"] == OWN and t["role"] == "report"
    }
    assert all(0 <= measures["accuracy"] <= 1 for measures in by_seed.values())
    with pytest.raises(RuntimeError, match=r"ended with status 2; standard error says why"):
        lossmeta.compare(model=new_model, data=parts, epochs=2, seeds=2, folder=folder)
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        lossmeta.compare(model=new_model, data=parts, seeds=0)


def regression() -> list[tuple[Tensor, Tensor]]:
    return [(x, x.sum(1, keepdim=True)) for x in (torch.randn(n, 4) for n in (24, 12, 24))]


def test_regression_has_the_methods_that_apply(tmp_path: Path) -> None:
    result = lossmeta.compare(
        model=lambda: nn.Linear(4, 1), data=regression, epochs=1, seeds=1, folder=tmp_path / "run"
    )
    header = read(tmp_path / "run").header
    assert header.rows == (OWN, TUNED, BOTH, LEARNED, TUNER)
    assert header.corrected == (LEARNED, TUNER)
    assert [m.name for m in header.tasks[0].measures] == ["test loss", "seconds", "validation test loss"]
    assert "failed" not in result.text
    absent = ", ".join(map(repr, (CLEAN, *POPULATIONS)))
    assert f"Not compared for want of classes as targets: {absent}." in " ".join(result.text.split())


def test_what_applies_depends_on_loss_and_classes() -> None:
    def labels(task: OwnTask) -> list[str]:
        return [row.label for row in rows(plan_of(task, 0, CPU))[0]][3:]

    assert labels(own_task()) == [LEARNED, CLEAN, *POPULATIONS, TUNER]
    assert labels(own_task(task_loss=nn.CrossEntropyLoss())) == labels(own_task())
    own = own_task(task_loss=lambda x, y: 2 * nn.functional.cross_entropy(x, y))
    assert labels(own) == [LEARNED, CLEAN, TUNER]
    many = own_task(model=lambda: nn.Linear(4, 21))
    assert labels(many) == [LEARNED, CLEAN, *POPULATIONS[:2], TUNER]
    absolute = own_task(model=lambda: nn.Linear(4, 1), data=regression, task_loss=nn.L1Loss())
    assert labels(absolute) == [TUNER]


def test_a_loss_of_ones_own_is_learned_towards(tmp_path: Path) -> None:
    result = lossmeta.compare(
        model=new_model,
        data=parts,
        task_loss=lambda x, y: nn.functional.cross_entropy(x, y, label_smoothing=0.1),
        metric=lossmeta.metrics.BalancedErrorRate(3),
        epochs=1,
        seeds=1,
        folder=tmp_path / "run",
    )
    assert "failed" not in result.text and "BalancedErrorRate" in result.text


@pytest.mark.parametrize("kind", ["pairs", "datasets", "loaders", "samples"])
def test_data_of_every_kind_are_the_same(kind: str) -> None:
    def data() -> Any:
        sets = [TensorDataset(*draw(n)) for n in (24, 12, 300)]
        if kind == "pairs":
            return tuple(s.tensors for s in sets)
        if kind == "datasets":
            return dict(zip(("test", "val", "train"), sets[::-1], strict=True))
        return [DataLoader(s, batch_size=5 if kind == "loaders" else None) for s in sets]

    found = fit(plan_of(own_task(data=data), 0, CPU)).parts
    with lossmeta.experiments.trial.seeded(0, CPU):
        expected = [draw(n) for n in (24, 12, 300)]
    for part, (x, y) in zip((found.train, found.validation, found.test), expected, strict=True):
        assert torch.equal(part[0], x) and torch.equal(part[1], y)


# ---- The starting file.


def test_new_writes_a_task_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "digits.py"
    written = command("new", path)
    assert written.exit_code == 0 and f"lossmeta compare {path}" in text_of(written)
    task = load(path)
    assert (task.name, task.epochs, task.batch_size) == ("digits", 40, 64)
    with lossmeta.experiments.trial.seeded(0, CPU):
        labels = {name: part[1] for name, part in task.data().items()}
    assert {name: len(y) for name, y in labels.items()} == {"train": 900, "validation": 200, "test": 697}
    few = replace(task, epochs=1)
    assert run(few, seeds=1, device="cpu", folder=tmp_path / "run") == 0
    assert not [trial for trial in trials(tmp_path / "run") if "failure" in trial]


def test_new_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("precious", encoding="utf-8")
    refused = command("new", path)
    assert refused.exit_code == 2 and "exists and is left as it is" in text_of(refused)
    assert path.read_text(encoding="utf-8") == "precious"
    assert command("new", tmp_path / "none" / "mine.py").exit_code == 1
