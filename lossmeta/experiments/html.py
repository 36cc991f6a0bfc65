"""Runs as one page of HTML that needs no network, no scripts and no other file."""

from __future__ import annotations

import statistics
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from lossmeta.experiments import report
from lossmeta.experiments._charts import lines
from lossmeta.experiments._markup import Markup, tag
from lossmeta.experiments._style import STYLE
from lossmeta.experiments._surfaces import Load, surfaces
from lossmeta.experiments._svg import Row, dots
from lossmeta.experiments.curves import Curve, curves
from lossmeta.experiments.records import Record, Run, TaskHeader
from lossmeta.experiments.run_folder import TRIALS
from lossmeta.experiments.statistics import summary
from lossmeta.experiments.table import Cell, Column, Table
from lossmeta.experiments.trial import Measure

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
PNG = b"\x89PNG\r\n\x1a\n"
SECONDS = Measure("seconds", higher_is_better=None, digits=2)
MEMORY = Measure("peak memory (MiB)", higher_is_better=None, digits=0)
COST = """\
Seconds: mean of the trials. Peak memory: highest of the trials, of the whole process or, on a GPU, of its tensors."""


def html(runs: Sequence[Run], unreadable: Sequence[str] = (), load_surface: Load | None = None) -> str:
    """One page for runs, made of what their folders hold, PNG figures included.

    Runs of one recipe stand side by side where there is room.

    Args:
        runs: as :func:`~lossmeta.experiments.run_folder.read` gives them.
        unreadable: why further folders could not be read; the page says so.
        load_surface: reads a loss surface, such as :meth:`lossmeta.landscape.LossSurface.load`; those in the folders
            are drawn then.

    Example:
        >>> from lossmeta.experiments.run_folder import read
        >>> page = html([read(Path("runs/quickstart"))])
    """
    recipes = list(dict.fromkeys(run.header.recipe for run in runs))
    title = f"Report of {recipes[0] if len(runs) == 1 else f'{len(runs)} runs'}"
    # Recipes in the order of their first runs, and the runs of each in theirs.
    ordered = sorted(runs, key=lambda run: recipes.index(run.header.recipe))
    named = [(f"run-{i}", run) for i, run in enumerate(ordered, 1)]
    groups = [list(group) for _, group in groupby(named, key=lambda pair: pair[1].header.recipe)]
    return "<!DOCTYPE html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("title", f"{title}: lossmeta"),
            tag("style", Markup(STYLE)),
        ),
        tag(
            "body",
            tag("a", "Skip to the results", class_="skip", href="#results"),
            tag("header", tag("h1", title), *([tag("p", ", ".join(recipes))] if len(runs) > 1 else [])),
            _box("Folders that could not be read", unreadable, role="alert"),
            _contents(named),
            tag(
                "main",
                *(
                    tag("div", *(_run(name, run, load_surface) for name, run in group), class_="side-by-side")
                    for group in groups
                ),
                id="results",
            ),
        ),
        lang="en",
    )


def _contents(named: Sequence[tuple[str, Run]]) -> Markup:
    """Links to runs and tasks; empty where there is but one task."""
    if sum(len(run.header.tasks) for _, run in named) < 2 and len(named) < 2:
        return Markup()
    items = []
    for name, run in named:
        tasks = [
            tag("li", tag("a", task.name, href=f"#{name}-task-{i}"))
            for i, task in enumerate(run.header.tasks, 1)
        ]
        link = tag("a", run.header.recipe, ", ", tag("code", str(run.path)), href=f"#{name}")
        items.append(tag("li", link, *([tag("ul", *tasks)] if tasks else [])))
    return tag("nav", tag("h2", "Contents", id="contents"), tag("ol", *items), aria_labelledby="contents")


def _run(name: str, run: Run, load_surface: Load | None) -> Markup:
    header = run.header
    tasks = [
        _task(f"{name}-task-{i}", run, task, report.trials_of(run, task, header.seeds))
        for i, task in enumerate(header.tasks, 1)
    ]
    return tag(
        "section",
        tag("h2", header.recipe, " ", tag("code", str(run.path)), id=f"{name}-title"),
        *([tag("p", header.about)] if header.about else []),
        *(tag("p", tag("strong", text)) for text in report.recommendations(run)),
        _box("Incomplete", report.notes(run)),
        _facts(run),
        *tasks,
        *(_surfaces(name, run.path, load_surface) if load_surface else ()),
        *_figures(name, run.path),
        tag(
            "div",
            *(tag("p", text) for text in (*filter(None, report.explanation(header)), COST)),
            class_="legend",
        ),
        id=name,
        aria_labelledby=f"{name}-title",
    )


