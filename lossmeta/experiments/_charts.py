"""Curves over a training and losses around a model, as inline SVG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from lossmeta.experiments._markup import Markup, tag
from lossmeta.experiments._svg import LINE, WIDTH, limits, picture, ticks
from lossmeta.experiments.curves import Curve

# Of the plot in the picture, in units of the view box.
LEFT, TOP, HEIGHT, BELOW = 62, 8, 190, 40
RIGHT = WIDTH - 14
# So many colours of lines are in the style. Dashes change with them, so that a page in grey has them apart too, and
# come with another colour in the next round.
COLOURS = 6
DASHES = ("none", "8 3", "2 2", "10 3 2 3")
SWATCH = 34
# Viridis from low to high, which tells its order to people with any kind of colour vision, and in grey.
BANDS = (
    *("#440154", "#482878", "#3e4a89", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)


def lines(
    curves: Mapping[str, Curve],
    rows: Sequence[str],
    *,
    name: str,
    title: str,
    description: str,
    across: str,
) -> Markup | None:
    """A line for each row over the steps, with a band of one deviation to either side.

    Args:
        curves: by the label of the row; one without a label has no legend.
        rows: all labels, by whose order colours are dealt out: a row has the same one in every picture.
        name: of the picture, which no other in the page has.
        title: its heading for those who do not see it.
        description: what it shows, for them.
        across: what goes from left to right.

    Returns:
        The picture; None where there is nothing finite to draw, or the numbers lie too far apart for a scale.
    """
    points = [point for curve in curves.values() for point in curve.points if point[1] is not None]
    ends = [m + sign * (d or 0.0) for _, m, d in points if m is not None for sign in (-1, 1)]
    scales = _scales([x for x, _, _ in points], ends)
    if scales is None:
        return None
    axes, at_x, at_y = scales
    bands, drawn = [], []
    for label, curve in curves.items():
        colour, dash = _line(rows.index(label))
        for piece in _pieces(curve):
            if any(d for _, _, d in piece):
                edge = [(x, m + d) for x, m, d in piece] + [(x, m - d) for x, m, d in reversed(piece)]
                bands.append(tag("path", class_=f"band {colour}", d=_path(edge, at_x, at_y) + "Z"))
            path = _path([(x, m) for x, m, _ in piece], at_x, at_y)
            drawn.append(tag("path", class_=f"curve {colour}", d=path, stroke_dasharray=dash))
            if len(piece) == 1:
                x, y = at_x(piece[0][0]), at_y(piece[0][1])
                drawn[-1] = tag("circle", class_=f"point {colour}", cx=x, cy=y, r=3)
    bottom = TOP + HEIGHT + BELOW
    legend, height = _legend(list(curves), rows, bottom + 4) if any(curves) else ([], 0.0)
    below = tag("text", across, class_="tick", x=(LEFT + RIGHT) / 2, y=bottom - 6, text_anchor="middle")
    return picture(name, title, description, bottom + 4 + height, *axes, *bands, *drawn, below, *legend)


def cells(
    losses: Sequence[Sequence[float]],
    x: Sequence[float],
    y: Sequence[float],
    *,
    name: str,
    title: str,
    description: str,
) -> Markup | None:
    """A plane of numbers in ten bands of colour; what is not finite is left empty.

    Args:
        losses: ``[G][H]``, at x and y.
        x: ``[G]``, ascending, from left to right.
        y: ``[H]``, ascending, from bottom to top.
        name: of the picture, which no other in the page has.
        title: its heading for those who do not see it.
        description: what it shows, for them.

    Returns:
        The picture; None where there is nothing finite to draw, or the numbers lie too far apart for a scale.
    """
    finite = [value for row in losses for value in row if math.isfinite(value)]
    if not finite or not math.isfinite(max(finite) - min(finite)):
        return None
    low, high = min(finite), max(finite)
    across, up = _edges(x), _edges(y)
    if not (_has_scale(across[0], across[-1]) and _has_scale(up[0], up[-1])):
        return None
    left, size = (WIDTH - 300) // 2, 300

    def at_x(value: float) -> float:
        return round(left + size * (value - across[0]) / (across[-1] - across[0]), 2)

    def at_y(value: float) -> float:
        return round(TOP + size * (up[-1] - value) / (up[-1] - up[0]), 2)

    def band(value: float) -> int:
        if not math.isfinite(value):
            return -1
        return min(len(BANDS) - 1, int(len(BANDS) * ((value - low) / (high - low)))) if high > low else 0

    paths: dict[int, list[str]] = {}
    for i in range(len(x)):
        start = 0
        for which, run in groupby(band(value) for value in losses[i]):
            end = start + len(list(run))
            x0, x1, y0, y1 = at_x(across[i]), at_x(across[i + 1]), at_y(up[start]), at_y(up[end])
            paths.setdefault(which, []).append(f"M{x0} {y0}H{x1}V{y1}H{x0}Z")
            start = end
    holes = paths.pop(-1, [])
    drawn = [tag("path", class_="cells", fill=BANDS[i], d="".join(d)) for i, d in sorted(paths.items())]
    drawn.append(tag("rect", class_="frame", x=left, y=TOP, width=size, height=size))
    if across[0] <= 0 <= across[-1] and up[0] <= 0 <= up[-1]:
        drawn.append(tag("circle", class_="model", cx=at_x(0), cy=at_y(0), r=4))
    bottom = TOP + size
    for value, text in ticks(across[0], across[-1]):
        drawn.append(tag("text", text, class_="tick", x=at_x(value), y=bottom + 14, text_anchor="middle"))
    for value, text in ticks(up[0], up[-1]):
        drawn.append(tag("text", text, class_="tick", x=left - 5, y=at_y(value) + 4, text_anchor="end"))
    # The scale: a box for every band, with the numbers at its ends.
    width = 36
    for i, colour in enumerate(BANDS):
        drawn.append(
            tag(
                "rect",
                fill=colour,
                x=(WIDTH - 10 * width) // 2 + i * width,
                y=bottom + 26,
                width=width,
                height=12,
            )
        )
    for i in (0, 5, 10):
        at = (WIDTH - 10 * width) // 2 + i * width
        text = f"{low + (high - low) * i / 10:.4g}"
        drawn.append(tag("text", text, class_="tick", x=at, y=bottom + 52, text_anchor="middle"))
    height = bottom + 60
    if holes:
        words = "Empty: the loss is not finite there."
        drawn.append(tag("text", words, class_="missing", x=left, y=bottom + 70))
        height += LINE
    return picture(name, title, description, height, *drawn)


Scale = Callable[[float], float]


def _scales(across: Sequence[float], up: Sequence[float]) -> tuple[list[Markup], Scale, Scale] | None:
    """A grid with its numbers, and where a number lies in it."""
    if not up or not all(map(math.isfinite, up)):
        return None
    first, last = min(across), max(across)
    low, high = limits(up)
    if first == last:
        first, last = limits([first])
    if not (_has_scale(low, high) and _has_scale(first, last)):
        return None

    def at_x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * ((value - first) / (last - first)), 2)

    def at_y(value: float) -> float:
        return round(TOP + HEIGHT * ((high - value) / (high - low)), 2)

    parts = []
    for value, text in ticks(low, high):
        y = at_y(value)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=RIGHT, y1=y, y2=y))
        parts.append(tag("text", text, class_="tick", x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value, text in ticks(first, last):
        x = at_x(value)
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=TOP, y2=TOP + HEIGHT))
        parts.append(tag("text", text, class_="tick", x=x, y=TOP + HEIGHT + 15, text_anchor="middle"))
    return parts, at_x, at_y


def _has_scale(first: float, last: float) -> bool:
    """Whether numbers can be told apart along it."""
    length = last - first
    return math.isfinite(length) and length > max(1e-12 * max(abs(first), abs(last)), 1e-300)


def _pieces(curve: Curve) -> Iterator[list[tuple[float, float, float]]]:
    """What lies between holes."""
    for there, run in groupby(curve.points, key=lambda point: point[1] is not None):
        if there:
            yield [(x, m, d or 0.0) for x, m, d in run if m is not None]


def _path(points: Sequence[tuple[float, float]], at_x: Scale, at_y: Scale) -> str:
    return "M" + "L".join(f"{at_x(x)} {at_y(y)}" for x, y in points)


def _line(i: int) -> tuple[str, str]:
    """Class and dashes of the i-th row."""
    return f"line-{i % COLOURS}", DASHES[(i + i // COLOURS) % len(DASHES)]


def _legend(labels: Sequence[str], rows: Sequence[str], top: float) -> tuple[list[Markup], float]:
    """A line for each label, and how high they are."""
    parts, y = [], top
    for label in labels:
        colour, dash = _line(rows.index(label))
        line = tag(
            "line", class_=f"curve {colour}", x1=0, x2=SWATCH - 8, y1=y + 8, y2=y + 8, stroke_dasharray=dash
        )
        parts.append(line)
        for text in textwrap.wrap(label, 52) or [""]:
            y += LINE
            parts.append(tag("text", text, x=SWATCH, y=y - 3))
    return parts, y - top + 4


def _edges(places: Sequence[float]) -> list[float]:
    """Where the cells around the places meet."""
    if len(places) == 1:
        return [places[0] - 0.5, places[0] + 0.5]
    between = [(a + b) / 2 for a, b in pairwise(places)]
    return [2 * places[0] - between[0], *between, 2 * places[-1] - between[-1]]
