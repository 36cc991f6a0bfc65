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
    folder: Annotated[Path, typer.Argument(help="Of a run, finished or not.")],
    markdown: Annotated[
        Path | None, typer.Option(help="Write a page of Markdown to this file instead.")
    ] = None,
) -> None:
    """Show the tables of a run again; trains nothing."""
    from rich.console import Console

    from lossmeta._files import write_text
    from lossmeta.experiments import report
    from lossmeta.experiments.records import FolderError
    from lossmeta.experiments.run_folder import read

    try:
        finished = read(folder)
        if markdown is None:
            report.show(finished, Console(highlight=False))
        else:
            write_text(markdown, report.page(finished))
    except FolderError as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error
    except OSError as error:
        typer.echo(f"lossmeta report: {error}", err=True)
        raise typer.Exit(1) from error
