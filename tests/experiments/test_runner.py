from __future__ import annotations

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lossmeta.experiments import Diverged, Method, Task, Trial, Tuned, memory, report
from lossmeta.experiments.records import Record
from lossmeta.experiments.run_folder import read
from lossmeta.experiments.runner import TrialError


def outcome(folder: Path) -> list[Record]:
    """The trials, without what differs from run to run."""
    return [replace(trial, seconds=0.0, peak_memory=None) for trial in read(folder).trials]


def reported(folder: Path, label: str) -> list[Record]:
    return [t for t in read(folder).trials if (t.role, t.method) == ("report", label)]


# ---- What is trained.


def test_every_method_is_trained_on_every_task_with_every_seed(toy: Any, tmp_path: Path) -> None:
    toy.tasks.append(toy.task("second"))
    assert toy(tmp_path / "new") == 0
    trials = [t for t in read(tmp_path / "new").trials if t.role == "report"]
    assert [(t.task, t.seed, t.method) for t in trials] == [
        (task, seed, label)
        for task in ("first", "second")
        for seed in range(3)
        for label in ("plain", "plain, tuned rate")
    ]
    for trial in trials:
        assert trial.measures.keys() == {"error", "precision", "selection error", "rate", "also"}
        assert trial.seconds > 0
        assert trial.peak_memory > 1e6


def test_data_is_made_once_a_seed_and_shared(toy: Any, tmp_path: Path) -> None:
    given: list[tuple[int, Any, dict[Any, Any]]] = []
    toy.before = lambda trial, label: given.append((trial.seed, trial.data, trial.scratch))
    assert toy(tmp_path, seeds=2) == 0
    assert toy.prepared == [("first", seed) for seed in (100, 101, 0, 1)]
    for seed in (0, 100):
        same = [(data, id(scratch)) for s, data, scratch in given if s == seed]
        assert len(same) > 1 and len(set(same)) == 1


def test_a_trial_depends_on_its_seed_alone(toy: Any, tmp_path: Path) -> None:
    def draw(trial: Trial, label: str) -> None:
        for _ in range(trial.seed):
            torch.rand(()), random.random()

    toy.methods = [toy.method("a"), toy.method("b")]
    toy.before = draw
    state = torch.get_rng_state()
    assert toy(tmp_path / "whole") == 0
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers must not move"
    torch.manual_seed(5)
    toy.methods.reverse()
    assert toy(tmp_path / "other", seeds=[2, 1]) == 0
    for label in "ab":
        ours = {t.seed: t.measures for t in reported(tmp_path / "whole", label)}
        theirs = {t.seed: t.measures for t in reported(tmp_path / "other", label)}
        assert theirs == {seed: ours[seed] for seed in (1, 2)}
        assert len({t["error"] for t in ours.values()}) == 3


def test_tuned_row_is_the_best_candidate(toy: Any, tmp_path: Path) -> None:
    assert toy(tmp_path) == 0
    trials = read(tmp_path).trials
    tuning = [(t.method, t.seed) for t in trials if t.role == "tuning"]
    assert tuning == [(f"plain, rate {r}", s) for s in (100, 101) for r in ("0.3", "0.1", "1")]
    assert {t.candidate for t in reported(tmp_path, "plain, tuned rate")} == {"plain, rate 0.1"}
    assert {t.candidate for t in reported(tmp_path, "plain")} == {None}


def test_tuning_knows_the_direction_and_divergence(toy: Any, tmp_path: Path) -> None:
    higher = replace(toy.tuned, label="highest", by="precision", seeds=(103,))
    constant = replace(toy.tuned, label="first of equals", by="also", seeds=(104,))
    toy.methods = [toy.tuned, higher, constant]
    measures = (*toy.tasks[0].measures, replace(toy.tasks[0].measures[0], name="also"))
    toy.tasks = [replace(toy.tasks[0], measures=measures)]

    def diverge(trial: Trial, label: str) -> None:
        if (label, trial.seed) == ("plain, rate 0.1", 101):
            raise Diverged

    toy.before = diverge
    assert toy(tmp_path) == 0
    best = {label: reported(tmp_path, label)[0].candidate for label in (m.label for m in toy.methods)}
    assert best == {
        "plain, tuned rate": "plain, rate 0.3",
        "highest": "plain, rate 0.1",
        "first of equals": "plain, rate 0.3",
    }