def _facts(run: Run) -> Markup:
    """Settings and environment."""
    header, where = run.header, run.header.environment
    gpu = (where.get("cuda") or {}).get("device") if where.get("device") == "cuda" else None
    facts = {
        "Settings": ", ".join(
            f"{key} {value}" for key, value in header.settings.items() if value is not None
        ),
        "Seeds": report.ranges(header.seeds),
        "Versions": ", ".join(
            f"{key} {where[key]}" for key in ("lossmeta", "torch", "python") if where.get(key)
        ),
        "Processor": where.get("processor"),
        "GPU": gpu,
        "Device": where.get("device"),
        "Threads": where.get("threads"),
        "Date": where.get("date"),
    }
    pairs = (tag("div", tag("dt", key), tag("dd", str(value))) for key, value in facts.items() if value)
    return tag("dl", *pairs)


def _task(name: str, run: Run, task: TaskHeader, rows: report.Rows) -> Markup:
    header = run.header
    parts = [tag("h3", task.name, id=f"{name}-title"), _box("Incomplete", _gaps(task, rows, header.seeds))]
    if any(rows.values()):
        table = report.table_of(header, task, rows, header.seeds)
        parts.append(_table(replace(table, notes=tuple(filter(None, [report.chosen(rows)])))))
        parts.append(tag("div", *_pictures(name, run, task, rows), class_="pictures"))
        parts.extend(_curves(name, task, rows))
        parts.append(_table(_cost(rows)))
    return tag("section", *parts, id=name, aria_labelledby=f"{name}-title")


def _gaps(task: TaskHeader, rows: report.Rows, seeds: Sequence[int]) -> Iterator[str]:
    """Which trials of a task are missing, and which diverged."""
    if not any(rows.values()):
        yield "No trial is finished."
        return
    for label, trials in rows.items():
        missing = [seed for seed in seeds if seed not in trials]
        if missing:
            yield f"{label}: not finished for seeds {report.ranges(missing)}."
        names = [measure.name for measure in report.compared_measures(task)]
        diverged = [
            seed
            for seed, t in trials.items()
            if not t.failure and any(t.measures.get(key) is None for key in names)
        ]
        if diverged:
            yield f"{label}: diverged with seeds {report.ranges(diverged)}."
    yield from report.failures(rows)


def _table(table: Table, corner_text: str = "Method") -> Markup:
    """In a box of its own, in which it can be scrolled."""
    groups = [(name, len(list(columns))) for name, columns in groupby(c.group for c in table.columns)]
    corner = tag("th", corner_text, scope="col", rowspan=2 if len(groups) > 1 else 1)
    headings = [tag("th", column.heading, scope="col") for column in table.columns]
    if len(groups) > 1:
        above = [tag("th", name, scope="colgroup", colspan=count) for name, count in groups]
        head = [tag("tr", corner, *above), tag("tr", *headings)]
    else:
        head = [tag("tr", corner, *headings)]
    body = (
        tag("tr", tag("th", label, scope="row"), *(tag("td", cell.text) for cell in cells))
        for label, cells in table.rows.items()
    )
    whole = tag("table", tag("caption", table.title), tag("thead", *head), tag("tbody", *body))
    box = tag("div", whole, class_="scroll", tabindex=0, role="group", aria_label=f"Table: {table.title}")
    return Markup(box + "".join(tag("p", note) for note in table.notes))


def _cost(rows: report.Rows) -> Table:
    """Time and memory of every row."""

    def cells(trials: dict[int, Record]) -> tuple[Cell, ...]:
        memory = [trial.peak_memory for trial in trials.values() if trial.peak_memory is not None]
        return (
            Cell(
                report.number(SECONDS, statistics.fmean(t.seconds for t in trials.values())) if trials else ""
            ),
            Cell(report.number(MEMORY, max(memory) / 2**20) if memory else ""),
        )

    columns = Column(SECONDS.name), Column(MEMORY.name)
    return Table("Time and memory", columns, {label: cells(trials) for label, trials in rows.items()})


