"""The page of a run on a GPU, and its summary for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from report_source import Source
from report_table import (
    Row,
    candidates_of,
    duration,
    median,
    memory,
    peak_memory_table,
    rows_of,
    significant,
    table,
    times,
    variant_name,
)

DRY = "DRY: no figure in it means anything"

SPEED = """Medians of one call, all of one process: compare within a row. *lossmeta* is the time between two CUDA events
around many calls, which is that of the host where launching takes longer than running; *graph* is a call's share in the
replay of a CUDA graph, without the host; *host* is how long a call takes to return. A median marked ~ is unsteady: the
interquartile range of its runs is more than a quarter of it. A baseline has its event time, then its graph's, and in
brackets how many times lossmeta's. *Bytes* is the least memory traffic that the operation needs, *GB/s* that over the
graph's time (the events' where there is none), and *of copy* its share of what a large `copy_` reaches in the same run.
The inputs rotate among sets that together are several times as large as the cache, but for those too small for that.
"""

SHORT_ROWS = 22
SHORT_FAILURES = 2


def report(source: Source) -> str:
    head = f"# {DRY}\n" if source.dry else f"# Benchmark results on {source.card or 'an unknown card'}\n"
    parts = [head, "Written by `python benchmarks/report.py`.\n", _bullets(_facts(source).items())]
    if source.missing:
        parts.append(f"**Missing:** {'; '.join(source.missing)}.\n")
    parts += [
        *_stages(source.parts.get("stages")),
        *_tests(source.parts.get("tests")),
        *_sweep(source.parts.get("sweep")),
        *_sanitizer(source.parts.get("sanitizer")),
        *_speed(source.run),
        *_profile(source.parts.get("profile")),
    ]
    return "\n".join(parts)


def _facts(source: Source) -> dict[str, str]:
    run = source.run
    seen = {
        **source.facts,
        "lossmeta": run.get("machine_info", {}).get("lossmeta", {}).get("lossmeta"),
        "commit": run.get("commit_info", {}).get("id"),
        "date": run.get("datetime"),
    }
    facts = {**seen, **{k: v for k, v in source.parts.get("machine", {}).items() if v is not None}}
    shown = {
        "date": str(facts.get("date") or "unknown")[:10],
        "card": facts.get("card"),
        "driver": facts.get("driver"),
        "CUDA": facts.get("cuda"),
        "nvcc": facts.get("nvcc"),
        "torch": facts.get("torch"),
        "triton": facts.get("triton"),
        "Python": facts.get("python"),
        "lossmeta": f"{facts.get('lossmeta') or 'unknown'} ({str(facts.get('commit') or 'unknown')[:12]})",
    }
    return {name: str(fact or "unknown") for name, fact in shown.items()}


# ---- The check.


def _stages(stages: Sequence[dict[str, Any]] | None) -> list[str]:
    if not stages:
        return []
    lines = [[str(s.get("stage")), _ending(s), f"{s.get('seconds') or 0:.0f}"] for s in stages]
    return [f"## Stages\n\n{table(['stage', 'ended', 'seconds'], lines)}\n"]


def _ending(stage: dict[str, Any]) -> str:
    code = stage.get("returncode")
    return "well" if code == 0 else "out of time" if code == 124 else f"with status {code}"


def _tests(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return []
    parts = ["## Tests\n", f"{_counts(tests)}.\n"]
    if failures := tests.get("failures"):
        parts.append(_bullets([(f"`{name}`", "failed") for name in failures]))
    if slowest := tests.get("slowest"):
        parts.append(table(["slowest", "seconds"], [[f"`{name}`", f"{s:.1f}"] for name, s in slowest]) + "\n")
    return parts


def _counts(tests: dict[str, Any]) -> str:
    return ", ".join(f"{tests.get(what, '?')} {what}" for what in ("passed", "failed", "skipped"))


def _sweep(sweep: Sequence[dict[str, Any]] | None) -> list[str]:
    if not sweep:
        return []
    parts = ["## Against float64\n"]
    lines = []
    for operator in dict.fromkeys(str(case.get("operator")) for case in sweep):
        cases = [case for case in sweep if str(case.get("operator")) == operator]
        worst = max((_share(case) for case in cases), default=math.nan)
        unequal = (
            sum(case.get(what) is False for case in cases) for what in ("bit_equal", "side_stream", "replay")
        )
        counts = (len(cases), len(_failed(cases)), len(_skipped(cases)))
        lines.append([operator, *map(str, counts), f"{worst:.2f}", *map(str, unequal)])
    columns = ["operator", "cases", "failed", "skipped", "worst error / allowed"]
    columns += ["two runs differ", "side stream differs", "replay differs"]
    parts.append(table(columns, lines) + "\n")
    if failures := _failed(sweep):
        parts.append("Failed:\n\n" + _bullets((_case(case), _error(case)) for case in failures))
    if skipped := _skipped(sweep):
        parts.append("Skipped:\n\n" + _bullets((_case(case), case.get("note")) for case in skipped))
    return parts


def _failed(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in sweep if case.get("ok") is False]


def _skipped(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in sweep if case.get("ok") is None]


def _share(case: dict[str, Any]) -> float:
    """An error that is no number counts as infinitely large."""
    error, allowed = case.get("error"), case.get("allowed")
    if error is None or allowed is None:
        return math.inf if case.get("ok") is False else 0.0
    if error == 0:
        return 0.0
    return math.inf if math.isnan(error) or not allowed else error / allowed


def _case(case: dict[str, Any]) -> str:
    seed = "" if case.get("seed") is None else f", seed {case['seed']}"
    return f"{case.get('operator')} {case.get('case')} {case.get('dtype')}{seed}"


def _error(case: dict[str, Any]) -> str:
    note = f"; {case['note']}" if case.get("note") else ""
    return f"error {_number(case.get('error'))}, allowed {_number(case.get('allowed'))}{note}"


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, (int, float)) else "unknown"


def _sanitizer(sanitizer: dict[str, Any] | None) -> list[str]:
    if not sanitizer:
        return []
    lines = [
        [tool, _findings(result), str(result.get("summary") or "–").replace("\n", " ")]
        for tool, result in sanitizer.items()
    ]
    return [f"## compute-sanitizer\n\n{table(['tool', 'errors', 'summary'], lines, text_columns=3)}\n"]


def _findings(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    return "did not run" if errors is None else str(errors)


def _profile(profile: Sequence[dict[str, Any]] | None) -> list[str]:
    if not profile:
        return []
    columns = {
        "kernel": "kernel",
        "µs": "duration_us",
        "DRAM %": "dram_percent",
        "SM %": "sm_percent",
        "registers": "registers",
        "occupancy %": "occupancy_percent",
    }
    lines = [[_figure(kernel.get(key)) for key in columns.values()] for kernel in profile]
    return [f"## Profile\n\n{table(list(columns), lines)}\n"]


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


# ---- Speed.


def _speed(run: dict[str, Any]) -> list[str]:
    operators = rows_of(run.get("benchmarks", []), "dtype")
    left = [*_reasons("Failed", run.get("failed")), *_reasons("Left out", run.get("skipped"))]
    if not operators:
        return ["## Speed\n", "Nothing was measured.\n", *left]
    copy = _copy(operators)
    parts = ["## Speed\n", SPEED]
    if copy:
        parts.append(f"Copy bandwidth: {copy / 1e9:.0f} GB/s.\n")
    for name, rows in operators.items():
        if name != "copy":
            parts.append(_table(name, rows, copy))
            parts += peak_memory_table(name, rows)
    no_graph = {
        f"{b['extra_info']['operator']}, {b['extra_info']['candidate']}": b["extra_info"]["no_graph"]
        for b in run["benchmarks"]
        if b["extra_info"].get("no_graph")
    }
    return [*parts, *_reasons("Without a graph", no_graph), *left]


def _copy(operators: dict[str, dict[tuple[str, Any], Row]]) -> float | None:
    """Bytes a second."""
    rates = [
        r["bytes_moved"] / r["median"] for row in operators.get("copy", {}).values() for r in row.values()
    ]
    return max(rates, default=None)


def _table(operator: str, rows: dict[tuple[str, Any], Row], copy: float | None) -> str:
    """A line for each size, dtype and variant of lossmeta."""
    variants, baselines = candidates_of(rows)
    columns = ["size", "dtype", *(["variant"] if variants[1:] else []), "lossmeta", "graph", "host"]
    columns += ["bytes", "GB/s", "of copy", *baselines]
    lines = []
    for (size, dtype), row in rows.items():
        moved = next(iter(row.values()))["bytes_moved"]
        for variant in [v for v in variants if v in row] or variants[:1] or [""]:
            ours = row.get(variant)
            cells = [size, dtype, *([variant_name(variant)] if variants[1:] else []), median(ours)]
            cells += [_graph(ours), _host(ours), memory(moved), *_rate(ours, copy)]
            lines.append([*cells, *(_against(row.get(baseline), ours) for baseline in baselines)])
    return f"### {operator}\n\n{table(columns, lines, text_columns=2)}\n"


def _graph(result: dict[str, Any] | None) -> str:
    return duration(result["graph"]) if result and result.get("graph") else "–"


def _host(result: dict[str, Any] | None) -> str:
    return f"{result['host_us']:.0f} µs" if result and result.get("host_us") else "–"


def _rate(result: dict[str, Any] | None, copy: float | None) -> tuple[str, str]:
    if not result:
        return "–", "–"
    rate = result["bytes_moved"] / (result.get("graph") or result["median"])
    return f"{rate / 1e9:.0f}", f"{100 * rate / copy:.0f} %" if copy else "–"


def _against(baseline: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    cell = median(baseline, ours and ours["median"])
    if baseline and baseline.get("graph"):
        cell += f"; {duration(baseline['graph'])}{times(baseline['graph'], ours and ours.get('graph'))}"
    return cell


def _reasons(title: str, names: dict[str, str] | None) -> list[str]:
    """The benchmarks by reason, of which a run out of time has one for many."""
    if not names:
        return []
    by_reason: dict[str, list[str]] = {}
    for name, reason in names.items():
        by_reason.setdefault(reason, []).append(f"`{name.rpartition('/')[2]}`")
    return [f"{title}:\n", _bullets((reason, ", ".join(of)) for reason, of in by_reason.items())]


def _bullets(items: Any) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in items) + "\n"


# ---- For a terminal.


def short(source: Source) -> str:
    """At most about forty lines."""
    facts = _facts(source)
    lines = [DRY] if source.dry else []
    lines.append(", ".join(f"{name} {fact}" for name, fact in facts.items() if fact != "unknown"))
    if source.missing:
        lines.append(f"missing: {'; '.join(source.missing)}")
    if ended := [s for s in source.parts.get("stages", []) if s.get("returncode")]:
        lines.append("stages: " + ", ".join(f"{s.get('stage')} ended {_ending(s)}" for s in ended))
    if (tests := source.parts.get("tests")) is not None:
        lines.append(f"tests: {_counts(tests)}")
        lines += _first(tests.get("failures") or [])
    if sweep := source.parts.get("sweep"):
        failures, worst = _failed(sweep), max(map(_share, sweep))
        counts = f"{len(sweep)} cases, {len(failures)} failed, {len(_skipped(sweep))} skipped"
        lines.append(f"against float64: {counts}, worst {worst:.2f} of allowed")
        lines += _first([f"{_case(case)}: {_error(case)}" for case in failures])
    if sanitizer := source.parts.get("sanitizer"):
        lines.append("sanitizer: " + ", ".join(f"{tool} {_findings(r)}" for tool, r in sanitizer.items()))
    if failed := source.run.get("failed"):
        lines.append(f"benchmarks that failed: {len(failed)}")
        lines += _first([f"{name.rpartition('/')[2]}: {reason}" for name, reason in failed.items()])
    return "\n".join([*lines, *_short_speed(source)])


def _first(items: Sequence[str]) -> list[str]:
    more = [f"  and {len(items) - SHORT_FAILURES} more"] if len(items) > SHORT_FAILURES else []
    return [f"  {item[:110]}" for item in items[:SHORT_FAILURES]] + more


def _short_speed(source: Source) -> list[str]:
    operators = rows_of(source.run.get("benchmarks", []), "dtype" if source.gpu else "threads")
    copy = _copy(operators)
    operators.pop("copy", None)
    by_operator = [
        [
            _short_row(name, key, row, variant, copy)
            for key, row in rows.items()
            for variant in candidates_of({0: row})[0]
        ]
        for name, rows in operators.items()
    ]
    if not any(by_operator):
        return ["speed: nothing was measured"]
    # The first of every operator are the most important ones.
    most = max(map(len, by_operator))
    while most > 1 and sum(len(rows[:most]) for rows in by_operator) > SHORT_ROWS:
        most -= 1
    head = ["operator", "size", "", "variant", "event", "graph", "host", "GB/s", "copy", "eager", "compile"]
    shown = [head, *(row for rows in by_operator for row in rows[:most])]
    widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
    text = [
        "  ".join(
            c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in shown
    ]
    return [
        f"copy: {copy / 1e9:.0f} GB/s" if copy else "copy: not measured",
        *(line.rstrip() for line in text),
    ]


def _short_row(operator: str, key: tuple[str, Any], row: Row, variant: str, copy: float | None) -> list[str]:
    ours, (_, baselines) = row[variant], candidates_of({0: row})
    compiled = [row[b]["median"] for b in baselines if b.startswith("compile")]
    others = [row[b]["median"] for b in baselines if not b.startswith("compile")]
    size = key[0].replace("forward + backward", "f+b").replace("forward", "f").replace("backward", "b")
    return [
        operator.replace("parametric_cross_entropy", "parametric_ce")[:22],
        size.replace("a row of Φ per sample", "rows")[:30],
        {"float32": "f32", "bfloat16": "bf16"}.get(key[1], str(key[1])),
        variant_name(variant).replace("default", ""),
        median(ours),
        _graph(ours),
        _host(ours),
        *_rate(ours, copy),
        *(f"{significant(min(of) / ours['median'])}×" if of else "–" for of in (others, compiled)),
    ]
