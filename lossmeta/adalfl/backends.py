"""How a meta-gradient is computed: three back-ends of one shape, equal up to documented error.

With the gradient w of the task loss in the training gradients, u = J w is the derivative of the prediction along w, and
the meta-gradient is the derivative of <slope, u> in the learned loss's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from lossmeta._checks import choice
from lossmeta._model_state import ModelState, copy_into
from lossmeta.adalfl.channels_last import in_channels_last
from lossmeta.adalfl.learned_loss import LearnedLoss
from lossmeta.adalfl.trained_model import TrainedModel, is_distributed

Vectors = dict[Tensor, Tensor]
"""A tensor of the same shape for each parameter."""


@dataclass
class TrainingPass:
    """A forward and backward pass of the training loss, which has left its gradients in ``.grad``.

    Attributes:
        inputs: of the model.
        start: buffers and random numbers before the pass.
        prediction: detached.
        loss: the learned loss, detached.
        slope: its derivative at the prediction, detached.
        mixed: what takes u to the meta-gradient; of :class:`DoubleBackward`, w.
    """

    inputs: Any
    start: ModelState
    prediction: Tensor
    loss: Tensor
    slope: Tensor
    mixed: Callable[[Any], Sequence[Tensor | None]]


class Backend:
    """What all back-ends share; this one knows the training pass only.

    Attributes:
        name: what users call it.
        averages: whether its gradients are averaged over the processes of a DistributedDataParallel model.
        needs_size: whether :meth:`meta_gradient` needs the norm of the parameters before the step.
    """

    name: ClassVar[str] = ""
    averages: ClassVar[bool] = True
    needs_size: ClassVar[bool] = False

    def __init__(self, model: TrainedModel, loss: LearnedLoss) -> None:
        self.model, self.loss = model, loss

    def train(self, inputs: Any, target: Tensor, start: ModelState) -> TrainingPass:
        """The training pass, from which a meta-gradient can follow."""
        return self.plain_pass(inputs, target, start, meta=True)

    def plain_pass(
        self, inputs: Any, target: Tensor, start: ModelState, *, meta: bool = False
    ) -> TrainingPass:
        """An ordinary training pass; without ``meta`` no meta-gradient can follow."""
        prediction = self.model.train(inputs)
        value, slope, mixed = self.loss.differentiated(prediction.detach(), target, meta)
        prediction.backward(slope.to(prediction.dtype))
        return TrainingPass(inputs, start, prediction.detach(), value, slope, mixed)

    def meta_gradient(
        self, trained: TrainingPass, w: Vectors, before: Vectors, size: Any, relaid: bool
    ) -> Sequence[Tensor | None]:
        """After the step, for each parameter of the loss, up to its sign.

        Args:
            trained: what :meth:`train` returned.
            w: for each parameter that has moved; may be overwritten.
            before: all parameters before the step.
            size: of the moved ones together, where ``needs_size``.
            relaid: whether the inputs may be given in channels-last layout.
        """
        inputs = in_channels_last(trained.inputs) if relaid else trained.inputs
        return trained.mixed(self.push_forward(trained, inputs, w, before, size))

    def push_forward(
        self, trained: TrainingPass, inputs: Any, w: Vectors, before: Vectors, size: Any
    ) -> Tensor:
        """u = J w before the step, with the random numbers and buffers of the training pass."""
        raise NotImplementedError


class DoubleBackward(Backend):
    """Exact: differentiates the training gradients, w times, in the loss's parameters.

    It needs a model that can be differentiated twice, and costs the graph of the training pass and a second backward
    pass. That is the least for a small model.
    """

    name = "double_backward"
    averages = False

    def train(self, inputs: Any, target: Tensor, start: ModelState) -> TrainingPass:
        # The graph must not notice that parameters and buffers change: it is made of copies.
        model = self.model
        leaves: dict[Tensor, Tensor] = {p: p.detach().clone().requires_grad_() for p in model.names}
        buffers = {name: b.clone() for name, b in model.plain.named_buffers()}
        state = {**buffers, **{model.names[p]: leaf for p, leaf in leaves.items()}}
        prediction = model.predict_at(state, inputs)
        # The model may have put others in their place.
        copy_into(model.plain.buffers(), [state[name] for name in buffers])
        value, slope = self.loss.with_slope(prediction.detach(), target, create_graph=True)
        gradients = torch.autograd.grad(
            prediction,
            list(leaves.values()),
            slope.to(prediction.dtype),
            create_graph=True,
            allow_unused=True,
        )
        with_graph = dict(zip(model.names, gradients, strict=True))
        for p, g in zip(leaves, gradients, strict=True):
            p.grad = None if g is None else g.detach().clone()

        def mixed(w: Vectors) -> Sequence[Tensor | None]:
            along = [with_graph[p] for p in w]
            return torch.autograd.grad(along, self.loss.phi, list(w.values()), allow_unused=True)

        return TrainingPass(inputs, start, prediction.detach(), value, slope.detach(), mixed)

    def meta_gradient(
        self, trained: TrainingPass, w: Vectors, before: Vectors, size: Any, relaid: bool
    ) -> Sequence[Tensor | None]:
        return trained.mixed(w)


class ForwardMode(Backend):
    """Exact: differentiates the prediction along w in forward mode.

    It needs a model whose every operation has a forward-mode derivative, and costs a forward pass with tangents and the
    least memory.
    """

    name = "jvp"

    def push_forward(
        self, trained: TrainingPass, inputs: Any, w: Vectors, before: Vectors, size: Any
    ) -> Tensor:
        model, start = self.model, trained.start
        names = [name for name, _ in model.plain.named_buffers()]
        state = {name: b.clone() for name, b in zip(names, start.buffers, strict=True)}
        start.random.bring_back()
        with forward_ad.dual_level():
            for p, name in model.names.items():
                state[name] = forward_ad.make_dual(before[p], w[p]) if p in w else before[p]
            output = model.predict_at(state, inputs)
            u = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(trained.prediction) if u is None else u


class FiniteDifference(Backend):
    """The difference of two predictions, a short way along w apart.

    It needs nothing of the model, compiled ones included. It costs one forward pass without a graph. A model without
    kinks gets two, for an error of second order, and under autocast there is one more, in full precision.
    """

    name = "finite_difference"
    needs_size = True

    def __init__(self, model: TrainedModel, loss: LearnedLoss) -> None:
        super().__init__(model, loss)
        self.central = not has_kinks(model.plain)

    def push_forward(
        self, trained: TrainingPass, inputs: Any, w: Vectors, before: Vectors, size: Any
    ) -> Tensor:
        model, prediction = self.model, trained.prediction
        # Of the output itself: after the loss float32 would have cancelled. Rounding, eps / e of the output, then
        # costs as much as curvature, e or for two passes e^2.
        start, moved = [before[p] for p in w], list(w.values())
        eps = torch.finfo(prediction.dtype if model.autocast is None else start[0].dtype).eps
        # Weights may all be 0, and so may w: u is then 0.
        step = size * eps ** (1 / 3 if self.central else 1 / 2) / norm(moved, 1e-30)
        torch._foreach_mul_(moved, step)

        def at(points: Iterable[Tensor]) -> Tensor:
            trained.start.bring_back()
            with _holding(w, points):
                return model.predict_in_full_precision(inputs)

        if self.central:
            behind = at(torch._foreach_sub(start, moved))
        else:  # under autocast the prediction is rounded too coarsely for a difference
            behind = prediction if model.autocast is None else at(start)
        torch._foreach_add_(moved, start)
        return (at(moved) - behind) / (2 * step if self.central else step)


BACKENDS: dict[str, type[Backend]] = {
    kind.name: kind for kind in (DoubleBackward, ForwardMode, FiniteDifference)
}


def make_backend(name: str, model: TrainedModel, loss: LearnedLoss) -> tuple[Backend, str]:
    """The back-end of this name, and why it is that one."""
    kind, reason = choice("AdaLFL", "backend", name, {"auto": None, **BACKENDS}), "as asked for"
    if kind is None:
        name, reason = choose_backend(model.wrapped)
        kind = BACKENDS[name]
    if model.distributed and not kind.averages:
        others = " or ".join(repr(other.name) for other in BACKENDS.values() if other.averages)
        raise ValueError(
            f"AdaLFL: backend must be {others} for a DistributedDataParallel model, whose gradients are averaged only "
            f"in its own backward pass, got {name!r}"
        )
    return kind(model, loss), reason


def choose_backend(model: nn.Module) -> tuple[str, str]:
    """The back-end that ``"auto"`` takes for a model, and why."""
    if is_distributed(model):
        return FiniteDifference.name, "the model is wrapped in DistributedDataParallel"
    for module in model.modules():
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            return FiniteDifference.name, "the model is compiled"
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            return FiniteDifference.name, f"{type(module).__name__} has no forward-mode derivative"
        if isinstance(module, nn.modules.conv._ConvNd):
            return FiniteDifference.name, "for convolutions one forward pass costs least"
    if has_kinks(model):
        return FiniteDifference.name, "for ReLU and max-pooling one forward pass costs least"
    return DoubleBackward.name, "the model is small and exactness is cheap"


# Piecewise linear, where a second pass of finite differences gains nothing.
_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def has_kinks(model: nn.Module) -> bool:
    return any(isinstance(m, _KINKED) for m in model.modules())


def norm(tensors: list[Tensor], least: float) -> Any:
    """Of all elements, but not below ``least``: a number, or on a GPU, where reading it would wait, a tensor."""
    norms = torch._foreach_norm(tensors)
    if norms[0].device.type != "cpu":
        return torch.stack(norms).norm().clamp(min=least)
    return max(math.hypot(*map(float, norms)), least)


@contextmanager
def _holding(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Within, the parameters have other values, wherever the model keeps them.

    It may keep them tied, parametrized, or in lists of its own as recurrent layers do.
    """
    parameters = list(parameters)
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value
