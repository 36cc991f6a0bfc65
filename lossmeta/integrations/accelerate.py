"""Learned losses beside accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from lossmeta._batches import Loss
from lossmeta.adalfl import OnlineLearner

try:
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        f"lossmeta.integrations.accelerate: accelerate must be installed, got {str(error)!r}; "
        'pip install "lossmeta[integrations]"'
    ) from error

WHERE = "prepare_learner"
SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)


def prepare_learner(
    accelerator: accelerate.Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    loss: nn.Module,
    task_loss: Loss,
    **options: Any,
) -> OnlineLearner:
    """A learner for what ``accelerator.prepare`` returned, whose steps take the place of ``accelerator.backward``.

    The loss moves to the accelerator's device. ``accelerator.save_state`` and ``load_state`` keep the learner's state
    with the rest. With several processes the loss starts as that of the first. With ``mixed_precision="bf16"`` the
    model computes in bfloat16 wherever it is called, and finite differences may give way to an exact back-end; an
    ``Accelerator()`` without it and ``autocast=torch.bfloat16`` here costs less.

    Args:
        accelerator: with one of the kinds of processes that ``DistributedDataParallel`` serves.
        model: prepared.
        optimizer: prepared, over the model's parameters.
        loss: what is learned; not prepared.
        task_loss: what is really to be lowered.
        options: of :class:`~lossmeta.adalfl.OnlineLearner`.

    Raises:
        TypeError: for an optimizer that is not prepared.
        ValueError: for float16, DeepSpeed, FSDP and others, and for ``gradient_accumulation_steps``, and what
            :class:`~lossmeta.adalfl.OnlineLearner` refuses.

    Example:
        >>> accelerator = accelerate.Accelerator(cpu=True)
        >>> model = torch.nn.Linear(4, 3)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> loss = lossmeta.losses.LossNetwork(residual="cross_entropy")
        >>> learner = prepare_learner(accelerator, model, optimizer, loss, torch.nn.functional.cross_entropy)
        >>> learner.step((torch.randn(8, 4), torch.randint(3, (8,)))).skipped is None
        True
    """
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"{WHERE}: model and optimizer must be what accelerator.prepare(model, optimizer) returned, got the "
            f"optimizer {type(optimizer).__name__}"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"{WHERE}: mixed_precision must be 'no' or 'bf16', whose gradients need no scaling, got "
            f"{accelerator.mixed_precision!r}"
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"{WHERE}: processes must be those of DistributedDataParallel, got {accelerator.distributed_type.value}"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"{WHERE}: gradient_accumulation_steps must be 1, got {accelerator.gradient_accumulation_steps}; call "
            "learner.step with a list of batches, or learner.accumulate for all but the last"
        )
    loss.to(accelerator.device)
    learner = OnlineLearner(model, optimizer, loss, task_loss, **options)
    accelerator.register_for_checkpointing(learner)
    return learner
