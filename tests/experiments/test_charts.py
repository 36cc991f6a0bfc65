"""Curves over a training, and losses around a model."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lossmeta.experiments import Measure
from lossmeta.experiments._charts import BANDS, cells, lines
from lossmeta.experiments.curves import Curve, curves
from lossmeta.experiments.html import html
from lossmeta.experiments.records import Header, Record, Run, TaskHeader
from lossmeta.landscape import LossSurface

NAMES = {"name": "a", "title": "b", "description": "c"}


def record(seed: int, series: dict[str, Any], method: str = "plain", **measures: float | None) -> Record:
    return Record("report", "Task", method, seed, {}, {"error": 0.1, **measures}, 1.0, None, series=series)


def a_run(path: Path, *trials: Record) -> Run:
    header = Header(
        recipe="toy",
        about="",
        settings={},
        tasks=(TaskHeader("Task", (Measure("error", higher_is_better=False),)),),
        rows=("plain", "other"),
        references=(),
        seeds=(0, 1),
        legend="",
        reported={},
        environment={},
    )
    return Run(path, header, list(trials))


def numbers(path: str) -> list[tuple[float, float]]:
    """The points of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def paths(drawing: str, kind: str) -> list[list[tuple[float, float]]]:
    return [numbers(d) for d in re.findall(rf'<path class="{kind} line-\d" d="([^"]*)"', drawing)]


def test_means_over_the_seeds() -> None:
    one = {"entropy": [(1, 1.0), (2, 2.0), (3, 4.0)]}
    other = {"entropy": [(1, 3.0), (2, None)]}
    found = curves({"plain": {0: record(0, one), 1: record(1, other)}, "without": {0: record(0, {})}})
    assert list(found) == ["entropy"] and list(found["entropy"]) == ["plain"]
    curve = found["entropy"]["plain"]
    assert curve.points == ((1, 2.0, pytest.approx(2**0.5)), (2, None, None), (3, None, None))
    assert (curve.seeds, curve.left_out) == (2, 2), "a mean of some of the seeds is none"
    alone = curves({"plain": {0: record(0, one)}})["entropy"]["plain"]
    assert alone.points[2] == (3, 4.0, None)


def test_measures_from_before_there_were_series() -> None:
    old = {"error after 400": 0.3, "error after 50": 0.5, "after 3": 1.0, "error after all": 2.0}
    found = curves({"plain": {0: record(0, {}, **old)}})
    assert list(found) == ["error"]
    assert found["error"]["plain"].points == ((50, 0.5, None), (400, 0.3, None))
    both = curves({"plain": {0: record(0, {"error": [(1, 7.0)]}, **old)}})
    assert both["error"]["plain"].points == ((1, 7.0, None),)


def test_lines_lie_where_their_numbers_are() -> None:
    points = ((0, 1.0, 0.5), (50, 3.0, 0.0), (100, 2.0, 0.5))
    drawing = lines({"plain": Curve(points, 2, 0)}, ["plain"], **NAMES, across="step")
    assert drawing is not None
    (line,), (band,) = paths(drawing, "curve"), paths(drawing, "band")
    ticks = [
        (float(y) - 4, float(text))
        for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([-\d.]+)<', drawing)
    ]
    (y0, v0), (y1, v1) = ticks[0], ticks[-1]
    values = [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for _, y in line]
    assert values == pytest.approx([1.0, 3.0, 2.0], abs=0.01)
    assert line[1][1] < line[2][1] < line[0][1], "what is more lies higher"
    edge = [v0 + (y - y0) * (v1 - v0) / (y1 - y0) for _, y in band]
    assert edge == pytest.approx([1.5, 3.0, 2.5, 1.5, 3.0, 0.5], abs=0.01)
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.02)
    assert ">plain</text>" in drawing


def test_holes_are_no_lines() -> None:
    points = (
        (0, 1.0, None),
        (1, 2.0, None),
        (2, None, None),
        (3, 1.0, None),
        (4, None, None),
        (5, 2.0, None),
    )
    drawing = lines({"": Curve(points, 1, 2)}, [""], **NAMES, across="step")
    assert drawing is not None
    assert [len(line) for line in paths(drawing, "curve")] == [2]
    assert drawing.count('class="point') == 2 and "nan" not in drawing


@pytest.mark.parametrize("count", [1, 6, 7, 13, 24])
def test_every_row_looks_its_own(count: int) -> None:
    many = {f"row {i}": Curve(((0, float(i), None), (1, float(i), None)), 1, 0) for i in range(count)}
    drawing = lines(many, list(many), **NAMES, across="step")
    assert drawing is not None
    looks = re.findall(r'<path class="curve (line-\d)" d="[^"]*" stroke-dasharray="([^"]*)"', drawing)
    assert len(set(looks)) == count
    last = lines({f"row {count - 1}": many[f"row {count - 1}"]}, list(many), **NAMES, across="step")
    assert last is not None and f"curve {looks[-1][0]}" in last, "also where it is alone"
    legend = re.findall(r'<line class="curve (line-\d)" [^>]*stroke-dasharray="([^"]*)"', drawing)
    assert legend == looks


