"""What a loss looks like."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Kind(str, Enum):
    contour = "contour"
    relief = "3d"
    curvature = "curvature"


def surface(
    file: Annotated[
        Path, typer.Argument(help="That `loss_surface(..., path=...)` or `LossSurface.save` wrote.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Picture to write, .png or .svg.", show_default="none")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="What to draw; a line is drawn as its curve.")] = Kind.contour,
    title: Annotated[str, typer.Option(help="Above the picture.")] = "",
) -> None:
    """Say what a loss surface in a file is like, and draw it."""
    from lossmeta import plot
    from lossmeta.landscape import LossSurface

    try:
        found = LossSurface.load(file)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from error
    losses = found.losses[found.losses.isfinite()]
    size = " x ".join(map(str, found.losses.shape))
    typer.echo(f"{size} points, the mean over {found.samples} samples each")
    if len(losses):
        typer.echo(f"loss: {float(losses.min()):.6g} to {float(losses.max()):.6g}")
    if found.holes:
        typer.echo(f"not finite: {found.holes} points")
    interpolated = int((~found.evaluated).sum())
    if interpolated:
        typer.echo(f"interpolated: {interpolated} points, off by {found.error:.2g} or so at most")
    if found.y is not None and min(found.losses.shape) > 2:
        typer.echo(f"mean Gaussian curvature: {found.nonconvexity():.6g}")
        typer.echo(f"mean absolute curvature: {found.mean_absolute_curvature():.6g}")
        typer.echo(f"share of saddle points: {found.saddle_share():.1%}")
    if output is None:
        return
    try:
        plot.save(found.plot(kind=kind.value, title=title), output)
    except ImportError as error:
        typer.echo(f"lossmeta surface: {error}", err=True)
        raise typer.Exit(2) from error
    except (OSError, ValueError) as error:
        typer.echo(f"lossmeta surface: {output} could not be written ({error})", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"Picture: {output}")
