"""Where a loss keeps the values that adapt, and what guards them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def register(module: nn.Module, name: str, value: Tensor, learnable: bool) -> None:
    """Keeps ``value`` as a parameter, or as a buffer, which ``module.parameters()`` leaves out."""
    if learnable:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def mark_learned(loss: nn.Module) -> None:
    """Tells a loss, and all that it is made of, that it is being learned: a call warns no more."""
    for module in loss.modules():
        if getattr(module, "_unlearned", False):
            module._unlearned = False  # type: ignore[assignment]


@torch.no_grad()
def project(loss: nn.Module) -> None:
    """Brings the parameters of a loss, and of all that it is made of, back into their ranges by their ``project_``."""
    for module in loss.modules():
        method = getattr(module, "project_", None)
        if method is not None:
            method()


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its ``forward``."""
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def check_not_minimized(loss: nn.Module, optimizer: Optimizer) -> None:
    """Refuses a training optimizer that would minimise a loss over the loss's own parameters.

    A loss that lowers itself says nothing about the model any more. It happens where the optimizer takes the parameters
    of a module that contains both, such as a ``LightningModule`` with its criterion. Frozen parameters are left out.

    Args:
        loss: any module.
        optimizer: the model's.

    Raises:
        ValueError: naming the parameters that it found.

    Example:
        >>> model, loss = torch.nn.Linear(4, 3), lossmeta.losses.LossNetwork(residual="cross_entropy")
        >>> check_not_minimized(loss, torch.optim.SGD(model.parameters(), lr=0.1))
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    found = [name for name, p in loss.named_parameters() if p.requires_grad and p in held]
    if found:
        raise ValueError(
            f"check_not_minimized: optimizer must not hold parameters of the loss, got {found}; make it of the model's "
            "alone, or freeze the loss: loss.requires_grad_(False)"
        )
