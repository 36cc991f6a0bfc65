"""One training step, and the derivative of what it achieved in what its loss has learned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._batches import Batch, Loss
from lossmeta._checks import check_scalar
from lossmeta._model_state import ModelState, is_capturing
from lossmeta.adalfl.backends import TrainingPass, make_backend, norm
from lossmeta.adalfl.channels_last import ChannelsLast, in_channels_last
from lossmeta.adalfl.clipping import Clipping
from lossmeta.adalfl.learned_loss import LearnedLoss
from lossmeta.adalfl.learned_rate import LearnedRates
from lossmeta.adalfl.step_jacobian import StepJacobian, parameters_of
from lossmeta.adalfl.trained_model import TrainedModel


@dataclass
class MetaGradient:
    """What one training step has shown.

    Attributes:
        loss: the learned loss on the training batch, before the step.
        task_loss: the task loss on the validation batch, after it.
        gradients: of ``task_loss``, one per parameter of the loss; ``None`` where it does not depend on it.
        learning_rate_gradients: of ``task_loss``, one per group of the optimizer; empty unless asked for.
        slope_ratio: mean absolute slope of the learned loss over that of the task loss, at the training batch: how much
            of a gain is only a larger learning rate. ``None`` unless asked for.
        backend: what computed it.
        nearly_nothing: whether the step hardly depends on the size of the gradient, so that nearly nothing can be
            learned from it: the first one of an adaptive optimizer.
    """

    loss: Tensor
    task_loss: Tensor
    gradients: list[Tensor | None]
    learning_rate_gradients: list[Tensor]
    slope_ratio: Tensor | None
    backend: str
    nearly_nothing: bool


@dataclass(frozen=True)
class StepOptions:
    """What :func:`meta_gradient` and :class:`OnlineLearner` hand on to the step.

    Attributes:
        backend: how the meta-gradient is computed, see :func:`meta_gradient`.
        clip_norm: largest norm of the whole gradient.
        clip_value: largest absolute value of an element of the gradient.
        approximate: take the step of an unknown optimizer for ``lr * g``.
        learning_rates: also differentiate with respect to the learning rates of the optimizer's groups.
        autocast: dtype under which the model runs, ``torch.bfloat16``.
        log_slope: whether to report the slope ratio.
    """

    backend: str = "auto"
    clip_norm: float | None = None
    clip_value: float | None = None
    approximate: bool = False
    learning_rates: bool = False
    autocast: torch.dtype | None = None
    log_slope: bool = False


def meta_gradient(
    model: nn.Module,
    optimizer: Optimizer,
    loss: nn.Module,
    task_loss: Loss,
    train_batch: Batch,
    valid_batch: Batch,
    *,
    backend: str = "auto",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    approximate: bool = False,
    learning_rates: bool = False,
) -> MetaGradient:
    r"""Takes one training step with ``loss`` and differentiates what it achieved (AdaLFL, Eq. 5 to 9).

    For :math:`\theta' = \theta - \mathrm{step}(g)`, :math:`g = \partial_\theta \mathcal M_\phi(y, f_\theta(x))`, with
    :math:`v = \nabla \mathcal L_T(\theta')` on the validation batch,
    :math:`w = (\partial\,\mathrm{step}/\partial g)^\top v` and :math:`u = J_\theta f\, w`,

    .. math:: \frac{\partial \mathcal L_T(\theta')}{\partial \phi} =
              - \frac{\partial}{\partial \phi} \left\langle \frac{\partial \mathcal M_\phi}{\partial f}, u \right\rangle

    so that only the loss needs second derivatives. Weights, optimizer state, buffers and random state end as one plain
    training step leaves them; if anything fails, as they were.

    Args:
        model: called as ``model(inputs)``, or ``model(*inputs)`` and ``model(**inputs)`` for a sequence or mapping.
        optimizer: of all the model's trainable parameters and no others; SGD, Adam, AdamW, RMSprop or Adagrad.
        loss: module ``loss(prediction, target) -> []`` with the parameters :math:`\phi`.
        task_loss: function of the same arguments, what the validation batch is judged by.
        train_batch: inputs and target of the step.
        valid_batch: inputs and target of the task loss.
        backend: how :math:`u` is computed. ``"double_backward"``: exact, through the graph of the training step.
            ``"jvp"``: exact, by forward-mode differentiation; least memory. ``"finite_difference"``: one forward pass
            more, or two where the model has no ReLU or max-pooling; also for models that forward mode does not know,
            such as compiled ones. Its relative error in float32 is about 1e-3, with two passes 1e-4. Under autocast it
            computes in float32, with one pass more; a model of bfloat16 weights costs it a tenth and more. ``"auto"``:
            see :func:`choose_backend`.
        clip_norm: largest norm of the whole gradient; larger ones are scaled down.
        clip_value: largest absolute value of an element of the gradient.
        approximate: take the step of an optimizer not named above for ``lr * g``.
        learning_rates: also differentiate with respect to the learning rates of the optimizer's groups.

    Raises:
        ValueError: for a model and an optimizer whose parameters differ, a loss of the wrong shape, and a prediction in
            float16: a ``GradScaler`` would not see these backward passes. bfloat16 needs none.
        TypeError: for an optimizer of another kind, and a prediction that is no tensor.
        DivergedError: if the learned loss or its slope is not finite, before the step.

    Example:
        >>> model, loss = torch.nn.Linear(4, 3), lossmeta.losses.LossNetwork()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> result = meta_gradient(model, optimizer, loss, torch.nn.functional.cross_entropy, *batches)
        >>> [g.shape for g in result.gradients]
        [torch.Size([40, 2]), torch.Size([40, 40]), torch.Size([1, 40])]
    """
    options = StepOptions(backend, clip_norm, clip_value, approximate, learning_rates)
    result = DifferentiableStep(model, optimizer, loss, task_loss, options)(train_batch, valid_batch)
    if result.nearly_nothing:
        warnings.warn(
            f"AdaLFL: the first step of {type(optimizer).__name__} hardly depends on the size of the gradient, so that "
            "nearly nothing is learned from it; start with SGD, or let the optimizer take some steps first",
            stacklevel=2,
        )
    return result


class DifferentiableStep:
    """:func:`meta_gradient` as an object that is called once per training step.

    Attributes:
        backend: what computes the meta-gradient.
        reason: why it is that one.
        model: what is trained.
        loss: what is learned.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: nn.Module,
        task_loss: Loss,
        options: StepOptions | None = None,
    ) -> None:
        self.options = options = options or StepOptions()
        self.optimizer, self.task_loss = optimizer, task_loss
        self.clipping = Clipping(options.clip_norm, options.clip_value)
        self.rates = LearnedRates(optimizer)
        self.model = TrainedModel(model, optimizer, options.autocast)
        self.loss = LearnedLoss(loss, self.model.device)
        self.backend, self.reason = make_backend(options.backend, self.model, self.loss)
        self.channels_last = ChannelsLast(self.model)
        # Kept from step to step: memory comes page by page.
        self._before: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in self.model.names}

    def __call__(self, train_batch: Batch, valid_batch: Batch) -> MetaGradient:
        model, (inputs, target) = self.model, train_batch
        may_relay = self.channels_last.accepts(inputs)
        model.check_parameters(self.optimizer)
        start = ModelState(model.plain, model.device)
        capturing = is_capturing(model.device)  # then nothing runs yet, nor has to be undone
        saved = {} if capturing else _copied_state(self.optimizer)
        stepped = False
        try:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                trained = self.backend.train(inputs, target, start)
            ratio = self._slope_ratio(trained, target)
            with torch.no_grad():
                jacobian = StepJacobian(self.optimizer, approximate=self.options.approximate)
                moved = [p for p, *_ in jacobian.stepped]
                clipped = self.clipping([p.grad for p in moved if p.grad is not None])
                torch._foreach_copy_(list(self._before.values()), list(self._before))
                before = [self._before[p] for p in moved]
                # Now, while the copies are in the cache.
                size = norm(before, 1e-3) if self.backend.needs_size else None
                stepped = True
                self.optimizer.step()
                after = ModelState(model.plain, model.device)
                with after.kept():
                    # In another layout random numbers would fall elsewhere.
                    relaid = may_relay and start.random.equals(after.random)
                    task_value, v = self._validate(*valid_batch, moved, relaid)
                    rates = self.rates.gradients(v, jacobian, before) if self.options.learning_rates else []
                    products, rate = jacobian.products(v, before)
                    w = dict(zip(moved, clipped.transposed(products), strict=True))
                    phi: Sequence[Tensor | None] = ()
                    if self.loss.phi:  # else only the learning rate is learned
                        phi = self.backend.meta_gradient(trained, w, self._before, size, relaid)
                    # All behind w is linear in it: a factor of all its elements can wait. Not in place: autograd may
                    # give one tensor to several parameters.
                    results = model.averaged([None if g is None else g * -rate for g in phi])
        except BaseException:
            if not capturing:
                if stepped:
                    self._step_back(saved)
                start.bring_back()
            raise
        nearly_nothing = jacobian.learns_nearly_nothing
        return MetaGradient(
            trained.loss, task_value, results, rates, ratio, self.backend.name, nearly_nothing
        )

    def plain_step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """A training step without a meta-gradient: the learned loss, and the slope ratio if asked for."""
        model, (inputs, target) = self.model, batch
        model.check_parameters(self.optimizer)
        start = ModelState(model.plain, model.device)
        try:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                trained = self.backend.plain_pass(inputs, target, start)
            ratio = self._slope_ratio(trained, target)
            self.clipping([p.grad for p, _ in parameters_of(self.optimizer) if p.grad is not None])
        except BaseException:
            start.bring_back()
            raise
        self.optimizer.step()
        return trained.loss, ratio

    def _validate(
        self, inputs: Any, target: Tensor, moved: list[Tensor], relaid: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The task loss after the step and its gradients."""
        with torch.enable_grad():
            prediction = self.model.predict(in_channels_last(inputs) if relaid else inputs)
            value = self.task_loss(prediction, target)
            check_scalar("AdaLFL", "task_loss", value)
            v = torch.autograd.grad(value, moved, allow_unused=True)
        filled = _writable([torch.zeros_like(p) if g is None else g for p, g in zip(moved, v, strict=True)])
        return value.detach(), self.model.averaged(filled)  # type: ignore[return-value]

    def _slope_ratio(self, trained: TrainingPass, target: Tensor) -> Tensor | None:
        if not self.options.log_slope:
            return None
        with torch.enable_grad():
            f = trained.prediction.detach().requires_grad_()
            (plain,) = torch.autograd.grad(self.task_loss(f, target), f)
        return trained.slope.abs().mean() / plain.abs().mean()

    @torch.no_grad()
    def _step_back(self, saved: dict[Tensor, Any]) -> None:
        torch._foreach_copy_(list(self._before), list(self._before.values()))
        self.optimizer.state.clear()
        self.optimizer.state.update(saved)


def _copied_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {
        p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        for p, state in optimizer.state.items()
    }


def _writable(tensors: list[Tensor]) -> list[Tensor]:
    """The same values: autograd may hand one tensor to several parameters, or an expanded one."""
    seen: set[int] = set()
    for i, t in enumerate(tensors):
        if 0 in t.stride() or t.untyped_storage().data_ptr() in seen:
            tensors[i] = t = t.clone(memory_format=torch.contiguous_format)
        seen.add(t.untyped_storage().data_ptr())
    return tensors
