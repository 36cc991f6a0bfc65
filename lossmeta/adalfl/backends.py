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
from lossmeta._model_state import ModelState
from lossmeta.adalfl.channels_last import in_channels_last
from lossmeta.adalfl.learned_loss import LearnedLoss
from lossmeta.adalfl.trained_model import TrainedModel
from lossmeta.adalfl.verification import (
    BackendError,
    probe,
    why_not_agreeing,
    why_not_differentiable,
    why_not_replayed,
)

Vectors = dict[Tensor, Tensor]
"""A tensor of the same shape for each parameter."""


@dataclass
class TrainingPass:
    """A forward and backward pass of the training loss, which has left its gradients in ``.grad``.

    Attributes:
        inputs: of the model.
        start: buffers and random numbers before the pass.
        share: of the step's loss, 1 where the step has one batch.
        prediction: detached.
        loss: the learned loss, detached.
        slope: its derivative at the prediction, detached.
        mixed: what takes u to the meta-gradient; of :class:`DoubleBackward`, w.
    """

    inputs: Any
    start: ModelState
    share: float
    prediction: Tensor
    loss: Tensor
    slope: Tensor
    mixed: Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """A check of a meta-gradient, which is due in this step.

    Attributes:
        probes: number of random directions.
        seed: of these.
    """

    probes: int
    seed: int


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

    def train(self, inputs: Any, target: Tensor, start: ModelState, share: float = 1.0) -> TrainingPass:
        """The training pass, from which a meta-gradient can follow; it adds to the gradients.

        Args:
            inputs: of the model.
            target: of the loss.
            start: buffers and random numbers before the pass.
            share: of the step's loss.
        """
        return self.plain_pass(inputs, target, start, share, meta=True)

    def plain_pass(
        self, inputs: Any, target: Tensor, start: ModelState, share: float = 1.0, *, meta: bool = False
    ) -> TrainingPass:
        """An ordinary training pass; without ``meta`` no meta-gradient can follow."""
        prediction = self.model.train(inputs)
        value, slope, mixed = self.loss.differentiated(
            self.model.for_losses(prediction.detach()), target, meta
        )
        prediction.backward(_shared(slope, share).to(prediction.dtype))
        return TrainingPass(inputs, start, share, prediction.detach(), value, slope, mixed)

    def meta_gradient(
        self,
        trained: TrainingPass,
        w: Vectors,
        before: Vectors,
        size: Any,
        relaid: bool,
        kept: bool = True,
        check: Check | None = None,
    ) -> tuple[Sequence[Tensor | None], str | None]:
        """After the step, for each parameter of the loss, up to its sign; or what the check found wrong.

        Args:
            trained: what :meth:`train` returned.
            w: for each parameter that has moved; overwritten unless ``kept``.
            before: all parameters before the step.
            size: of all of them together, where ``needs_size``.
            relaid: whether the inputs may be given in channels-last layout.
            kept: whether w is needed again.
            check: what is to be checked in this step; then w is kept.
        """
        inputs = in_channels_last(trained.inputs) if relaid else trained.inputs
        u = self.push_forward(trained, inputs, w, before, size, kept, check is not None)
        if check and (reason := self._wrong(trained, w, before, u, check)):
            return (), reason
        return trained.mixed(_shared(u, trained.share).to(trained.slope.dtype)), None

    def _wrong(
        self, trained: TrainingPass, w: Vectors, before: Vectors, u: Tensor, check: Check
    ) -> str | None:
        """What is wrong, if the training pass cannot be repeated or u is not its J w."""
        trained.start.bring_back()
        with holding(w, [before[p] for p in w]), torch.enable_grad():
            prediction = self.model.predict(trained.inputs)
            reason = why_not_replayed(trained.prediction, prediction.detach())
            if reason:
                return reason
            probes = probe(prediction, list(w), list(w.values()), check.probes, check.seed)
        return why_not_agreeing(u, probes)

    def push_forward(
        self,
        trained: TrainingPass,
        inputs: Any,
        w: Vectors,
        before: Vectors,
        size: Any,
        kept: bool,
        look: bool,
    ) -> Tensor:
        """u = J w before the step, with the random numbers and buffers of the training pass.

        With ``look``, in the steps that are checked, it may take longer, to find out what is best for the others.
        """
        raise NotImplementedError

    def state(self) -> Any:
        """What it has found out about the model, to be saved."""
        return None

    def load(self, state: Any) -> None:
        """Takes what :meth:`state` gave."""


