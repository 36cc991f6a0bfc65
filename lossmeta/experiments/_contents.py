"""Whether what the files of a run folder hold is a run: types, ranges, and names that fit together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from reprlib import repr as short
from typing import Any

from lossmeta.experiments.records import Header, Record, TaskHeader
from lossmeta.experiments.statistics import LARGEST
from lossmeta.experiments.trial import Measure, Point

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
ROLES = ("report", "tuning")
NOTHING = type(None)
# Of what a report says of the environment; further ones are free.
ENVIRONMENT = {
    **dict.fromkeys(("lossmeta", "torch", "python", "processor", "device", "date"), str),
    "threads": int,
    "cuda": dict,
}
DIGITS = 20


def parsed(text: bytes) -> Any:
    """JSON without what the standard leaves open: no NaN, no infinity, no key twice, no half of a surrogate pair.

    Raises:
        ValueError: for anything else.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object)
        json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return content


def header_of(content: Any) -> Header:
    """The header that ``run.json`` holds, without its schema.

    Raises:
        KeyError: where something is missing.
        TypeError: for something of another type, and what a header does not have.
        ValueError: for names that do not fit together.
    """
    tasks = []
    for task in _of("tasks", content["tasks"], list):
        measures = _of("measures", _of("task", task, dict)["measures"], list)
        tasks.append(TaskHeader(task["name"], tuple(Measure(**_of("measure", m, dict)) for m in measures)))
    lists = {name: tuple(_of(name, content[name], list)) for name in ("rows", "references", "seeds")}
    lists["corrected"] = tuple(_of("corrected", content.get("corrected", []), list))
    header = Header(**{**content, **lists, "tasks": tuple(tasks)})
    check_header(header)
    return header


def check_header(header: Header) -> None:
    """Raises as :func:`header_of`."""
    for name in ("recipe", "about", "legend"):
        _text(name, getattr(header, name))
    for task in header.tasks:
        _text("task", task.name)
        if not task.measures:
            raise ValueError(f"{task.name} must have a measure, got none")
        for measure in task.measures:
            _check_measure(measure)
        _different("measures", [_text("measure", measure.name) for measure in task.measures])
    _different("tasks", [task.name for task in header.tasks])
    _different("rows", [_text("row", row) for row in header.rows])
    _different("seeds", [_of("seed", seed, int) for seed in header.seeds])
    for name, labels in (("reference", header.references), ("corrected", header.corrected)):
        for label in labels:
            if label not in header.rows:
                raise ValueError(f"{name} must be one of the rows, got {short(label)}")
    _different("corrected rows", header.corrected)
    _of("settings", header.settings, dict)
    for heading, by_task in _of("reported", header.reported, dict).items():
        for task_name, by_row in _of(heading, by_task, dict).items():
            for text in _of(task_name, by_row, dict).values():
                _text(heading, text)
    _of("environment", header.environment, dict)
    for name, expected in ENVIRONMENT.items():
        _of(name, header.environment.get(name), expected, NOTHING)


def _check_measure(measure: Measure) -> None:
    for name in ("percent", "shown", "ratio"):
        _of(name, getattr(measure, name), bool)
    _of("higher_is_better", measure.higher_is_better, bool, NOTHING)
    if not 0 <= _of("digits", measure.digits, int) <= DIGITS:
        raise ValueError(f"digits must lie in [0, {DIGITS}], got {short(measure.digits)}")


def record_of(content: Any, tasks: Sequence[TaskHeader]) -> Record:
    """The trial that a line of ``trials.jsonl`` holds; it has all measures of its task.

    Raises:
        TypeError: for something of another type, and what is missing or unknown.
        ValueError: for values out of range, and measures that are missing.
    """
    record = Record(**_of("a trial", content, dict))
    record = replace(
        record, series={name: _points(name, p) for name, p in _of("series", record.series, dict).items()}
    )
    check_record(record)
    wanted = next((task.measures for task in tasks if task.name == record.task), ())
    if missing := [measure.name for measure in wanted if measure.name not in record.measures]:
        raise ValueError(f"measures must have {', '.join(missing)}, got {short(list(record.measures))}")
    return record


def check_record(record: Record) -> None:
    """Raises as :func:`record_of`."""
    if record.role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {short(record.role)}")
    for name in ("task", "method"):
        _text(name, getattr(record, name))
    for name in ("candidate", "failure"):
        if getattr(record, name) is not None:
            _text(name, getattr(record, name))
    _of("seed", record.seed, int)
    _of("settings", record.settings, dict)
    for name, value in _of("measures", record.measures, dict).items():
        if value is not None:
            _number(name, value)
    if _number("seconds", record.seconds) < 0:
        raise ValueError(f"seconds must not be negative, got {record.seconds}")
    if record.peak_memory is not None and not 0 <= _of("peak_memory", record.peak_memory, int) <= LARGEST:
        raise ValueError(f"peak_memory must lie in [0, {LARGEST:g}], got {short(record.peak_memory)}")


def _points(name: str, points: Any) -> list[Point]:
    found: list[Point] = []
    for point in _of(_text("series", name), points, list):
        if len(_of(name, point, list)) != 2:
            raise ValueError(f"{name} must have points [step, value], got {short(point)}")
        step, value = point
        if found and not _number(name, step) > found[-1][0]:
            raise ValueError(f"{name} must have steps that ascend, got {short(step)} after {found[-1][0]}")
        found.append((_number(name, step), None if value is None else _number(name, value)))
    return found


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{short(key)} stands twice")
        found[key] = value
    return found


def _of(name: str, value: Any, *types: type) -> Any:
    """The value, where it is of one of the types; true and false are no numbers."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("null" if one is NOTHING else one.__name__ for one in types)
        raise TypeError(f"{name} must be {wanted}, got {short(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if CONTROL.search(_of(name, value, str)):
        raise ValueError(f"{name} must have no control characters, got {short(value)}")
    return str(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or null, got {short(value)}")
    if not abs(value) <= LARGEST:
        raise ValueError(f"{name} must lie within ±{LARGEST:g}, got {short(value)}")
    return value


def _different(what: str, names: Sequence[Any]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{what} must differ, got {short(list(names))}")
