"""What is installed."""

from __future__ import annotations

import typer

import lossmeta


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
