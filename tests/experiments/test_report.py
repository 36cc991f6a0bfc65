from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lossmeta.experiments import Measure, report
from lossmeta.experiments.records import Header, Record, Run, TaskHeader

MEASURES = (
    Measure("error", higher_is_better=False, percent=True, digits=1),
    Measure("precision", higher_is_better=True, digits=3),
    Measure("selection error", higher_is_better=False, shown=False),
    Measure("rate", higher_is_better=None, digits=2),
)
HEADER = Header(
    recipe="toy",
    about="A toy.",
    settings={"size": "small", "steps": None},
    tasks=(TaskHeader("Task", MEASURES), TaskHeader("without data", MEASURES)),
    rows=("plain", "other"),
    references=("plain",),
    seeds=(0, 1, 2, 5),
    legend="What the\nrows are.\n\nAnd more.",
    reported={"paper": {"Task": {"other": "9.9 ± 0.1"}}},
    environment={"lossmeta": "1.0", "torch": "2.10", "processor": "a CPU", "date": "2026-01-02T03:04:05"},
)


def record(method: str, seed: int, error: float | None, **changes: Any) -> Record:
    measures = {"error": error, "precision": None if error is None else 1 - error, "rate": 0.1}
    return Record("report", "Task", method, seed, {}, measures, 1.0, None, **changes)


def run(plain: dict[int, float | None], other: dict[int, float | None], **changes: Any) -> Run:
    trials = [record("plain", seed, error) for seed, error in plain.items()]
    trials += [record("other", seed, error) for seed, error in other.items()]
    return Run(Path("folder"), replace(HEADER, **changes), trials)


PLAIN = {0: 0.10, 1: 0.12, 2: 0.11, 5: 0.13}
OTHER = {0: 0.08, 1: 0.11, 2: 0.11, 5: 0.10}


def test_page() -> None:
    expected = """\
# toy

A toy.

Settings: size small; seeds: 0 to 2, 5; lossmeta 1.0, torch 2.10; a CPU; 2026-01-02.

### Task, 4 seeds; error: difference to plain

|  | error (%) | paper | precision | rate | difference | 95 % interval | better | p t-test | p Wilcoxon |
| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
| plain | 11.5 ± 1.3 |  | 0.885 ± 0.013 | 0.10 |  |  |  |  |  |
| other | 10.0 ± 1.4 | 9.9 ± 0.1 | 0.900 ± 0.014 | 0.10 | -1.5 | -3.6 to +0.6 | 3/4, 1= | 0.1 | 0.25 |

precision: difference to plain:

|  | difference | 95 % interval | better | p t-test | p Wilcoxon |
| --- | --: | --: | --: | --: | --: |
| plain |  |  |  |  |  |
| other | +0.015 | -0.006 to +0.036 | 3/4, 1= | 0.1 | 0.25 |

±: standard deviation over the seeds. Difference: mean of the differences to the row that is named, seed by seed, \
with a 95 % confidence interval. Better: in how many seeds (=: equal). p: of the paired t-test and of Wilcoxon's \
signed-rank test. Lower is better for error. Higher is better for precision.

What the rows are.

And more.
"""
    assert report.page(run(PLAIN, OTHER)) == expected


def test_data_of_cells() -> None:
    (table,) = report.tables(run(PLAIN, OTHER))
    data = json.loads(json.dumps(table.data(), allow_nan=False))
    cells = dict(zip([c["heading"] for c in data["columns"]][:6], data["rows"]["other"], strict=False))
    assert cells["error (%)"]["value"] == {
        "count": 4,
        "mean": pytest.approx(0.1),
        "deviation": pytest.approx(2**0.5 / 100),
        "diverged": 0,
    }
    assert cells["difference"]["value"]["wins"] == 3
    assert cells["difference"]["value"]["difference"] == pytest.approx(-0.015)


def texts(of: Run, row: str, seeds: list[int] | None = None) -> dict[str, str]:
    """What a row says under the headings up to the first measure's comparison, where it says anything."""
    (table,) = report.tables(of, seeds)
    found: dict[str, str] = {}
    for column, cell in zip(table.columns, table.rows[row], strict=True):
        if cell.text:
            found.setdefault(column.heading, cell.text)
    return found


