"""One training step, and the derivative of what it achieved in what its loss has learned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._batches import Batch, Loss, samples
from lossmeta._checks import check_scalar
from lossmeta._model_state import ModelState, ThreadModes, Watch, is_capturing
from lossmeta._optimizers import unwrapped
from lossmeta.adalfl.backends import Check, DoubleBackward, ForwardMode, TrainingPass
from lossmeta.adalfl.capture import all_finite
from lossmeta.adalfl.channels_last import ChannelsLast, in_channels_last
from lossmeta.adalfl.choice_of_backend import BACKENDS, make_backend
from lossmeta.adalfl.clean_gradient import CleanGradient, Gradients
from lossmeta.adalfl.clipping import Clipping
from lossmeta.adalfl.finite_difference import FiniteDifference, norm
from lossmeta.adalfl.learned_loss import DivergedError, LearnedLoss, check_apart
from lossmeta.adalfl.learned_rate import LearnedRates
from lossmeta.adalfl.records import MetaGradient, StepOptions
from lossmeta.adalfl.step_jacobian import StepJacobian, check_has_derivative, parameters_of
from lossmeta.adalfl.trained_model import TrainedModel
from lossmeta.adalfl.verification import FIRST_PROBES, INTERVAL, LATER_PROBES, BackendError


class DifferentiableStep:
    """:func:`meta_gradient` as an object that is called once per training step.

    Attributes:
        backend: what computes the meta-gradient.
        reason: why it is that one.
        model: what is trained.
        loss: what is learned.
        steps: with a meta-gradient, taken so far.
        clean: what the validation batches add to a training step, or ``None``.
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
        self.optimizer, self.task_loss = unwrapped(optimizer), task_loss
        check_apart(model, loss)
        check_has_derivative(self.optimizer, approximate=options.approximate)
        self.clipping = Clipping(options.clip_norm, options.clip_value)
        self.rates = LearnedRates(self.optimizer)
        self.model = TrainedModel(model, self.optimizer, options.autocast, options.output)
        self.loss = LearnedLoss(loss, self.model.device)
        self.backend, self.reason = make_backend(options.backend, self.model, self.loss)
        self.channels_last = ChannelsLast(self.model)
        self.watch = Watch(self.model.plain, self.model.device)
        self.steps = 0
        self.clean = CleanGradient(options.clean_weight) if options.clean_weight else None
        self._undo: Callable[[], None] | None = None
        # Kept from step to step: memory comes page by page.
        self._before: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in self.model.names}

    # ---- A step, whole or not at all.

    def __call__(self, batches: Sequence[Batch], valid_batch: Batch) -> MetaGradient:
        """One training step on the batches together, and its meta-gradient. :meth:`undo` takes it back."""
        while True:
            try:
                with self._all_or_nothing(), self.model.step():
                    result = self._step(batches, valid_batch)
                    self.steps += 1
                    return result
            except BackendError as error:
                self._take_another_backend(error)

    def plain_step(
        self, batches: Sequence[Batch], valid_batch: Batch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """A training step without a meta-gradient: the learned loss, and the slope ratio if asked for."""
        with self._all_or_nothing(), self.model.step():
            _, passes, ratio = self._train(batches, valid_batch, meta=False)
            self.clipping([p.grad for p, _ in parameters_of(self.optimizer) if p.grad is not None])
            self.optimizer.step()
            return _mean([t.loss for t in passes], passes), ratio

    def undo(self) -> None:
        """Takes the last step back, if it is not forgotten."""
        if self._undo is not None:
            self._undo()
        self.forget()

    def forget(self) -> None:
        """Keeps nothing of the state before the last step."""
        self._undo = None

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Keeps what a step changes, and brings it back if the step fails."""
        self._undo = None
        if is_capturing(self.model.device):  # then nothing runs yet, nor has to be undone
            yield
            return
        optimizer, modes = self.optimizer, ThreadModes(self.model.device.type)
        start = ModelState(self.model.plain, self.model.device, self.watch, everything=self._check_is_due())
        gradients = {p: p.grad for p, _ in parameters_of(optimizer)}
        state = copied_state(optimizer)
        groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._keep_weights()
        backend = self.backend.state()
        clean = self.clean.as_it_is(self.model.names) if self.clean else None

        @torch.no_grad()
        def undo() -> None:
            torch._foreach_copy_(list(self._before), list(self._before.values()))
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, options in zip(optimizer.param_groups, groups, strict=True):
                _bring_back(group, options)
            for p, g in gradients.items():
                p.grad = g
            start.bring_back()
            self.backend.load(backend)
            if clean:
                clean()

        self._start, self._saved, self._undo = start, state, undo
        try:
            yield
        except BaseException:
            self.undo()
            modes.bring_back()
            raise

    @torch.no_grad()
    def _keep_weights(self) -> None:
        kept = list(self._before.values())
        torch._foreach_copy_(kept, list(self._before))
        # Now, while the copies are in the cache.
        self._size = norm(kept, 1e-3) if self.backend.needs_size else None

    def _check_is_due(self) -> bool:
        return self.steps % INTERVAL == 0

    def _take_another_backend(self, error: BackendError) -> None:
        """With ``"auto"``: goes on with what is left after a back-end has failed."""
        left = {
            ForwardMode: FiniteDifference if "forward-mode" in str(error) else DoubleBackward,
            FiniteDifference: DoubleBackward,
        }
        failed = type(self.backend)
        if self.options.backend != "auto":
            raise BackendError(
                f"AdaLFL: with backend={failed.name!r} {error}; backend='auto' may know a way"
            ) from error
        other = left.get(failed)
        if other is None or (self.model.distributed and not other.averages):
            raise BackendError(f"AdaLFL: no back-end is right for this model: {error}") from error
        if other is DoubleBackward:
            warnings.warn(
                f"AdaLFL: {failed.name} gives way to {other.name}: {error}", RuntimeWarning, stacklevel=5
            )
        self.backend, self.reason = other(self.model, self.loss), str(error)

    def backend_state(self) -> tuple[str, str, Any, int]:
        """Its name, why it is that one, what it has found out, and the steps so far."""
        return self.backend.name, self.reason, self.backend.state(), self.steps

    def load_backend(self, name: str, reason: str, found: Any, steps: int) -> None:
        """Goes on as :meth:`backend_state` says, but with the back-end that was asked for by name."""
        self.steps = steps
        if self.options.backend in ("auto", name):
            self.backend, self.reason = BACKENDS[name](self.model, self.loss), reason
            self.backend.load(found)

    # ---- Its parts.

    def _train(
        self, batches: Sequence[Batch], valid_batch: Batch | None, *, meta: bool
    ) -> tuple[bool, list[TrainingPass], Tensor | None]:
        """The training passes; whether inputs may be relaid, the passes, and the slope ratio if asked for."""
        model = self.model
        relay = meta and len(batches) == 1 and self.channels_last.accepts(batches[0][0])
        model.check_parameters(self.optimizer)
        for p, _ in parameters_of(self.optimizer):  # as zero_grad, which takes eight times as long
            p.grad = None
        versions = [p._version for p in model.names]
        shares = _shares(batches)
        passes = []
        with torch.enable_grad():
            for i, ((inputs, target), share) in enumerate(zip(batches, shares, strict=True)):
                before = self._start if i == 0 else self._now()
                last = i + 1 == len(batches)
                with nullcontext() if last or not model.distributed else model.wrapped.no_sync():  # type: ignore[operator]
                    if meta:
                        passes.append(self.backend.train(inputs, target, before, share))
                    else:
                        passes.append(self.backend.plain_pass(inputs, target, before, share))
        changed = [n for (p, n), v in zip(model.names.items(), versions, strict=True) if p._version != v]
        if changed:
            raise ValueError(
                "AdaLFL: the model's forward pass must leave its trainable parameters as they are, got one that "
                f"changes {changed[0]}; change it between the steps, or by a parametrization"
            )
        if self.clean and valid_batch is not None:
            self.clean.add(model.names, lambda: self._clean_gradient(valid_batch))
        ratios = [self._slope_ratio(t, target) for t, (_, target) in zip(passes, batches, strict=True)]
        return relay, passes, None if ratios[0] is None else _mean(ratios, passes)  # type: ignore[arg-type]

    def _clean_gradient(self, valid_batch: Batch) -> Gradients:
        """That of the task loss before the step. It leaves buffers and random numbers as they are."""
        parameters = list(self.model.names)
        with self._now().kept():
            value, gradients, reached = self._validate(*valid_batch, parameters, relaid=False)
        found = {p: g for p, g, r in zip(parameters, gradients, reached, strict=True) if r}
        if not all_finite([value, *found.values()]):
            raise DivergedError(
                f"AdaLFL: the task loss on the clean batch is {value.item()}, or its gradient is not finite; the step "
                "was not taken. Look at the batch, lower the learning rates, or load an earlier state"
            )
        return found

    def _now(self) -> ModelState:
        return ModelState(self.model.plain, self.model.device, self.watch, everything=self._check_is_due())

    def _step(self, batches: Sequence[Batch], valid_batch: Batch) -> MetaGradient:
        model, capturing = self.model, is_capturing(self.model.device)
        if capturing:
            self._start = self._now()
            self._keep_weights()
        start = self._start
        check = None
        if self._check_is_due() and not capturing:
            check = Check(FIRST_PROBES if self.steps == 0 else LATER_PROBES, self.steps)
        if self.options.learning_rates:
            self.rates.check_start("AdaLFL")
        may_relay, passes, ratio = self._train(batches, valid_batch, meta=True)
        if check:
            self.watch.learn(start)
        with torch.no_grad():
            jacobian = StepJacobian(
                self.optimizer,
                approximate=self.options.approximate,
                saved={} if capturing else self._saved,
            )
            moved = [p for p, *_ in jacobian.stepped]
            if not moved:
                raise ValueError(
                    "AdaLFL: the training loss must depend on the optimizer's parameters, got one that gives none of "
                    "them a gradient; if the model has got others, as from load_state_dict(assign=True), make a new "
                    "optimizer and learner"
                )
            clipped = self.clipping([p.grad for p in moved if p.grad is not None])
            before = [self._before[p] for p in moved]
            self.optimizer.step()
            if not (self.options.keep_gradients or jacobian.needs_gradients or capturing):
                for p in moved:  # their memory is that of v then
                    p.grad = None
            after = ModelState(model.plain, model.device, self.watch)
            unseen = (
                not self.watch.numpy
                and start.random.numpy_differs(after.random)
                and not isinstance(self.backend, DoubleBackward)
            )
            with after.kept():
                # In another layout random numbers would fall elsewhere.
                relaid = may_relay and start.random.equals(after.random)
                task_value, v, reached = self._validate(*valid_batch, moved, relaid)
                if self.clean:  # the products overwrite v
                    judged = {p: g.clone() for p, g, r in zip(moved, v, reached, strict=True) if r}
                rates = self.rates.gradients(v, jacobian, before) if self.options.learning_rates else []
                products, rate = jacobian.products(v, before)
                w = dict(zip(moved, clipped.transposed(products), strict=True))
                phi: list[Tensor | None] = []
                if self.loss.phi and not unseen:  # else only the learning rate is learned
                    phi = self._meta_gradient(passes, w, relaid, check)
                # All behind w is linear in it: a factor of all its elements can wait. Not in place: autograd may
                # give one tensor to several parameters.
                results = model.averaged([None if g is None else g * -rate for g in phi])
        if unseen:
            self.watch.numpy = True
        if self.clean and all_finite([task_value, *judged.values()]):
            self.clean.keep(judged, model.names)
        return MetaGradient(
            _mean([t.loss for t in passes], passes),
            task_value,
            results or [None] * len(self.loss.phi),
            rates,
            ratio,
            self.backend.name,
            jacobian.learns_nearly_nothing,
            "the model has begun to draw NumPy's random numbers, which are drawn again from the next step on"
            if unseen
            else None,
        )

    def _meta_gradient(
        self, passes: Sequence[TrainingPass], w: dict[Tensor, Tensor], relaid: bool, check: Check | None
    ) -> list[Tensor | None]:
        """Of all passes together, up to its sign."""
        total: list[Tensor | None] = []
        wrong, kept = None, check is not None or len(passes) > 1
        for i, trained in enumerate(passes):
            found, reason = self.backend.meta_gradient(
                trained, w, self._before, self._size, relaid, kept, check if i == 0 else None
            )
            wrong = wrong or reason
            if wrong:
                break
            total = list(found) if i == 0 else [_added(a, b) for a, b in zip(total, found, strict=True)]
        if check and self.model.anywhere(wrong is not None):
            raise BackendError(wrong or "on another process the meta-gradient was found wrong")
        return total

    def _validate(
        self, inputs: Any, target: Tensor, moved: list[Tensor], relaid: bool
    ) -> tuple[Tensor, list[Tensor], list[bool]]:
        """The task loss after the step, its gradients, 0 where there is none, and whether there is one."""
        with torch.enable_grad():
            prediction = self.model.predict(in_channels_last(inputs) if relaid else inputs)
            value = self.task_loss(self.model.for_losses(prediction), target)
            check_scalar("AdaLFL", "task_loss", value)
            v = torch.autograd.grad(value, moved, allow_unused=True)
        filled = _writable([torch.zeros_like(p) if g is None else g for p, g in zip(moved, v, strict=True)])
        reached = [g is not None for g in v]
        return value.detach(), self.model.averaged(filled), reached  # type: ignore[return-value]

    def _slope_ratio(self, trained: TrainingPass, target: Tensor) -> Tensor | None:
        if not self.options.log_slope:
            return None
        reference = self.options.slope_of or self.task_loss
        if self.options.slope_of is None and not isinstance(target, Tensor):
            raise TypeError(
                "AdaLFL: for the slope ratio task_loss must take the training target, got a "
                f"{type(target).__name__}; give slope_of, a loss that does"
            )
        with torch.enable_grad():
            f = self.model.for_losses(trained.prediction).detach().requires_grad_()
            (plain,) = torch.autograd.grad(reference(f, target), f)
        return trained.slope.abs().mean() / plain.abs().mean()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def copied_state(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: {k: _copied(v) for k, v in state.items()} for p, state in optimizer.state.items()}


def _bring_back(group: dict[str, Any], options: dict[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
            group[key].copy_(value)
        else:
            group[key] = value


def _shares(batches: Sequence[Batch]) -> list[float]:
    """Of each batch in the mean over all samples."""
    if len(batches) == 1:
        return [1.0]
    counts = [samples(target) for _, target in batches]
    return [count / sum(counts) for count in counts]


def _mean(values: Sequence[Tensor], passes: Sequence[TrainingPass]) -> Tensor:
    if len(passes) == 1:
        return values[0]
    return sum((v * t.share for v, t in zip(values, passes, strict=True)), torch.zeros_like(values[0]))


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _writable(tensors: list[Tensor]) -> list[Tensor]:
    """The same values: autograd may hand one tensor to several parameters, or an expanded one."""
    seen: set[int] = set()
    for i, t in enumerate(tensors):
        if 0 in t.stride() or t.untyped_storage().data_ptr() in seen:
            tensors[i] = t = t.clone(memory_format=torch.contiguous_format)
        seen.add(t.untyped_storage().data_ptr())
    return tensors
