"""Experiments: to run one, and to see what came of it."""

from __future__ import annotations

import shutil
import textwrap
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Size(str, Enum):
    small = "small"
    paper = "paper"


# Steps of the quickstart in one epoch: 900 digits in whole batches of 64.
EPOCH = 14

Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]
Device = Annotated[str, typer.Option(help="Where to train: cpu, or cuda.")]


def quickstart(
    seeds: Seeds = 3,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of every run with wrong labels, instead of the recipe's own."),
    ] = None,
    device: Device = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/quickstart"),
) -> None:
    """Learn a loss on digits with wrong labels, and choose one's parameters from few runs; takes about a minute."""
    from lossmeta.recipes import recipes

    found, steps = recipes(), None if epochs is None else epochs * EPOCH
    status = found["quickstart"].run(size="small", seeds=seeds, device=device, output=output, steps=steps)
    if status == 0:
        folder = output / "tuneloss"
        status = found["quickstart-tuneloss"].run(size="small", seeds=seeds, device=device, output=folder)
    raise typer.Exit(status)


def list_recipes() -> None:
    """Recipes for `lossmeta run`."""
    from lossmeta.recipes import recipes

    found = recipes()
    width = max(map(len, found))
    room = max(20, shutil.get_terminal_size().columns - width - 2)
    for name, recipe in found.items():
        first, *more = textwrap.wrap(recipe.about, room)
        typer.echo(f"{name:{width}}  {first}")
        for line in more:
            typer.echo(" " * (width + 2) + line)


def run(
    recipe: Annotated[str, typer.Argument(help="One of those of `lossmeta list`.")],
    size: Annotated[
        Size, typer.Option(help="small: minutes on a CPU; paper: the paper's models and steps.")
    ] = Size.small,
    seeds: Seeds = 5,
    device: Device = "cpu",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training and initialisation steps instead of the recipe's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/RECIPE-SIZE")
    ] = None,
) -> None:
    """Run an experiment: its table, and a paper's figures beside ours. Continues where it was stopped."""
    from lossmeta.recipes import recipes

    found = recipes()
    if recipe not in found:
        raise typer.BadParameter(f"expected one of {', '.join(found)}, got {recipe}", param_hint="RECIPE")
    folder = output or Path("runs") / f"{recipe}-{size.value}"
    status = found[recipe].run(size=size.value, seeds=seeds, device=device, steps=steps, output=folder)
    raise typer.Exit(status)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Of runs, finished or not.")],
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write a page of Markdown to this file instead, all runs below each other."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one page of HTML to this file instead: tables, pictures, loss surfaces, the runs' figures. A "
            "folder that cannot be read is named in it."
        ),
    ] = None,
) -> None:
    """Show the tables of runs again; trains nothing."""
    from rich.console import Console

    from lossmeta._files import write_text
    from lossmeta.experiments import report
    from lossmeta.experiments.html import html as page_of
    from lossmeta.experiments.records import FolderError, Run
    from lossmeta.experiments.run_folder import read
    from lossmeta.landscape import LossSurface

    runs: list[Run] = []
    unreadable: list[str] = []
    for folder in folders:
        try:
            runs.append(read(folder))
        except (FolderError, OSError) as error:
            unreadable.append(str(error))
    if unreadable and not (html and runs):
        raise typer.BadParameter("; ".join(unreadable), param_hint="FOLDER")
    try:
        if html:
            write_text(html, page_of(runs, unreadable, LossSurface.load))
            typer.echo(html)
        if markdown:
            write_text(markdown, "\n".join(map(report.page, runs)))
        if not (html or markdown):
            for run in runs:
                if len(runs) > 1:
                    typer.echo(f"{run.path}: {run.header.recipe}\n")
                report.show(run, Console(highlight=False))
    except OSError as error:
        typer.echo(f"lossmeta report: {error}", err=True)
        raise typer.Exit(1) from error
    for reason in unreadable:
        typer.echo(f"lossmeta report: {reason}", err=True)
