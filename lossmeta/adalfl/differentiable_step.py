"""The derivative of a validation loss through one training step, with respect to what the training loss has learned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lossmeta.adalfl._batches import call_model
from lossmeta.adalfl._capture import is_capturing
from lossmeta.adalfl._state import cloned, copy_back, random_state, same, set_random_state
from lossmeta.adalfl.step_jacobian import StepJacobian, parameters_of

Batch = tuple[Any, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Mixed = Callable[[Any], Sequence[Tensor | None]]

BACKENDS = ("auto", "double_backward", "jvp", "finite_difference")


class DivergedError(RuntimeError):
    """The learned loss or its slope is not finite; the training step was not taken."""


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
    """

    loss: Tensor
    task_loss: Tensor
    gradients: list[Tensor | None]
    learning_rate_gradients: list[Tensor]
    slope_ratio: Tensor | None
    backend: str


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
            such as compiled ones. Its relative error in float32 is about 1e-3, with two passes 1e-4; under autocast
            it computes in float32, with one pass more, but a model of bfloat16 weights costs it a tenth and more.
            ``"auto"``: see :func:`choose_backend`.
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
    step = DifferentiableStep(
        model,
        optimizer,
        loss,
        task_loss,
        backend=backend,
        clip_norm=clip_norm,
        clip_value=clip_value,
        approximate=approximate,
        learning_rates=learning_rates,
    )
    result = step(train_batch, valid_batch)
    if step.learned_nearly_nothing:
        warnings.warn(
            f"AdaLFL: the first step of {type(optimizer).__name__} hardly depends on the size of the gradient, so that "
            "nearly nothing is learned from it; start with SGD, or let the optimizer take some steps first",
            stacklevel=2,
        )
    return result


def choose_backend(model: nn.Module) -> tuple[str, str]:
    """The back-end that ``"auto"`` takes for a model, and why."""
    if isinstance(model, DistributedDataParallel):
        return "finite_difference", "the model is wrapped in DistributedDataParallel"
    for module in model.modules():
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            return "finite_difference", "the model is compiled"
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            return "finite_difference", f"{type(module).__name__} has no forward-mode derivative"
        if isinstance(module, nn.modules.conv._ConvNd):
            return "finite_difference", "for convolutions one forward pass costs least"
    if _has_kinks(model):
        return "finite_difference", "for ReLU and max-pooling one forward pass costs least"
    return "double_backward", "the model is small and exactness is cheap"


