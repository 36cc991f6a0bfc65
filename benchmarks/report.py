"""Turns the JSON of ``pytest benchmarks --benchmark-json=FILE`` into ``benchmarks/RESULTS.md``.

python benchmarks/report.py FILE [RESULTS.md]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# One line of a table: what was measured, and the results by candidate.
Row = dict[str, dict[str, Any]]

HEADER = """# Benchmark results

Medians of one call, all of one process: compare within a row. A median marked ~ is unsteady: the interquartile range of
its runs is more than a quarter of it. In brackets, how many times lossmeta's median a baseline takes. *Bytes* is the
least memory traffic that the operation needs; *GB/s* is that over lossmeta's median, and *of copy* its share of what a
large `copy_` reaches with the same threads in the same run (above 100 % where the data stays in a cache). Written by
`python benchmarks/report.py`.
"""


def report(run: dict[str, Any]) -> str:
    """The whole file for one run of pytest-benchmark."""
    operators: dict[str, dict[tuple[str, int], Row]] = {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        rows = operators.setdefault(info["operator"], {})
        row = rows.setdefault((info["size"], info["threads"]), {})
        row[info["candidate"]] = {**benchmark["stats"], **info}
    copies = operators.pop("copy", {})
    bandwidth = {
        threads: row["eager"]["bytes_moved"] / row["eager"]["median"] for (_, threads), row in copies.items()
    }
    parts = [HEADER, _machine(run), _devices(run)]
    if bandwidth:
        figures = (f"{b / 1e9:.1f} GB/s with {t} thread{'s' * (t > 1)}" for t, b in sorted(bandwidth.items()))
        parts.append(f"Copy bandwidth: {', '.join(figures)}.\n")
    for name, rows in sorted(operators.items()):
        parts.append(_table(name, rows, bandwidth))
        parts += _memory(name, rows)
    return "\n".join(parts)


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine_info"]
    info = machine["lossmeta"]
    facts = {
        "date": run["datetime"][:10],
        "CPU": f"{machine['cpu'].get('brand_raw', 'unknown')}, instruction set {info['cpu']['isa']}",
        "lossmeta": f"{info['lossmeta']} ({run['commit_info'].get('id', 'unknown')[:12]})",
        "torch": info["torch"],
        "Python": info["python"],
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items()) + "\n"


def _devices(run: dict[str, Any]) -> str:
    devices = {benchmark["extra_info"].get("device", "cpu") for benchmark in run["benchmarks"]}
    if "cuda" in devices:
        return f"Run on: {', '.join(sorted(devices))} (GPU: {run['machine_info']['lossmeta']['cuda']['device']}).\n"
    return "**Not run: CUDA.** Every figure here is from the CPU; none says anything about the GPU kernels.\n"


def _table(operator: str, rows: dict[tuple[str, int], Row], bandwidth: dict[int, float]) -> str:
    """A line for each size, number of threads and variant of lossmeta: candidates named "lossmeta ..."."""
    candidates = list(dict.fromkeys(c for row in rows.values() for c in row))
    baselines = [c for c in candidates if not c.startswith("lossmeta")]
    variants = sorted(c for c in candidates if c.startswith("lossmeta"))
    columns = ["size", "threads", *(["variant"] if variants[1:] else []), "lossmeta", *baselines]
    columns += ["bytes", "GB/s", "of copy"]
    lines = [f"## {operator}\n", _line(columns), _line(["---", *("--:" for _ in columns[1:])])]
    sizes = list(dict.fromkeys(size for size, _ in rows))
    for (size, threads), row in sorted(rows.items(), key=lambda item: (sizes.index(item[0][0]), item[0][1])):
        moved, copy = next(iter(row.values()))["bytes_moved"], bandwidth.get(threads)
        for variant in [v for v in variants if v in row] or variants[:1]:
            ours = row[variant]["median"] if variant in row else None
            cells = [size, str(threads)]
            if variants[1:]:
                cells.append(variant.removeprefix("lossmeta").strip() or "default")
            cells += [_time(row.get(variant)), *(_time(row.get(b), ours) for b in baselines), _bytes(moved)]
            cells.append(f"{moved / ours / 1e9:.1f}" if ours else "–")
            cells.append(f"{100 * moved / ours / copy:.0f} %" if ours and copy else "–")
            lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _memory(operator: str, rows: dict[tuple[str, int], Row]) -> list[str]:
    """Peak memory, where it was measured: it does not depend on the number of threads."""
    sizes: dict[str, Row] = {}
    for (size, _), row in rows.items():
        sizes.setdefault(size, {}).update(row)
    if not any("peak_bytes" in result for row in sizes.values() for result in row.values()):
        return []
    candidates = list(dict.fromkeys(c for row in sizes.values() for c in row))
    candidates.sort(key=lambda c: c != "lossmeta")
    lines = [f"Peak memory of the {operator}, batches, parameters and optimizer state included:\n"]
    lines += [_line(["size", *candidates]), _line(["---", *("--:" for _ in candidates)])]
    for size, row in sizes.items():
        cells = [size]
        for candidate in candidates:
            peak = row.get(candidate, {}).get("peak_bytes")
            ours = row.get("lossmeta", {}).get("peak_bytes")
            ratio = f" ({_significant(peak / ours)}×)" if peak and ours and candidate != "lossmeta" else ""
            cells.append(_bytes(peak) + ratio if peak else "–")
        lines.append(_line(cells))
    return ["\n".join(lines) + "\n"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _time(result: dict[str, Any] | None, ours: float | None = None) -> str:
    if result is None:
        return "–"
    median = result["median"]
    mark = "~" if result["iqr"] > median / 4 else ""
    ratio = f" ({_significant(median / ours)}×)" if ours else ""
    return (f"{mark}{median * 1e6:.1f} µs" if median < 1e-3 else f"{mark}{median * 1e3:.2f} ms") + ratio


def _significant(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        raise SystemExit(__doc__)
    run = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    target = Path(arguments[1]) if len(arguments) == 2 else Path(__file__).with_name("RESULTS.md")
    target.write_text(report(run), encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
