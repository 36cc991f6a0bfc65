"""Reads what a report is made of: a JSON of pytest-benchmark, a lines file, or a folder of the GPU check.

A run may have been cut: whatever is missing or half-written is named, and the rest is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lines


@dataclass
class Source:
    """What was found.

    Attributes:
        run: as pytest-benchmark's JSON: ``machine_info``, ``commit_info``, ``datetime``, ``benchmarks``; and by name
            what was ``skipped`` or ``failed``, with the reason.
        parts: what a folder holds beside: ``machine``, ``stages``, ``tests``, ``sweep``, ``sanitizer``, ``profile``.
        missing: what is not there, and why.
    """

    run: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """Of the machine that the benchmarks ran on, as they saw it."""
        facts: dict[str, Any] = self.run.get("machine_info", {}).get("device", {})
        return facts

    @property
    def dry(self) -> bool:
        """Whether nothing in it was measured."""
        return bool(self.parts.get("machine", {}).get("dry")) or "dry" in self._devices

    @property
    def gpu(self) -> bool:
        """Whether all that was measured was on a GPU, or as on one."""
        return bool(self.parts) or "cpu" not in self._devices

    @property
    def card(self) -> str | None:
        card: str | None = self.parts.get("machine", {}).get("card") or self.facts.get("card")
        return card

    @property
    def _devices(self) -> set[str]:
        devices = {b["extra_info"].get("device", "cpu") for b in self.run.get("benchmarks", [])}
        return devices or {self.facts.get("name", "cpu")}


def load(path: Path) -> Source:
    if path.is_dir():
        return _folder(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        content = None
    if isinstance(content, dict) and "benchmarks" in content:
        return Source(run=content)
    return _lines(path)


def _lines(path: Path) -> Source:
    records, broken = lines.read(path)
    source = Source()
    source.run = dict(next((r for r in records if "machine_info" in r), {}))
    if not source.run:
        source.missing.append(f"the machine of {path.name} (its first line)")
    if broken:
        source.missing.append(_broken(path.name, broken))
    # A file that a second session went on with: what counts is what last became of a benchmark.
    last = {record["name"]: record for record in records if "name" in record}
    source.run["benchmarks"] = [record for record in last.values() if "stats" in record]
    for what in ("skipped", "failed"):
        source.run[what] = {name: record[what] for name, record in last.items() if what in record}
    return source


def _folder(folder: Path) -> Source:
    timing = folder / "timing.jsonl"
    source = _lines(timing) if timing.exists() else Source(missing=["timing.jsonl (not written)"])
    source.parts = {"machine": {}}
    readers: dict[str, Callable[[Path, Source], Any]] = {
        "machine.json": _json(dict),
        "stages.jsonl": _records,
        "tests.json": _json(dict),
        "sweep.jsonl": _records,
        "sanitizer.json": _json(dict),
        "profile.json": _json(list),
    }
    for name, read in readers.items():
        path = folder / name
        if not path.exists():
            source.missing.append(f"{name} (not written)")
            continue
        content = read(path, source)
        if content is not None:
            source.parts[path.stem] = content
    return source


def _json(kind: type) -> Callable[[Path, Source], Any]:
    def read(path: Path, source: Source) -> Any:
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except json.JSONDecodeError:
            content = None
        if isinstance(content, kind):
            return content
        source.missing.append(f"{path.name} (cut or not what it should be)")
        return None

    return read


def _records(path: Path, source: Source) -> list[dict[str, Any]]:
    records, broken = lines.read(path)
    if broken:
        source.missing.append(_broken(path.name, broken))
    return records


def _broken(name: str, count: int) -> str:
    return f"{count} line{'s' * (count > 1)} of {name} (cut)"