def test_tuning_may_depend_on_the_task_and_lead_to_another_method(toy: Any, tmp_path: Path) -> None:
    toy.tasks = [toy.task("first", rates=[0.2, 0.3]), toy.task("second", rates=[0.4, 0.3])]

    def candidates(task: Task) -> tuple[Method, ...]:
        return tuple(toy.method(f"plain, rate {r:g}", rate=r) for r in task.settings["rates"])

    def then(best: Method) -> Method:
        return toy.method("learned", rate=best.settings["rate"], learned=True)

    toy.methods = [
        Tuned("tuned", candidates, "selection error", (100,)),
        Tuned("learned", candidates, "selection error", (100,), then),
    ]
    assert toy(tmp_path, seeds=1) == 0
    settings = [t.settings["method"] for t in reported(tmp_path, "learned")]
    assert settings == [{"rate": 0.2, "learned": True}, {"rate": 0.3, "learned": True}]
    assert sum(seed == 100 for _, _, seed in toy.trained) == 4, "candidates are trained once for both rows"


def test_what_lies_beside_the_best_is_tried_until_nothing_is_better(toy: Any, tmp_path: Path) -> None:
    """From the edge of a grid it goes on, one step at a time; what has been tried is not tried again."""
    ladder = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]

    def plain(rate: float) -> Method:
        return toy.method(f"plain, rate {rate:g}", rate=rate)

    def beside(best: Method) -> tuple[Method, ...]:
        at = ladder.index(best.settings["rate"])
        return tuple(plain(rate) for rate in ladder[max(at - 1, 0) : at + 2])

    start = plain(0.8), plain(1.6)
    toy.methods = [Tuned("tuned", start, "selection error", (100, 101), beside=beside)]
    assert toy(tmp_path, seeds=2) == 0
    tried = [label for _, label, seed in toy.trained if seed == 100]
    assert tried == [f"plain, rate {rate:g}" for rate in (0.8, 1.6, 0.4, 0.2, 0.1, 0.05)]
    assert [t.candidate for t in reported(tmp_path, "tuned")] == ["plain, rate 0.1"] * 2
    toy.trained.clear()
    assert toy(tmp_path, seeds=2) == 0
    assert toy.trained == []


def test_equal_trials_are_trained_once(toy: Any, tmp_path: Path) -> None:
    toy.methods = [toy.method("plain, rate 0.1"), toy.tuned]
    assert toy(tmp_path, seeds=1) == 0
    assert toy.trained.count(("first", "plain, rate 0.1", 0)) == 1
    plain, tuned = (reported(tmp_path, label)[0] for label in ("plain, rate 0.1", "plain, tuned rate"))
    assert (plain.measures, plain.seconds) == (tuned.measures, tuned.seconds)