@pytest.mark.parametrize("values", [[], [None], [1e308, -1e308], [1.0]])
def test_what_has_no_scale(values: list[float | None]) -> None:
    points = tuple((float(i), value, None) for i, value in enumerate(values))
    drawing = lines({"plain": Curve(points, 1, 0)}, ["plain"], **NAMES, across="step")
    assert (drawing is None) == (values != [1.0])


def test_cells_have_the_colour_of_their_band() -> None:
    losses = [[0.0, 1.0, math.nan], [9.0, 9.99, 10.0]]
    drawing = cells(losses, [0.0, 1.0], [0.0, 1.0, 3.0], **NAMES)
    assert drawing is not None
    found = dict(re.findall(r'class="cells" fill="(#\w+)" d="([^"]*)"', drawing))
    assert list(found) == [BANDS[0], BANDS[1], BANDS[9]]
    # x goes from left to right and y from bottom to top; cells of one band in a column are one.
    assert found[BANDS[0]] == "M70.0 308.0H220.0V241.33H70.0Z"
    assert found[BANDS[1]] == "M70.0 241.33H220.0V141.33H70.0Z"
    assert found[BANDS[9]] == "M220.0 308.0H370.0V8.0H220.0Z"
    assert "not finite" in drawing
    assert drawing.count(BANDS[4]) == 1, "the scale has all bands"


def test_cells_without_numbers() -> None:
    assert cells([[math.nan]], [0.0], [0.0], **NAMES) is None
    assert cells([[1e308, -1e308]], [0.0], [0.0, 1.0], **NAMES) is None
    three = [[1.0, 2.0, 3.0]] * 3
    for axis in ([-1e308, 0.0, 1e308], [0.0, 5e-324, 1e-323], [1.0, 1 + 2e-16, 1 + 4e-16]):
        assert cells(three, axis, [0.0, 1.0, 2.0], **NAMES) is None
        assert cells(three, [0.0, 1.0, 2.0], axis, **NAMES) is None
    drawing = cells([[2.0]], [0.0], [0.0], **NAMES)
    assert drawing is not None and "nan" not in drawing


def test_names_of_measures_with_endless_numbers() -> None:
    for digits in (400, 5000):
        assert curves({"plain": {0: record(0, {}, **{"error after " + "9" * digits: 1.0})}}) == {}


def test_series_on_the_page(tmp_path: Path) -> None:
    series = {"policy <entropy>": [(10, 1.0), (20, 0.5)]}
    page = html([a_run(tmp_path, record(0, series), record(1, series), record(0, {}, "other"))])
    assert page.count("<h4>Over the training</h4>") == 1
    assert "policy &lt;entropy&gt;" in page and "plain: from 1 to 0.5" in page
    assert "<summary>Numbers of policy &lt;entropy&gt;</summary>" in page
    assert re.search(r'<th scope="row">10</th>\s*<td>1 ± 0</td>', page)
    cut = {"policy <entropy>": [(10, 1.0)]}
    page = html([a_run(tmp_path, record(0, series), record(1, cut))])
    assert "plain: left out at 1 of 2 steps, where not all of its seeds have a number." in page
    assert "Over the training" not in html([a_run(tmp_path, record(0, {}))])
    percent = TaskHeader("Task", (Measure("error", higher_is_better=False, percent=True),))
    run = a_run(tmp_path, record(0, {"error": [(1, 0.5), (2, 0.25)]}))
    page = html([replace(run, header=replace(run.header, tasks=(percent,)))])
    assert "plain: from 50 to 25" in page and "Numbers of error (%)" in page


def surface(*shape: int) -> LossSurface:
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape]
    losses = sum(
        axis.square().reshape([-1 if i == d else 1 for i in range(len(shape))]) for d, axis in enumerate(axes)
    )
    assert isinstance(losses, torch.Tensor)
    return LossSurface(losses, axes[0], axes[1] if len(axes) > 1 else None, torch.ones(shape).bool(), 9)


def test_surfaces_on_the_page(tmp_path: Path) -> None:
    plane = surface(5, 4)
    plane.losses[0, 0] = math.nan
    plane.save(tmp_path / "plane.safetensors")
    surface(7).save(tmp_path / "line.safetensors")
    replace(surface(3, 3), x=torch.tensor([0.0, 0.0, 1.0])).save(tmp_path / "folded.safetensors")
    surface(300, 2).save(tmp_path / "large.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "line.safetensors").read_bytes()[:-9])
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    replace(surface(2, 2), losses=torch.full((2, 2), math.inf)).save(tmp_path / "nothing.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    replace(surface(2, 2), error=10**400).save(tmp_path / "overflow.safetensors")
    run = a_run(tmp_path, record(0, {}))
    page = html([run], load_surface=LossSurface.load)
    assert page.count('class="cells"') >= 2 and page.count('class="frame"') == 1
    assert "Loss: mean over 9 samples. Least 0.1111, most 2." in page
    assert "1 of 20 points are not finite." in page
    missing = page[page.index("Surfaces that are missing") :]
    for words in (
        "folded.safetensors must have coordinates that ascend",
        "large.safetensors has 300 × 2 points",
        "half.safetensors must be a file that save wrote",
        "nothing.safetensors: there is no number to draw",
        "folder.safetensors could not be read",
        "overflow.safetensors: int too large",
    ):
        assert words in missing
    assert "model.safetensors" not in page
    assert "Loss around the model" not in html([run])
