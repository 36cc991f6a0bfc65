"""What a loss looks like."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lossmeta.landscape import LossSurface


class Kind(str, Enum):
    contour = "contour"
    relief = "3d"
    curvature = "curvature"


def surface(
    file: Annotated[
        Path,
        typer.Argument(
            help="A surface that `loss_surface(..., path=...)` or `LossSurface.save` wrote; or a Python file that "
            "defines `model()` and `data()`, and `loss` where that is not cross-entropy: its surface is computed."
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="For the model of a Python file: .safetensors, or what torch.save wrote. Without it the model is as "
            "`model()` returns it."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Picture to write, .png or .svg.", show_default="none")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="What to draw; a line is drawn as its curve.")] = Kind.contour,
    title: Annotated[str, typer.Option(help="Above the picture.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where a computed surface is kept. The same command goes on from there where it was stopped.",
            show_default="beside the checkpoint, .surface.safetensors",
        ),
    ] = None,
    points: Annotated[
        int, typer.Option(min=1, help="Of a computed surface, along each of two random directions.")
    ] = 51,
    span: Annotated[float, typer.Option(help="A computed surface goes from -span to span.")] = 1.0,
    refine: Annotated[
        float | None,
        typer.Option(
            help="Share of the range, 0.01 say, to which points may be interpolated.", show_default="no"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the directions.")] = 0,
) -> None:
    """Say what a loss surface is like, and draw it: one that is in a file, or one of a model, computed."""
    from lossmeta import plot
    from lossmeta.landscape import LossSurface

    if file.suffix == ".py":
        found = _computed(file, checkpoint, out, points, span, refine, seed)
    else:
        if checkpoint is not None or out is not None:
            raise typer.BadParameter(
                f"expected a Python file, .py, where there is a checkpoint or --out, got {file}",
                param_hint="FILE",
            )
        try:
            found = LossSurface.load(file)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="FILE") from error
    _describe(found)
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


def _computed(
    file: Path,
    checkpoint: Path | None,
    out: Path | None,
    points: int,
    span: float,
    refine: float | None,
    seed: int,
) -> LossSurface:
    from lossmeta.cli._surface_task import TaskError, load_checkpoint, read_task
    from lossmeta.landscape import loss_surface

    try:
        task = read_task(file)
    except TaskError as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from error
    if checkpoint is not None:
        try:
            load_checkpoint(task.model, checkpoint)
        except TaskError as error:
            raise typer.BadParameter(str(error), param_hint="CHECKPOINT") from error
    path = out or (checkpoint or file).with_suffix(".surface.safetensors")
    try:
        found = loss_surface(
            task.model,
            task.loss,
            task.data,
            points=points,
            span=span,
            refine=refine,
            seed=seed,
            path=path,
            progress=True,
        )
    except Exception as error:
        # The model and the loss are the user's, too: what fails in them is said as what is wrong with the options.
        typer.echo(f"lossmeta surface: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"Surface: {path}")
    return found


def _describe(found: LossSurface) -> None:
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
