"""Pictures of loss surfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from lossmeta import plot
from lossmeta._checks import choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"contour": "contour", "3d": "3d", "curvature": "curvature"}
LEVELS = 20


class Surface(Protocol):
    """What is drawn: a :class:`~lossmeta.landscape.LossSurface`."""

    losses: Tensor
    x: Tensor
    y: Tensor | None

    @property
    def holes(self) -> int: ...

    def curvature(self) -> Tensor: ...


def plot_surface(
    surface: Surface, *, kind: str = "contour", path: Tensor | None = None, title: str = ""
) -> Figure:
    """A figure of a surface; of a line its curve. Points whose loss is not finite are left white, and counted.

    Args:
        surface: what :func:`loss_surface` gives.
        kind: ``"contour"``, ``"3d"`` or ``"curvature"``, a map of the Gaussian curvature; of no account for a line.
        path: ``[T, 2]``, coordinates to draw over a contour, such as those of :func:`pca_directions`.
        title: above it.

    Raises:
        ValueError: for another kind, too few points for it, and a path of another shape.
        ImportError: without matplotlib.

    Example:
        >>> model, samples = torch.nn.Linear(4, 3), (torch.randn(20, 4), torch.randint(3, (20,)))
        >>> surface = loss_surface(model, torch.nn.functional.cross_entropy, samples, points=11)
        >>> drawing = plot_surface(surface)
        >>> lossmeta.plot.save(drawing, "surface.svg")
    """
    choice("plot_surface", "kind", kind, KINDS)
    least = 3 if kind == "curvature" else 2
    if surface.y is not None and min(surface.losses.shape) < least:
        raise ValueError(
            f"plot_surface: a {kind} picture needs {least} × {least} points or more, got {list(surface.losses.shape)}"
        )
    if path is not None and (path.dim() != 2 or path.shape[1] != 2):
        raise ValueError(f"plot_surface: path must have shape [T, 2], got {list(path.shape)}")
    if surface.y is None:
        drawing = _curve(surface)
    elif kind == "3d":
        drawing = _relief(surface)
    elif kind == "curvature":
        drawing = _curvature(surface)
    else:
        drawing = _contour(surface, path)
    axes = drawing.axes[0]
    said = [title] if title else []
    if surface.holes:
        said.append(f"{surface.holes} of {surface.losses.numel()} points are not finite")
    axes.set_title("\n".join(said))
    return drawing


def _curve(surface: Surface) -> Figure:
    drawing, (axes,) = plot.figure("plot_surface", size=(5.0, 3.5))
    axes.plot(surface.x.numpy(), _finite(surface))
    axes.set_xlabel("along the direction")
    axes.set_ylabel("loss")
    return drawing


def _finite(surface: Surface) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    losses = surface.losses.numpy()
    found: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.where(np.isfinite(losses), losses, np.nan)
    return found


def _contour(surface: Surface, path: Tensor | None) -> Figure:
    assert surface.y is not None
    drawing, (axes,) = plot.figure("plot_surface", size=(5.5, 4.5))
    losses = np.ma.masked_invalid(_finite(surface)).T
    x, y = surface.x.numpy(), surface.y.numpy()
    if losses.count() and losses.max() > losses.min():
        filled = axes.contourf(x, y, losses, levels=LEVELS)
        axes.contour(x, y, losses, levels=LEVELS, colors="white", linewidths=0.4)
        drawing.colorbar(filled, ax=axes, label="loss")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    axes.plot(0, 0, marker="+", color="white", markersize=9)
    if path is not None:
        at = path.detach().cpu().numpy()
        axes.plot(at[:, 0], at[:, 1], color="black", marker="o", markersize=3, linewidth=1)
    _label(axes)
    return drawing


def _label(axes: Axes) -> None:
    axes.set_xlabel("along the first direction")
    axes.set_ylabel("along the second direction")


def _relief(surface: Surface) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    plot.figure("plot_surface")  # refuses where there is no matplotlib
    assert surface.y is not None
    with rc_context(plot.STYLE):
        drawing = Figure(figsize=(6.0, 5.0), layout="constrained")
        axes = drawing.add_subplot(projection="3d")
    x, y = np.meshgrid(surface.x.numpy(), surface.y.numpy(), indexing="ij")
    axes.plot_surface(x, y, np.ma.masked_invalid(_finite(surface)), cmap="viridis", linewidth=0)
    _label(axes)
    axes.set_zlabel("loss")
    return drawing


def _curvature(surface: Surface) -> Figure:
    assert surface.y is not None
    drawing, (axes,) = plot.figure("plot_surface", size=(5.5, 4.5))
    curvature = surface.curvature().numpy()
    known = np.abs(curvature[np.isfinite(curvature)])
    # Few points are so curved that they would leave the others without colour.
    limit = float(np.quantile(known, 0.98)) if known.size else 1.0
    picture = axes.pcolormesh(
        surface.x[1:-1].numpy(),
        surface.y[1:-1].numpy(),
        np.ma.masked_invalid(curvature).T,
        cmap="RdBu",
        vmin=-(limit or 1.0),
        vmax=limit or 1.0,
        shading="nearest",
    )
    drawing.colorbar(picture, ax=axes, label="Gaussian curvature", extend="both")
    _label(axes)
    return drawing


def plot_index(
    histories: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, label: str, unit: str = "epoch"
) -> Figure:
    """An index of curvature by epoch, one curve for each training.

    Args:
        histories: by name, epochs and values, such as those of :class:`CurvatureTracker`.
        label: what the values are.
        unit: of the first numbers.

    Example:
        >>> drawing = plot_index({"cross-entropy": ([0, 1], [0.3, 0.2])}, label="mean curvature")
    """
    drawing, (axes,) = plot.figure("plot_index", size=(6.5, 3.5))
    for (name, (epochs, values)), style in zip(histories.items(), _styles(len(histories)), strict=True):
        axes.plot(list(epochs), list(values), marker="o", markersize=3, label=name, **style)
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    if histories:
        drawing.legend(loc="outside right upper")
    return drawing


def _styles(count: int) -> list[dict[str, Any]]:
    """Colours after Okabe and Ito, which all kinds of sight tell apart, and then dashes."""
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    dashes = ("-", "--", ":")
    return [
        {"color": colours[i % len(colours)], "linestyle": dashes[i // len(colours) % len(dashes)]}
        for i in range(count)
    ]