class DifferentiableStep:
    """:func:`meta_gradient` as an object that is called once per training step; it keeps its buffers."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: nn.Module,
        task_loss: Loss,
        *,
        backend: str = "auto",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        approximate: bool = False,
        learning_rates: bool = False,
        autocast: torch.dtype | None = None,
        log_slope: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(
                f"AdaLFL: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
            )
        if autocast is not None and autocast != torch.bfloat16:
            raise ValueError(f"AdaLFL: autocast must be torch.bfloat16{_UNSCALED}, got {autocast}")
        for name, bound in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if bound is not None and not bound > 0:
                raise ValueError(f"AdaLFL: {name} must be positive, got {bound}")
        self.reason = "as asked for"
        if backend == "auto":
            backend, self.reason = choose_backend(model)
        self.backend = backend
        self.model, self.optimizer, self.loss, self.task_loss = model, optimizer, loss, task_loss
        self.clip_norm, self.clip_value, self.approximate = clip_norm, clip_value, approximate
        self.learning_rates = learning_rates
        self.autocast = autocast
        self.log_slope = log_slope
        self.distributed = isinstance(model, DistributedDataParallel)
        if self.distributed and self.backend == "double_backward":
            raise ValueError(
                "AdaLFL: backend must be 'jvp' or 'finite_difference' for a DistributedDataParallel model, whose "
                "gradients are averaged only in its own backward pass, got 'double_backward'"
            )
        self.plain: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.phi: list[Tensor] = [p for p in loss.parameters() if p.requires_grad]
        self.names = _names(self.plain, optimizer)
        self.device = next(iter(self.names)).device
        self.central = not _has_kinks(self.plain)
        self.learned_nearly_nothing = False
        self._spatial: bool | None = None  # whether it may run in channels-last layout: not yet known
        self._before: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in self.names}

    # ---- One step.

    def __call__(self, train_batch: Batch, valid_batch: Batch) -> MetaGradient:
        inputs, target = train_batch
        if self._spatial is None:
            self._spatial = self._accepts_channels_last(inputs)
        self._check_parameters()
        random, buffers = random_state(self.device), cloned(self.plain.buffers())
        capturing = is_capturing(self.device)  # then nothing runs yet, nor has to be undone
        saved = {} if capturing else _copied_state(self.optimizer)
        stepped = False
        try:
            prediction, value, slope, mixed = self._train(inputs, target)
            ratio = self._slope_ratio(prediction, target, slope)
            with torch.no_grad():
                jacobian = StepJacobian(self.optimizer, approximate=self.approximate)
                self.learned_nearly_nothing = jacobian.learns_nearly_nothing
                moved = [p for p, *_ in jacobian.stepped]
                self._clip(moved)
                torch._foreach_copy_(list(self._before.values()), list(self._before))
                before = [self._before[p] for p in moved]
                if self.backend == "finite_difference":  # now, while the copies are in the cache
                    self._size = _norm(before, 1e-3)
                stepped = True
                self.optimizer.step()
                after = random_state(self.device)
                with self._undone(after):
                    # In another layout random numbers would fall elsewhere.
                    relaid = self._spatial and same(random, after)
                    task_value, v = self._validate(*valid_batch, moved, relaid)
                    rates = self._learning_rate_gradients(v, jacobian, before) if self.learning_rates else []
                    products, rate = jacobian.products(v, before)
                    w = dict(zip(moved, self._unclipped(products), strict=True))
                    # All behind w is linear in it: a factor of all its elements can wait.
                    if not self.phi:
                        phi: Sequence[Tensor | None] = ()  # only the learning rate is learned
                    elif self.backend == "double_backward":
                        phi = mixed(w)
                    else:
                        at = _in_channels_last(inputs) if relaid else inputs
                        phi = mixed(self._push_forward(at, w, prediction, random, buffers))
                    # Not in place: autograd may give one tensor to several parameters.
                    results = self._averaged([None if g is None else g * -rate for g in phi])
        except BaseException:
            if not capturing:
                self._restore(stepped, saved, random, buffers)
            raise
        return MetaGradient(value, task_value, results, rates, ratio, self.backend)

    def plain_step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """A training step without a meta-gradient: the learned loss, and the slope ratio if asked for."""
        self._check_parameters()
        random, buffers = random_state(self.device), cloned(self.plain.buffers())
        try:
            prediction, value, slope, _ = self._train(*batch, meta=False)
            ratio = self._slope_ratio(prediction, batch[1], slope)
            self._clip([p for p, _ in parameters_of(self.optimizer) if p.grad is not None])
        except BaseException:
            self._restore(False, {}, random, buffers)
            raise
        self.optimizer.step()
        return value, ratio

    def _check_parameters(self) -> None:
        """Refuses what has been frozen or unfrozen since, and hooks, whose effect on a gradient is not known."""
        for p, _ in parameters_of(self.optimizer):
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

    def _train(
        self, inputs: Any, target: Tensor, *, meta: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Mixed]:
        """Forward and backward of the training loss, which leaves its gradients in ``.grad``. Returns the prediction,
        the loss, its slope at the prediction, and what takes u, or for double_backward w, to the loss's parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            if meta and self.backend == "double_backward":
                return self._train_with_graph(inputs, target)
            prediction = self._call(self.model, inputs)
            value, slope, mixed = self._differentiated_loss(prediction.detach(), target, meta)
            prediction.backward(slope.to(prediction.dtype))
        return prediction.detach(), value, slope, mixed

    def _train_with_graph(self, inputs: Any, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Mixed]:
        # The graph must not notice that parameters and buffers change: it is made of copies.
        leaves: dict[Tensor, Tensor] = {p: p.detach().clone().requires_grad_() for p in self.names}
        buffers = {name: b.clone() for name, b in self.plain.named_buffers()}
        state = {**buffers, **{self.names[p]: leaf for p, leaf in leaves.items()}}
        prediction = self._call(lambda *a, **k: functional_call(self.plain, state, a, k), inputs)
        # The model may have put others in their place.
        copy_back(self.plain.buffers(), [state[name].detach() for name in buffers])
        value, slope = self._loss_and_slope(prediction.detach(), target, True)
        gradients = torch.autograd.grad(
            prediction,
            list(leaves.values()),
            slope.to(prediction.dtype),
            create_graph=True,
            allow_unused=True,
        )
        with_graph = dict(zip(self.names, gradients, strict=True))
        for p, g in zip(leaves, gradients, strict=True):
            p.grad = None if g is None else g.detach().clone()

        def mixed(w: dict[Tensor, Tensor]) -> Sequence[Tensor | None]:
            along = [with_graph[p] for p in w]
            return torch.autograd.grad(along, self.phi, list(w.values()), allow_unused=True)

        return prediction.detach(), value, slope.detach(), mixed

    def _differentiated_loss(self, f: Tensor, target: Tensor, meta: bool) -> tuple[Tensor, Tensor, Mixed]:
        """The learned loss at the prediction ``f``, its slope there, and what takes u to its parameters: from the
        loss's own ``with_mixed_derivative`` where it has one for these arguments, which is cheaper, or by autograd."""
        direct = getattr(self.loss, "with_mixed_derivative", None)
        result = direct(f, target) if direct is not None else None
        if result is not None:
            self._check_loss(*result[:2])
            return result
        value, slope = self._loss_and_slope(f, target, meta)

        def mixed(u: Tensor) -> Sequence[Tensor | None]:
            if not slope.requires_grad:  # no parameter changes the slope
                return [None] * len(self.phi)
            return torch.autograd.grad(slope, self.phi, u, allow_unused=True)

        return value, slope.detach(), mixed

    def _loss_and_slope(self, f: Tensor, target: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        value = self.loss(f.requires_grad_(), target)
        if value.dim():
            raise ValueError(
                f"AdaLFL: loss must reduce to a scalar (reduction='mean'), got {list(value.shape)}"
            )
        (slope,) = torch.autograd.grad(value, f, create_graph=create_graph)
        self._check_loss(value, slope)
        return value.detach(), slope

    def _check_loss(self, value: Tensor, slope: Tensor) -> None:
        if is_capturing(self.device):
            return  # nothing can be read
        finite = bool(slope.isfinite().all())
        if not (finite and math.isfinite(value.item())):
            raise DivergedError(
                f"AdaLFL: the learned loss is {value.item()} on this batch, its slope "
                f"{'finite' if finite else 'not finite'}; the step was not taken. Lower the learning rates, or load an "
                "earlier state"
            )

    def _validate(
        self, inputs: Any, target: Tensor, moved: list[Tensor], relaid: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The task loss after the step and its gradients."""
        with torch.enable_grad():
            prediction = self._call(self.plain, _in_channels_last(inputs) if relaid else inputs)
            value = self.task_loss(prediction, target)
            if value.dim():
                raise ValueError(f"AdaLFL: task_loss must reduce to a scalar, got {list(value.shape)}")
            v = torch.autograd.grad(value, moved, allow_unused=True)
        filled = _writable([torch.zeros_like(p) if g is None else g for p, g in zip(moved, v, strict=True)])
        return value.detach(), self._averaged(filled)  # type: ignore[return-value]

    def _push_forward(
        self, inputs: Any, w: dict[Tensor, Tensor], prediction: Tensor, random: Any, buffers: list[Tensor]
    ) -> Tensor:
        """u = J w at the parameters before the step, with the random numbers and buffers of the training pass."""
        if self.backend == "jvp":
            return self._jvp(inputs, w, prediction, random, buffers)
        # Of the output itself: after the loss float32 would have cancelled. Rounding, eps / e of the output, then
        # costs as much as curvature, e or for two passes e^2.
        start, moved = [self._before[p] for p in w], list(w.values())
        eps = torch.finfo(prediction.dtype if self.autocast is None else start[0].dtype).eps
        # Weights may all be 0, and so may w: u is then 0.
        step = self._size * eps ** (1 / 3 if self.central else 1 / 2) / _norm(moved, 1e-30)
        torch._foreach_mul_(moved, step)

        def at(points: Iterable[Tensor]) -> Tensor:
            set_random_state(self.device, random)
            copy_back(self.plain.buffers(), buffers)
            with _holding(w, points):
                return self._call(self.plain, inputs, None)

        if self.central:
            behind = at(torch._foreach_sub(start, moved))
        else:  # under autocast the prediction is rounded too coarsely for a difference
            behind = prediction if self.autocast is None else at(start)
        torch._foreach_add_(moved, start)
        return (at(moved) - behind) / (2 * step if self.central else step)

    def _jvp(
        self, inputs: Any, w: dict[Tensor, Tensor], prediction: Tensor, random: Any, buffers: list[Tensor]
    ) -> Tensor:
        names = [name for name, _ in self.plain.named_buffers()]
        state = dict(zip(names, cloned(buffers), strict=True))
        set_random_state(self.device, random)
        with forward_ad.dual_level():
            for p, name in self.names.items():
                state[name] = forward_ad.make_dual(self._before[p], w[p]) if p in w else self._before[p]
            output = self._call(lambda *a, **k: functional_call(self.plain, state, a, k), inputs)
            u = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(prediction) if u is None else u

    # ---- Clipping.

    @torch.no_grad()
    def _clip(self, moved: list[Tensor]) -> None:
        gradients = [p.grad for p in moved if p.grad is not None]
        self._inside: list[Tensor] | None = None
        self._scale: Tensor | None = None
        if self.clip_value is not None:
            self._inside = [g.abs() <= self.clip_value for g in gradients]
            torch._foreach_clamp_min_(gradients, -self.clip_value)
            torch._foreach_clamp_max_(gradients, self.clip_value)
        if self.clip_norm is not None:
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            # As torch.nn.utils.clip_grad_norm_.
            self._scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            self._direction = [g / (norm + 1e-6) for g in gradients]
            self._norm = norm
            torch._foreach_mul_(gradients, self._scale)

    def _unclipped(self, w: list[Tensor]) -> list[Tensor]:
        """The transposed derivative of the clipping, times w."""
        if self._scale is not None:
            # clip / (n + e) g: its derivative is s (I - g g' / (n (n + e))), where it clips.
            along = sum((d * x).sum() for d, x in zip(self._direction, w, strict=True))
            clipped = self._scale < 1
            back = along * (self._norm + 1e-6) / self._norm.where(self._norm > 0, 1)
            w = [
                self._scale * (x - (back * d).where(clipped, 0))
                for x, d in zip(w, self._direction, strict=True)
            ]
        if self._inside is not None:
            w = [x * inside for x, inside in zip(w, self._inside, strict=True)]
        return w

    # ---- Learning rates.

    def _learning_rate_gradients(
        self, v: list[Tensor], jacobian: StepJacobian, before: list[Tensor]
    ) -> list[Tensor]:
        """-<v, d step / d lr> per group: every step is proportional to its learning rate."""
        groups = self.optimizer.param_groups
        sums = [torch.zeros((), device=self.device, dtype=v[0].dtype) for _ in groups]
        index = {id(group): i for i, group in enumerate(groups)}
        for g, old, (parameter, group, *_) in zip(v, before, jacobian.stepped, strict=True):
            sums[index[id(group)]] -= (g * (old - parameter)).sum() / group["lr"]
        return sums

    # ---- Small things.

    @torch.no_grad()
    def _accepts_channels_last(self, inputs: Any) -> bool:
        """Whether the passes after the step may take the layout in which a CPU convolves and pools fastest. It is tried
        once: not every model is free of ``view`` and of random numbers."""
        if not (
            self.device.type == "cpu"
            and any(isinstance(m, nn.Conv2d) for m in self.plain.modules())
            and isinstance(inputs, Tensor)
            and inputs.dim() == 4
            and inputs.dtype == torch.float32
        ):
            return False
        random, buffers = random_state(self.device), cloned(self.plain.buffers())
        with self._undone(random):
            expected = self._call(self.plain, inputs)
            set_random_state(self.device, random)
            copy_back(self.plain.buffers(), buffers)
            try:
                actual = self._call(self.plain, _in_channels_last(inputs))
            except RuntimeError:
                return False
        return bool((actual - expected).norm() <= 1e-3 * expected.norm())

    def _call(self, model: Callable[..., Any], inputs: Any, autocast: Any = ...) -> Tensor:
        """The model's prediction, under the learner's autocast or another one."""
        dtype = self.autocast if autocast is ... else autocast
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
            output = call_model(model, inputs)
        if not isinstance(output, Tensor):
            raise TypeError(f"AdaLFL: the model must return a tensor, got {type(output).__name__}")
        if output.dtype == torch.float16:
            raise ValueError(f"AdaLFL: the model must run in float32 or in bfloat16{_UNSCALED}, got float16")
        return output

    def _averaged(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Over the processes of a DistributedDataParallel model, in one message."""
        present = [t for t in tensors if t is not None]
        if self.distributed and present:
            flat = torch.cat([t.flatten() for t in present])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for t, part in zip(present, flat.split([t.numel() for t in present]), strict=True):
                t.copy_(part.view_as(t))
        return list(tensors)

    def _slope_ratio(self, prediction: Tensor, target: Tensor, slope: Tensor) -> Tensor | None:
        if not self.log_slope:
            return None
        with torch.enable_grad():
            f = prediction.detach().requires_grad_()
            (plain,) = torch.autograd.grad(self.task_loss(f, target), f)
        return slope.detach().abs().mean() / plain.abs().mean()

    @contextmanager
    def _undone(self, random: Any) -> Iterator[None]:
        """Buffers and random state are afterwards what they are now; nothing random has happened since ``random``."""
        buffers = cloned(self.plain.buffers())
        try:
            yield
        finally:
            set_random_state(self.device, random)
            copy_back(self.plain.buffers(), buffers)

    @torch.no_grad()
    def _restore(self, stepped: bool, saved: dict[Tensor, Any], random: Any, buffers: list[Tensor]) -> None:
        if stepped:
            torch._foreach_copy_(list(self._before), list(self._before.values()))
            self.optimizer.state.clear()
            self.optimizer.state.update(saved)
        copy_back(self.plain.buffers(), buffers)
        set_random_state(self.device, random)


_UNSCALED = (
    ", whose gradients need no scaling (the backward passes here are none that a GradScaler would see)"
)

# Piecewise linear, where a second pass of finite differences gains nothing.
_KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def _has_kinks(model: nn.Module) -> bool:
    return any(isinstance(m, _KINKED) for m in model.modules())


def _norm(tensors: list[Tensor], least: float) -> Any:
    """Of all elements, but not below ``least``: a number, or on a GPU, where reading it would wait, a tensor."""
    norms = torch._foreach_norm(tensors)
    if norms[0].device.type != "cpu":
        return torch.stack(norms).norm().clamp(min=least)
    return max(math.hypot(*map(float, norms)), least)


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


def _in_channels_last(inputs: Any) -> Any:
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return inputs
    _, channels, height, width = inputs.shape
    if channels == 1:  # both layouts at once; the strides tell which is meant
        return inputs.contiguous().as_strided(inputs.shape, (height * width, 1, width, 1))
    return inputs.contiguous(memory_format=torch.channels_last)


@contextmanager
def _holding(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """The parameters have other values for a while, wherever the model keeps them: tied, parametrized, or in lists of
    its own as recurrent layers do."""
    parameters = list(parameters)
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value