class DoubleBackward(Backend):
    """Exact: differentiates the training gradients, w times, in the loss's parameters.

    It needs a model that can be differentiated twice, and costs the graph of the training pass and a second backward
    pass. That is the least for a small model.
    """

    name = "double_backward"
    averages = False

    def train(self, inputs: Any, target: Tensor, start: ModelState, share: float = 1.0) -> TrainingPass:
        # The graph must not notice that parameters and buffers change: it is made of copies.
        model = self.model
        leaves: dict[Tensor, Tensor] = {p: p.detach().clone().requires_grad_() for p in model.names}
        buffers = {name: b.clone() for name, b in model.plain.named_buffers()}
        state = {**buffers, **{model.names[p]: leaf for p, leaf in leaves.items()}}
        prediction = model.predict_at(state, inputs)
        model.take_buffers(buffers, state)
        value, slope = self.loss.with_slope(model.for_losses(prediction.detach()), target, create_graph=True)
        shared = _shared(slope, share).to(prediction.dtype)
        gradients = torch.autograd.grad(
            prediction, list(leaves.values()), shared, create_graph=True, allow_unused=True
        )
        with_graph = dict(zip(model.names, gradients, strict=True))
        for p, g in with_graph.items():
            if g is not None and p.grad is None:
                p.grad = g.detach().clone()
            elif g is not None:
                p.grad += g.detach()

        def mixed(w: Vectors, check: Check | None) -> tuple[Sequence[Tensor | None], str | None]:
            along = [(g, w[p]) for p in w if (g := with_graph[p]) is not None]
            seen = [(g, x) for g, x in along if g.requires_grad]
            if not (seen and shared.requires_grad):  # no parameter of the loss changes them
                return [None] * len(self.loss.phi), None
            outputs, vectors = [g for g, _ in seen], [x for _, x in seen]
            if check:
                u = torch.autograd.grad(outputs, shared, vectors, retain_graph=True, allow_unused=True)[0]
                if reason := why_not_differentiable(u, shared, along):
                    return (), reason
            return torch.autograd.grad(outputs, self.loss.phi, vectors, allow_unused=True), None

        return TrainingPass(inputs, start, share, prediction.detach(), value, slope.detach(), mixed)

    def meta_gradient(
        self,
        trained: TrainingPass,
        w: Vectors,
        before: Vectors,
        size: Any,
        relaid: bool,
        kept: bool = True,
        check: Check | None = None,
    ) -> tuple[Sequence[Tensor | None], str | None]:
        result: tuple[Sequence[Tensor | None], str | None] = trained.mixed(w, check)
        return result


