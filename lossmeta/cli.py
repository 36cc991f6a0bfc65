"""The command ``lossmeta``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import lossmeta

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


@app.command()
def info() -> None:
    """Versions, and which operator runs compiled on which device."""
    facts = lossmeta.info()
    cpu, cuda, operators = facts["cpu"], facts["cuda"], facts["operators"]
    loaded = f"compiled operators loaded; {cuda['device'] or 'no GPU is visible'}"
    width = max(map(len, operators))
    typer.echo(f"lossmeta {facts['lossmeta']}, torch {facts['torch']}, Python {facts['python']}")
    typer.echo(f"CPU:  instruction set {cpu['isa']} (best here: {cpu['best_isa']})")
    typer.echo(f"CUDA: {loaded if cuda['compiled'] else cuda['why_not']}")
    typer.echo(f"\n{'operator':{width}}  {'cpu':9}  cuda")
    for name, backends in operators.items():
        cells = [f"{backends[device].partition(':')[0]:9}" for device in ("cpu", "cuda")]
        typer.echo(f"{name:{width}}  {'  '.join(cells)}".rstrip())
    reasons = {backend for backends in operators.values() for backend in backends.values() if ":" in backend}
    for reason in sorted(reasons - {f"reference: {cuda['why_not']}"}):
        typer.echo(f"\n{reason}")


@app.command()
def quickstart(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs per run.")] = 40,
    device: Annotated[str, typer.Option(help="Where to train: cpu, or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/quickstart"),
) -> None:
    """Train on scikit-learn's digits with cross-entropy and with a loss that adapts; takes seconds."""
    from lossmeta.recipes import quickstart

    raise typer.Exit(quickstart.run(seeds=seeds, epochs=epochs, device=device, output=output))


class Size(str, Enum):
    small = "small"
    paper = "paper"


@app.command(name="list")
def list_recipes() -> None:
    """Recipes for `lossmeta run`."""
    from lossmeta.recipes import recipes

    found = recipes()
    width = max(map(len, found))
    for name, recipe in found.items():
        typer.echo(f"{name:{width}}  {recipe.about}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="One of those of `lossmeta list`.")],
    size: Annotated[
        Size, typer.Option(help="small: minutes on a CPU; paper: the paper's models and steps.")
    ] = Size.small,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 5,
    device: Annotated[str, typer.Option(help="Where to train: cpu, or cuda.")] = "cpu",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training and initialisation steps instead of the recipe's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/RECIPE-SIZE")
    ] = None,
) -> None:
    """Run an experiment of the papers: its table, ours beside theirs. Continues where it was stopped."""
    from lossmeta.recipes import recipes

    found = recipes()
    if recipe not in found:
        raise typer.BadParameter(f"expected one of {', '.join(found)}, got {recipe}", param_hint="RECIPE")
    folder = output or Path("runs") / f"{recipe}-{size.value}"
    status = found[recipe].run(size=size.value, seeds=seeds, device=device, steps=steps, output=folder)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
