"""What both ways to differentiate an initialisation need: gradients of the inner steps, and products with theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lossmeta._batches import Batch, Loss, call_model
from lossmeta._checks import check_scalar
from lossmeta.adalfl.verification import BackendError

SAME = 1e-2  # of the gradient's norm


def gradient_of(
    loss: Loss, model: nn.Module
) -> tuple[Callable[[list[Tensor], Batch, bool], list[Tensor]], list[Tensor]]:
    """The gradient of the loss as a function of the model's parameters, and these; 0 for those that it leaves out."""
    model.train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("AdaLFL: make_model must return a model with trainable parameters, got one without")

    def gradient(at: list[Tensor], batch: Batch, create_graph: bool) -> list[Tensor]:
        state = dict(zip(named, at, strict=True))
        prediction = call_model(lambda *a, **k: functional_call(model, state, a, k), batch[0])
        value = loss(prediction, batch[1])
        check_scalar("AdaLFL", "loss", value, " (reduction='mean')")
        return _gradients(value, at, create_graph=create_graph)

    return gradient, list(named.values())


def validate(
    task_loss: Loss, model: nn.Module, theta: list[Tensor], batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    """The task loss and its gradient."""
    value = task_loss(call_model(model, batch[0]), batch[1])
    check_scalar("AdaLFL", "task_loss", value, " (reduction='mean')")
    return value, _gradients(value, theta)


def transposed(
    g: list[Tensor], inputs: list[Tensor], vectors: list[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    """(d g / d inputs)' vectors."""
    differentiable = [(x, v) for x, v in zip(g, vectors, strict=True) if x.requires_grad]
    if not differentiable:  # both the loss and the model are linear
        return [torch.zeros_like(p) for p in inputs]
    outputs, along = map(list, zip(*differentiable, strict=True))
    return _gradients(outputs, inputs, along, retain_graph=retain_graph)


def _gradients(outputs: Any, inputs: list[Tensor], vectors: Any = None, **options: Any) -> list[Tensor]:
    """Of what autograd returns several may be one tensor, expanded, or one of ``vectors``: not to be written to."""
    found = torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]


@torch.no_grad()
def check_repeated(first: list[Tensor], second: list[Tensor]) -> None:
    """Refuses a model whose passes are not one function: the derivative would be that of another step.

    Raises:
        BackendError: where the gradients differ by more than rounding in another order explains.
    """
    size, off = (
        float(torch.stack(torch._foreach_norm(v)).norm())
        for v in (first, list(torch._foreach_sub(second, first)))
    )
    if off > SAME * size:
        raise BackendError(
            f"AdaLFL: a repeated pass of an inner step gave another gradient, off by {off / max(size, 1e-30):.1g} of "
            "it: the model draws random numbers or keeps state where they cannot be replayed; take that out of the "
            'model, or in initialize choose method="implicit"'
        )


@torch.no_grad()
def descend(theta: list[Tensor], gradient: list[Tensor], rate: float) -> None:
    torch._foreach_sub_(theta, gradient, alpha=rate)


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
