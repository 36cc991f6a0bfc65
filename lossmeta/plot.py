"""Figures in one style; the one place that knows matplotlib, which may be missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmeta._files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "image.cmap": "viridis",
}
DPI = 150


def installed() -> bool:
    """Whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def figure(
    caller: str, rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (8.0, 3.2)
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row.

    Args:
        caller: who draws, for the error.
        rows: of panels.
        columns: of panels.
        size: width and height in inches.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> drawing, (left, right) = figure("docs", columns=2)
        >>> lines = left.plot([1, 2, 3], [3, 2, 1])
        >>> save(drawing, "docs.png")
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'{caller}: matplotlib must be installed to draw, got none; pip install "lossmeta[plot]"'
        ) from error
    with rc_context(STYLE):
        # Not pyplot: its figures stay until closed.
        drawing = Figure(figsize=size, layout="constrained")
        panels = drawing.subplots(rows, columns, squeeze=False)
    return drawing, list(panels.flat)


def shades(values: Sequence[float]) -> tuple[list[Any], ScalarMappable]:
    """A colour per value, from dark (lowest) to bright, and what ``Figure.colorbar`` wants to show them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale, colours = Normalize(min(values), max(values)), colormaps["viridis"]
    return [colours(scale(value)) for value in values], ScalarMappable(scale, colours)


def matrix(axes: Axes, values: Sequence[Sequence[float]], label: str, *, limit: float | None = None) -> None:
    """Rows of numbers as colours, 0 in the middle of them, and a bar that says which is which.

    Colours go to ``limit``, so that several matrices can share them, or to the largest of the numbers.
    """
    limit = limit or max((abs(value) for row in values for value in row), default=0) or 1
    figure = axes.get_figure()
    assert figure is not None
    picture = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
    figure.colorbar(picture, ax=axes, label=label)
    axes.locator_params(integer=True)  # rows and columns


def intervals(axes: Axes, labels: Sequence[str], means: Sequence[float], deviations: Sequence[float]) -> None:
    """One line per label, from top to bottom: a dot at its mean and a bar of one deviation to either side."""
    axes.errorbar(means, range(len(labels)), xerr=deviations, fmt="o", capsize=4)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def file_name(*names: str) -> str:
    """The words of names of recipes, tasks and rows, as a part of a file's name."""
    return "-".join(re.findall(r"[\w.]+", " ".join(names).lower()))


def save(drawing: Figure, path: Path | str) -> None:
    """Writes a figure in the format of the path's suffix; a file that is there is replaced in one step."""
    replace_file(Path(path), lambda temporary: drawing.savefig(temporary, dpi=DPI))
