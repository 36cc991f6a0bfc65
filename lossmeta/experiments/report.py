"""Tables, page and figure of a run, made from its folder alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmeta import plot
from lossmeta._files import write_json, write_text
from lossmeta.experiments.records import Header, Record, Run, TaskHeader
from lossmeta.experiments.run_folder import HEADER, TRIALS
from lossmeta.experiments.statistics import Comparison, Summary, compare, holm, summary
from lossmeta.experiments.table import Cell, Column, Table
from lossmeta.experiments.trial import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

PAGE, TABLES = "tables.md", "tables.json"
TEXT_WIDTH = 100
# From here on decimals become fewer, and then none are left.
LARGE, HUGE = 1e3, 1e6
COMPARISONS = ("difference", "95 % interval", "better", "p t-test", "p Wilcoxon")
HOLM = "p t-test, Holm"
NOTE = """\
±: standard deviation over the seeds. Difference: mean of the differences to the row that is named, seed by seed, \
with a 95 % confidence interval. Better: in how many seeds (=: equal). p: of the paired t-test and of Wilcoxon's \
signed-rank test."""

CORRECTED = " Holm: that of the t-test, corrected for the number of rows that it is given of."

# Below which a corrected p is not taken for chance.
LEVEL = 0.05
Rows = dict[str, dict[int, Record]]


def tables(run: Run, seeds: Sequence[int] | None = None) -> list[Table]:
    """One table for every task that has trials; with the seeds given, or all that were asked for."""
    seeds = run.header.seeds if seeds is None else seeds
    found = []
    for task in run.header.tasks:
        rows = trials_of(run, task, seeds)
        if any(rows.values()):
            found.append(table_of(run.header, task, rows, seeds))
    return found


def explanation(header: Header) -> list[str]:
    """Paragraphs: what all tables have in common, and the recipe's legend."""
    better: dict[bool, list[str]] = {False: [], True: []}
    for measure in dict.fromkeys(m for task in header.tasks for m in compared_measures(task)):
        assert measure.higher_is_better is not None
        better[measure.higher_is_better].append(measure.name)
    directions = [
        f"{'Higher' if higher else 'Lower'} is better for {' and '.join(names)}."
        for higher, names in better.items()
        if names
    ]
    legend = [" ".join(paragraph.split()) for paragraph in header.legend.split("\n\n")]
    note = NOTE + (CORRECTED if header.corrected else "")
    return [" ".join([note, *directions] if header.references else directions), *legend]


def notes(run: Run) -> Iterator[str]:
    """What of the folder is missing, or is not shown."""
    if run.cut:
        yield f"The last line of {TRIALS} is cut off, as a process was stopped that wrote it. It is left out."
    if not run.trials:
        yield "No trial is finished."
    header = run.header
    tasks = [task.name for task in header.tasks]
    trials = [trial for trial in run.trials if trial.role == "report"]
    known: list[tuple[str, Sequence[Any], list[Any]]] = [
        ("tasks", tasks, [trial.task for trial in trials]),
        ("rows", header.rows, [trial.method for trial in trials if trial.task in tasks]),
        ("seeds", header.seeds, [trial.seed for trial in trials if trial.task in tasks]),
    ]
    for what, named, of in known:
        names = ", ".join(dict.fromkeys(str(name) for name in of if name not in named))
        if names:
            yield f"{TRIALS} has trials of {what} that {HEADER} does not name. They are left out: {names}."


def recommendations(run: Run, seeds: Sequence[int] | None = None) -> list[str]:
    """A sentence for each task, where rows of the run compete."""
    seeds = run.header.seeds if seeds is None else seeds
    if not run.header.corrected or not run.header.references:
        return []
    several = len(run.header.tasks) > 1
    found = []
    for task in run.header.tasks:
        _, text = recommended(run.header, task, trials_of(run, task, seeds), seeds)
        found.append(f"Recommended{f' for {task.name}' if several else ''}: {text}")
    return found


