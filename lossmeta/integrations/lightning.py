"""Lightning modules that train with a learned loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossmeta._batches import Batch
from lossmeta._optimizers import unwrapped
from lossmeta.adalfl import OnlineLearner, StepReport

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(
            f"lossmeta.integrations.lightning: lightning must be installed, got {str(error)!r}; "
            'pip install "lossmeta[integrations]"'
        ) from error

WHERE = "OnlineModule"


class OnlineModule(pl.LightningModule):  # type: ignore[misc]  # Any where lightning is missing
    """A ``LightningModule`` whose training steps are those of an :class:`~lossmeta.adalfl.OnlineLearner`.

    ``configure_optimizers`` takes the parameters of the model alone, not ``self.parameters()``, in which the learned
    loss may be. :meth:`configure_learner` says how the loss is learned. Optimization stays automatic: steps are
    counted, schedulers step, and checkpoints are written as in any other module. The learner's state is in the
    checkpoints. With ``Trainer(accumulate_grad_batches=n)`` the n batches make one step.

    A ``training_step`` of your own calls :meth:`learn` once and returns the loss of the report. Nothing else is
    trained: a loss that it returns has no backward pass.

    Raises:
        ValueError: when the training starts, for what cannot be right: several processes or optimizers, float16, manual
            optimization, ``Trainer(gradient_clip_val=...)``, a learner of another optimizer, one that keeps gradients
            or captures, and a checkpoint without the learner's state.

    Example:
        >>> class Digits(OnlineModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Linear(64, 10)
        ...         self.loss = lossmeta.losses.LossNetwork(residual="cross_entropy")
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.model.parameters(), lr=0.1)
        ...
        ...     def configure_learner(self, optimizer):
        ...         return OnlineLearner(self.model, optimizer, self.loss, torch.nn.functional.cross_entropy)
    """

    def configure_learner(self, optimizer: Optimizer) -> OnlineLearner:
        """The learner; called when the training starts, when the optimizer is there and all is on its device.

        Args:
            optimizer: what ``configure_optimizers`` made.
        """
        raise NotImplementedError(f"{WHERE}: configure_learner(optimizer) must return an OnlineLearner")

    @property
    def learner(self) -> OnlineLearner:
        """The learner of this training."""
        return self._loop.learner

    def learn(self, batch: Batch, valid_batch: Batch | None = None) -> StepReport | None:
        """One step of the learner, from ``training_step``.

        Args:
            batch: inputs and target.
            valid_batch: inputs and target of the task loss; the training batch again where there is none.

        Returns:
            The report, or ``None`` for a batch that only waits for the others of its step, with
            ``Trainer(accumulate_grad_batches=n)``.

        Raises:
            RuntimeError: for a second call in one ``training_step``.
        """
        return self._loop.learn(batch, valid_batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learns from the batch, ``(inputs, target)``, and logs its loss as ``train_loss``."""
        report = self.learn((batch[0], batch[1]))
        if report is None:
            return torch.zeros((), device=self.device)
        self.log("train_loss", report.loss, prog_bar=True)
        return report.loss

    # ---- What Lightning calls.

    def configure_callbacks(self) -> Any:
        """Also the callback that makes the learner: an override returns it too."""
        return [_Loop()]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing: the learner has made its backward passes, and the optimizer's step."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Runs ``training_step``, which makes the step: one more without gradients would still count in some."""
        assert optimizer_closure is not None
        with self._loop.last_of_a_step():
            optimizer_closure()

    @property
    def _loop(self) -> _Loop:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _Loop):
                return callback
        raise ValueError(
            f"{WHERE}: configure_callbacks must return the learner's callback too, got one that does not; add those "
            "of super().configure_callbacks()"
        )


class _Loop(pl.Callback):  # type: ignore[misc]
    """Makes the learner of a training, takes its steps, and keeps its state in checkpoints."""

    def __init__(self) -> None:
        self.made: OnlineLearner | None = None
        self.saved: dict[str, Any] | None = None
        self.is_last = False  # of the batches of a step
        self.calls = 0

    @property
    def learner(self) -> OnlineLearner:
        if self.made is None:
            raise RuntimeError(f"{WHERE}: the learner is there while trainer.fit runs, not before")
        return self.made

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        _check(trainer, pl_module)
        (optimizer,) = trainer.optimizers
        learner = pl_module.configure_learner(optimizer)
        if not isinstance(learner, OnlineLearner):
            raise TypeError(
                f"{WHERE}: configure_learner must return an OnlineLearner, got {type(learner).__name__}"
            )
        if unwrapped(learner.optimizer) is not unwrapped(optimizer):
            raise ValueError(
                f"{WHERE}: the learner must have the optimizer that configure_learner was given, got another; "
                "Lightning saves the one of configure_optimizers"
            )
        if learner.keep_gradients or learner.captures:
            raise ValueError(
                f"{WHERE}: the learner must have keep_gradients=False and capture=False, got True; Lightning clears "
                "gradients after every step"
            )
        self.made = learner
        if self.saved is not None:
            learner.load_state_dict(self.saved)
            self.saved = None

    @contextmanager
    def last_of_a_step(self) -> Iterator[None]:
        """Inside, the batch is the last of its step, which must be taken."""
        self.is_last, self.calls = True, 0
        try:
            yield
        finally:
            self.is_last = False
        if self.calls == 0:
            raise RuntimeError(
                f"{WHERE}: training_step must call self.learn(batch), which trains the model; it did not"
            )

    def learn(self, batch: Batch, valid_batch: Batch | None) -> StepReport | None:
        if not self.is_last:
            self.learner.accumulate(batch)
            return None
        if self.calls:
            raise RuntimeError(f"{WHERE}: training_step must call self.learn once, it did so again")
        report = self.learner.step(batch, valid_batch)
        self.calls += 1
        return report

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and not checkpoint.get("callbacks", {}).get(self.state_key):
            raise ValueError(
                f"{WHERE}: a checkpoint to go on from must hold the learner's state, got one without; it is not of an "
                "OnlineModule, or of its weights alone"
            )

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict() if self.made is not None else (self.saved or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict or None


def _check(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuses what would be silently wrong."""
    if trainer.world_size > 1:
        raise ValueError(
            f"{WHERE}: the trainer must have one process, got {trainer.world_size}; pass devices=1"
        )
    if not module.automatic_optimization:
        raise ValueError(f"{WHERE}: automatic_optimization must stay True, got False")
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"{WHERE}: configure_optimizers must return one optimizer, got {len(trainer.optimizers)}"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"{WHERE}: gradient_clip_val must be None, for the trainer does not see the gradients, got "
            f"{trainer.gradient_clip_val}; pass clip_norm or clip_value to the OnlineLearner"
        )
    if str(trainer.precision).startswith("16"):
        raise ValueError(
            f"{WHERE}: precision must not be float16, whose GradScaler does not see the gradients, got "
            f'{trainer.precision!r}; use "bf16-mixed"'
        )
