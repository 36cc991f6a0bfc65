from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lossmeta
from lossmeta.experiments import Measure, run_folder
from lossmeta.experiments.records import FolderError, Header, Record, TaskHeader
from lossmeta.experiments.run_folder import finished, opened, read

MEASURE = Measure("error", higher_is_better=False)


def header(**changes: Any) -> Header:
    fields: dict[str, Any] = {
        "recipe": "toy",
        "about": "A toy.",
        "settings": {"size": "small", "steps": None},
        "tasks": (TaskHeader("t", (MEASURE,)),),
        "rows": ("a", "b"),
        "references": ("a",),
        "seeds": (0, 1),
        "legend": "",
        "reported": {"paper": {"t": {"a": "0.1"}}},
        "environment": run_folder.environment("cpu", 1),
    }
    return Header(**{**fields, **changes})


def record(seed: int = 0, **changes: Any) -> Record:
    fields: dict[str, Any] = {"role": "report", "task": "t", "method": "a", "seed": seed}
    numbers = {"settings": {"task": {}, "method": {"Φ": 1}}, "measures": {"error": None, "x": 0.1}}
    return Record(**{**fields, **numbers, "seconds": 1.5, "peak_memory": 7, **changes})


def write(path: Path, *seeds: int, **changes: Any) -> None:
    with opened(path, header(**changes)) as writer:
        for seed in seeds:
            writer.append(record(seed))


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", 0, 1)
    run = read(tmp_path / "new" / "folder")
    assert run.trials == [record(0), record(1)]
    assert run.header == header(environment=run.header.environment)
    assert run.header.environment["lossmeta"] == lossmeta.__version__
    assert run.header.environment["processor"]
    assert finished(run.path) == 2


def test_series(tmp_path: Path) -> None:
    """Kept with the trial; where there are none the line is that of a lossmeta without series."""
    series = {"entropy": [(10, 1.0), (20, None), (30.5, 0.5)]}
    with opened(tmp_path, header()) as writer:
        writer.append(record(0))
        writer.append(record(1, series=series))
    without, with_series = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert "series" not in without and json.loads(with_series)["series"]["entropy"][1] == [20, None]
    assert read(tmp_path).trials == [record(0), record(1, series=series)]


def test_a_run_goes_on_with_more(tmp_path: Path) -> None:
    write(tmp_path, 0)
    first = read(tmp_path).header
    with opened(tmp_path, header(seeds=(0, 5), rows=("a", "b", "c"))) as writer:
        assert writer.trials == [record(0)]
        assert writer.header.seeds == (0, 1, 5)
        writer.append(record(5))
    again = read(tmp_path)
    assert again.header == header(seeds=(0, 1, 5), rows=("a", "b", "c"), environment=first.environment)
    assert again.trials == [record(0), record(5)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"size": "small", "steps": 3}}, "steps is None there and 3 now"),
        ({"settings": {"size": "paper"}}, "size is small there and paper now"),
        ({"recipe": "other"}, "recipe is toy there and other now"),
        (
            {"environment": {**run_folder.environment("cuda", 1), "lossmeta": "9"}},
            f"lossmeta is {lossmeta.__version__} there and 9 now; device is cpu there and cuda now",
        ),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = contents(tmp_path)
    with pytest.raises(FolderError, match="holds results of other settings") as refusal:
        write(tmp_path, 1, **changes)
    assert words in str(refusal.value)
    assert str(refusal.value).endswith("; choose another --output or remove it")
    assert contents(tmp_path) == before


