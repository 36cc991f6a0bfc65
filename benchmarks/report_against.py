"""What has become slower since another page of results was written, beside what it is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterator

ALLOWED = 0.1
"""Share by which a ratio may be worse: machines are shared."""
KINDS = ("CPU", "card")
"""The facts of a page that name the kind of machine."""

Key = tuple[str, ...]
"""Operator, what names the line, and the baseline."""

_RATIO = re.compile(r"\(([0-9.]+)×\)")


def compared(recorded: str, measured: str) -> str:
    """The regressions of one page against another, in words.

    Ratios are compared, baseline over lossmeta, which hardly depend on how busy a machine was.

    Args:
        recorded: an earlier page of :mod:`report`.
        measured: the page of now.

    Raises:
        ValueError: for pages of other kinds of machine, and where no figure stands in both.
    """
    kinds = [_kind(page) for page in (recorded, measured)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the page must be of the same kind of machine, {kinds[1]}, got one of {kinds[0]}")
    before, now = (dict(_ratios(page)) for page in (recorded, measured))
    both = [key for key in before if key in now]
    if not both:
        raise ValueError("the page must have figures that were measured now too, got none")
    worse = [key for key in both if now[key] < (1 - ALLOWED) * before[key]]
    missing = len(before) - len(both)
    lines = [
        f"{', '.join(key[:-1])}: {key[-1]} took {before[key]:g} times as long, now {now[key]:g}"
        for key in worse
    ]
    head = f"{len(worse)} of {len(both)} ratios are worse by more than {ALLOWED:.0%}"
    return "\n".join([head + (f"; {missing} were not measured now" if missing else ""), *lines])


def _kind(page: str) -> str:
    for name in KINDS:
        if found := re.search(rf"^- {name}: (.+)$", page, re.MULTILINE):
            return found[1]
    return "unknown"


def _ratios(page: str) -> Iterator[tuple[Key, float]]:
    """Those in brackets, in the tables that have a column of lossmeta's times."""
    section, columns = "", list[str]()
    for line in page.splitlines():
        if line.startswith("#"):
            section, columns = line.lstrip("# "), []
        elif not line.startswith("| "):
            columns = []
        elif not columns:
            columns = _cells(line)
        elif "lossmeta" in columns:
            cells = _cells(line)
            named = columns.index("lossmeta")
            for column, cell in zip(columns[named + 1 :], cells[named + 1 :], strict=True):
                if ratio := _RATIO.search(cell):
                    yield (section, *cells[:named], column), float(ratio[1])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
