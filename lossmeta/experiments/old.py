"""Reads ``results.json``, which held a whole run before there were run folders (schema 1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossmeta.experiments._contents import check_header, check_record
from lossmeta.experiments.records import REMEDY, FolderError, Header, Record, Run, TaskHeader
from lossmeta.experiments.trial import Measure

OLD = "results.json"

# Of the tables of papers, and of the quickstart.
TABLE = (
    Measure("test", higher_is_better=False),
    Measure("slope_ratio", higher_is_better=None, digits=2),
    Measure("final_rate", higher_is_better=None, digits=3),
)
QUICKSTART = (
    Measure("error", higher_is_better=False, percent=True, digits=2),
    Measure("average_precision", higher_is_better=True, percent=True, digits=2),
)
REFERENCES = ("plain, tuned rate", "cross-entropy")
# Seeds from here on served to choose the learning rate.
TUNING = 10_000


def convert(path: Path, content: Any) -> Run:
    """The run in today's form; the file stays as it is.

    Raises:
        FolderError: where the file is not one of those.
    """
    try:
        trials = list(_records(content["results"]))
        reported = [trial for trial in trials if trial.role == "report"]
        rows = tuple(dict.fromkeys(trial.method for trial in reported))
        quickstart = content.get("recipe") == "quickstart"
        header = Header(
            recipe=content["settings"].get("recipe") or content["recipe"],
            about=content.get("about", ""),
            settings=content["settings"],
            tasks=tuple(
                TaskHeader(name, QUICKSTART if quickstart else TABLE)
                for name in dict.fromkeys(trial.task for trial in reported)
            ),
            rows=rows,
            references=tuple(label for label in (*REFERENCES, *rows) if label in rows)[:1],
            seeds=tuple(sorted({trial.seed for trial in reported})),
            legend=f"Converted from {OLD} of an earlier lossmeta.",
            reported={},
            environment=content["versions"],
        )
        check_header(header)
        compared = [m.name for m in (QUICKSTART if quickstart else TABLE) if m.higher_is_better is not None]
        for trial in trials:
            check_record(trial)
            if missing := [name for name in compared if name not in trial.measures]:
                raise ValueError(f"a result must have {', '.join(missing)}, got {', '.join(trial.measures)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{path / OLD} must hold results of a recipe, got {type(error).__name__}: {error}; {REMEDY}"
        ) from error
    return Run(path, header, trials)


def _records(results: list[dict[str, Any]]) -> Iterator[Record]:
    for result in results:
        numbers = {**result, **result["test"]} if isinstance(result["test"], dict) else result
        yield Record(
            role="tuning" if result["seed"] >= TUNING else "report",
            task=result.get("task", "Digits"),
            method=result["method"],
            seed=result["seed"],
            settings=result.get("settings", {}),
            measures={
                name: value
                for name, value in numbers.items()
                if name not in ("seed", "seconds") and (value is None or type(value) in (int, float))
            },
            seconds=result["seconds"],
            peak_memory=None,
        )