def test_half_a_line_is_dropped_wherever_it_is_cut(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2)
    trials = tmp_path / "trials.jsonl"
    whole = trials.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        trials.write_bytes(whole[:end])
        assert read(tmp_path).trials == [record(0), record(1)]
        assert finished(tmp_path) == 2
        if end in (start, start + 1, len(whole) - 1):
            write(tmp_path, 2)
            assert trials.read_bytes() == whole


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 40,
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        json.dumps({**record().__dict__, "seed": "0"}).encode(),
        json.dumps({**record().__dict__, "measures": {"error": "low"}}).encode(),
        json.dumps({**record().__dict__, "unknown": 1}).encode(),
    ],
)
@pytest.mark.parametrize("reading", [read, lambda path: write(path, 5)], ids=["read", "write"])
def test_a_damaged_line_is_refused_by_number(
    garbage: bytes, reading: Callable[[Path], Any], tmp_path: Path
) -> None:
    write(tmp_path, 0, 1, 2)
    trials = tmp_path / "trials.jsonl"
    lines = trials.read_bytes().splitlines()
    lines[1] = garbage
    trials.write_bytes(b"\n".join(lines) + b"\n")
    before = trials.read_bytes()
    with pytest.raises(FolderError, match=r"trials\.jsonl, line 2, is damaged .* delete that line"):
        reading(tmp_path)
    assert trials.read_bytes() == before
    trials.write_bytes(b"\n".join([lines[0], lines[2]]) + b"\n")
    assert read(tmp_path).trials == [record(0), record(2)]


def test_a_newer_folder_is_refused_by_version(tmp_path: Path) -> None:
    write(tmp_path, 0)
    content = json.loads((tmp_path / "run.json").read_text())
    newer = {**content, "schema": 3, "environment": {**content["environment"], "lossmeta": "9.1"}}
    (tmp_path / "run.json").write_text(json.dumps(newer))
    for reading in (read, write):
        with pytest.raises(FolderError, match=r"lossmeta 9\.1 with schema 3; .* up to 2: use the newer"):
            reading(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": "2"}', '{"schema": 2, "tasks": [{}]}'])
def test_a_damaged_header_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path, 0)
    (tmp_path / "run.json").write_text(text)
    for reading in (read, write):
        with pytest.raises(FolderError, match=r"run\.json (is damaged|must say schema 2).*remove it"):
            reading(tmp_path)


