from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lossmeta.cli import app
from lossmeta.experiments import Measure, report, run_folder
from lossmeta.experiments._style import STYLE
from lossmeta.experiments._svg import Row, dots
from lossmeta.experiments.html import html
from lossmeta.experiments.records import Header, Record, Run, TaskHeader

MEASURES = (
    Measure("error", higher_is_better=False, percent=True, digits=1),
    Measure("precision", higher_is_better=True, digits=3),
    Measure("rate", higher_is_better=None, digits=2),
)
HEADER = Header(
    recipe="toy",
    about="A toy.",
    settings={"size": "small", "steps": None},
    tasks=(TaskHeader("Task", MEASURES),),
    rows=("plain", "other", "third"),
    references=("plain",),
    seeds=(0, 1, 2, 5),
    legend="What the\nrows are.",
    reported={"paper": {"Task": {"other": "9.9 ± 0.1"}}},
    environment={
        "lossmeta": "1.0",
        "torch": "2.10",
        "python": "3.11",
        "cuda": {"device": "a GPU"},
        "processor": "a CPU",
        "device": "cpu",
        "threads": 3,
        "date": "2026-01-02T03:04:05+00:00",
    },
)
ERRORS: dict[str, dict[int, float | None]] = {
    "plain": {0: 0.10, 1: 0.12, 2: 0.11, 5: 0.13},
    "other": {0: 0.08, 1: 0.11, 2: 0.11, 5: 0.10},
    "third": {0: 0.15, 1: 0.14, 2: 0.19, 5: 0.13},
}
HOSTILE = "</th></title><script>alert(1)</script> & \"q\" 'r' <img src=x onerror=y> \ud800 &amp;"
# One pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = ("meta", "img")
SERIES = ("third", "fourth", "fifth")


def a_run(
    errors: dict[str, dict[int, float | None]] = ERRORS, path: Path = Path("folder"), **changes: Any
) -> Run:
    header = replace(HEADER, **changes)
    trials = [
        Record(
            role="report",
            task=header.tasks[0].name,
            method=label,
            seed=seed,
            settings={},
            measures={"error": error, "precision": None if error is None else 1 - error, "rate": 0.1},
            seconds=2.0 + seed,
            peak_memory=(100 + seed) * 2**20,
        )
        for label, by_seed in errors.items()
        for seed, error in by_seed.items()
    ]
    return Run(path, header, trials)


def on_disk(of: Run, path: Path) -> Path:
    with run_folder.opened(path, of.header) as writer:
        for trial in of.trials:
            writer.append(trial)
    return path


