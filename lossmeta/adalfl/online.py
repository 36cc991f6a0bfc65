"""AdaLFL's online learner (Algorithm 2): a loss that is updated after every training step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lossmeta._batches import Batch, Loss, Output, checked, checked_batches
from lossmeta._checks import check_at_least_one, check_positive_and_finite
from lossmeta._model_state import ThreadModes
from lossmeta.adalfl.capture import (
    CapturedStep,
    all_finite,
    check_learner_capturable,
    update_where_finite,
)
from lossmeta.adalfl.differentiable_step import DifferentiableStep, copied_state
from lossmeta.adalfl.learned_loss import (
    check_meta_optimizer,
    default_meta_rate,
    to_learn,
    warn_of_collapse,
)
from lossmeta.adalfl.loss_snapshot import LossSnapshot
from lossmeta.adalfl.meta_schedule import Every, MetaSchedule
from lossmeta.adalfl.records import MetaGradient, Snapshot, StepOptions, StepReport
from lossmeta.adalfl.replicas import Replicas
from lossmeta.adalfl.slope_bounds import SlopeBounds
from lossmeta.adalfl.turning_guard import TurningGuard
from lossmeta.adalfl.verification import INTERVAL
from lossmeta.losses._parameters import project


class OnlineLearner:
    r"""Trains a model with a learned loss, and the loss by what each step achieved (AdaLFL, Algorithm 2).

    .. math:: \theta_{t+1} = \theta_t - \mathrm{step}(\nabla_\theta \mathcal M_{\phi_t}), \qquad
              \phi_{t+1} = \phi_t - \eta\,\nabla_\phi \mathcal L_T(\theta_{t+1})

    It takes the place of ``loss.backward(); optimizer.step()`` in a training loop. Weights, optimizer state, BatchNorm
    buffers and random state end as a plain step with that loss leaves them, and no gradients are left behind. A step
    that raises changes nothing. The passes of a step must be one function, see :func:`meta_gradient`; that is checked
    in the first step and every hundredth after it. In the processes of a ``DistributedDataParallel`` model the loss
    starts as that of the first, and is compared as often. Anything differentiable can be learned:
    the network of :class:`~lossmeta.losses.LossNetwork`, the coefficients of a Taylor loss, the class correlations of
    :class:`~lossmeta.losses.ParametricCrossEntropy` with ``learnable=True`` (as L2T-DLF does), the mixture of a
    :class:`~lossmeta.losses.DistanceMixtureLoss`, or several of them in one module.

    Args:
        model: the model, in training mode; may be wrapped in ``DistributedDataParallel``.
        optimizer: the model's, over all its trainable parameters. Any that moves each weight by its own gradient; SGD,
            Adam, AdamW, RMSprop and Adagrad cost least. May be wrapped by Lightning or accelerate.
        loss: module ``loss(prediction, target) -> []``; initialise it first, see :func:`initialize`.
        task_loss: function of the same arguments, what is really to be lowered.
        meta_optimizer: of the loss; by default Adam with the rate that the loss names as its ``meta_rate``, 3e-3 for a
            :class:`~lossmeta.losses.LossNetwork` with ``residual`` and ``normalize_slope``, or with
            :data:`PAPER_META_RATE`, 1e-5. It holds all trainable parameters of ``loss`` and no others. Its groups may
            have rates of their own.
        meta_every: training steps per meta-update; or a function of the steps done so far that gives those until the
            next one, such as :func:`seldom_later`, which spares most updates of a long training.
        learning_rate: step size of the optimizer's learning rates, which are then learned too (Algorithm 4); 0 leaves
            them as they are. A rate moves by this times its gradient, and in one step falls to a thousandth of itself
            at most. A rate that is a tensor is filled in place. No group may start at 0.
        min_slope: keeps the loss from stopping the training early; ``None`` does not. Where the slope ratio falls below
            this, the last meta-update is undone, together with what it left in the meta-optimizer. A loss that starts
            below it learns until it has once been above. The ratio is the mean over the processes of a
            ``DistributedDataParallel`` model.
        max_slope: the same for a slope ratio above this, which is a learning rate that runs away. A loss with
            ``normalize_slope`` has a ratio of 1.
        guard: whether to go back to an earlier loss, model, optimizer state and learned rates, with a tenth of the meta
            rate and a warning, where the task loss on the validation batches rises for long: where its moving average
            over ten updates or so has been above its least for ten, and by more than a quarter of what it first was.
            After three times it stops to watch.
        backend: see :func:`meta_gradient`.
        clip_norm: see :func:`meta_gradient`.
        clip_value: see :func:`meta_gradient`.
        approximate: see :func:`meta_gradient`.
        autocast: dtype under which the model runs, ``torch.bfloat16``. Not float16, which needs a ``GradScaler``: it
            would not see the backward passes here.
        log_slope: whether to report the slope ratio of every step.
        slope_of: the loss of the same arguments as ``loss`` whose slope on the training batch the slope ratio compares
            with; by default ``task_loss``, which then must take training targets too, and not only those of validation
            batches.
        snapshot_every: training steps from one :class:`Snapshot` in ``history`` to the next; ``None``: none. The first
            is of the loss before the first step. :func:`plot_loss` draws them.
        capture: replay training step, meta-gradient and update as one CUDA graph, which spares a small model the time
            of launching kernels. It needs batches on the GPU, SGD, or Adam or AdamW with ``capturable=True``, and a
            model that draws no random numbers. Nothing is read back: ``skipped`` is a tensor, and a report gives no
            reason. Steps without a meta-update run as they would without it.
        clean_weight: how much the task loss on the validation batches weighs in the training step, where the learned
            loss on the training batch weighs 1; with labels that are partly wrong, of which the validation batches have
            right ones, 1 is good. Its gradient is the one that the last meta-update has computed, so that it costs next
            to nothing; a step after one without a meta-update makes a pass for it. Every step then needs a validation
            batch.
        output: what of the model's output is the prediction, see :func:`meta_gradient`.
        keep_gradients: leave the training gradients in ``.grad``.

    A loss may have a method ``with_mixed_derivative(pred, target)`` as :meth:`LossNetwork.with_mixed_derivative
    <lossmeta.losses.LossNetwork.with_mixed_derivative>`. The step calls it and does not differentiate the loss twice.
    It, or a module in it, may have a method ``project_()``, which brings its parameters back into their range. It is
    called after every meta-update.

    Attributes:
        loss: the learned loss.
        optimizer: the model's.
        meta_optimizer: the loss's, or ``None`` where it has no parameters to learn.
        steps: training steps done.
        skipped: meta-updates that were due but not taken; a tensor with ``capture``.
        history: snapshots of the loss, empty without ``snapshot_every``.
        backend: how the meta-gradient is computed, and why so.

    Raises:
        ValueError: for options out of range, for a model and an optimizer, or a loss and a meta-optimizer, whose
            parameters differ, and for what cannot be captured.

    Example:
        >>> model, loss = torch.nn.Linear(4, 3), lossmeta.losses.LossNetwork()
        >>> learner = OnlineLearner(
        ...     model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.nn.functional.cross_entropy
        ... )
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> learner.step(*batches).skipped is None
        True

        Several losses in one module, with rates of their own:

        >>> class Both(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = lossmeta.losses.LossNetwork()
        ...         self.classes = lossmeta.losses.ParametricCrossEntropy(3, activation="identity", learnable=True)
        ...
        ...     def forward(self, prediction, target):
        ...         return self.network(prediction, target) + self.classes(prediction, target)
        >>> loss = Both()
        >>> rates = [
        ...     {"params": loss.network.parameters(), "lr": 1e-5},
        ...     {"params": loss.classes.parameters(), "lr": 1e-3},
        ... ]
        >>> learner = OnlineLearner(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     loss,
        ...     torch.nn.functional.cross_entropy,
        ...     meta_optimizer=torch.optim.Adam(rates),
        ... )
        >>> learner.step(*batches).skipped is None
        True

        The learning rate alone (Meta-LR, Algorithm 4; its start is :func:`initialize_learning_rate`):

        >>> learner = OnlineLearner(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     torch.nn.CrossEntropyLoss(),
        ...     torch.nn.functional.cross_entropy,
        ...     learning_rate=1e-3,
        ... )
        >>> learner.step(*batches).skipped is None
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: nn.Module,
        task_loss: Loss,
        *,
        meta_optimizer: Optimizer | None = None,
        meta_every: Every = 1,
        learning_rate: float = 0.0,
        min_slope: float | None = None,
        max_slope: float | None = None,
        guard: bool = False,
        backend: str = "auto",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        approximate: bool = False,
        autocast: torch.dtype | None = None,
        log_slope: bool = False,
        slope_of: Loss | None = None,
        snapshot_every: int | None = None,
        capture: bool = False,
        clean_weight: float = 0.0,
        output: Output = None,
        keep_gradients: bool = False,
    ) -> None:
        if snapshot_every is not None:
            check_at_least_one("OnlineLearner", "snapshot_every", snapshot_every)
        schedule = MetaSchedule(meta_every)
        if not learning_rate >= 0:
            raise ValueError(f"OnlineLearner: learning_rate must not be negative, got {learning_rate}")
        if not 0 <= clean_weight < math.inf:
            raise ValueError(
                f"OnlineLearner: clean_weight must be finite and not negative, got {clean_weight}"
            )
        if clean_weight and capture:
            raise ValueError(f"OnlineLearner: with capture=True clean_weight must be 0, got {clean_weight}")
        if min_slope is not None:
            check_positive_and_finite("OnlineLearner", "min_slope", min_slope)
        if max_slope is not None:
            check_positive_and_finite("OnlineLearner", "max_slope", max_slope)
            if min_slope is not None and max_slope <= min_slope:
                raise ValueError(
                    f"OnlineLearner: max_slope must be above min_slope, got {max_slope} and {min_slope}"
                )
        phi = to_learn(loss)
        if not phi and not learning_rate:
            raise ValueError("OnlineLearner: loss must have parameters to learn, got none")
        fused = all(p.device.type in ("cpu", "cuda") for p in phi)
        self.meta_optimizer = meta_optimizer or (
            Adam(phi, lr=default_meta_rate(loss), fused=fused, capturable=capture) if phi else None
        )
        if self.meta_optimizer is not None:
            check_meta_optimizer("OnlineLearner", loss, self.meta_optimizer)
            if not guard:
                warn_of_collapse("OnlineLearner", loss, self.meta_optimizer)
        self.loss = loss
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.min_slope = min_slope
        self.max_slope = max_slope
        self.snapshot_every = snapshot_every
        self.history: list[Snapshot] = []
        self.steps = 0
        self.skipped: int | Tensor = 0
        self._schedule = schedule
        self._bounds = SlopeBounds(phi)
        self.keep_gradients = keep_gradients
        self._accumulated: list[Batch] = []
        self._warned_of_gradients = False
        self._check_replicas_at = 0
        options = StepOptions(
            backend=backend,
            clip_norm=clip_norm,
            clip_value=clip_value,
            approximate=approximate,
            learning_rates=learning_rate > 0,
            autocast=autocast,
            log_slope=log_slope or min_slope is not None or max_slope is not None,
            output=output,
            clean_weight=clean_weight,
            slope_of=slope_of,
            keep_gradients=keep_gradients,
        )
        self._step = DifferentiableStep(model, optimizer, loss, task_loss, options)
        self._guard = None
        if guard and phi:
            learned_rates = [self._step.rates] if learning_rate else []
            self._guard = TurningGuard(phi, self._step.optimizer, [self._step.model.plain, *learned_rates])
        self._replicas = None
        if self._step.model.distributed:
            self._replicas = Replicas(
                loss, self.meta_optimizer, self._step.model.group, self._step.model.device
            )
            self._replicas.make_equal()
        if learning_rate:
            self._step.rates.check_start("OnlineLearner")
        self._captured = self._make_captured() if capture else None

    def _make_captured(self) -> CapturedStep:
        model, meta = self._step.model, self.meta_optimizer
        decides = bool(self.learning_rate) or any(
            x is not None for x in (self.min_slope, self.max_slope, self._guard)
        )
        own = self._step.optimizer
        optimizers = check_learner_capturable(model.device, model.distributed, decides, own, meta)
        return CapturedStep(self._step_on_device, list(model.names), optimizers)

    def _step_on_device(self, train_batch: Batch, valid_batch: Batch) -> list[Tensor]:
        """A step with a meta-update that reads nothing back.

        Returns:
            Both losses, whether the update was taken, and the slope ratio if asked for.
        """
        result = self._step([train_batch], valid_batch)
        assert self.meta_optimizer is not None
        taken = update_where_finite(
            self.meta_optimizer, self._step.loss.phi, result.gradients, result.task_loss
        )
        project(self.loss)
        ratio = [] if result.slope_ratio is None else [result.slope_ratio]
        return [result.loss, result.task_loss, taken, *ratio]

    @property
    def meta_every(self) -> Every:
        """As it was given."""
        return self._schedule.every

    @property
    def backend(self) -> str:
        """How the meta-gradient is computed, and why so."""
        return f"{self._step.backend.name}: {self._step.reason}"

    @property
    def captures(self) -> bool:
        """Whether steps are replayed as one CUDA graph."""
        return self._captured is not None

    def accumulate(self, batch: Batch) -> None:
        """Keeps a batch for the next :meth:`step`, whose own batch it is joined with. Nothing is computed yet.

        Args:
            batch: inputs and target.

        Raises:
            ValueError: for an empty batch.
            TypeError: for a batch that is not a pair.
        """
        self._accumulated.append(checked("OnlineLearner", "batch", batch))

    def step(self, train_batch: Batch | Sequence[Batch], valid_batch: Batch | None = None) -> StepReport:
        """One training step, and where it is due a meta-update.

        Args:
            train_batch: inputs and target; or a list of such pairs, whose losses are averaged over their samples, for
                one step of them all with the memory of one. Those that were accumulated come before them.
            valid_batch: inputs and target of the task loss; the last training batch again where there is none (the
                paper's appendix D.4 compares the two). Not needed for steps without a meta-update.

        Raises:
            ValueError: for an empty batch, whatever the model and the losses raise for one that does not fit them, and
                a ``meta_every`` that gives less than 1.
            TypeError: for a batch that is not a pair, and a ``meta_every`` that gives no integer.
            DivergedError: if the learned loss or its slope is not finite.
            BackendError: if the meta-gradient cannot be computed, see :func:`meta_gradient`.
            RuntimeError: if the processes of a DistributedDataParallel model have different losses.
            Whatever is raised, an interrupt too, everything is as before.
        """
        batches = [*self._accumulated, *checked_batches("OnlineLearner", "train_batch", train_batch)]
        if valid_batch is not None:
            valid_batch = checked("OnlineLearner", "valid_batch", valid_batch)
        elif self._step.clean:
            raise ValueError(
                "OnlineLearner: with clean_weight valid_batch must be given in every step, got None"
            )
        if self._captured is not None and len(batches) > 1:
            raise ValueError(
                f"OnlineLearner: with capture=True a step must have one batch, got {len(batches)}"
            )
        self._warn_of_gradients()
        with self._all_or_nothing():
            if self.snapshot_every and not self.history:
                self._snapshot(None)
            report = self._advance(batches, valid_batch)
            if self.snapshot_every and self.steps % self.snapshot_every == 0:
                self._snapshot(report.slope_ratio)
            if not self.keep_gradients and self._captured is None:
                for p in self._step.model.names:
                    p.grad = None
            self._accumulated = []
            return report

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Keeps what a step changes beside the model and its optimizer, and brings it back if the step fails."""
        modes = ThreadModes(self._step.model.device.type)
        loss, meta = [*self.loss.parameters(), *self.loss.buffers()], self.meta_optimizer
        values = [t.detach().clone() for t in loss]
        state = copied_state(meta) if meta else {}
        rates = [group["lr"] for group in meta.param_groups] if meta else []
        counters = self.steps, self.skipped, len(self.history), self._accumulated, self._bounds.accepted
        guard, due_next = self._guard.state() if self._guard else None, self._schedule.next
        try:
            yield
        except BaseException:
            self._step.undo()
            with torch.no_grad():
                torch._foreach_copy_(loss, values)
            for p in loss:
                p.grad = None
            if meta is not None:
                meta.state.clear()
                meta.state.update(state)
                for group, rate in zip(meta.param_groups, rates, strict=True):
                    group["lr"] = rate
            self.steps, self.skipped, length, self._accumulated, self._bounds.accepted = counters
            del self.history[length:]
            self._schedule.next = due_next
            if self._guard and guard:
                self._guard.load(guard)
            modes.bring_back()
            raise
        finally:
            self._step.forget()

    def _warn_of_gradients(self) -> None:
        if self._warned_of_gradients or self.keep_gradients or self._captured is not None:
            return
        if any(p.grad is not None for p in self._step.model.names):
            self._warned_of_gradients = True
            warnings.warn(
                "OnlineLearner: a step makes its own gradients, got some in the model already, which are dropped; to "
                "accumulate, pass a list of batches or call accumulate(batch)",
                stacklevel=3,
            )

    def _advance(self, batches: list[Batch], valid_batch: Batch | None) -> StepReport:
        due = self._schedule.is_due(self.steps)
        if self._replicas is not None and self._check_replicas_at <= self.steps:
            self._replicas.check(self.steps)
            self._check_replicas_at = self.steps + INTERVAL
        if not due:
            loss, ratio = self._step.plain_step(batches, valid_batch)
            self.steps += 1
            return StepReport(loss, None, ratio, None)
        self._schedule.next = self._schedule.after(self.steps)
        valid_batch = batches[-1] if valid_batch is None else valid_batch
        if self._captured is not None:
            loss, task_loss, taken, *ratios = self._captured(batches[0], valid_batch)
            self.steps += 1
            self.skipped = self.skipped + taken.logical_not().long()
            return StepReport(loss, task_loss, ratios[0] if ratios else None, None)
        result = self._step(batches, valid_batch)
        self.steps += 1
        skipped = result.skipped or self._update(result)
        self.skipped += skipped is not None
        return StepReport(result.loss, result.task_loss, result.slope_ratio, skipped)

    def _update(self, found: MetaGradient) -> str | None:
        """Moves the loss and the learning rates; or says why not."""
        phi, meta = self._step.loss.phi, self.meta_optimizer
        bounded = self.min_slope is not None or self.max_slope is not None
        if phi and meta is not None and bounded and found.slope_ratio is not None:
            ratio = self._step.model.mean(found.slope_ratio)
            undone = self._bounds.undo_if_outside(self.min_slope, self.max_slope, ratio, meta)
            if undone:
                return undone
        present = [g for g in (*found.gradients, *found.learning_rate_gradients) if g is not None]
        if not present:
            return "no gradient reaches the loss's parameters"
        if not all_finite([found.task_loss, *present]):
            finite = bool(found.task_loss.isfinite())
            return "the meta-gradient is not finite" if finite else "the task loss is not finite"
        if self._guard and meta is not None:
            turned = self._guard.turned(float(self._step.model.mean(found.task_loss)), meta)
            if turned:
                warnings.warn(f"OnlineLearner: {turned}", RuntimeWarning, stacklevel=5)
                self._guard.undo(meta)
                self._bounds.accepted = None
                return turned
        if meta is not None:
            for p, g in zip(phi, found.gradients, strict=True):
                p.grad = g
            meta.step()
            project(self.loss)
            for p in phi:
                p.grad = None
        if found.learning_rate_gradients:
            self._step.rates.descend(found.learning_rate_gradients, self.learning_rate)
        return None

    def _snapshot(self, slope_ratio: Tensor | None) -> None:
        state = {name: value.to("cpu", copy=True) for name, value in self.loss.state_dict().items()}
        ratio = None if slope_ratio is None else slope_ratio.item()
        self.history.append(Snapshot(self.steps, state, ratio))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model and its optimizer, which are the caller's to save."""
        accepted = self._bounds.accepted
        return {
            "loss": self.loss.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict() if self.meta_optimizer else None,
            "steps": self.steps,
            "next_update": self._schedule.next,
            "skipped": int(self.skipped),
            "accepted": accepted and (accepted.values, accepted.state),
            "guard": self._guard.state() if self._guard else None,
            "history": [(s.step, s.state, s.slope_ratio) for s in self.history],
            "backend": self._step.backend_state(),
            "clean": self._step.clean.state(self._step.model.names) if self._step.clean else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        if self.meta_optimizer:
            self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._schedule.next = state.get("next_update", 0)
        accepted = state["accepted"]
        self._bounds.accepted = accepted and LossSnapshot(*accepted)
        if self._guard:
            self._guard.load(state.get("guard"))
        self.history = [Snapshot(*saved) for saved in state["history"]]
        if "backend" in state:
            self._step.load_backend(*state["backend"])
        if self._step.clean:
            self._step.clean.load(state.get("clean"), self._step.model.names)
        self._accumulated = []
        self._check_replicas_at = self.steps
