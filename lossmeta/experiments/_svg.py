"""Pictures of rows of numbers as inline SVG, which needs neither scripts nor matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lossmeta.experiments._markup import Markup, tag

# In units of the view box. It is as narrow as a phone, so that the text stays legible there.
WIDTH, SIDE, LINE, TRACK, AXIS = 440, 30, 15, 32, 22
# So many fit beside one another at 12 units a line.
CHARACTERS = 58
TICKS = 6


@dataclass(frozen=True)
class Row:
    """One line of a picture.

    Attributes:
        label: above it.
        points: by seed; what is not finite is left out.
        mean: None where there is none.
        interval: around the mean, or None.
        note: below the label: what is missing.
    """

    label: str
    points: Mapping[int, float]
    mean: float | None = None
    interval: tuple[float, float] | None = None
    note: str = ""

    def numbers(self) -> list[float]:
        """All that is drawn."""
        return [*self.points.values(), *(self.interval or ()), *([] if self.mean is None else [self.mean])]


def dots(
    rows: Sequence[Row], *, name: str, title: str, description: str, zero: bool = False
) -> Markup | None:
    """Rows below one another: a dot at the mean with a bar over the interval, and below it a circle for each seed.

    Args:
        rows: from top to bottom.
        name: of the picture, which no other in the page has.
        title: its heading for those who do not see it.
        description: what it shows, for them.
        zero: whether there is a vertical line at 0.

    Returns:
        The picture; None where there is nothing finite to draw, or the numbers lie too far apart for a scale.
    """
    found = [x for row in rows for x in row.numbers() if math.isfinite(x)]
    if not found:
        return None
    low, high = limits([*found, 0.0] if zero else found)
    if not math.isfinite(high - low):
        return None

    def at(value: float) -> float:
        return round(SIDE + (WIDTH - 2 * SIDE) * ((value - low) / (high - low)), 2)

    marks, y = [], 0
    for row in rows:
        part, height = _row(row, y, at)
        marks.append(part)
        y += height
    places = [(at(value), text) for value, text in ticks(low, high)]
    grid = [tag("line", class_="grid", x1=x, x2=x, y1=4, y2=y + 4) for x, _ in places]
    if zero:
        grid.append(tag("line", class_="zero", x1=at(0), x2=at(0), y1=4, y2=y + 4))
    texts = [tag("text", text, class_="tick", x=x, y=y + 18, text_anchor="middle") for x, text in places]
    return picture(name, title, description, y + AXIS, *grid, *marks, *texts)


def picture(name: str, title: str, description: str, height: float, *parts: Markup) -> Markup:
    """The parts, with a heading and a description for those who do not see them."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *parts,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-desc",
    )


def _row(row: Row, top: int, at: Callable[[float], float]) -> tuple[Markup, int]:
    """A row below ``top``, and its height."""
    lines = [(line, "label") for line in textwrap.wrap(row.label, CHARACTERS)]
    lines += [(line, "missing") for line in textwrap.wrap(row.note, CHARACTERS)]
    parts = [
        tag("text", line, class_=kind, x=0, y=top + LINE * (i + 1)) for i, (line, kind) in enumerate(lines)
    ]
    height = LINE * len(lines) + TRACK
    y = top + height - 21
    if row.interval is not None and all(map(math.isfinite, row.interval)):
        start, end = map(at, row.interval)
        parts.append(tag("line", class_="interval", x1=start, x2=end, y1=y, y2=y))
    if row.mean is not None and math.isfinite(row.mean):
        parts.append(tag("circle", class_="mean", cx=at(row.mean), cy=y, r=4.5))
    for seed, value in row.points.items():
        if math.isfinite(value):
            hint = tag("title", f"seed {seed}: {value:.4g}")
            parts.append(tag("circle", hint, class_="seed", cx=at(value), cy=y + 11, r=3))
    return tag("g", *parts), height


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Where the scale begins and ends: a little around the values, and never in one point."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    margin = 0.03 * (high - low)
    if high - low <= max(1e-9 * largest, 1e-300):
        margin = 0.05 * largest or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """At most TICKS multiples of 1, 2 or 5 times a power of ten, and how they are written."""
    rough = (high - low) / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    largest = max(map(abs, values), default=0.0)
    if step >= 1e-4 and largest < 1e7:
        decimals = max(0, -math.floor(math.log10(step)))
        return [(value, f"{value:.{decimals}f}") for value in values]
    digits = 1 + max(0, math.ceil(math.log10(largest / step))) if largest else 1
    return [(value, f"{value:.{digits}g}") for value in values]
