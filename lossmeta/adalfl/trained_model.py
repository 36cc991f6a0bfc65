"""The model that a step trains, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lossmeta._batches import call_model
from lossmeta.adalfl.step_jacobian import parameters_of

UNSCALED = ", whose gradients need no scaling (the backward passes here are none that a GradScaler would see)"


class TrainedModel:
    """A model, its trainable parameters by name, and the autocast that it runs under.

    Args:
        model: may be a ``DistributedDataParallel``.
        optimizer: of all its trainable parameters and no others.
        autocast: ``None`` or ``torch.bfloat16``.

    Attributes:
        wrapped: the model as it was given.
        plain: the module itself.
        names: the name of each trainable parameter.
        device: of the parameters.
        distributed: whether gradients are averaged over processes.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, autocast: torch.dtype | None) -> None:
        if autocast is not None and autocast != torch.bfloat16:
            raise ValueError(f"AdaLFL: autocast must be torch.bfloat16{UNSCALED}, got {autocast}")
        self.wrapped = model
        self.autocast = autocast
        self.distributed = is_distributed(model)
        self.plain: nn.Module = model.module if self.distributed else model  # type: ignore[assignment]
        self.names = _names(self.plain, optimizer)
        self.device = next(iter(self.names)).device

    def train(self, inputs: Any) -> Tensor:
        """The prediction of the training pass, whose backward pass averages the gradients over processes."""
        return self._call(self.wrapped, inputs, self.autocast)

    def predict(self, inputs: Any) -> Tensor:
        return self._call(self.plain, inputs, self.autocast)

    def predict_in_full_precision(self, inputs: Any) -> Tensor:
        """Without autocast."""
        return self._call(self.plain, inputs, None)

    def predict_at(self, state: dict[str, Tensor], inputs: Any) -> Tensor:
        """With other parameters and buffers in the place of its own."""
        return self._call(lambda *a, **k: functional_call(self.plain, state, a, k), inputs, self.autocast)

    def _call(self, model: Callable[..., Any], inputs: Any, autocast: torch.dtype | None) -> Tensor:
        with nullcontext() if autocast is None else torch.autocast(self.device.type, dtype=autocast):
            output = call_model(model, inputs)
        if not isinstance(output, Tensor):
            raise TypeError(f"AdaLFL: the model must return a tensor, got {type(output).__name__}")
        if output.dtype == torch.float16:
            raise ValueError(f"AdaLFL: the model must run in float32 or in bfloat16{UNSCALED}, got float16")
        return output

    def averaged(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Over the processes of a DistributedDataParallel model, in one message."""
        present = [t for t in tensors if t is not None]
        if self.distributed and present:
            flat = torch.cat([t.flatten() for t in present])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for t, part in zip(present, flat.split([t.numel() for t in present]), strict=True):
                t.copy_(part.view_as(t))
        return list(tensors)

    def mean(self, value: Tensor) -> Tensor:
        """Over the processes; the value itself where there is one."""
        if not self.distributed:
            return value
        value = value.clone()
        self.averaged([value])
        return value

    def check_parameters(self, optimizer: Optimizer) -> None:
        """Refuses what has been frozen or unfrozen since, and hooks, whose effect on a gradient is not known."""
        for p, _ in parameters_of(optimizer):
            if p.requires_grad != (p in self.names):
                change = "unfrozen" if p.requires_grad else "frozen"
                raise ValueError(
                    "AdaLFL: the model's trainable parameters must stay the same, got one of shape "
                    f"{list(p.shape)} that was {change} since; make a new learner"
                )
            if p._backward_hooks or p._post_accumulate_grad_hooks:  # type: ignore[attr-defined]
                raise ValueError(
                    "AdaLFL: the model's parameters must have no gradient hooks, whose derivative is not known, got "
                    f"one on {self.names.get(p, 'a frozen parameter')}; to clip, use clip_norm or clip_value"
                )


def is_distributed(model: nn.Module) -> bool:
    return isinstance(model, DistributedDataParallel)


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """The name of each parameter of the optimizer, which are those of the model."""
    named: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    owned = {p for p, _ in parameters_of(optimizer)}
    for p, name in named.items():
        if p not in owned:
            raise ValueError(
                f"AdaLFL: the optimizer must have all trainable parameters of the model, but {name} is missing; "
                "add it, or freeze it with requires_grad_(False)"
            )
    for p in owned:
        if p.requires_grad and p not in named:
            raise ValueError(
                "AdaLFL: the optimizer must have parameters of the model only, got another one of shape "
                f"{list(p.shape)}; the loss needs an optimizer of its own"
            )
    if not named:
        raise ValueError("AdaLFL: the model must have trainable parameters, got none")
    return named