def test_divergence_is_a_result(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def nan(trial: Trial) -> dict[str, float | None]:
        return {"error": float("nan"), "precision": float("-inf"), "selection error": None, "rate": 1}

    def diverge(trial: Trial) -> dict[str, float | None]:
        raise Diverged

    toy.methods += [Method("not a number", nan), Method("diverges", diverge)]
    assert toy(tmp_path) == 0
    numbers = {"error": None, "precision": None, "selection error": None}
    assert reported(tmp_path, "not a number")[0].measures == {**numbers, "rate": 1}
    assert reported(tmp_path, "diverges")[0].measures == {**numbers, "rate": None}
    assert "diverged" in capsys.readouterr().out


# ---- Going on.


def test_a_finished_run_trains_nothing_and_needs_no_data(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert toy(tmp_path) == 0
    shown, before = capsys.readouterr().out, outcome(tmp_path)
    toy.trained.clear(), toy.prepared.clear()
    assert toy(tmp_path) == 0
    assert toy.trained == toy.prepared == []
    assert capsys.readouterr().out == shown
    assert outcome(tmp_path) == before
    assert toy(tmp_path, seeds=1) == 0
    assert capsys.readouterr().out.startswith("first, 1 seed;")
    assert toy.trained == []
    assert toy(tmp_path, seeds=4) == 0
    assert {seed for _, _, seed in toy.trained} == {3}


@pytest.mark.parametrize("place", ["train", "prepare", "write", "figure"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupt_anywhere_names_what_is_kept(
    place: str,
    after: int,
    toy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert toy(tmp_path / "whole") == 0
    threads, left = torch.get_num_threads(), [after]

    def interrupt(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    if place == "train":
        toy.before = interrupt
    elif place == "prepare":
        monkeypatch.setattr(random, "setstate", interrupt)  # called when data was made
    elif place == "write":
        monkeypatch.setattr(os, "fsync", interrupt)
    else:
        left[0] = 0
        monkeypatch.setattr(report, "write", interrupt)
    folder = tmp_path / "parts"
    capsys.readouterr()
    status = toy(folder, threads=1)
    monkeypatch.undo()
    monkeypatch.setattr("lossmeta.plot.installed", lambda: False)
    said = capsys.readouterr().err
    assert status == 130
    assert torch.get_num_threads() == threads
    if folder.exists():
        count = len(read(folder).trials)
        kept = f"{count} trial{'s are' if count > 1 else ' is'} in {folder / 'trials.jsonl'}"
        assert said == f"lossmeta toy: stopped; {kept}, the same command goes on from there\n"
    else:
        assert said == "lossmeta toy: stopped; no trial was finished, nothing is kept\n"
    toy.before = lambda trial, label: None
    assert toy(folder) == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_method_that_has_changed_is_trained_anew(toy: Any, tmp_path: Path) -> None:
    assert toy(tmp_path) == 0
    first = toy.methods[0]
    for rate, trains in ((0.5, True), (0.3, False)):
        toy.trained.clear()
        toy.methods[0] = toy.method("plain", rate=rate)
        assert toy(tmp_path) == 0
        assert toy.trained == ([("first", "plain", seed) for seed in range(3)] if trains else [])
        shown = {t.seed: t.measures["rate"] for t in reported(tmp_path, "plain")}
        assert set(shown.values()) == {rate}, "the last trial of a row and seed counts"
    assert toy.methods[0].settings == first.settings
    toy.trained.clear()
    toy.tasks = [toy.task("first", steps=9)]
    assert toy(tmp_path) == 0
    assert len(toy.trained) == 12


def test_other_settings_are_refused(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert toy(tmp_path) == 0
    assert toy(tmp_path, settings={"size": "paper"}) == 2
    assert capsys.readouterr().err == (
        f"lossmeta toy: {tmp_path} holds results of other settings: size is small there and paper now; "
        "choose another --output or remove it\n"
    )


# ---- What cannot be done.


def test_tasks_without_data_are_named_once(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def missing(error: Exception) -> Any:
        def prepare(seed: int, device: torch.device) -> None:
            raise error

        return prepare

    absent, torn = FileNotFoundError("put it there"), ValueError("file.gz is cut off")
    lacking = ModuleNotFoundError("install scikit-learn")
    for name, error in (("a", absent), ("b", torn), ("c", absent), ("d", lacking)):
        toy.tasks.append(replace(toy.task(name), prepare=missing(error)))
    assert toy(tmp_path, seeds=1) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "lossmeta toy: a, c were left out. put it there",
        "lossmeta toy: b was left out. file.gz is cut off",
        "lossmeta toy: d was left out. install scikit-learn",
    ]
    assert "first, 1 seed" in captured.out
    del toy.tasks[0]
    assert toy(tmp_path / "none", seeds=1) == 2
    assert not (tmp_path / "none").exists()


def test_a_method_that_fails_is_named_and_the_rest_kept(toy: Any, tmp_path: Path) -> None:
    def fail(trial: Trial, label: str) -> None:
        if (label, trial.seed) == ("plain", 1):
            raise IndexError("too far")

    toy.before = fail
    with pytest.raises(TrialError, match=r"^first, plain, seed 1: IndexError: too far$") as error:
        toy(tmp_path)
    assert isinstance(error.value.__cause__, IndexError)
    assert [(t.method, t.seed) for t in read(tmp_path).trials if t.role == "report"] == [
        ("plain", 0),
        ("plain, tuned rate", 0),
    ]
    toy.before = lambda trial, label: None
    assert toy(tmp_path) == 0


def test_data_that_fail_are_named(toy: Any, tmp_path: Path) -> None:
    def prepare(seed: int, device: torch.device) -> None:
        raise KeyError("column")

    toy.tasks = [replace(toy.tasks[0], prepare=prepare)]
    with pytest.raises(TrialError, match="first, data of seed 100: KeyError: 'column'"):
        toy(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_every_measure_must_be_given(toy: Any, tmp_path: Path) -> None:
    toy.methods = [Method("half", lambda trial: {"error": 0.1})]
    with pytest.raises(TrialError, match="first, half, seed 0: precision must be measured, got error"):
        toy(tmp_path)
    assert not tmp_path.joinpath("run.json").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unusable_device_is_said(
    device: str, toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert toy(tmp_path / "new", device=device) == 2
    assert capsys.readouterr().err.startswith(f"lossmeta toy: --device {device} cannot be used: ")
    assert not (tmp_path / "new").exists()


def test_seeds_that_serve_to_choose_are_not_reported(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert toy(tmp_path / "new", seeds=range(99, 102)) == 2
    assert "--seeds must leave out 100, which serves to choose settings" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_places_that_cannot_be_written(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert toy(tmp_path / "file" / "folder") == 1
    assert "the results could not be written ([Errno 20] Not a directory" in capsys.readouterr().err

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert toy(tmp_path / "new") == 1
    assert capsys.readouterr().err == (
        f"lossmeta toy: the results could not be written ([Errno 30] Read-only file system: '{tmp_path}'); "
        "no trial was finished, nothing is kept\n"
    )


@pytest.mark.parametrize("place", ["trial", "figure of a method", "tables"])
def test_a_full_disk_keeps_what_is_finished(
    place: str, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def at_last(trial: Trial, label: str) -> None:
        if trial.seed == 2:
            full() if place == "figure of a method" else monkeypatch.setattr(os, "write", full)

    if place == "tables":
        monkeypatch.setattr(report, "write_text", full)
    else:
        toy.before = at_last
    assert toy(tmp_path) == 1
    kept = len(read(tmp_path).trials)
    assert kept == (12 if place == "tables" else 10)
    assert capsys.readouterr().err == (
        "lossmeta toy: the results could not be written ([Errno 28] No space left on device); "
        f"{kept} trials are in {tmp_path / 'trials.jsonl'}, the same command goes on from there\n"
    )


def test_tasks_and_methods_must_fit_together(toy: Any, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            toy(tmp_path / "new", **options)

    refused("reference must be one of plain, plain, tuned rate, got other", reference="other")
    methods = toy.methods
    toy.methods = [methods[0], toy.method("plain")]
    refused("methods must have different names, got plain, plain")
    toy.methods = [toy.method("plain, rate 1", rate=0.5), toy.tuned]
    refused("methods called plain, rate 1 must have the same settings")
    for by in ("nothing", "rate"):
        toy.methods = [replace(toy.tuned, by=by)]
        refused(f"by must be a compared measure of first, got {by}")
    toy.methods, toy.tasks = methods, toy.tasks * 2
    refused("tasks must have different names, got first, first")
    assert not (tmp_path / "new").exists()


# ---- Around training.


def test_threads_are_set_and_restored(toy: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    inside = before + 1
    seen: list[int] = []
    toy.before = lambda trial, label: seen.append(torch.get_num_threads())
    assert toy(tmp_path, threads=inside) == 0
    assert set(seen) == {inside}
    assert torch.get_num_threads() == before
    assert read(tmp_path).header.environment["threads"] == inside
    seen.clear()
    assert toy(tmp_path / "other") == 0
    assert set(seen) == {before}


def test_peak_memory_is_the_trials_own(toy: Any, tmp_path: Path) -> None:
    size = 300_000_000

    def fill(trial: Trial, label: str) -> None:
        if label == "large":
            torch.ones(size, dtype=torch.uint8)

    toy.before = fill
    toy.methods = [toy.method("small"), toy.method("large"), toy.method("small again")]
    assert toy(tmp_path, seeds=1) == 0
    small, large, again = (t.peak_memory for t in read(tmp_path).trials)
    assert large - small == pytest.approx(size, rel=0.1)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not forget a process's peak")
    assert again < small + size / 2


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", Path("/nonexistent"))
    memory.reset_peak(torch.device("cpu"))
    assert memory.peak(torch.device("cpu")) > 1e7


def test_a_method_may_write_figures_into_the_folder(toy: Any, tmp_path: Path) -> None:
    toy.before = lambda trial, label: (trial.folder / f"{label}.txt").write_text("drawn")
    assert toy(tmp_path, seeds=1) == 0
    assert (tmp_path / "plain.txt").exists()


def test_tables_are_written(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert toy(tmp_path, legend="What the rows are.", about="A toy.") == 0
    shown = capsys.readouterr().out
    assert "What the rows are." in shown
    assert f"Results and figures: {tmp_path}" in shown
    page = (tmp_path / "tables.md").read_text()
    assert page.startswith("# toy\n\nA toy.\n")
    assert [table["title"] for table in json.loads((tmp_path / "tables.json").read_text())] == [
        "first, 3 seeds"
    ]


@pytest.mark.parametrize("count", [1, 99, 100, 101, 197, 500, 520, 5000])
def test_seeds_that_stop_early_keep_the_same_steps(toy: Any, tmp_path: Path, count: int) -> None:
    def before(trial: Trial, label: str) -> None:
        for step in range(count):
            trial.record("long", step, 1.0)

    toy.before = before
    assert toy(tmp_path, seeds=1) == 0
    steps = [step for step, _ in read(tmp_path).trials[0].series["long"]]
    assert steps[0] == 0 and steps[-1] == count - 1
    assert len(steps) <= 100 and (len(steps) >= 50 or len(steps) == count)
    stride = steps[1] - steps[0] if count > 1 else 1
    assert steps[:-1] == list(range(0, count - 1, stride)) and stride in (1, 2, 4, 8, 16, 32, 64)


def test_steps_may_be_numbers_of_any_library(toy: Any, tmp_path: Path) -> None:
    def before(trial: Trial, label: str) -> None:
        for step in (np.int64(1), torch.tensor(2), np.float32(2.5), 3):
            trial.record("short", step, torch.tensor(0.5))

    toy.before = before
    assert toy(tmp_path, seeds=1) == 0
    assert read(tmp_path).trials[0].series["short"] == [(1, 0.5), (2, 0.5), (2.5, 0.5), (3, 0.5)]


@pytest.mark.parametrize("step", [math.nan, math.inf, 1e200, True, "7", None, torch.zeros(2)])
def test_steps_that_are_no_numbers_are_refused(toy: Any, tmp_path: Path, step: Any) -> None:
    def before(trial: Trial, label: str) -> None:
        trial.record("short", step, 1.0)

    toy.before = before
    with pytest.raises(TrialError, match="ValueError: record: step of 'short' must be a finite number, got "):
        toy(tmp_path, seeds=1)


def test_series_are_kept_with_the_trial(toy: Any, tmp_path: Path) -> None:
    def before(trial: Trial, label: str) -> None:
        for training in (7.0, 8.0):  # the last counts
            for step in range(1, 1001):
                trial.record("long", step, training + step)
        for step, value in ((1, math.nan), (2, math.inf), (3, None), (4, 0.5)):
            trial.record("with holes", step, value)

    toy.before = before
    assert toy(tmp_path) == 0
    for trial in read(tmp_path).trials:
        long = trial.series["long"]
        assert [step for step, _ in long] == [*range(1, 1000, 16), 1000]
        assert long[0] == (1, 9.0) and long[-1] == (1000, 1008.0)
        assert trial.series["with holes"] == [(1, None), (2, None), (3, None), (4, 0.5)]
