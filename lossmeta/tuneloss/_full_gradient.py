"""A loss on a whole data set, and its gradient, with the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Loss, Output, call_model, prediction_of, samples
from lossmeta._checks import check_scalar
from lossmeta._model_state import ModelState, evaluating
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.tuneloss._data_set import DataSet


class FullGradient:
    """The mean of a loss over the samples of a data set, and its gradient.

    Args:
        where: who asks, for errors.
        model: is in evaluation mode meanwhile. Mode, buffers, random numbers and ``.grad`` are as before afterwards.
        task_loss: ``task_loss(prediction, target)``, a mean over samples.
        output: what of the model's output is the prediction.
    """

    def __init__(self, where: str, model: nn.Module, task_loss: Loss, output: Output) -> None:
        self.where, self.model, self.task_loss, self.output = where, model, task_loss, output

    def __call__(self, tensors: Sequence[Tensor], *data: DataSet) -> list[tuple[float, list[Tensor]]]:
        """Loss and gradient for each data set; in the precision of the tensors, float32 at least.

        Args:
            tensors: parameters of the model; the gradient of a frozen one is zero.
            data: to run through.
        """
        device = tensors[0].device
        state = ModelState(self.model, device)
        with ExitStack() as stack:
            for context in (
                state.kept(),
                evaluating(self.model),
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                stack.enter_context(context)
            if any(isinstance(m, nn.RNNBase) for m in self.model.modules()):
                # cuDNN's have no gradient in evaluation mode.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            return [self._mean(list(tensors), d, device) for d in data]

    def _mean(self, tensors: list[Tensor], data: DataSet, device: torch.device) -> tuple[float, list[Tensor]]:
        total, count = 0.0, 0
        sums = [torch.zeros_like(t, dtype=accumulation_dtype(t.dtype)) for t in tensors]
        for batch in data:
            inputs, target = _moved(batch, device)
            prediction = prediction_of(self.where, call_model(self.model, inputs), self.output)
            loss = self.task_loss(prediction, target)
            if not isinstance(loss, Tensor):
                raise TypeError(f"{self.where}: task_loss must give a tensor, got {type(loss).__name__}")
            check_scalar(self.where, "task_loss", loss, hint=", a mean over samples")
            number = samples(target)
            moving = [i for i, t in enumerate(tensors) if t.requires_grad]
            if moving and loss.requires_grad:
                found = torch.autograd.grad(loss, [tensors[i] for i in moving], allow_unused=True)
                for i, g in zip(moving, found, strict=True):
                    if g is not None:
                        sums[i].add_(g.to(sums[i].dtype), alpha=number)
            total += number * float(loss.detach())
            count += number
        for s in sums:
            s /= count
        return total / count, sums


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on the model's device, where a DataLoader leaves them on the CPU."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_moved(v, device) for v in value)
    return value
