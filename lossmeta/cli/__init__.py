"""The command ``lossmeta``."""

from __future__ import annotations

from typing import Annotated

import typer

import lossmeta
from lossmeta.cli import build, comparison, experiments, landscape

app = typer.Typer(
    help=lossmeta.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lossmeta {lossmeta.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


app.command()(experiments.quickstart)
app.command(name="list")(experiments.list_recipes)
app.command()(experiments.run)
app.command()(experiments.report)
app.command()(comparison.compare)
app.command()(comparison.new)
app.command()(landscape.surface)
app.command()(build.info)
