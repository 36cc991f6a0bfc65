"""How a meta-gradient is computed: three back-ends of one shape, equal up to documented error.

With the gradient w of the task loss in the training gradients, u = J w is the derivative of the prediction along w, and
the meta-gradient is the derivative of <slope, u> in the learned loss's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

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
