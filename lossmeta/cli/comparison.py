"""Whether anything helps on a task of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lossmeta.cli.experiments import Device, Seeds

TaskFile = Annotated[Path, typer.Argument(metavar="TASK.py", show_default=False)]


def compare(
    task: TaskFile,
    seeds: Seeds = 5,
    device: Device = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/compare-TASK")
    ] = None,
) -> None:
    """Train a task of your own, plain and by every method that applies. Continues where it was stopped."""
    from lossmeta.comparison import TaskError, load, run
    from lossmeta.experiments.runner import TrialError

    folder = output or Path("runs") / f"compare-{task.stem}"
    try:
        status = run(load(task), seeds=seeds, device=device, folder=folder)
    except TaskError as error:
        typer.echo(f"lossmeta compare: {error}", err=True)
        raise typer.Exit(2) from error
    except TrialError as error:
        typer.echo(f"lossmeta compare: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(status)


def new(task: TaskFile) -> None:
    """Write a task to begin with, for `lossmeta compare`: digits with wrong labels."""
    from lossmeta.comparison import write_new

    try:
        write_new(task)
    except FileExistsError as error:
        typer.echo(f"lossmeta new: {task} exists and is left as it is; choose another name", err=True)
        raise typer.Exit(2) from error
    except OSError as error:
        typer.echo(f"lossmeta new: {task} could not be written ({error.strerror})", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{task} is written; `lossmeta compare {task}` trains it")
