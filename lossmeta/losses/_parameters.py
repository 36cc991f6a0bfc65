"""Where a loss keeps the values that adapt."""

from __future__ import annotations

from torch import Tensor, nn


def register(module: nn.Module, name: str, value: Tensor, learnable: bool) -> None:
    """Keeps ``value`` as a parameter, or as a buffer, which ``module.parameters()`` leaves out."""
    if learnable:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)
