"""What a training step is told, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta._batches import Loss, Output


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
        skipped: why there are no gradients although the loss has parameters, or ``None``.
    """

    loss: Tensor
    task_loss: Tensor
    gradients: list[Tensor | None]
    learning_rate_gradients: list[Tensor]
    slope_ratio: Tensor | None
    backend: str
    nearly_nothing: bool
    skipped: str | None = None


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
        output: what of the model's output is the prediction.
        clean_weight: of the task loss on the validation batches in the training step.
        slope_of: the loss whose slope on the training batch the slope ratio compares with; ``None``: the task loss.
        keep_gradients: leave the training gradients in ``.grad``.
    """

    backend: str = "auto"
    clip_norm: float | None = None
    clip_value: float | None = None
    approximate: bool = False
    learning_rates: bool = False
    autocast: torch.dtype | None = None
    log_slope: bool = False
    output: Output = None
    clean_weight: float = 0.0
    slope_of: Loss | None = None
    keep_gradients: bool = True


@dataclass
class StepReport:
    """What one call of :meth:`OnlineLearner.step` did.

    Attributes:
        loss: the learned loss on the training batch, before the step.
        task_loss: the task loss on the validation batch after it, or ``None`` without a meta-update.
        slope_ratio: mean absolute slope of the learned loss over that of the task loss; how much of a gain is only a
            larger learning rate. ``None`` unless ``log_slope``.
        skipped: why a meta-update was due but not taken, or ``None``.
    """

    loss: Tensor
    task_loss: Tensor | None
    slope_ratio: Tensor | None
    skipped: str | None


@dataclass
class Snapshot:
    """The learned loss at one time of the training.

    Attributes:
        step: training steps done.
        state: the loss's ``state_dict()``, copied to the CPU.
        slope_ratio: that of the last step, if it was logged.
    """

    step: int
    state: dict[str, Tensor]
    slope_ratio: float | None