def test_divergence() -> None:
    some = texts(run(PLAIN, {0: 0.08, 1: None, 2: 0.09, 5: 0.10}), "other")
    assert some["error (%)"] == "9.0 ± 1.0, 1 diverged"
    assert (some["better"], some["p Wilcoxon"]) == ("3/4", "0.75")
    assert texts(run(PLAIN, dict.fromkeys(PLAIN)), "other") == {
        "error (%)": "diverged",
        "paper": "9.9 ± 0.1",
        "precision": "diverged",
        "rate": "0.10",
        "better": "0/4",
        "p Wilcoxon": "0.12",
    }


def test_only_some_seeds() -> None:
    of = run(PLAIN, OTHER)
    assert texts(of, "plain", [0])["error (%)"] == "10.0"
    assert texts(of, "other", [0]) == {
        "error (%)": "8.0",
        "paper": "9.9 ± 0.1",
        "precision": "0.920",
        "rate": "0.10",
        "difference": "-2.0",
        "better": "1/1",
        "p Wilcoxon": "1",
    }
    (table,) = report.tables(of, [0])
    assert "p t-test" not in [column.heading for column in table.columns], "what no row has is left out"
    assert "seeds: 0;" in report.page(of, [0])


def test_an_unfinished_run() -> None:
    of = run(PLAIN, {0: 0.08, 1: 0.10})
    (table,) = report.tables(of)
    assert table.notes == ("Not finished: other: 2 of 4.",)
    other = texts(of, "other")
    assert (other["difference"], other["better"]) == ("-2.0", "2/2"), "paired over what there is"
    (table,) = report.tables(run(PLAIN, {}))
    assert {cell.text for cell in table.rows["other"]} == {"", "9.9 ± 0.1"}
    assert report.tables(run({}, {})) == []


def test_what_was_chosen_and_the_last_trial_of_a_seed() -> None:
    of = run(PLAIN, {})
    of.trials.extend(record("other", seed, 0.5, candidate="rate 1") for seed in PLAIN)
    of.trials.extend(record("other", seed, 0.2, candidate="rate 0.1") for seed in PLAIN)
    of.trials.append(replace(record("other", 0, 0.9), role="tuning"))
    (table,) = report.tables(of)
    assert table.notes == ("Chosen: other: rate 0.1.",)
    assert texts(of, "other")["error (%)"] == "20.0 ± 0.0"


def test_several_references_and_none() -> None:
    (table,) = report.tables(run(PLAIN, OTHER, references=("plain", "other")))
    groups = list(dict.fromkeys(column.group for column in table.columns))
    assert groups == [
        "",
        "error: difference to plain",
        "precision: difference to plain",
        "error: difference to other",
        "precision: difference to other",
    ]
    (table,) = report.tables(run(PLAIN, OTHER, references=()))
    assert len(table.columns) == 4
    assert report.explanation(run(PLAIN, OTHER, references=()).header)[0] == (
        "Lower is better for error. Higher is better for precision."
    )


def test_large_numbers_stay_short() -> None:
    assert texts(run(PLAIN, {0: 12.34, 1: 123.4}), "other")["error (%)"] == "6787 ± 7853"
    assert texts(run(PLAIN, {0: 1.5e20, 1: 2e20}), "other")["error (%)"] == "1.75e+22 ± 3.54e+21"


def test_figures(tmp_path: Path, figures: None) -> None:
    of = replace(run(PLAIN, {0: None, 1: 0.11}), path=tmp_path)
    assert [path.name for path in report.write(of)] == ["tables.md", "tables.json", "toy-task.png"]
    assert (tmp_path / "toy-task.png").read_bytes().startswith(b"\x89PNG")
    ((_, drawing),) = report.figures(of)
    (axes,) = drawing.axes
    assert axes.get_title() == "Task"
    assert axes.get_xlabel() == "error (%), mean ± sd"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "other"]
    one_task = replace(of, header=replace(of.header, tasks=of.header.tasks[:1]))
    assert [name for name, _ in report.figures(one_task)] == ["toy.png"]
    assert list(report.figures(run({}, {}))) == []


def test_without_matplotlib(tmp_path: Path) -> None:
    assert [path.name for path in report.write(replace(run(PLAIN, OTHER), path=tmp_path))] == [
        "tables.md",
        "tables.json",
    ]
