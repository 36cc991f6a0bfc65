"""A loss on a whole data set, and its gradient, with the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lossmeta._batches import (
    Batch,
    Loss,
    Output,
    call_model,
    checked,
    checked_batches,
    prediction_of,
    samples,
)
from lossmeta._checks import check_scalar
from lossmeta._model_state import ModelState, evaluating
from lossmeta.ops._precision import accumulation_dtype


class DataSet:
    """A batch, or batches that start again where they end.

    Args:
        where: who asks, for errors.
        name: of the argument, for errors.
        data: the same; a DataLoader's own random generators are brought back after each pass.
        shared: whether somebody else runs through it meanwhile, which persistent workers do not bear.

    Attributes:
        length: number of batches; ``None`` of a single batch, and where it is not known.

    Raises:
        TypeError: for something else.
        ValueError: for an iterator, no batches, an empty one, and workers that would be taken from somebody else.
    """

    def __init__(self, where: str, name: str, data: Any, *, shared: bool) -> None:
        self.where, self.name = where, name
        self.data: Iterable[Any]
        if isinstance(data, (tuple, list)):
            self.data = checked_batches(where, name, data)
            several = isinstance(data, list) and isinstance(data[0], Sequence)
            self.length = len(data) if several else None
            return
        if isinstance(data, Iterator):
            raise ValueError(
                f"{where}: {name} must start again where it ends, got an iterator; give a batch, a list or a DataLoader"
            )
        if not isinstance(data, Iterable) or isinstance(data, (Tensor, str, Mapping)):
            raise TypeError(
                f"{where}: {name} must be a batch (inputs, target) or batches, got {type(data).__name__}"
            )
        if shared and getattr(data, "persistent_workers", False):
            raise ValueError(
                f"{where}: {name} must not have persistent workers, which do one pass at a time, got a DataLoader with "
                "them; give another loader of the same data"
            )
        self.data = data
        try:
            self.length = len(data)  # type: ignore[arg-type]
        except TypeError:
            self.length = None
        if self.length == 0:
            raise self._empty()

    def _empty(self) -> ValueError:
        return ValueError(
            f"{self.where}: {self.name} must hold at least one batch each time it is gone through, got none"
        )

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        with _generators_kept(self.data):
            for batch in self.data:
                count += 1
                yield checked(self.where, f"a batch of {self.name}", batch)
        if not count:
            raise self._empty()


@contextmanager
def _generators_kept(data: Iterable[Any]) -> Iterator[None]:
    """Random generators that a DataLoader or its samplers own."""
    owners = (
        [data, *(getattr(data, n, None) for n in ("sampler", "batch_sampler"))]
        if isinstance(data, DataLoader)
        else []
    )
    found = {id(g): g for g in (getattr(o, "generator", None) for o in owners)}.values()
    kept = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


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
