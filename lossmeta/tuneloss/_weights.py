"""The weights that are regularised, and what a pass of them needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_names(where: str, parameters: Sequence[str]) -> list[str]:
    """Refuses what is no list of names."""
    if isinstance(parameters, str) or not all(isinstance(n, str) for n in parameters):
        raise TypeError(f"{where}: parameters must be a list of names, got {parameters!r}")
    return list(parameters)


def selected(where: str, model: nn.Module, parameters: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name, a shared one once: the named ones, or the trainable ones of two or more dimensions.

    Raises:
        ValueError: for none, names that the model lacks, and several of one tensor.
    """
    if parameters is None:
        found = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() >= 2 and p.numel()}
        if not found:
            raise ValueError(
                f"{where}: model must have a trainable parameter of two or more dimensions, got none; name others by "
                "parameters="
            )
        return found
    every = dict(model.named_parameters(remove_duplicate=False))
    if missing := [n for n in parameters if n not in every]:
        raise ValueError(f"{where}: parameters must be of the model, got {missing[0]!r}")
    found = {n: every[n] for n in parameters}
    if len({id(p) for p in found.values()}) < len(parameters):
        raise ValueError(f"{where}: parameters must be different tensors, got {', '.join(parameters)}")
    return found


def trainable(where: str, model: nn.Module, parameters: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The same; at least one, and none that is frozen or empty.

    Raises:
        TypeError: for parameters that are no list of names.
        ValueError: as :func:`selected`, and for others.
    """
    names = None if parameters is None else check_names(where, parameters)
    if names == [] or (names is not None and len(set(names)) < len(names)):
        raise ValueError(
            f"{where}: parameters must be one or more different tensors, got {', '.join(names) or 'none'}"
        )
    found = selected(where, model, names)
    for name, p in found.items():
        if not p.requires_grad or not p.numel():
            kind = "an empty one" if p.requires_grad else "a frozen one"
            raise ValueError(f"{where}: parameters must be trainable and have elements, got {kind}, {name!r}")
    return found


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """[P], without gradient; float64 where one of them is, else float32."""
    double = any(t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if double else torch.float32
    return torch.cat([t.detach().reshape(-1).to(tensors[0].device, dtype) for t in tensors])


def finite(vector: Tensor) -> bool:
    """Whether all of at least one number are finite, in one pass that keeps nothing."""
    low, high = (float(end) for end in torch.aminmax(vector.detach()))  # NaN where one is
    return math.isfinite(low) and math.isfinite(high)
