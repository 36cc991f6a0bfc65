"""Runs a case: its operator or composition, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]


def outputs_of(function: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    outputs = function(*inputs.values())
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def result_names(outputs: Sequence[str], inputs: Inputs) -> list[str]:
    return [*outputs, *(f"gradient of {name}" for name, t in inputs.items() if t.requires_grad)]


def evaluate(function: Callable[..., Any], inputs: Inputs, pulls: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs, and the gradients of all inputs that require one, for the incoming gradients ``pulls``."""
    outputs = outputs_of(function, inputs)
    wanted = [t for t in inputs.values() if t.requires_grad]
    gradients: Sequence[Tensor] = ()
    if wanted:
        pulled = [(o, p) for o, p in zip(outputs, pulls, strict=True) if p is not None]
        gradients = torch.autograd.grad([o for o, _ in pulled], wanted, [p for _, p in pulled])
    return [*(o.detach() for o in outputs), *gradients]


def evaluate_by_chunks(
    function: Callable[..., Any],
    inputs: Inputs,
    pulls: Sequence[Tensor | None],
    by_row: Sequence[str],
    rows: int,
) -> list[Tensor]:
    """As :func:`evaluate`, ``rows`` rows of the outputs at a time: what is not ``by_row`` has its gradients added."""
    results: list[list[Tensor]] = []
    count = len(inputs[by_row[0]])
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        results.append(evaluate(function, *select(inputs, pulls, by_row, part)))
    outputs = len(results[0]) - sum(t.requires_grad for t in inputs.values())
    joined = [True] * outputs + [name in by_row for name, t in inputs.items() if t.requires_grad]
    return [
        torch.cat(parts) if join else torch.stack(parts).sum(0)
        for join, parts in zip(joined, zip(*results, strict=True), strict=True)
    ]


def select(
    inputs: Inputs, pulls: Sequence[Tensor | None], by_row: Sequence[str], rows: slice | Tensor
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """The same rows of all inputs that are ``by_row`` and of the incoming gradients."""
    chosen = {
        name: t.detach()[rows].requires_grad_(t.requires_grad) if name in by_row else t
        for name, t in inputs.items()
    }
    return chosen, [None if p is None else p[rows] for p in pulls]


def exactly(inputs: Inputs, pulls: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Everything in float64."""
    return _as(torch.float64, inputs, pulls)


def widely(inputs: Inputs, pulls: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Everything that is narrower in float32."""
    double = any(t.dtype == torch.float64 for t in inputs.values())
    return _as(torch.float64 if double else torch.float32, inputs, pulls)


def nudged(inputs: Inputs, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs that are off by about a rounding."""
    moved = {}
    for name, t in inputs.items():
        if t.is_floating_point():
            noise = torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator)
            t = torch.addcmul(t.detach(), t.detach(), noise, value=torch.finfo(t.dtype).eps / 2)
            t.requires_grad_(inputs[name].requires_grad)
        moved[name] = t
    return moved


def _as(
    dtype: torch.dtype, inputs: Inputs, pulls: Sequence[Tensor | None]
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    cast = {
        name: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in inputs.items()
    }
    return cast, [None if p is None else p.to(dtype) for p in pulls]
