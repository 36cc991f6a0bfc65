"""The model that a step trains, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lossmeta._batches import Output, call_model, prediction_of
from lossmeta._model_state import refuse_shards
from lossmeta.adalfl.step_jacobian import parameters_of

UNSCALED = ", whose gradients need no scaling (the backward passes here are none that a GradScaler would see)"


class TrainedModel:
    """A model, its trainable parameters by name, and the autocast that it runs under.

    Args:
        model: may be a ``DistributedDataParallel``.
        optimizer: of all its trainable parameters and no others.
        autocast: ``None`` or ``torch.bfloat16``.
        output: what of the model's output is the prediction, see :func:`~lossmeta._batches.prediction_of`.

    Attributes:
        wrapped: the model as it was given.
        plain: the module itself.
        names: the name of each trainable parameter.
        device: of the parameters.
        distributed: whether gradients are averaged over processes.
        group: these processes.
        dtype: of the autocast that the passes of this step run under, or ``None``.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, autocast: torch.dtype | None, output: Output = None
    ) -> None:
        _check_autocast("autocast", autocast)
        refuse_shards("AdaLFL", model, "wrap it in DistributedDataParallel instead")
        self.wrapped = model
        self.autocast = self.dtype = autocast
        self.output = output
        self.distributed = is_distributed(model)
        self.plain: nn.Module = model.module if self.distributed else model  # type: ignore[assignment]
        self.group: Any = model.process_group if self.distributed else None
        self.names = _names(self.plain, optimizer)
        self.device = next(iter(self.names)).device

    @contextmanager
    def step(self) -> Iterator[None]:
        """The passes of one step.

        Inside, an autocast context of the caller's is taken for the option of that dtype and ends: it would keep the
        cast weights of one pass for the next, which is after the step.
        """
        kind = self.device.type
        outer = torch.is_autocast_enabled(kind)
        self.dtype = self.autocast
        if outer and self.autocast is None:
            self.dtype = torch.get_autocast_dtype(kind)
            _check_autocast(f"the dtype of torch.autocast({kind!r}) around the step", self.dtype)
        if not outer:
            yield
            return
        with torch.autocast(kind, enabled=False):
            yield

    def train(self, inputs: Any) -> Tensor:
        """The prediction of the training pass, whose backward pass averages the gradients over processes."""
        return self._call(self.wrapped, inputs, self.dtype)

    def predict(self, inputs: Any) -> Tensor:
        return self._call(self.plain, inputs, self.dtype)

    def predict_by(self, other: nn.Module, inputs: Any) -> Tensor:
        """As another module of the same kind predicts."""
        return self._call(other, inputs, self.autocast)

    def predict_in_full_precision(self, inputs: Any) -> Tensor:
        """Without autocast."""
        return self._call(self.plain, inputs, None)

    def predict_at(self, state: dict[str, Tensor], inputs: Any) -> Tensor:
        """With other parameters and buffers in the place of its own."""
        return self._call(lambda *a, **k: functional_call(self.plain, state, a, k), inputs, self.dtype)

    def _call(self, model: Callable[..., Any], inputs: Any, autocast: torch.dtype | None) -> Tensor:
        # An outermost context ends with its cache of cast weights, but this one may be inside another, as may those
        # of the model.
        torch.clear_autocast_cache()
        if autocast is None:
            output = call_model(model, inputs)
        else:
            with torch.autocast(self.device.type, dtype=autocast):
                output = call_model(model, inputs)
        prediction = prediction_of("AdaLFL", output, self.output)
        if prediction.dtype == torch.float16:
            raise ValueError(f"AdaLFL: the model must run in float32 or in bfloat16{UNSCALED}, got float16")
        return prediction

    def for_losses(self, prediction: Tensor) -> Tensor:
        """The prediction in the precision of the losses: float32 under autocast, as its own losses have."""
        return prediction if self.dtype is None else prediction.float()

    @torch.no_grad()
    def take_buffers(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """Gives the model's buffers what :meth:`predict_at` left in its state.

        Args:
            before: the buffers in that state, by name.
            after: the state; a pass may have put others in their place, of other sizes too.
        """
        for name, copy in before.items():
            value = after[name]
            if value is copy:
                self.plain.get_buffer(name).copy_(value)
            else:
                owner, _, key = name.rpartition(".")
                self.plain.get_submodule(owner)._buffers[key] = value.detach()

    def averaged(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Over the processes of a DistributedDataParallel model, in one message."""
        present = [t for t in tensors if t is not None]
        if self.distributed and present:
            flat = torch.cat([t.flatten() for t in present])
            torch.distributed.all_reduce(flat, group=self.group)
            flat /= torch.distributed.get_world_size(self.group)
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

    def anywhere(self, found: bool) -> bool:
        """Whether it was found on any of the processes."""
        if not self.distributed:
            return found
        flag = torch.tensor(float(found), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)

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


def _check_autocast(argument: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype != torch.bfloat16:
        raise ValueError(f"AdaLFL: {argument} must be torch.bfloat16{UNSCALED}, got {dtype}")


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
