"""Which row is recommended: the best that is surely ahead of the best reference, or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lossmeta.experiments import Measure, report
from lossmeta.experiments.records import Header, Record, Run, TaskHeader
from lossmeta.experiments.statistics import compare, holm

NOISE = (0.0, 0.01, -0.01, 0.02, -0.02)


def run_of(values: dict[str, list[float | None]], higher: bool = False, seeds: int = 5) -> Run:
    """Rows whose names begin with plain are references."""
    rows = tuple(values)
    header = Header(
        recipe="toy",
        about="",
        settings={},
        tasks=(TaskHeader("first", (Measure("score", higher),)),),
        rows=rows,
        references=tuple(row for row in rows if row.startswith("plain")),
        seeds=tuple(range(seeds)),
        legend="",
        reported={},
        environment={},
        corrected=tuple(row for row in rows if not row.startswith("plain")),
    )
    trials = [
        Record("report", "first", row, seed, {}, {"score": value}, 0.0, None)
        for row, of_row in values.items()
        for seed, value in enumerate(of_row)
    ]
    return Run(Path(), header, trials)


def around(mean: float, unevenness: float = 0.0) -> list[float | None]:
    shifts = (1.0, -1.0, 0.5, -0.5, 0.0)
    return [mean + noise + unevenness * shift for noise, shift in zip(NOISE, shifts, strict=True)]


def recommended(run: Run) -> tuple[str | None, str]:
    (sentence,) = report.recommendations(run)
    task, seeds = run.header.tasks[0], run.header.seeds
    label, text = report.recommended(run.header, task, report.trials_of(run, task, seeds), seeds)
    assert sentence == f"Recommended: {text}"
    return label, sentence


@pytest.mark.parametrize("higher", [False, True])
def test_the_best_that_is_surely_ahead(higher: bool) -> None:
    sign = -1 if higher else 1
    rows = {
        "plain": around(sign * 1.0),
        "plain, tuned": around(sign * 0.8),
        "good": around(sign * 0.5, 0.01),
        "better": around(sign * 0.4, 0.01),
        "best by chance": around(sign * 0.3, 3.0),
    }
    label, sentence = recommended(run_of(rows, higher))
    assert label == "better"
    p_values = [
        compare(rows[r], rows["plain, tuned"], higher_is_better=higher).t_test for r in list(rows)[2:]
    ]
    expected = holm(p_values)[1]
    assert sentence == (
        f"Recommended: better; it is ahead of plain, tuned, the best of what it must beat (score {sign * -0.4:+.4f}, "
        f"p = {expected:.2g} corrected for 3 rows)."
    )


def test_none_where_it_may_be_chance() -> None:
    label, sentence = recommended(run_of({"plain": around(1.0), "lucky": around(0.9, 0.5)}))
    assert label is None
    assert sentence.startswith(
        "Recommended: none; lucky is ahead of plain by what may be chance (score -0.1000"
    )


def test_none_where_only_the_worse_reference_is_beaten() -> None:
    rows = {"plain": around(1.0), "plain, tuned": around(0.5), "method": around(0.7, 0.01)}
    assert recommended(run_of(rows)) == (None, "Recommended: none; no row is ahead of plain, tuned.")


def test_the_number_of_rows_counts() -> None:
    plain, ahead = around(1.0), around(0.9, 0.08)
    p = compare(ahead, plain, higher_is_better=False).t_test
    assert p is not None and 0.01 < p < 0.05
    assert recommended(run_of({"plain": plain, "method": ahead}))[0] == "method"
    others = {f"other {i}": around(1.0, 0.3) for i in range(4)}
    assert recommended(run_of({"plain": plain, "method": ahead, **others}))[0] is None


def test_a_row_that_diverged_once_is_not_recommended() -> None:
    diverged = [None, *around(0.1, 0.01)[1:]]
    assert recommended(run_of({"plain": around(1.0), "method": diverged}))[0] is None
    rows = {"plain": [None, *around(0.0)[1:]], "plain, tuned": around(1.0), "method": around(0.5, 0.01)}
    assert "ahead of plain, tuned" in recommended(run_of(rows))[1]


def test_none_yet_while_trials_are_missing() -> None:
    rows = {"plain": around(1.0), "method": around(0.5, 0.01)[:4]}
    assert recommended(run_of(rows)) == (None, "Recommended: none yet, for trials are missing.")


def test_one_seed_recommends_nothing() -> None:
    rows: dict[str, list[float | None]] = {"plain": [1.0], "method": [0.5]}
    assert recommended(run_of(rows, seeds=1))[0] is None


def test_rows_that_do_not_compete_are_not_recommended() -> None:
    run = run_of({"plain": around(1.0)})
    assert report.recommendations(run) == []


def test_the_table_has_the_corrected_p() -> None:
    rows = {"plain": around(1.0), "one": around(0.9, 0.05), "other": around(0.5, 0.01)}
    (table,) = report.tables(run_of(rows))
    place = [column.heading for column in table.columns].index(report.HOLM)
    p_values = [compare(rows[r], rows["plain"], higher_is_better=False).t_test for r in ("one", "other")]
    assert [cells[place].value for cells in table.rows.values()] == [None, *holm(p_values)]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    # What is not known counts as one more.
    assert holm([None, 0.01, None]) == [None, pytest.approx(0.03), None]