@dataclass
class Node:
    """An element with its parts."""

    name: str
    attributes: dict[str, str]
    parts: list[Node | str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Node]:
        for part in self.parts:
            if isinstance(part, Node):
                yield part
                yield from part

    def all(self, name: str, **attributes: str) -> list[Node]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [n for n in self if n.name == name and wanted.items() <= n.attributes.items()]

    def one(self, name: str, **attributes: str) -> Node:
        (found,) = self.all(name, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


class Parser(HTMLParser):
    """Builds the tree of a page, and refuses tags that do not balance."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), "an attribute stands twice"
        node = Node(tag, {key: value or "" for key, value in attrs})
        self.open[-1].parts.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def parsed(page: str) -> Node:
    """The page, which is well formed, loads nothing and runs nothing."""
    page.encode("utf-8")
    assert page.startswith("<!DOCTYPE html>\n<html lang=")
    parser = Parser()
    parser.feed(page)
    parser.close()
    (tree,) = parser.open
    for name in ("h1", "main", "header"):
        tree.one(name)
    assert tree.one("head").one("title").text
    assert not {node.name for node in tree} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    names = [node.attributes["id"] for node in tree if "id" in node.attributes]
    assert len(set(names)) == len(names)
    for node in tree:
        assert not [key for key in node.attributes if key.startswith("on") or key == "style"]
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            if key in node.attributes:
                assert node.attributes[key].startswith(("#", "data:image/png;base64,"))
        for target in [
            node.attributes.get("href", "#")[1:],
            *node.attributes.get("aria-labelledby", "").split(),
        ]:
            assert not target or target in names
        if node.name == "img":
            assert node.attributes["alt"]
        if node.name == "th":
            assert node.attributes["scope"] in ("row", "col", "colgroup")
        if node.name == "section":
            assert node.attributes["aria-labelledby"]
        if node.name == "table":
            assert node.one("caption").text
        if node.name == "svg":
            assert node.attributes["role"] == "img" and node.one("desc").text
        if node.attributes.get("class") == "scroll":
            assert node.attributes["tabindex"] == "0" and node.attributes["aria-label"]
    assert len(tree.all("div", class_="scroll")) == len(tree.all("table"))
    style = tree.one("style").text
    assert "url(" not in style and "@import" not in style
    policy = tree.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    return tree


def notes(tree: Node) -> list[str]:
    """Title and lines of every box, in order."""
    return [
        ": ".join([box.one("strong").text, *(line.text.strip() for line in box.all("li"))])
        for box in tree.all("div", class_="box")
    ]


def tables(tree: Node) -> list[dict[str, list[str]]]:
    """Cells by label."""
    return [
        {row.one("th").text: [cell.text for cell in row.all("td")] for row in table.one("tbody").all("tr")}
        for table in tree.all("table")
    ]


def map_of(picture: Node) -> tuple[float, float]:
    """Slope and intercept of the scale: two of its ticks, read as numbers."""
    ticks = [(float(n.attributes["x"]), float(n.text)) for n in picture.all("text", class_="tick")]
    (x0, v0), (x1, v1) = ticks[0], ticks[-1]
    slope = (v1 - v0) / (x1 - x0)
    for x, value in ticks:
        assert value == pytest.approx(v0 + slope * (x - x0), abs=0.02 * abs(slope))
    return slope, v0 - slope * x0


def test_one_run() -> None:
    tree = parsed(html([a_run()]))
    assert tree.one("h1").text == "Report of toy"
    assert tree.one("h2").text == "toy folder"
    assert {d.one("dt").text: d.one("dd").text for d in tree.one("dl").all("div")} == {
        "Settings": "size small",
        "Seeds": "0 to 2, 5",
        "Versions": "lossmeta 1.0, torch 2.10, python 3.11",
        "Processor": "a CPU",
        "Device": "cpu",
        "Threads": "3",
        "Date": "2026-01-02T03:04:05+00:00",
    }
    assert not tree.all("nav") and not notes(tree)
    legend = [p.text for p in tree.one("div", class_="legend").all("p")]
    assert legend[:-1] == report.explanation(HEADER)
    assert legend[-1].startswith("Seconds: mean of the trials.")
    on_gpu = a_run(environment={**HEADER.environment, "device": "cuda"})
    assert "a GPU" in [dd.text for dd in parsed(html([on_gpu])).all("dd")]


def test_the_table_is_that_of_the_report() -> None:
    of = a_run(references=("plain", "third"))
    tree = parsed(html([of]))
    (expected,) = report.tables(of)
    assert tables(tree)[0] == {label: [c.text for c in cells] for label, cells in expected.rows.items()}
    above, below = tree.all("thead")[0].all("tr")
    assert [th.text for th in below.all("th")] == [column.heading for column in expected.columns]
    corner, *groups = above.all("th")
    assert corner.attributes["rowspan"] == "2"
    assert [g.text for g in groups for _ in range(int(g.attributes["colspan"]))] == [
        column.group for column in expected.columns
    ]
    assert tree.all("caption")[0].text == expected.title
    without = parsed(html([a_run(references=())]))
    assert len(without.all("thead")[0].all("tr")) == 1


def test_time_and_memory() -> None:
    errors = {**ERRORS, "other": {1: 0.1, 2: 0.2}, "third": {}}
    assert tables(parsed(html([a_run(errors)])))[1] == {
        "plain": ["4.00", "105"],
        "other": ["3.50", "102"],
        "third": ["", ""],
    }


def test_pictures_of_differences() -> None:
    of = a_run()
    tree = parsed(html([of]))
    titles = [figure.one("strong").text for figure in tree.all("figure")]
    assert titles == [
        "error (%)",
        "error (%): difference to plain",
        "precision",
        "precision: difference to plain",
    ]
    (expected,) = report.tables(of)
    first = [c.heading for c in expected.columns].index("difference")
    picture = tree.all("svg")[1]
    slope, start = map_of(picture)

    def value(node: Node, key: str) -> float:
        return start + slope * float(node.attributes[key])

    exact = pytest.approx
    assert value(picture.one("line", class_="zero"), "x1") == exact(0, abs=abs(slope) * 0.02)
    rows = picture.all("g")
    assert [row.one("text").text for row in rows] == ["other", "third"]
    for label, row in zip(("other", "third"), rows, strict=True):
        numbers = expected.rows[label][first].value
        close = {"abs": 0.02 * abs(slope)}
        assert value(row.one("circle", class_="mean"), "cx") == exact(100 * numbers["difference"], **close)
        bar = row.one("line", class_="interval")
        assert [value(bar, key) for key in ("x1", "x2")] == exact(
            [100 * x for x in numbers["interval"]], **close
        )
        seeds = row.all("circle", class_="seed")
        differences = [100 * (ERRORS[label][s] - ERRORS["plain"][s]) for s in HEADER.seeds]  # type: ignore[operator]
        assert [value(dot, "cx") for dot in seeds] == exact(differences, **close)
        assert [dot.text.strip() for dot in seeds] == [
            f"seed {seed}: {d:.4g}" for seed, d in zip(HEADER.seeds, differences, strict=True)
        ]


def test_pictures_of_measures() -> None:
    picture = parsed(html([a_run()])).all("svg")[0]
    slope, start = map_of(picture)
    assert not picture.all("line", class_="zero")
    for row, errors in zip(picture.all("g"), ERRORS.values(), strict=True):
        values = [100 * error for error in errors.values() if error is not None]
        found = [start + slope * float(dot.attributes["cx"]) for dot in row.all("circle")]
        assert found == pytest.approx([math.fsum(values) / 4, *values], abs=0.02 * abs(slope))
    described = picture.one("desc").text
    assert described == "plain: 11.5; other: 10; third: 15.25"


@pytest.mark.parametrize(
    "values",
    [[0.0], [3.0, 3.0], [-2e-9, 5e-9], [1e6, 1e6 + 3], [-8e5, 3], [1e300, -1e300], [5e-324, 0.0], [0.1, 0.7]],
)
def test_scales(values: list[float]) -> None:
    picture = dots([Row("row", dict(enumerate(values)))], name="a", title="b", description="c")
    assert picture is not None
    parser = Parser()
    parser.feed(picture)
    tree = parser.open[0]
    ticks = [node.text for node in tree.all("text", class_="tick")]
    assert 1 <= len(ticks) <= 6 and len(set(ticks)) == len(ticks) and "-0" not in ticks
    places = [float(dot.attributes["cx"]) for dot in tree.all("circle")]
    assert all(30 <= x <= 410 for x in places)
    assert (places[0] < places[-1]) == (values[0] < values[-1] and values[-1] > 1e-300)
    if len(ticks) > 1 and values[-1] != values[0]:
        slope, start = map_of(tree)
        wrong = 0.02 * abs(slope) + 1e-6 * max(map(abs, values))
        assert [start + slope * x for x in places] == pytest.approx(values, abs=wrong)


def test_what_cannot_be_drawn_is_left_out() -> None:
    assert dots([], name="a", title="b", description="c") is None
    assert dots([Row("row", {0: math.nan})], name="a", title="b", description="c") is None
    assert dots([Row("row", {0: 1e308, 1: -1e308})], name="a", title="b", description="c") is None
    picture = dots(
        [Row("row", {0: math.inf, 1: 2.0}, math.inf, (1.0, math.nan))], name="a", title="b", description="c"
    )
    assert picture is not None
    assert picture.count("<circle") == 1 and "interval" not in picture and "nan" not in picture


def test_zero_is_in_the_picture_where_all_differences_are_positive() -> None:
    picture = dots([Row("row", {0: 7.0, 1: 8.0})], name="a", title="b", description="c", zero=True)
    assert picture is not None
    parser = Parser()
    parser.feed(picture)
    tree = parser.open[0]
    zero = float(tree.one("line", class_="zero").attributes["x1"])
    first, last = (float(dot.attributes["cx"]) for dot in tree.all("circle"))
    assert 30 < zero < first < last < 410
    assert (last - zero) / (first - zero) == pytest.approx(8 / 7, abs=1e-3)


def test_what_was_chosen() -> None:
    of = a_run()
    of.trials[:] = [replace(t, candidate="rate 0.1" if t.method == "other" else None) for t in of.trials]
    assert "Chosen: other: rate 0.1." in [p.text for p in parsed(html([of])).all("p")]


def test_hostile_text() -> None:
    labels = tuple(f"{HOSTILE}{i}" for i in range(3))
    errors = dict(zip(labels, ERRORS.values(), strict=True))
    measures = (Measure(HOSTILE, higher_is_better=False), replace(MEASURES[0]))
    of = a_run(
        errors,
        path=Path("a<b>&\"c'"),
        recipe=HOSTILE,
        about=HOSTILE,
        legend=HOSTILE,
        tasks=(TaskHeader(HOSTILE, measures),),
        rows=labels,
        references=labels[:1],
        settings={HOSTILE: HOSTILE},
        reported={HOSTILE: {HOSTILE: {labels[1]: HOSTILE}}},
        environment=dict.fromkeys(("lossmeta", "processor", "device", "threads", "date"), HOSTILE),
    )
    tree = parsed(html([of, of], [HOSTILE]))
    shown = HOSTILE.replace("\ud800", "?")
    assert tree.all("h3")[0].text == shown
    assert list(tables(tree)[0]) == [label.replace("\ud800", "?") for label in labels]
    assert tree.all("h2")[1].text == f"{shown} a<b>&\"c'"
    assert tree.all("div", class_="scroll")[0].attributes["aria-label"].startswith(f"Table: {shown}")
    assert notes(tree)[0] == f"Folders that could not be read: {shown}"


def test_an_unfinished_run() -> None:
    tree = parsed(html([a_run({"plain": ERRORS["plain"], "other": {0: 0.08, 1: 0.10}})]))
    assert notes(tree) == [
        "Incomplete: other: not finished for seeds 2, 5.: third: not finished for seeds 0 to 2, 5."
    ]
    plain, other, third = tree.all("svg")[0].all("g")
    assert [t.text for t in other.all("text")] == ["other", "2 of 4 seeds"]
    assert [t.text for t in third.all("text")] == ["third", "no trial"] and not third.all("circle")
    other, third = tree.all("svg")[1].all("g")
    assert len(other.all("circle", class_="seed")) == 2 and not third.all("circle")


def test_divergence() -> None:
    some = {**ERRORS, "other": {0: 0.08, 1: None, 2: 0.09, 5: 0.10}, "third": dict.fromkeys(HEADER.seeds)}
    tree = parsed(html([a_run(some)]))
    assert notes(tree) == ["Incomplete: other: diverged with seeds 1.: third: diverged with seeds 0 to 2, 5."]
    _, other, third = tree.all("svg")[0].all("g")
    assert [t.text for t in other.all("text")] == ["other", "1 diverged"]
    assert len(other.all("circle", class_="seed")) == 3
    assert not third.all("circle")
    other, third = tree.all("svg")[1].all("g")
    assert not other.all("circle", class_="mean") and not other.all("line", class_="interval")
    assert len(other.all("circle", class_="seed")) == 3, "where there is a difference it is shown"
    assert "other: no mean, 1 diverged" in tree.all("desc")[1].text
    nothing = {label: dict.fromkeys(HEADER.seeds) for label in ERRORS}
    tree = parsed(html([a_run(nothing)]))
    assert not tree.all("svg")
    assert notes(tree)[1:] == [
        f"{title}: There is no number to draw."
        for title in (
            "error (%)",
            "error (%): difference to plain",
            "precision",
            "precision: difference to plain",
        )
    ]


def test_empty_runs() -> None:
    tree = parsed(html([a_run({}), a_run({}, tasks=HEADER.tasks * 2)]))
    assert set(notes(tree)) == {"Incomplete: No trial is finished."}
    assert len(notes(tree)) == 2 + 3
    assert not tree.all("table") and not tree.all("svg")
    one_seed = parsed(html([a_run({label: {0: 0.1} for label in ERRORS}, seeds=(0,))]))
    assert not one_seed.all("line", class_="interval") and not notes(one_seed)
    bare = a_run({}, tasks=HEADER.tasks[:0])
    bare = replace(
        bare, header=replace(bare.header, rows=(), seeds=(), references=(), legend="", environment={})
    )
    assert notes(parsed(html([bare]))) == ["Incomplete: No trial is finished."]
    assert parsed(html([], ["No."])).one("h1").text == "Report of 0 runs"


def test_what_is_only_shown_is_drawn_where_nothing_is_compared() -> None:
    tree = parsed(html([a_run(tasks=(TaskHeader("Task", MEASURES[2:]),))]))
    assert [figure.one("strong").text for figure in tree.all("figure")] == ["rate"]


def test_several_runs() -> None:
    runs = [a_run(), a_run(recipe="second", path=Path("b")), a_run(path=Path("c"))]
    tree = parsed(html(runs))
    assert tree.one("h1").text == "Report of 3 runs"
    assert tree.one("header").one("p").text == "toy, second"
    links = [(a.text, a.attributes["href"]) for a in tree.one("nav").all("a")]
    assert links[::2] == [("toy, folder", "#run-1"), ("toy, c", "#run-2"), ("second, b", "#run-3")]
    assert links[1] == ("Task", "#run-1-task-1")
    beside = tree.all("div", class_="side-by-side")
    assert [[h.text for h in group.all("h2")] for group in beside] == [["toy folder", "toy c"], ["second b"]]


def test_figures_are_in_the_page(tmp_path: Path) -> None:
    folder = on_disk(a_run(), tmp_path / "run")
    (folder / "learned-loss.png").write_bytes(PNG)
    (folder / "broken.png").write_bytes(PNG[1:])
    (folder / "cut.png").write_bytes(PNG[:-3])
    (folder / "flipped.png").write_bytes(PNG[:45] + bytes([PNG[45] ^ 1]) + PNG[46:])
    (folder / ".7-half.png").write_bytes(PNG)
    (folder / "folder.png").mkdir()
    tree = parsed(html([run_folder.read(folder)]))
    image = tree.one("img")
    assert image.attributes["alt"] == "Figure of the run: learned loss"
    assert base64.b64decode(image.attributes["src"].partition(",")[2]) == PNG
    assert notes(tree) == [
        "Figures that are missing: broken.png is no whole PNG image.: cut.png is no whole PNG image.: "
        "flipped.png is no whole PNG image.: folder.png could not be read: Is a directory."
    ]


def test_a_figure_of_fewer_trials_is_left_out(tmp_path: Path) -> None:
    folder = on_disk(a_run(), tmp_path / "run")
    (folder / "old.png").write_bytes(PNG)
    os.utime(folder / "old.png", (1, 1))
    tree = parsed(html([run_folder.read(folder)]))
    assert not tree.all("img")
    assert "old.png is older than the last trial" in notes(tree)[0]


def test_a_half_written_line(tmp_path: Path) -> None:
    folder = on_disk(a_run(), tmp_path / "run")
    assert not notes(parsed(html([run_folder.read(folder)])))
    trials = folder / "trials.jsonl"
    trials.write_bytes(trials.read_bytes()[:-7])
    (whole, rows) = notes(parsed(html([run_folder.read(folder)])))
    assert whole.startswith("Incomplete: The last line of trials.jsonl is cut off")
    assert rows == "Incomplete: third: not finished for seeds 5."


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_every_mode() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    modes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root {(.*?)}", STYLE, re.S)
    ]
    assert len(modes) == 3, "in the light, in the dark, on paper"
    for mode in modes:
        assert set(mode) == {"page", "panel", "line", "text", "soft", "mean", "seed", *SERIES}
        for front, back in itertools.product(("text", "soft", "mean", "seed", *SERIES), ("page", "panel")):
            assert contrast(mode[front], mode[back]) >= 4.5, (front, back)


def command(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exit_code == status, result.output
    # Errors stand in a frame, and are broken to its width.
    return " ".join(result.output.replace("│", " ").split()) if status == 2 else result.output


def test_command(tmp_path: Path) -> None:
    first, second = on_disk(a_run(), tmp_path / "first"), on_disk(a_run(recipe="second"), tmp_path / "second")
    page = tmp_path / "docs" / "page.html"
    assert command(first, second, "--html", page).replace("\n", "") == str(page)
    assert page.read_text(encoding="utf-8") == html([run_folder.read(first), run_folder.read(second)])
    text = tmp_path / "page.md"
    assert command(first, second, "--markdown", text) == ""
    pages = [report.page(run_folder.read(folder)) for folder in (first, second)]
    assert text.read_text(encoding="utf-8") == "\n".join(pages)
    one, other = command(first), command(second)
    assert command(first, second) == f"{first}: toy\n\n{one}{second}: second\n\n{other}"


def test_command_with_folders_that_cannot_be_read(tmp_path: Path) -> None:
    good, newer, damaged = on_disk(a_run(), tmp_path / "good"), tmp_path / "newer", tmp_path / "damaged"
    newer.mkdir()
    (newer / "run.json").write_text(json.dumps({"schema": 99, "environment": {"lossmeta": "9.9"}}))
    on_disk(a_run(), damaged)
    with (damaged / "trials.jsonl").open("a") as file:
        file.write("[]\n")
    page = tmp_path / "page.html"
    output = command(tmp_path / "none", good, newer, damaged, "--html", page)
    tree = parsed(page.read_text(encoding="utf-8"))
    assert len(tree.all("h2")) == 1
    (box,) = tree.all("div", role="alert")
    reasons = [line.text for line in box.all("li")]
    for reason, part in zip(
        reasons,
        ("holds no run", "written by lossmeta 9.9 with schema 99", "line 13, is damaged"),
        strict=True,
    ):
        assert part in reason and reason.strip() in output
    page.unlink()
    assert "holds no run" in command(tmp_path / "none", newer, "--html", page, status=2)
    assert not page.exists()
    command(good, newer, status=2)
    command(good, newer, "--markdown", page, status=2)
    assert "lossmeta report: " in command(good, "--html", good / "run.json" / "page.html", status=1)
