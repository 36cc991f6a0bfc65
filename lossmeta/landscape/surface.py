"""The loss on a line or a plane through a model's weights, and the file that keeps it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossmeta import _safetensors
from lossmeta.landscape import plots
from lossmeta.ops import gaussian_curvature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
HEADER = "lossmeta_surface"


@dataclass
class LossSurface:
    r"""The loss :math:`L(\theta + a\,\delta_1 + b\,\delta_2)` on a grid.

    Attributes:
        losses: ``[G, H]``, or ``[G]`` on a line; float64, on the CPU. What is not finite is kept so.
        x: ``[G]``, the coefficients a; rows of ``losses``.
        y: ``[H]``, the coefficients b, or ``None`` on a line.
        evaluated: of the shape of ``losses``: whether the loss was evaluated there; it was interpolated elsewhere.
        samples: that the loss is a mean over.
        error: with ``refine``, an estimate of the largest error of interpolation, no bound; 0 where all was evaluated.
    """

    losses: Tensor
    x: Tensor
    y: Tensor | None
    evaluated: Tensor
    samples: int
    error: float = 0.0

    @property
    def holes(self) -> int:
        """How many of the losses are not finite."""
        return int((~self.losses.isfinite()).sum())

    def curvature(self) -> Tensor:
        """Gaussian curvature of the graph at the interior points, ``[G - 2, H - 2]``; NaN beside holes.

        Raises:
            ValueError: for a line, and fewer than three points in a row.
        """
        if self.y is None or min(self.losses.shape) < 3:
            raise ValueError(
                f"LossSurface: curvature needs a plane of at least 3 × 3 points, got {list(self.losses.shape)}"
            )
        finite = self.losses.where(self.losses.isfinite(), torch.nan)
        return gaussian_curvature(finite, _spacing(self.x), _spacing(self.y))

    def nonconvexity(self) -> float:
        """The mean Gaussian curvature of the interior points, the index of ALA's figure 4; holes left out."""
        return float(self.curvature().nanmean())

    def mean_absolute_curvature(self) -> float:
        """The mean of |K| over the interior points, holes left out."""
        return float(self.curvature().abs().nanmean())

    def saddle_share(self) -> float:
        """The share of the interior points with negative curvature, holes left out."""
        curvature = self.curvature()
        known = curvature[~curvature.isnan()]
        return float((known < 0).double().mean()) if len(known) else math.nan

    def plot(self, *, kind: str = "contour", path: Tensor | None = None, title: str = "") -> Figure:
        """A figure, see :func:`lossmeta.landscape.plot_surface`."""
        return plots.plot_surface(self, kind=kind, path=path, title=title)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, in one step.

        Raises:
            OSError: where it cannot be written.
        """
        write(path, self, {})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> LossSurface:
        """What :meth:`save` wrote, or :func:`loss_surface` where it was finished.

        Raises:
            ValueError: for another file, one that is damaged, and a surface that is not finished.
            OSError: where there is none.
        """
        surface, _, finished = read(path)
        if not finished:
            raise ValueError(
                f"LossSurface: {os.fspath(path)} must be finished, got one that was stopped; call loss_surface with "
                "this path again"
            )
        return surface


def _spacing(axis: Tensor) -> float:
    return float(axis[-1] - axis[0]) / (len(axis) - 1)


def write(
    path: str | os.PathLike[str], surface: LossSurface, fingerprint: dict[str, Any], finished: bool = True
) -> None:
    """With what tells this surface from others, and whether it is finished."""
    tensors = {"losses": surface.losses, "evaluated": surface.evaluated, "x": surface.x}
    if surface.y is not None:
        tensors["y"] = surface.y
    description = {
        "format": FORMAT,
        "samples": surface.samples,
        "error": surface.error,
        "finished": finished,
        "fingerprint": fingerprint,
    }
    _safetensors.write(path, tensors, HEADER, json.dumps(description))


def read(path: str | os.PathLike[str]) -> tuple[LossSurface, dict[str, Any], bool]:
    """What :func:`write` wrote."""
    where = f"LossSurface: {os.fspath(path)}"
    description, tensors = _safetensors.read(where, path, HEADER, FORMAT)
    try:
        losses, evaluated, x, y = (tensors.get(n) for n in ("losses", "evaluated", "x", "y"))
        shape = [len(axis) for axis in (x, y) if axis is not None]
        if losses is None or evaluated is None or x is None:
            raise KeyError("losses, evaluated or x")
        if list(losses.shape) != shape or evaluated.shape != losses.shape:
            raise ValueError(f"losses {list(losses.shape)} on axes of {shape}")
        surface = LossSurface(
            losses.double(),
            x.double(),
            y,
            evaluated.bool(),
            int(description["samples"]),
            float(description["error"]),
        )
        return surface, dict(description["fingerprint"]), bool(description["finished"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} must be a surface that was saved whole, got one without {error}; remove it"
        ) from error
