"""Run folders that were edited by hand, or written in part: an error by name, or a note; never a wrong picture."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lossmeta import experiments
from lossmeta.cli import app
from lossmeta.experiments import Measure, Method, Task

Content = tuple[dict[str, Any], list[dict[str, Any]]]
Edit = Callable[[dict[str, Any]], Any]
HUGE = 10**400


def put(*place: Any, value: Any) -> Edit:
    """Replaces what is there."""

    def edit(content: dict[str, Any]) -> None:
        *way, last = place
        at: Any = content
        for step in way:
            at = at[step]
        at[last] = value

    return edit


def drop(*place: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        *way, last = place
        at: Any = content
        for step in way:
            at = at[step]
        del at[last]

    return edit


HEADERS: dict[str, Edit] = {
    "no schema": drop("schema"),
    "unknown schema": put("schema", value=1),
    "newer schema": put("schema", value=99),
    "newer schema, environment a list": lambda content: content.update(schema=99, environment=[]),
    "schema true": put("schema", value=True),
    "schema 2.0": put("schema", value=2.0),
    "no rows": drop("rows"),
    "rows a word": put("rows", value="plain"),
    "a row twice": put("rows", value=["plain", "plain"]),
    "a row that is a number": put("rows", 0, value=1),
    "a row with a control character": put("rows", 0, value="plain\x1b[31m"),
    "half of a surrogate pair": put("about", value="\ud800"),
    "a reference that is no row": put("references", value=["nobody"]),
    "references null": put("references", value=None),
    "a seed that is a word": put("seeds", 0, value="0"),
    "a seed that is true": put("seeds", 0, value=True),
    "a seed twice": put("seeds", value=[0, 0]),
    "recipe null": put("recipe", value=None),
    "legend a list": put("legend", value=["a"]),
    "settings a list": put("settings", value=[]),
    "settings NaN": put("settings", value={"rate": math.nan}),
    "tasks an object": put("tasks", value={}),
    "a task that is a word": put("tasks", 0, value="first"),
    "a task twice": lambda content: content["tasks"].append(content["tasks"][0]),
    "a task without measures": put("tasks", 0, "measures", value=[]),
    "a measure without a name": drop("tasks", 0, "measures", 0, "name"),
    "a measure twice": lambda content: content["tasks"][0]["measures"].append(
        content["tasks"][0]["measures"][0]
    ),
    "digits negative": put("tasks", 0, "measures", 0, "digits", value=-1),
    "digits huge": put("tasks", 0, "measures", 0, "digits", value=10**9),
    "digits a word": put("tasks", 0, "measures", 0, "digits", value="2"),
    "percent a word": put("tasks", 0, "measures", 0, "percent", value="no"),
    "direction a word": put("tasks", 0, "measures", 0, "higher_is_better", value="false"),
    "reported a list": put("reported", value=[]),
    "reported a number": put("reported", value={"paper": {"first": {"plain": 9.9}}}),
    "reported too shallow": put("reported", value={"paper": "9.9"}),
    "environment null": put("environment", value=None),
    "processor a number": put("environment", "processor", value=7),
    "date a number": put("environment", "date", value=20260102),
    "cuda a word": put("environment", "cuda", value="no"),
    "a key that is unknown": put("colour", value="red"),
}
# Of the third line.
TRIALS: dict[str, Edit] = {
    "NaN": put("measures", "error", value=math.nan),
    "infinity": put("measures", "error", value=-math.inf),
    "too large for float64": put("measures", "error", value=HUGE),
    "too large to be squared": put("measures", "error", value=1e200),
    "an error that is true": put("measures", "error", value=True),
    "an error that is a word": put("measures", "error", value="0.1"),
    "an error that is a list": put("measures", "error", value=[0.1]),
    "no error": drop("measures", "error"),
    "no measures": drop("measures"),
    "measures a list": put("measures", value=[]),
    "no seed": drop("seed"),
    "seed 0.5": put("seed", value=0.5),
    "seed true": put("seed", value=True),
    "method null": put("method", value=None),
    "method a list": put("method", value=["plain"]),
    "an unknown role": put("role", value="reported"),
    "seconds null": put("seconds", value=None),
    "seconds negative": put("seconds", value=-1.0),
    "seconds infinite": put("seconds", value=math.inf),
    "memory a word": put("peak_memory", value="7 MiB"),
    "memory negative": put("peak_memory", value=-7),
    "memory huge": put("peak_memory", value=HUGE),
    "settings null": put("settings", value=None),
    "series a list": put("series", value=[]),
    "a series of numbers": put("series", value={"entropy": [1, 2]}),
    "a point of three numbers": put("series", value={"entropy": [[1, 2, 3]]}),
    "a point that is NaN": put("series", value={"entropy": [[1, math.nan]]}),
    "a point that is a word": put("series", value={"entropy": [[1, "low"]]}),
    "steps that go back": put("series", value={"entropy": [[2, 0.5], [1, 0.5]]}),
    "candidate a number": put("candidate", value=3),
    "a key that is unknown": put("colour", value="red"),
}
# Of the raw text of the third line.
LINES: dict[str, Callable[[str], str]] = {
    "half a line": lambda line: line[: len(line) // 2],
    "two lines in one": lambda line: line + line,
    "a key twice": lambda line: line.replace('"error"', '"error": 0.5, "error"', 1),
    "1e999": lambda line: re.sub(r'"error": [^,]+', '"error": 1e999', line),
    "nested too deeply": lambda line: "[" * 200_000,
    "a comment": lambda line: f"# {line}",
    "empty": lambda line: "",
}
# What is left out with a note that has these words.
NOTES: dict[str, tuple[Edit, str]] = {
    "an unknown row": (put("method", value="nobody"), "trials of rows that run.json does not name.*nobody"),
    "an unknown task": (put("task", value="another"), "trials of tasks that run.json does not name.*another"),
    "an unknown seed": (put("seed", value=77), "trials of seeds that run.json does not name.*77"),
    "diverged": (lambda trial: trial["measures"].update(dict.fromkeys(trial["measures"])), "diverged"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What a run has written."""

    def train(trial: experiments.Trial) -> dict[str, float]:
        error = 0.1 + 0.1 * torch.rand(()).item()
        for step in (10, 20):
            trial.record("entropy", step, 1 / step)
        return {"error": error, "precision": 1 - error, "rate": 0.1}

    measures = (
        Measure("error", higher_is_better=False, percent=True, digits=2),
        Measure("precision", higher_is_better=True, digits=3),
        Measure("rate", higher_is_better=None, digits=2),
    )
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lossmeta.plot.installed", lambda: False)
        status = experiments.run(
            "toy",
            [Task("first", lambda seed, device: None, measures)],
            [Method("plain", train), Method("other", train)],
            seeds=3,
            device="cpu",
            folder=folder,
            settings={"size": "small"},
            reference="plain",
            reported={"paper": {"first": {"other": "9.9"}}},
        )
    assert status == 0
    lines = (folder / "trials.jsonl").read_text().splitlines()
    return json.loads((folder / "run.json").read_text()), [json.loads(line) for line in lines]


