"""How the reports write figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# One line of a table: what was measured, and the results by candidate.
Row = dict[str, dict[str, Any]]


def rows_of(benchmarks: Sequence[dict[str, Any]], column: str) -> dict[str, dict[tuple[str, Any], Row]]:
    """Operator -> (size, what else sets rows apart) -> the row."""
    operators: dict[str, dict[tuple[str, Any], Row]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        row = operators.setdefault(info["operator"], {}).setdefault((info["size"], info.get(column)), {})
        row[info["candidate"]] = {**benchmark["stats"], **info}
    return operators


def candidates_of(rows: dict[Any, Row]) -> tuple[list[str], list[str]]:
    """The variants of lossmeta, candidates named "lossmeta ...", and the baselines."""
    candidates = list(dict.fromkeys(candidate for row in rows.values() for candidate in row))
    ours = sorted(c for c in candidates if c.startswith("lossmeta"))
    return ours, [c for c in candidates if not c.startswith("lossmeta")]


def variant_name(candidate: str) -> str:
    return candidate.removeprefix("lossmeta").strip() or "default"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Figures stand on the right."""
    alignment = ["---" if i < text_columns else "--:" for i in range(len(columns))]
    return "\n".join(line(cells) for cells in (columns, alignment, *lines))


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def peak_memory_table(operator: str, rows: dict[tuple[str, Any], Row]) -> list[str]:
    """Peak memory, where it was measured: it does not depend on the number of threads."""
    sizes: dict[str, Row] = {}
    for (size, _), row in rows.items():
        sizes.setdefault(size, {}).update(row)
    if not any(result.get("peak_bytes") for row in sizes.values() for result in row.values()):
        return []
    candidates = list(dict.fromkeys(c for row in sizes.values() for c in row))
    candidates.sort(key=lambda c: c != "lossmeta")
    lines = []
    for size, row in sizes.items():
        cells = [size]
        for candidate in candidates:
            peak = row.get(candidate, {}).get("peak_bytes")
            ours = row.get("lossmeta", {}).get("peak_bytes")
            ratio = f" ({significant(peak / ours)}×)" if peak and ours and candidate != "lossmeta" else ""
            cells.append(memory(peak) + ratio if peak else "–")
        lines.append(cells)
    head = f"Peak memory of the {operator}, batches, parameters and optimizer state included:\n\n"
    return [head + table(["size", *candidates], lines) + "\n"]


def median(result: dict[str, Any] | None, ours: float | None = None) -> str:
    """A time, marked where it is unsteady, and how many times ``ours`` it is."""
    if result is None:
        return "–"
    mark = "~" if result.get("iqr", 0) > result["median"] / 4 else ""
    return mark + duration(result["median"]) + times(result["median"], ours)


def times(seconds: float, ours: float | None) -> str:
    return f" ({significant(seconds / ours)}×)" if ours else ""


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def significant(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def memory(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