def recommended(header: Header, task: TaskHeader, rows: Rows, seeds: Sequence[int]) -> tuple[str | None, str]:
    """The competing row that is furthest ahead of the best reference, where that is not chance, and why; or None.

    Ahead by the mean difference of the first measure that is compared, with a Holm-corrected p below LEVEL.
    """
    if any(len(rows[label]) < len(seeds) for label in (*header.references, *header.corrected)):
        return None, "none yet, for trials are missing."
    measure = compared_measures(task)[0]
    sign = -1 if measure.higher_is_better else 1

    def badness(label: str) -> float:
        values = [trial.measures.get(measure.name) for trial in rows[label].values()]
        return math.inf if None in values else sign * math.fsum(v for v in values if v is not None)

    best = min(header.references, key=badness)
    compared = {label: comparison(measure, rows[label], rows[best]) for label in header.corrected}
    p_values = corrected(header.corrected, compared)
    ahead = [
        (sign * c.difference, label)
        for label, c in compared.items()
        if c and c.difference is not None and sign * c.difference < 0
    ]
    sure = [(d, label) for d, label in ahead if (p := p_values[label]) is not None and p < LEVEL]
    if not ahead:
        return None, f"none; no row is ahead of {best}."
    difference, label = min(sure or ahead)
    p = p_values[label]
    known = "no p" if p is None else f"p = {p:.2g}"
    figures = f"{measure.name} {number(measure, sign * difference, '+')}, {known} corrected for {len(p_values)} rows"
    if sure:
        return label, f"{label}; it is ahead of {best}, the best of what it must beat ({figures})."
    return None, f"none; {label} is ahead of {best} by what may be chance ({figures}). More seeds may tell."


def show(run: Run, console: Console, seeds: Sequence[int] | None = None) -> None:
    """The tables for people, and what explains them."""
    for note in notes(run):
        console.print(
            f"Incomplete: {note}", markup=False, highlight=False, width=min(console.width, TEXT_WIDTH)
        )
    for table in tables(run, seeds):
        table.print(console)
    for paragraph in (*recommendations(run, seeds), *explanation(run.header)):
        console.print(paragraph, markup=False, highlight=False, width=min(console.width, TEXT_WIDTH))