def write(folder: Path, header: Any, lines: list[str]) -> None:
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "trials.jsonl").write_text("".join(f"{line}\n" for line in lines))


def reports(folder: Path) -> Iterator[tuple[int, str]]:
    """Exit status and what is said, as text and as a page. Whatever fails, there is no traceback."""
    page = folder / "page.html"
    for arguments in ([], ["--html", str(page)]):
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["report", str(folder), *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        output = page.read_text() if arguments and result.exit_code == 0 else result.output
        yield result.exit_code, " ".join(output.replace("│", " ").split())


def refused(folder: Path, words: str) -> None:
    for status, output in reports(folder):
        assert status == 2
        assert words in output, output
    assert not (folder / "page.html").exists()


def test_the_folder_itself_is_whole(made: Content, tmp_path: Path) -> None:
    write(tmp_path, made[0], [json.dumps(trial) for trial in made[1]])
    for status, output in reports(tmp_path):
        assert status == 0
        assert "Incomplete" not in output and "diverged" not in output


@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_is_refused(edit: Edit, made: Content, tmp_path: Path) -> None:
    header = copy.deepcopy(made[0])
    edit(header)
    write(tmp_path, header, [json.dumps(trial) for trial in made[1]])
    refused(tmp_path, "run.json")


@pytest.mark.parametrize("edit", TRIALS.values(), ids=TRIALS.keys())
def test_a_trial_is_refused_by_line(edit: Edit, made: Content, tmp_path: Path) -> None:
    trials = copy.deepcopy(made[1])
    edit(trials[2])
    write(tmp_path, made[0], [json.dumps(trial) for trial in trials])
    refused(tmp_path, "trials.jsonl, line 3, is damaged")


@pytest.mark.parametrize("edit", LINES.values(), ids=LINES.keys())
def test_a_line_is_refused(edit: Callable[[str], str], made: Content, tmp_path: Path) -> None:
    lines = [json.dumps(trial) for trial in made[1]]
    lines[2] = edit(lines[2])
    write(tmp_path, made[0], lines)
    refused(tmp_path, "trials.jsonl, line 3, is damaged")


@pytest.mark.parametrize(("edit", "words"), NOTES.values(), ids=NOTES.keys())
def test_a_note_says_what_is_left_out(edit: Edit, words: str, made: Content, tmp_path: Path) -> None:
    trials = copy.deepcopy(made[1])
    edit(trials[2])
    write(tmp_path, made[0], [json.dumps(trial) for trial in trials])
    for status, output in reports(tmp_path):
        assert status == 0
        assert re.search(words, output), output


def test_half_a_last_line_is_left_out_with_a_note(made: Content, tmp_path: Path) -> None:
    write(tmp_path, made[0], [json.dumps(trial) for trial in made[1]])
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"role": "report", "ta')
    for status, output in reports(tmp_path):
        assert status == 0
        assert "The last line of trials.jsonl is cut off" in output


def test_a_header_without_trials(made: Content, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(made[0]))
    (tmp_path / "figure.png").write_bytes(b"")
    for status, output in reports(tmp_path):
        assert status == 0
        assert "No trial is finished." in output


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.text(st.characters(codec=None), max_size=5),
    st.sampled_from([HUGE, 1e149, 1e308, -0.0, 5e-324, [], {}, [[]], {"": None}, "\ud800", "<b>", "x" * 500]),
)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_one_value_that_is_replaced(made: Content, tmp_path: Path, data: st.DataObject) -> None:
    header, trials = copy.deepcopy(made)
    at: Any = data.draw(st.sampled_from([header, *trials[:2]]))
    while True:
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
        else:
            break
    at[key] = data.draw(VALUES)
    write(tmp_path, header, [json.dumps(trial) for trial in trials])
    for status, output in reports(tmp_path):
        assert status in (0, 2), output
        assert status == 0 or "run.json" in output or "trials.jsonl, line" in output
        if output.startswith("<!DOCTYPE") and status == 0:
            pictures = "".join(re.findall(r"<svg.*?</svg>", output))
            assert not re.search(r'="-?(nan|inf)', pictures)
    (tmp_path / "page.html").unlink(missing_ok=True)
