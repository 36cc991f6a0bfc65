"""Loss surfaces that lie in a run's folder, as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lossmeta.experiments._charts import cells, lines
from lossmeta.experiments._markup import Markup
from lossmeta.experiments.curves import Curve

# What tells a file of a surface from other files of tensors.
HEADER = "lossmeta_surface"
# Of a plane that is drawn: a page with more of them would be slow.
LARGEST = 256


class Surface(Protocol):
    """What a loss surface has, see :class:`lossmeta.landscape.LossSurface`; tensors."""

    losses: Any
    x: Any
    y: Any
    evaluated: Any
    samples: int

    @property
    def holes(self) -> int: ...


Load = Callable[[Path], Surface]


def surfaces(name: str, folder: Path, load: Load) -> Iterator[tuple[str, str, Markup | None]]:
    """Of every file with a surface its name, what there is to say, and the picture, None where there can be none.

    Files with something else are passed over.

    Args:
        name: of the pictures, from which each has its own.
        folder: of the run.
        load: reads a surface; raises OSError and ValueError.
    """
    for i, path in enumerate(sorted(folder.glob("[!.]*.safetensors")), 1):
        try:
            if _is_another(path):
                continue
            surface = load(path)
        except OSError as error:
            yield path.name, f"{path.name} could not be read: {error.strerror or error}.", None
            continue
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # whatever stands in the file
            yield path.name, f"{error}." if path.name in str(error) else f"{path.name}: {error}.", None
            continue
        yield path.name, *_picture(f"{name}-{i}", path, surface)


def _is_another(path: Path) -> bool:
    """Whether it is a whole safetensors file that never was a surface."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # its errors name the file
        pass
    try:
        with safe_open(str(path), framework="pt") as file:
            return HEADER not in (file.metadata() or {})
    except SafetensorError:
        return False


def _picture(name: str, path: Path, surface: Surface) -> tuple[str, Markup | None]:
    axes = [surface.x] if surface.y is None else [surface.x, surface.y]
    for axis in axes:
        if not len(axis) or not bool(axis.isfinite().all()) or not bool((axis.diff() > 0).all()):
            return f"{path.name} must have coordinates that ascend; it is not drawn.", None
    if max(surface.losses.shape) > LARGEST:
        shape = " × ".join(map(str, surface.losses.shape))
        return f"{path.name} has {shape} points; more than {LARGEST} in a row are not drawn.", None
    finite = surface.losses[surface.losses.isfinite()]
    said = f"Loss: mean over {surface.samples} samples."
    if len(finite):
        said += f" Least {finite.min().item():.4g}, most {finite.max().item():.4g}."
    if surface.holes:
        said += f" {surface.holes} of {surface.losses.numel()} points are not finite."
    evaluated = int(surface.evaluated.sum())
    if evaluated < surface.losses.numel():
        said += f" {evaluated} points were evaluated, the others lie between them."
    words = path.stem.replace("-", " ")
    texts = {"name": name, "title": f"Loss around the model: {words}", "description": said}
    if surface.y is None:
        points = [
            (x, value if math.isfinite(value) else None, None)
            for x, value in zip(surface.x.tolist(), surface.losses.tolist(), strict=True)
        ]
        drawing = lines(
            {"": Curve(tuple(points), 1, surface.holes)}, [""], across="along the direction", **texts
        )
    else:
        said += " The circle is the model."
        drawing = cells(surface.losses.tolist(), surface.x.tolist(), surface.y.tolist(), **texts)
    return (said, drawing) if drawing else (f"{path.name}: there is no number to draw.", None)