def page(run: Run, seeds: Sequence[int] | None = None) -> str:
    """The run as a page of Markdown."""
    header, where = run.header, run.header.environment
    shown = header.seeds if seeds is None else seeds
    settings = ", ".join(f"{name} {value}" for name, value in header.settings.items() if value is not None)
    versions = ", ".join(f"{name} {where[name]}" for name in ("lossmeta", "torch") if where.get(name))
    facts: list[str | None] = [f"Settings: {settings}"] if settings else []
    facts += [f"seeds: {ranges(shown)}", versions, where.get("processor"), (where.get("date") or "")[:10]]
    parts = [
        f"# {header.recipe}",
        header.about,
        "; ".join(filter(None, facts)) + ".",
        *(f"Incomplete: {note}" for note in notes(run)),
        *(table.markdown().rstrip() for table in tables(run, seeds)),
        *recommendations(run, seeds),
        *explanation(header),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write(run: Run, seeds: Sequence[int] | None = None) -> list[Path]:
    """Puts page, tables as JSON and, with matplotlib, a figure into the run's folder; gives their paths."""
    written = [run.path / PAGE, run.path / TABLES]
    write_text(written[0], page(run, seeds))
    write_json(written[1], [table.data() for table in tables(run, seeds)])
    if plot.installed():
        for name, drawing in figures(run, seeds):
            written.append(run.path / name)
            plot.save(drawing, written[-1])
    return written


def figures(run: Run, seeds: Sequence[int] | None = None) -> Iterator[tuple[str, Figure]]:
    """File name and figure of every task: mean and deviation of the first measure of every row."""
    seeds = run.header.seeds if seeds is None else seeds
    for task in run.header.tasks:
        measure = (compared_measures(task) or task.measures)[0]
        factor = 100 if measure.percent else 1
        points = {}
        for label, trials in trials_of(run, task, seeds).items():
            of_row = summary([trial.measures.get(measure.name) for trial in trials.values()])
            if of_row.mean is not None:
                points[label] = factor * of_row.mean, factor * (of_row.deviation or 0.0)
        if points:
            drawing, (axes,) = plot.figure(run.header.recipe, size=(7.0, 1.0 + 0.32 * len(points)))
            means, deviations = zip(*points.values(), strict=True)
            plot.intervals(axes, list(points), means, deviations)
            axes.set_title(task.name)
            axes.set_xlabel(f"{column_name(measure)}, mean ± sd")
            names = [run.header.recipe, *([task.name] if len(run.header.tasks) > 1 else [])]
            yield f"{plot.file_name(*names)}.png", drawing


def compared_measures(task: TaskHeader) -> list[Measure]:
    """The measures that tables compare."""
    return [m for m in task.measures if m.shown and m.higher_is_better is not None]


def trials_of(run: Run, task: TaskHeader, seeds: Sequence[int]) -> Rows:
    """The last trial of every row and seed."""
    rows: Rows = {label: {} for label in run.header.rows}
    for trial in run.trials:
        if (trial.role, trial.task) == ("report", task.name) and trial.method in rows and trial.seed in seeds:
            rows[trial.method][trial.seed] = trial
    return rows


def table_of(header: Header, task: TaskHeader, rows: Rows, seeds: Sequence[int]) -> Table:
    """Of one task: measures, a paper's columns and comparisons."""
    columns, cells = [], []
    for column, of_rows in (*_values(header, task, rows), *_comparisons(header, task, rows)):
        columns.append(column)
        cells.append(of_rows)
    by_row = {label: tuple(of_rows[i] for of_rows in cells) for i, label in enumerate(rows)}
    title = f"{task.name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return Table(title, tuple(columns), by_row, tuple(_notes(rows, len(seeds))))


def _values(header: Header, task: TaskHeader, rows: Rows) -> Iterator[tuple[Column, list[Cell]]]:
    """The measures; columns of others stand after the first."""
    beside = {heading: texts[task.name] for heading, texts in header.reported.items() if texts.get(task.name)}
    for measure in (m for m in task.measures if m.shown):
        of_rows = [
            summary([trial.measures.get(measure.name) for trial in trials.values()])
            for trials in rows.values()
        ]
        failed = [sum(trial.failure is not None for trial in trials.values()) for trials in rows.values()]
        cells = [Cell(_spread(measure, s, n), _data(s)) for s, n in zip(of_rows, failed, strict=True)]
        yield Column(column_name(measure)), cells
        if measure.ratio and header.references:
            name = header.references[0]
            base = of_rows[list(rows).index(name)].mean
            ratios = [None if not base or s.mean is None else s.mean / base for s in of_rows]
            yield Column(f"times {name}"), [Cell("" if r is None else f"{r:.2f}", r) for r in ratios]
        for heading, texts in beside.items():
            yield Column(heading), [Cell(texts.get(label, "")) for label in rows]
        beside = {}


def _comparisons(header: Header, task: TaskHeader, rows: Rows) -> Iterator[tuple[Column, list[Cell]]]:
    for reference in header.references:
        for measure in compared_measures(task):
            group = f"{measure.name}: difference to {reference}"
            compared = [
                None if label == reference else comparison(measure, trials, rows[reference])
                for label, trials in rows.items()
            ]
            texts = [("",) * len(COMPARISONS) if c is None else _texts(measure, c) for c in compared]
            for i, heading in enumerate(COMPARISONS):
                values = [None if c is None or i else _data(c) for c in compared]
                of_rows = [Cell(text[i], value) for text, value in zip(texts, values, strict=True)]
                if i == 0 or any(cell.text for cell in of_rows):
                    yield Column(heading, group), of_rows
            if header.corrected:
                of_label = corrected(header.corrected, dict(zip(rows, compared, strict=True)))
                found = [of_label.get(label) for label in rows]
                if any(p is not None for p in found):
                    yield Column(HOLM, group), [Cell("" if p is None else f"{p:.2g}", p) for p in found]


def comparison(
    measure: Measure, trials: dict[int, Record], reference: dict[int, Record]
) -> Comparison | None:
    """Of the seeds that both rows have; None without any."""
    pairs = [(trials[seed], reference[seed]) for seed in trials if seed in reference]
    if not pairs:
        return None
    values, others = (
        [trial.measures.get(measure.name) for trial in side] for side in zip(*pairs, strict=True)
    )
    return compare(values, others, higher_is_better=bool(measure.higher_is_better))


def corrected(labels: Sequence[str], compared: Mapping[str, Comparison | None]) -> dict[str, float | None]:
    """p of the t-tests of these rows, corrected for their number."""
    p_values = [c.t_test if (c := compared.get(label)) else None for label in labels]
    return dict(zip(labels, holm(p_values), strict=True))


def _texts(measure: Measure, c: Comparison) -> tuple[str, ...]:
    """In the order of COMPARISONS."""
    return (
        "" if c.difference is None else number(measure, c.difference, "+"),
        "" if c.interval is None else " to ".join(number(measure, end, "+") for end in c.interval),
        f"{c.wins}/{c.count}" + (f", {c.ties}=" if c.ties else ""),
        "" if c.t_test is None else f"{c.t_test:.2g}",
        "" if c.wilcoxon is None else f"{c.wilcoxon:.2g}",
    )


def _notes(rows: Rows, seeds: int) -> Iterator[str]:
    """What was chosen, what failed, and what is missing."""
    if best := chosen(rows):
        yield best
    yield from failures(rows)
    partial = {label: len(trials) for label, trials in rows.items() if len(trials) < seeds}
    if partial:
        yield "Not finished: " + "; ".join(f"{label}: {n} of {seeds}" for label, n in partial.items()) + "."


def failures(rows: Rows) -> Iterator[str]:
    """Which methods failed, with which seeds, and why."""
    for label, trials in rows.items():
        seeds: dict[str, list[int]] = {}
        for seed, trial in trials.items():
            if trial.failure:
                seeds.setdefault(trial.failure, []).append(seed)
        for why, of in seeds.items():
            yield f"{label} failed with seed{'s' * (len(of) > 1)} {ranges(of)}: {why}"


def chosen(rows: Rows) -> str:
    """Which candidates the tuned rows are; empty where none is tuned."""
    of_rows = {
        label: next((t.candidate for t in trials.values() if t.candidate), None)
        for label, trials in rows.items()
    }
    named = "; ".join(f"{label}: {best}" for label, best in of_rows.items() if best)
    return f"Chosen: {named}." if named else ""


def column_name(measure: Measure) -> str:
    """The heading of a measure's column."""
    return f"{measure.name} (%)" if measure.percent else measure.name


def number(measure: Measure, value: float, sign: str = "") -> str:
    """A value of a measure as tables show it."""
    value *= 100 if measure.percent else 1
    if abs(value) >= HUGE:
        return f"{value:{sign}.3g}"
    digits = measure.digits - int(math.log10(abs(value))) + 1 if abs(value) >= LARGE else measure.digits
    return f"{value:{sign}.{max(0, digits)}f}"


def _spread(measure: Measure, s: Summary, failed: int = 0) -> str:
    """Mean ± sd of what is finite, and how much is not."""
    compared = measure.higher_is_better is not None
    if s.mean is None:
        what = "failed" if failed == s.count else "diverged" if not failed else "diverged or failed"
        return what if s.count and compared else ""
    text = number(measure, s.mean)
    # What is not compared is often a setting: the same in every trial, or in some of them none.
    if s.deviation is not None and (compared or number(measure, s.deviation) != number(measure, 0)):
        text += f" ± {number(measure, s.deviation)}"
    without = {"diverged": s.diverged - failed, "failed": failed}
    return ", ".join([text, *(f"{n} {what}" for what, n in without.items() if n)]) if compared else text


def _data(numbers: Summary | Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(numbers)


def ranges(seeds: Sequence[int]) -> str:
    """0 to 4, 7: what follows on one another as a range."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