class ForwardMode(Backend):
    """Exact: differentiates the prediction along w in forward mode.

    It needs a model whose every operation has a forward-mode derivative, and costs a forward pass with tangents and the
    least memory.
    """

    name = "jvp"

    def push_forward(
        self,
        trained: TrainingPass,
        inputs: Any,
        w: Vectors,
        before: Vectors,
        size: Any,
        kept: bool,
        look: bool,
    ) -> Tensor:
        model = self.model
        trained.start.bring_back()
        state = {name: b.clone() for name, b in model.plain.named_buffers()}
        try:
            with forward_ad.dual_level():
                for p, name in model.names.items():
                    state[name] = forward_ad.make_dual(before[p], w[p]) if p in w else before[p]
                output = model.predict_at(state, inputs)
                u = forward_ad.unpack_dual(output).tangent
        except (RuntimeError, NotImplementedError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(f"the model has no forward-mode derivative ({first})") from error
        return torch.zeros_like(trained.prediction) if u is None else u


class FiniteDifference(Backend):
    """The difference of two predictions, a short way along w apart.

    It needs nothing of the model, compiled ones included. It costs one forward pass without a graph. A model without
    kinks gets two, for an error of second order, and under autocast there is one more, in full precision. How far apart
    they are is decided in the steps that are checked, by what a longer way changes.

    Attributes:
        central: whether it takes two passes.
        factor: of the distance, against that of a model that bends over a distance as long as its weights.
    """

    name = "finite_difference"
    needs_size = True

    def __init__(self, model: TrainedModel, loss: LearnedLoss) -> None:
        super().__init__(model, loss)
        self.central = not has_kinks(model.plain)
        self.factor = 1.0

    def push_forward(
        self,
        trained: TrainingPass,
        inputs: Any,
        w: Vectors,
        before: Vectors,
        size: Any,
        kept: bool,
        look: bool,
    ) -> Tensor:
        # Of the output itself: after the loss float32 would have cancelled. Rounding, eps / e of the output, then
        # costs as much as curvature, e or for two passes e^2.
        model, start, along = self.model, [before[p] for p in w], list(w.values())
        half = model.dtype is not None  # then the prediction is rounded too coarsely for a difference
        eps = torch.finfo(start[0].dtype if half else trained.prediction.dtype).eps
        # Weights may all be 0, and so may w: u is then 0.
        unit = size / norm(along, 1e-30) * eps ** (1 / 3 if self.central else 1 / 2)

        def at(step: Any, *, last: bool = False) -> Tensor:
            points = _scaled(along, step, in_place=last and not kept)
            torch._foreach_add_(points, start)
            trained.start.bring_back()
            with holding(w, points):
                return model.predict_in_full_precision(inputs)

        middle = trained.prediction
        if half and (look or not self.central):
            middle = at(0.0)

        def difference(step: Any, *, last: bool = False) -> Tensor:
            if not self.central:
                return (at(step, last=last) - middle) / step
            behind = at(-step)
            return (at(step, last=last) - behind) / (2 * step)

        if not look:
            return difference(unit * self.factor, last=True)
        step = unit * self.factor
        u = difference(step)
        better = self._better_factor(u, difference(4 * step), float(step), eps * _norm(middle))
        if 0.5 < better / self.factor < 2:
            return u
        self.factor = better
        return difference(unit * better, last=True)

    def _better_factor(self, u: Tensor, longer: Tensor, step: float, rounding: float) -> float:
        """The factor with which rounding and curvature cost least together.

        Relative to u, rounding costs r / e, and curvature a e^k, k = 2 for two passes and 1 for one; at four times the
        distance u is then off by (4^k - 1) a e^k more.
        """
        k = 2 if self.central else 1
        size, change = _norm(u), _norm(longer.double() - u.double())
        if not (0 < size < math.inf and change < math.inf and rounding > 0):
            return self.factor
        rounded = 2 * rounding / (step * size)
        curved = max(change / size - 1.25 * rounded, 0.1 * rounded) / (4**k - 1)
        return min(max(self.factor * (rounded / (k * curved)) ** (1 / (k + 1)), 1 / 256), 16.0)

    def state(self) -> Any:
        return self.factor

    def load(self, state: Any) -> None:
        self.factor = state


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
    """The back-end with which ``"auto"`` starts for a model, and why.

    An exact one where it costs at most 15 % more than finite differences. Measured, a step with forward mode costs 0.95
    to 1.15 times as much where those need two passes, and 1.14 to 1.4 times as much where they need one. The clock of
    the first step does not decide: runs would differ.
    """
    for module in model.modules():
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            return FiniteDifference.name, "the model is compiled"
        if isinstance(module, nn.RNNBase):
            return FiniteDifference.name, f"{type(module).__name__} has no forward-mode derivative"
    if has_kinks(model):
        return FiniteDifference.name, "for ReLU and max-pooling one forward pass costs least"
    return ForwardMode.name, "it is exact, and costs no more than two passes of finite differences"


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


def _scaled(tensors: list[Tensor], factor: Any, *, in_place: bool = False) -> list[Tensor]:
    if not in_place:
        return list(torch._foreach_mul(tensors, factor))
    torch._foreach_mul_(tensors, factor)
    return tensors


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _shared(tensor: Tensor, share: float) -> Tensor:
    return tensor if share == 1.0 else tensor * share


@contextmanager
def holding(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
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