def test_folders_without_a_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FolderError, match=r"holds no run: it has neither run\.json nor results\.json"):
            read(path)
    (tmp_path / "trials.jsonl").write_text("")
    with pytest.raises(FolderError, match=r"trials\.jsonl without its run\.json"):
        write(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["trials.jsonl"]


def test_a_folder_without_a_finished_trial_is_left_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine.txt").write_text("")
    write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    write(tmp_path, 0)
    write(tmp_path)
    assert read(tmp_path).trials == [record(0)]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lossmeta.experiments.lock import locked\n"
        "with locked(Path(sys.argv[1]) / '.lock') as holder: print(holder, flush=True); time.sleep(100)"
    )
    write(tmp_path, 0)
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "None\n"
        with pytest.raises(FolderError, match=f"is being written to by process {other.pid}; wait for it"):
            write(tmp_path, 1)
        assert read(tmp_path).trials == [record(0)], "reading needs no lock"
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    write(tmp_path, 1)
    assert read(tmp_path).trials == [record(0), record(1)]


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder removes the file after this process has opened it."""
    opens = []

    def removing(*arguments: Any) -> None:
        if not opens:
            (tmp_path / ".lock").unlink()
        opens.append(arguments)

    monkeypatch.setattr("fcntl.flock", removing)
    write(tmp_path, 0)
    assert len(opens) == 2
    assert (tmp_path / ".lock").exists()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def none(file: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    write(tmp_path, 0)
    assert read(tmp_path).trials == [record(0)]
    assert capsys.readouterr().err == f"lossmeta: {tmp_path} cannot be locked (Function not implemented)\n"


@pytest.mark.parametrize("how", ["write", "part", "fsync"])
def test_a_full_disk_loses_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 0)
    whole = (tmp_path / "trials.jsonl").read_bytes()
    real = os.write

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with opened(tmp_path, header()) as writer:
        if how == "part":
            monkeypatch.setattr(os, "write", lambda file, line: real(file, line[:20]))
        else:
            monkeypatch.setattr(os, how, full)
        with pytest.raises(OSError, match="No space left on device"):
            writer.append(record(1))
        monkeypatch.undo()
        assert (tmp_path / "trials.jsonl").read_bytes() == whole
        assert writer.trials == [record(0)]
        writer.append(record(1))
    assert read(tmp_path).trials == [record(0), record(1)]


def test_numbers_are_of_json(tmp_path: Path) -> None:
    with opened(tmp_path, header()) as writer:
        with pytest.raises(ValueError, match="Out of range float"):
            writer.append(record(0, measures={"error": float("nan")}))
        writer.append(record(0))
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 1


def test_identity_is_what_was_trained() -> None:
    plain = record(3, method="plain, rate 0.1", settings={"a": 1, "b": (2,)})
    tuned = record(3, method="tuned", candidate="plain, rate 0.1", settings={"b": [2], "a": 1})
    assert plain.identity == tuned.identity
    assert plain.identity != record(4, method="plain, rate 0.1", settings={"a": 1, "b": (2,)}).identity
    assert plain.identity != record(3, method="plain, rate 0.1", settings={"a": 1}).identity


# ---- Before there were run folders.


def old(results: list[dict[str, Any]], **more: Any) -> str:
    settings = {"recipe": "adalfl-mnist", "size": "small", "device": "cpu", "steps": None}
    return json.dumps({"settings": settings, "versions": {"lossmeta": "0.1.0"}, "results": results, **more})


def old_trial(method: str, seed: int, test: float | None) -> dict[str, Any]:
    where = {"task": "MNIST + MLP", "method": method, "seed": seed, "settings": {"steps": 3}}
    numbers = {"selection": test, "test": test, "slope_ratio": None, "final_rate": 0.1, "skipped": 0}
    return {**where, **numbers, "seconds": 2.0}


def test_results_of_an_earlier_lossmeta_are_read_and_kept(tmp_path: Path) -> None:
    trials = [old_trial("tuning, rate 0.1", 10_000, 0.3)]
    trials += [old_trial(m, s, 0.1) for s in (0, 1) for m in ("plain, base rate", "plain, tuned rate")]
    path = tmp_path / "results.json"
    path.write_text(old([*trials, old_trial("AdaLFL, 1e-3", 0, None)]))
    before = contents(tmp_path)
    run = read(tmp_path)
    assert run.header.rows == ("plain, base rate", "plain, tuned rate", "AdaLFL, 1e-3")
    assert run.header.references == ("plain, tuned rate",)
    assert run.header.seeds == (0, 1)
    assert [t.role for t in run.trials] == ["tuning"] + ["report"] * 5
    assert run.trials[1].measures["test"] == 0.1
    assert run.trials[-1].measures["test"] is None
    with pytest.raises(FolderError, match=r"schema 1, this one writes 2.*`lossmeta report .*` shows it"):
        write(tmp_path, 0)
    assert contents(tmp_path) == before


def test_an_earlier_quickstart_is_read(tmp_path: Path) -> None:
    def trial(method: str, seed: int) -> dict[str, Any]:
        numbers = {"error": 0.03, "average_precision": 0.9}
        return {"method": method, "seed": seed, "seconds": 1.0, "validation": numbers, "test": numbers}

    results = [trial(method, seed) for seed in (0, 1) for method in ("cross-entropy", "AdaLFL, online")]
    (tmp_path / "results.json").write_text(old(results, recipe="quickstart", about="What it is."))
    run = read(tmp_path)
    assert run.header.rows == ("cross-entropy", "AdaLFL, online")
    assert run.trials[0].measures == {"error": 0.03, "average_precision": 0.9}
    assert [m.higher_is_better for m in run.header.tasks[0].measures] == [False, True]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": {}, "versions": {}, "results": [{}]}'])
def test_damaged_results_of_an_earlier_lossmeta(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(FolderError, match=r"results\.json (is damaged|must hold results of a recipe)"):
        read(tmp_path)