def _pictures(name: str, run: Run, task: TaskHeader, rows: report.Rows) -> Iterator[Markup]:
    """Of every measure: the rows, and their differences to every reference."""
    seeds = len(run.header.seeds)
    for i, measure in enumerate(report.compared_measures(task) or task.measures[:1]):
        title = report.column_name(measure)
        if measure.higher_is_better is not None:
            better = f"{'Higher' if measure.higher_is_better else 'Lower'} is better."
        else:
            better = ""
        drawn = [_values(measure, label, trials, seeds) for label, trials in rows.items()]
        yield _picture(f"{name}-{i}", drawn, title, f"Dots: means. Circles: seeds. {better}")
        for j, reference in enumerate(run.header.references if better else ()):
            drawn = [
                _differences(measure, label, trials, rows[reference], seeds)
                for label, trials in rows.items()
                if label != reference
            ]
            text = f"Dots: means, with 95 % intervals. Circles: seeds. {better}"
            yield _picture(f"{name}-{i}-{j}", drawn, f"{title}: difference to {reference}", text, zero=True)


def _picture(name: str, rows: Sequence[Row], title: str, text: str, *, zero: bool = False) -> Markup:
    """With a caption; a note where there is nothing to draw."""
    described = "; ".join(
        f"{row.label}: {'no mean' if row.mean is None else f'{row.mean:.4g}'}"
        + (f" ({row.interval[0]:.4g} to {row.interval[1]:.4g})" if row.interval else "")
        + (f", {row.note}" if row.note else "")
        for row in rows
    )
    drawing = dots(rows, name=name, title=title, description=described, zero=zero)
    if drawing is None:
        return _box(title, ["There is no number to draw."])
    caption = tag("figcaption", tag("strong", title), " ", text)
    return tag("figure", caption, drawing)


def _values(measure: Measure, label: str, trials: dict[int, Record], seeds: int) -> Row:
    values = {seed: trial.measures.get(measure.name) for seed, trial in trials.items()}
    mean = summary(list(values.values())).mean
    factor = 100 if measure.percent else 1
    return Row(
        label,
        {seed: factor * value for seed, value in values.items() if value is not None},
        None if mean is None else factor * mean,
        note=_note(values, seeds),
    )


def _differences(
    measure: Measure,
    label: str,
    trials: dict[int, Record],
    reference: dict[int, Record],
    seeds: int,
) -> Row:
    values: dict[int, float | None] = {}
    factor = 100 if measure.percent else 1
    for seed in trials:
        if seed in reference:
            a, b = (side[seed].measures.get(measure.name) for side in (trials, reference))
            values[seed] = None if a is None or b is None else factor * (a - b)
    compared = report.comparison(measure, trials, reference)
    mean = compared.difference if compared else None
    interval = compared.interval if compared else None
    return Row(
        label,
        {seed: value for seed, value in values.items() if value is not None},
        None if mean is None else factor * mean,
        None if interval is None else (factor * interval[0], factor * interval[1]),
        _note(values, seeds),
    )


def _note(values: Mapping[int, float | None], seeds: int) -> str:
    """What a row of a picture lacks."""
    diverged = sum(value is None for value in values.values())
    parts = []
    if len(values) < seeds:
        parts.append(f"{len(values)} of {seeds} seeds" if values else "no trial")
    if diverged:
        parts.append(f"{diverged} diverged")
    return ", ".join(parts)


