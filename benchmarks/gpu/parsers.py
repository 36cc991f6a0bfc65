"""Reads what compute-sanitizer and Nsight Compute write."""

from __future__ import annotations

import csv
import re
from typing import Any

PREFIX = "========= "
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed).*")

METRICS = {
    "gpu__time_duration.sum": "duration_us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
# Nsight Compute 2023 and earlier spell the units out.
MICROSECONDS = {
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
    "second": 1e6,
}


def sanitizer(text: str) -> dict[str, Any]:
    """``errors``, the number found, None where the tool came to no end; and ``summary``: its last line, then the first
    finding or whatever else it said."""
    lines = [line.removeprefix(PREFIX).strip() for line in text.splitlines() if line.startswith(PREFIX)]
    said = [line for line in lines if line and line != "COMPUTE-SANITIZER"]
    found = [(line, match) for line in said if (match := SUMMARY.fullmatch(line))]
    if not found:
        return {"errors": None, "summary": "; ".join(said[:3]) or "the tool wrote nothing"}
    summary, match = found[-1]
    errors = int(match[1] or match[2])
    first = said[: said.index(summary)][:3] if errors else []
    return {"errors": errors, "summary": "; ".join([summary, *first])}


def profile(text: str) -> list[dict[str, Any]]:
    """What ``ncu --csv`` wrote: for each kernel launch ``kernel`` and the keys of ``METRICS``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        key = METRICS.get(row.get("Metric Name") or "")
        if key is None:
            continue
        empty = {"kernel": kernel_name(row["Kernel Name"]), **dict.fromkeys(METRICS.values())}
        launch = launches.setdefault(row["ID"], empty)
        launch[key] = _value(key, row["Metric Value"], row["Metric Unit"])
    return list(launches.values())


def kernel_name(demangled: str) -> str:
    """A kernel's own name, without namespaces, template arguments and parameters."""
    plain = re.sub(r"<unnamed>::|\(anonymous namespace\)::|^void ", "", demangled)
    return re.split(r"[<(]", plain)[0].strip().rpartition("::")[2]


def complaint(text: str) -> str:
    """The errors and warnings of Nsight Compute."""
    lines = [line for line in text.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))]
    return "; ".join(line.strip() for line in lines[:3])


def _value(key: str, text: str, unit: str) -> float | int | None:
    try:
        number = float(text.replace(",", ""))
    except ValueError:  # "n/a", where a counter cannot be read
        return None
    if key == "duration_us":
        return number * MICROSECONDS[unit] if unit in MICROSECONDS else None
    return int(number) if key == "registers" else number
