"""Turns what was measured into a page of results.

python benchmarks/report.py SOURCE [TARGET] [--short]
python benchmarks/report.py SOURCE --against PAGE

SOURCE is the JSON of ``pytest benchmarks --benchmark-json=FILE``, a file of ``pytest benchmarks --lines FILE``, or a
folder of the GPU check. TARGET is by default ``benchmarks/RESULTS.md`` for the CPU and ``benchmarks/RESULTS-<card>.md``
for a GPU; a dry run, whose figures mean nothing, has none. ``--short`` prints some forty lines instead. ``--against``
writes nothing: it prints the ratios that are more than a tenth worse than on an earlier page, of the same
kind of machine, and ends with status 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import report_against
import report_gpu
import report_source
from report_table import Row, candidates_of, median, memory, peak_memory_table, rows_of, table, variant_name

HEADER = """# Benchmark results

Medians of one call, all of one process: compare within a row. A median marked ~ is unsteady: the interquartile range of
its runs is more than a quarter of it. In brackets, how many times lossmeta's median a baseline takes. *Bytes* is the
least memory traffic that the operation needs; *GB/s* is that over lossmeta's median, and *of copy* its share of what a
large `copy_` reaches with the same threads in the same run (above 100 % where the data stays in a cache). Written by
`python benchmarks/report.py`.
"""


def report(run: dict[str, Any]) -> str:
    """The whole file for one run on the CPU."""
    operators = rows_of(run["benchmarks"], "threads")
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
        parts += peak_memory_table(name, rows)
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
    return "Every figure here is from the CPU; those of a GPU are in the files named after the card.\n"


def _table(operator: str, rows: dict[tuple[str, int], Row], bandwidth: dict[int, float]) -> str:
    """A line for each size, number of threads and variant of lossmeta."""
    variants, baselines = candidates_of(rows)
    columns = ["size", "threads", *(["variant"] if variants[1:] else []), "lossmeta", *baselines]
    columns += ["bytes", "GB/s", "of copy"]
    lines = []
    sizes = list(dict.fromkeys(size for size, _ in rows))
    for (size, threads), row in sorted(rows.items(), key=lambda item: (sizes.index(item[0][0]), item[0][1])):
        moved, copy = next(iter(row.values()))["bytes_moved"], bandwidth.get(threads)
        for variant in [v for v in variants if v in row] or variants[:1]:
            ours = row[variant]["median"] if variant in row else None
            cells = [size, str(threads)]
            if variants[1:]:
                cells.append(variant_name(variant))
            cells += [
                median(row.get(variant)),
                *(median(row.get(b), ours) for b in baselines),
                memory(moved),
            ]
            cells.append(f"{moved / ours / 1e9:.1f}" if ours else "–")
            cells.append(f"{100 * moved / ours / copy:.0f} %" if ours and copy else "–")
            lines.append(cells)
    return f"## {operator}\n\n{table(columns, lines)}\n"


def target_for(source: report_source.Source) -> Path:
    """Where the page goes that no TARGET was named for."""
    here = Path(__file__)
    if not source.gpu:
        return here.with_name("RESULTS.md")
    if source.dry:
        raise SystemExit(
            "This was a dry run: no figure in it means anything. Name a TARGET to see its report"
        )
    if not source.card:
        raise SystemExit("The card's name is missing: name a TARGET")
    return here.with_name(f"RESULTS-{slug(source.card)}.md")


def slug(card: str) -> str:
    """As in ``RESULTS-H100-80GB-HBM3.md``."""
    return re.sub(r"[^A-Za-z0-9]+", "-", card.removeprefix("NVIDIA ")).strip("-")


def compare(page: str, recorded: Path) -> None:
    try:
        found = report_against.compared(recorded.read_text(encoding="utf-8"), page)
    except ValueError as error:
        raise SystemExit(f"{recorded}: {error}") from error
    print(found)
    if not found.startswith("0 "):
        raise SystemExit(1)


def main(arguments: list[str]) -> None:
    short, against = "--short" in arguments, "--against" in arguments
    paths = [Path(argument) for argument in arguments if argument not in ("--short", "--against")]
    if len(paths) not in (1, 2) or (short and len(paths) == 2) or (against and (short or len(paths) == 1)):
        raise SystemExit(__doc__)
    for path in paths if against else paths[:1]:
        if not path.exists():
            raise SystemExit(f"{path} does not exist")
    source = report_source.load(paths[0])
    if short:
        print(report_gpu.short(source))
        return
    if not source.gpu and "machine_info" not in source.run:
        raise SystemExit(f"{paths[0]} does not say on what machine it was measured")
    page = report_gpu.report(source) if source.gpu else report(source.run)
    if against:
        compare(page, paths[1])
        return
    target = paths[1] if paths[1:] else target_for(source)
    target.write_text(page, encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
