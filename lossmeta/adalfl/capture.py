"""A step of the online learner as one CUDA graph: for small models launching the kernels takes longer than they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from lossmeta._model_state import RandomState

Step = Callable[[Any, Any], Sequence[Tensor]]


def check_learner_capturable(
    device: torch.device,
    distributed: bool,
    decides: bool,
    optimizer: Optimizer,
    meta_optimizer: Optimizer | None,
) -> list[Optimizer]:
    """The optimizers, where nothing of the step must be read by the host.

    Args:
        device: of the model.
        distributed: whether the model is in several processes.
        decides: whether something is decided by the values of a step.
        optimizer: of the model.
        meta_optimizer: of the loss; ``None`` where it has no parameters.
    """
    if device.type != "cuda":
        raise ValueError(
            f"OnlineLearner: capture=True needs the model on a CUDA device, got {device}; move it, or leave capture"
        )
    if distributed:
        raise ValueError("OnlineLearner: with capture=True model must not be a DistributedDataParallel")
    if meta_optimizer is None or decides:
        raise ValueError(
            "OnlineLearner: with capture=True the loss must have parameters, and learning_rate, min_slope, "
            "max_slope and guard, which decide on the host, must be left as they are"
        )
    check_capturable("optimizer", optimizer)
    check_capturable("meta_optimizer", meta_optimizer)
    return [optimizer, meta_optimizer]


def check_capturable(argument: str, optimizer: Optimizer) -> None:
    """Refuses an optimizer that reads from the device, or counts its steps on the host."""
    captures = type(optimizer) is SGD or (
        type(optimizer) in (Adam, AdamW) and all(group["capturable"] for group in optimizer.param_groups)
    )
    if not captures:
        raise ValueError(
            f"OnlineLearner: with capture=True {argument} must be SGD, or Adam or AdamW with capturable=True, "
            f"got {type(optimizer).__name__}"
        )
    if any(group.get("momentum") and group["dampening"] for group in optimizer.param_groups):
        # Undone, a first step leaves a momentum of 0, from which only one without dampening is again a first step.
        raise ValueError(f"OnlineLearner: with capture=True {argument} must have no dampening, got some")
    if any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        raise ValueError(
            f"OnlineLearner: with capture=True {argument} must have a number as lr, got a tensor"
        )


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element is, [] on the device."""
    tensors = [t for t in tensors if t.numel()]
    if (
        tensors and tensors[0].device.type == "cpu"
    ):  # where the largest takes five times as long as the length
        finite = torch.stack(torch._foreach_norm(tensors)).isfinite().all()
        if finite:
            return finite
    # The length may overflow for finite elements.
    return torch.stack(torch._foreach_norm(tensors, ord=math.inf)).isfinite().all()


@torch.no_grad()
def update_where_finite(
    optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], *others: Tensor
) -> Tensor:
    """A step of the optimizer that the device itself undoes where a gradient, or another value, is not finite.

    Returns:
        Whether it was taken, [].
    """
    present = [g for g in gradients if g is not None]
    if not present:
        return torch.zeros((), dtype=torch.bool, device=parameters[0].device)
    finite = all_finite([*others, *present])

    def state() -> dict[tuple[Tensor, str], Tensor]:
        values = ((p, name, v) for p in parameters for name, v in optimizer.state.get(p, {}).items())
        return {(p, name): v for p, name, v in values if isinstance(v, Tensor)}

    before = [(p, p.clone()) for p in parameters]
    earlier = {key: value.clone() for key, value in state().items()}
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()
    for p in parameters:
        p.grad = None
    # What the first step has made was 0 before, or is as good as 0: momentum without dampening.
    before += [(value, earlier.get(key, torch.zeros_like(value))) for key, value in state().items()]
    for value, old in before:
        value.copy_(torch.where(finite, value, old))
    return finite


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Sequence[Tensor]
    gradients: list[Tensor | None]


class CapturedStep:
    """``step(train_batch, valid_batch) -> tensors``, replayed as a CUDA graph after :attr:`WARM_UP` ordinary calls.

    Batches of another shape get a graph of their own. A learning rate that has changed, and state that was loaded, need
    a new one: they are numbers and addresses in the graph.

    Args:
        step: reads nothing from the device and draws no random numbers.
        parameters: whose ``.grad`` is left as the step leaves it.
        optimizers: that the step moves.
    """

    WARM_UP = 3

    def __init__(self, step: Step, parameters: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        self.step, self.parameters, self.optimizers = step, parameters, optimizers
        self.device = parameters[0].device
        self.stream = torch.cuda.Stream(self.device)
        self.options: Hashable = None
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, _Captured] = {}

    def __call__(self, train_batch: Any, valid_batch: Any) -> list[Tensor]:
        leaves, layout = tree_flatten((train_batch, valid_batch))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) != len(leaves) or any(t.device != self.device for t in tensors):
            raise ValueError(f"OnlineLearner: with capture=True batches must be tensors on {self.device}")
        if (options := self._options()) != self.options:
            self.options = options
            self.calls.clear()
            self.captured.clear()
        key = (str(layout), tuple((t.shape, t.dtype, t.stride()) for t in tensors))
        self.calls[key] = calls = self.calls.get(key, 0) + 1
        # Gradients and the graph of autograd keep to the stream that they were made on.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if calls <= self.WARM_UP:
                outputs = self._warm_up(train_batch, valid_batch)
            else:
                if key not in self.captured:
                    self.captured[key] = self._capture(tensors, layout)
                captured = self.captured[key]
                torch._foreach_copy_(captured.inputs, tensors)
                captured.graph.replay()
                for p, g in zip(self.parameters, captured.gradients, strict=True):
                    p.grad = g
                outputs = [o.clone() for o in captured.outputs]
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return outputs

    def _options(self) -> Hashable:
        """What a graph holds of the optimizers: numbers, and the addresses of parameters and state."""
        groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        numbers = tuple((k, str(v)) for _, group in groups for k, v in group.items() if k != "params")
        tensors = (
            t for o, group in groups for p in group["params"] for t in (p, *o.state.get(p, {}).values())
        )
        return numbers, tuple(t.data_ptr() for t in tensors if isinstance(t, Tensor))

    def _warm_up(self, train_batch: Any, valid_batch: Any) -> list[Tensor]:
        before = RandomState(self.device)
        outputs = list(self.step(train_batch, valid_batch))
        if not before.equals(RandomState(self.device)):
            raise ValueError(
                "OnlineLearner: with capture=True the model must draw no random numbers: a graph cannot draw those of "
                "dropout a second time. Use capture=False, or remove it; this step has been taken"
            )
        return outputs

    def _capture(self, tensors: list[Tensor], layout: Any) -> _Captured:
        inputs = [t.clone() for t in tensors]
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins batches, may go on.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            outputs = self.step(*tree_unflatten(inputs, layout))
        return _Captured(graph, inputs, outputs, [p.grad for p in self.parameters])