def _curves(name: str, task: TaskHeader, rows: report.Rows) -> Iterator[Markup]:
    """What was recorded over the training: a picture of every series, and its numbers."""
    drawn = []
    measures = {measure.name: measure for measure in task.measures}
    for i, (series, by_row) in enumerate(curves(rows).items()):
        title = series
        if series in measures:
            title = report.column_name(measures[series])
            by_row = {k: c.times(100 if measures[series].percent else 1) for k, c in by_row.items()}
        ends = {label: [m for _, m, _ in curve.points if m is not None] for label, curve in by_row.items()}
        described = "; ".join(
            f"{label}: " + (f"from {means[0]:.4g} to {means[-1]:.4g}" if means else "no mean")
            for label, means in ends.items()
        )
        drawing = lines(
            by_row, list(rows), name=f"{name}-series-{i}", title=title, description=described, across="step"
        )
        notes = [
            f"{label}: left out at {curve.left_out} of {len(curve.points)} steps, where not all of its seeds have a "
            "number."
            for label, curve in by_row.items()
            if curve.left_out
        ]
        if drawing is None:
            drawn.append(_box(title, [*notes, "There is no number to draw."]))
            continue
        spread = any(sd for curve in by_row.values() for _, _, sd in curve.points)
        text = "Lines: means of the seeds." + (" Bands: one standard deviation." if spread else "")
        numbers = tag(
            "details", tag("summary", f"Numbers of {title}"), _table(_of_series(title, by_row), "Step")
        )
        caption = tag("figcaption", tag("strong", title), " ", text)
        drawn.append(tag("figure", caption, drawing, numbers, *([_box("Left out", notes)] if notes else [])))
    if drawn:
        yield tag("h4", "Over the training")
        yield tag("div", *drawn, class_="pictures")


def _of_series(title: str, by_row: Mapping[str, Curve]) -> Table:
    """Means and deviations by step."""
    texts = {
        label: {
            step: "" if mean is None else f"{mean:.4g}" + ("" if sd is None else f" ± {sd:.2g}")
            for step, mean, sd in curve.points
        }
        for label, curve in by_row.items()
    }
    steps = sorted({step for of_row in texts.values() for step in of_row})
    cells = {f"{step:g}": tuple(Cell(of_row.get(step, "")) for of_row in texts.values()) for step in steps}
    columns = tuple(Column(f"{label} (seeds: {curve.seeds})") for label, curve in by_row.items())
    return Table(title, columns, cells)


def _surfaces(name: str, folder: Path, load: Load) -> Iterator[Markup]:
    """The folder's loss surfaces."""
    found = list(surfaces(f"{name}-surface", folder, load))
    if not found:
        return
    drawn = [
        tag("figure", tag("figcaption", tag("strong", file), " ", text), drawing)
        for file, text, drawing in found
        if drawing is not None
    ]
    yield tag(
        "section",
        tag("h3", "Loss around the model", id=f"{name}-surfaces"),
        _box("Surfaces that are missing", [text for _, text, drawing in found if drawing is None]),
        tag("div", *drawn, class_="pictures"),
        aria_labelledby=f"{name}-surfaces",
    )


def _figures(name: str, folder: Path) -> Iterator[Markup]:
    """The folder's PNG figures, in the page itself."""
    drawn, broken = [], []
    trials = folder / TRIALS
    newest = trials.stat().st_mtime if trials.exists() else 0.0
    for path in sorted(folder.glob("[!.]*.png")):
        try:
            content = path.read_bytes()
        except OSError as error:
            broken.append(f"{path.name} could not be read: {error.strerror}.")
            continue
        if not _whole(content):
            broken.append(f"{path.name} is no whole PNG image.")
            continue
        if path.stat().st_mtime < newest:
            broken.append(f"{path.name} is older than the last trial; finish the run to draw it anew.")
            continue
        words = path.stem.replace("-", " ")
        source = f"data:image/png;base64,{b64encode(content).decode()}"
        drawn.append(
            tag("figure", tag("figcaption", words), tag("img", src=source, alt=f"Figure of the run: {words}"))
        )
    if drawn or broken:
        yield tag(
            "section",
            tag("h3", "Figures", id=f"{name}-figures"),
            _box("Figures that are missing", broken),
            tag("div", *drawn, class_="pictures"),
            aria_labelledby=f"{name}-figures",
        )


def _whole(image: bytes) -> bool:
    """Whether it is a PNG image from its first chunk to its last, with the checksums that they name."""
    place, kind = len(PNG), b""
    while image.startswith(PNG) and place + 12 <= len(image) and kind != b"IEND":
        (length,) = struct.unpack_from(">I", image, place)
        kind, end = image[place + 4 : place + 8], place + 8 + length
        if image[end : end + 4] != struct.pack(">I", zlib.crc32(image[place + 4 : end])):
            return False
        place = end + 4
    return kind == b"IEND" and place == len(image)


def _box(title: str, notes: Iterable[str], role: str = "note") -> Markup:
    """What a reader must not overlook; nothing without notes."""
    items = [tag("li", note) for note in notes]
    return tag("div", tag("strong", title), tag("ul", *items), class_="box", role=role) if items else Markup()
