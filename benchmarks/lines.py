"""Files of one JSON object a line, to which each result is added at once: a run that is cut keeps what is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Lines:
    """Adds lines to a file; a half-written last one, of a run that was cut, gets its end."""

    def __init__(self, path: Path) -> None:
        cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if cut:
            self._file.write("\n")

    def add(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, default=str) + "\n")
        self._file.flush()


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects, and how many lines are none."""
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    return records, broken
