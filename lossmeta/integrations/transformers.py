"""Losses and learned losses in the ``Trainer`` of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta._batches import Batch, Loss, Output, prediction_of
from lossmeta._files import replace_file
from lossmeta._optimizers import unwrapped
from lossmeta.adalfl import OnlineLearner

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"lossmeta.integrations.transformers: transformers must be installed, got {str(error)!r}; "
        'pip install "lossmeta[integrations]"'
    ) from error

STATE = "learner.pt"


class ComputeLoss:
    """A loss for ``Trainer(compute_loss_func=...)``.

    It takes what models of transformers give: logits ``[B, C]`` with labels ``[B]``, logits ``[B, T, C]`` with labels
    ``[B, T]``, one logit or prediction for each label, or ``[B, 1]`` with float labels ``[B]``. The Trainer counts the
    labels of all batches of a step; the loss is the sum over labels divided by that number, so that batches which are
    accumulated weigh as in one large batch. Labels of -100 count neither there nor here.

    Args:
        loss: with a ``reduction``, such as those of :mod:`lossmeta.losses` and of ``torch.nn``. One with parameters of
            its own is not learned here: that is for :class:`OnlineTrainer`.
        shift: judge each token by the next label, for causal language models, whose labels are their inputs.
        output: what of the model's output is the logits, see :func:`~lossmeta.adalfl.meta_gradient`.

    Raises:
        TypeError: for a loss without a reduction, and when called with an output in which no logits are found.
        ValueError: for another ignore_index than the Trainer's, and when called with labels that do not fit the
            logits, or without labels.

    Example:
        >>> compute = ComputeLoss(lossmeta.losses.ParametricCrossEntropy(5, activation="identity"))
        >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[0, 1, -100], [2, -100, -100]])
        >>> round(compute({"logits": logits}, labels, num_items_in_batch=6).item(), 4)  # 3 labels of log 5 each
        0.8047
    """

    def __init__(self, loss: nn.Module, *, shift: bool = False, output: Output = None) -> None:
        if getattr(loss, "reduction", None) not in ("none", "mean", "sum"):
            raise TypeError(
                "ComputeLoss: loss must be a module with a reduction, such as lossmeta.losses.ParametricCrossEntropy, "
                f"got {type(loss).__name__}"
            )
        self.mean, self.sum = (copy.copy(loss) for _ in range(2))  # the parameters are shared
        self.mean.reduction, self.sum.reduction = "mean", "sum"  # type: ignore[assignment]
        if getattr(loss, "ignore_index", -100) != -100:
            raise ValueError(
                f"ComputeLoss: ignore_index must be -100, as the Trainer counts labels, got {loss.ignore_index}"
            )
        self.shift, self.output = shift, output

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if not isinstance(labels, Tensor):
            raise ValueError(f"ComputeLoss: the batch must have labels, got {type(labels).__name__}")
        logits, labels = aligned(
            "ComputeLoss", prediction_of("ComputeLoss", outputs, self.output), labels, self.shift
        )
        if num_items_in_batch is None:
            return self.mean(logits, labels)  # type: ignore[no-any-return]
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        if labels.shape == logits.shape:  # several labels for each sample, which a sum over samples averages
            return self.mean(logits, labels) * (labels != -100).sum() / num_items_in_batch  # type: ignore[no-any-return]
        return self.sum(logits, labels) / num_items_in_batch  # type: ignore[no-any-return]


class OnlineTrainer(transformers.Trainer):  # type: ignore[misc]  # Any where transformers is missing
    """A ``Trainer`` whose training steps are those of an :class:`~lossmeta.adalfl.OnlineLearner`.

    Optimizer, schedule, evaluation, logging and checkpoints are the Trainer's. The optimizer has stepped when the
    Trainer comes to its own step, which then does nothing; so its logged ``grad_norm`` is 0, and ``max_grad_norm`` is
    handed to the learner. Checkpoints hold the learner's state in ``learner.pt``. Losses take logits and labels as
    :class:`ComputeLoss` does. The batches of ``gradient_accumulation_steps`` make one step, in which their mean losses
    count by their numbers of samples.

    Args:
        learned_loss: the loss that is learned.
        task_loss: what is really to be lowered, over the same logits and labels.
        meta_dataset: what it is lowered on, in batches as for evaluation, one for each step, in turn; the training
            batch again where there is none.
        shift: as for :class:`ComputeLoss`.
        make_learner: ``make_learner(model, optimizer, loss, task_loss, **options) -> OnlineLearner`` where the
            defaults of :class:`~lossmeta.adalfl.OnlineLearner` will not do: a ``functools.partial`` of it, or a
            function that makes a meta-optimizer. Options hold ``clip_norm``.
        args, kwargs: those of ``transformers.Trainer``.

    Attributes:
        learner: from the first training step on.

    Raises:
        ValueError: for what cannot be right: float16, several GPUs or processes, DeepSpeed, FSDP, label smoothing of
            the arguments (the losses have their own), ``compute_loss_func``, and several labels. When it trains, for a
            model, optimizer and loss that do not fit, and for a checkpoint without the learner's state.

    Example:
        >>> make = functools.partial(OnlineLearner, log_slope=True)  # doctest: +SKIP
        >>> trainer = OnlineTrainer(
        ...     learned_loss=lossmeta.losses.LossNetwork(residual="cross_entropy"),
        ...     make_learner=make,
        ...     model=model,
        ...     args=transformers.TrainingArguments("out", max_steps=100),
        ...     train_dataset=dataset,
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        learned_loss: nn.Module,
        task_loss: Loss = F.cross_entropy,
        meta_dataset: Any = None,
        shift: bool = False,
        make_learner: Callable[..., OnlineLearner] = OnlineLearner,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check()
        if meta_dataset is not None and not hasattr(meta_dataset, "__len__"):
            raise ValueError(
                f"OnlineTrainer: meta_dataset must have a length, got {type(meta_dataset).__name__}"
            )
        self.learned_loss, self.task_loss = learned_loss, task_loss
        self.meta_dataset, self.shift, self.make_learner = meta_dataset, shift, make_learner
        self.learner: OnlineLearner | None = None
        self._learner_state: dict[str, Any] | None = None
        self._meta_batches: Iterator[Any] | None = None

    def _check(self) -> None:
        arguments = self.args
        refused = {
            "fp16 must be False, for its GradScaler does not see the gradients; use bf16": arguments.fp16,
            f"there must be one GPU, got {arguments.n_gpu}; choose one with CUDA_VISIBLE_DEVICES": arguments.n_gpu
            > 1,
            f"there must be one process, got {arguments.world_size}; in several use an OnlineLearner of a "
            "DistributedDataParallel model in a loop of your own": arguments.world_size > 1,
            "DeepSpeed is not supported; train without it": self.is_deepspeed_enabled,
            "FSDP is not supported; train without it": self.is_fsdp_enabled,
            "label_smoothing_factor must be 0; give the losses label_smoothing": bool(
                arguments.label_smoothing_factor
            ),
            "compute_loss_func must be None; pass it as task_loss": self.compute_loss_func is not None,
            f"there must be one of label_names, got {self.label_names}": len(self.label_names) != 1,
        }
        for message, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"OnlineTrainer: {message}")

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        model.train()
        learner = self._made(model)
        batch = self._split(inputs)
        if not self.accelerator.sync_gradients:
            learner.accumulate(batch)
            return torch.zeros((), device=self.args.device)
        return learner.step(batch, self._meta_batch(learner.steps)).loss

    def _made(self, model: nn.Module) -> OnlineLearner:
        """The learner of this model and optimizer, which are there when the training starts."""
        old = self.learner
        assert self.optimizer is not None
        if old is None or unwrapped(old.optimizer) is not unwrapped(self.optimizer):
            options = {"clip_norm": self.args.max_grad_norm} if self.args.max_grad_norm > 0 else {}
            self.learned_loss.to(self.args.device)
            losses = Aligned(self.learned_loss, self.shift), Aligned(self.task_loss, self.shift)
            self.learner = self.make_learner(model, self.optimizer, *losses, **options)
            if self.learner.keep_gradients or self.learner.captures:
                raise ValueError(
                    "OnlineTrainer: keep_gradients and capture must be False, for the Trainer clears the gradients"
                )
            # The Trainer steps once more. Without gradients that would still count in some optimizers.
            self.optimizer.step = _nothing  # type: ignore[method-assign, assignment]
        assert self.learner is not None
        if self._learner_state is not None:
            self.learner.load_state_dict(self._learner_state)
            self._learner_state = None
        return self.learner

    def _split(self, inputs: dict[str, Any]) -> Batch:
        inputs = self._prepare_inputs(inputs)
        (name,) = self.label_names
        if name not in inputs:
            raise ValueError(f"OnlineTrainer: a batch must have {name!r}, got {', '.join(inputs)}")
        return {k: v for k, v in inputs.items() if k != name}, inputs[name]

    def _meta_batch(self, step: int) -> Batch | None:
        if self.meta_dataset is None:
            return None
        if self._meta_batches is None:
            loader = self.get_eval_dataloader(self.meta_dataset)
            self._meta_batches = _from(loader, step % len(loader))
        return self._split(next(self._meta_batches))

    # ---- Checkpoints: the learner's state beside the optimizer's.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.learner is not None and self.args.should_save:
            state = self.learner.state_dict()
            replace_file(Path(output_dir) / STATE, lambda path: torch.save(state, path))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        path = None if checkpoint is None else Path(checkpoint) / STATE
        if path is not None and not path.exists():
            raise ValueError(
                f"OnlineTrainer: {path} must hold the learner's state, got no such file; the checkpoint is not of an "
                "OnlineTrainer"
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if path is not None:
            self._learner_state = torch.load(path, map_location=self.args.device, weights_only=True)
            self._meta_batches = None


class Aligned(nn.Module):
    """A loss over logits and labels as models of transformers give them."""

    def __init__(self, loss: Loss, shift: bool) -> None:
        super().__init__()
        self.loss, self.shift = loss, shift

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(*aligned("OnlineTrainer", logits, labels, self.shift))

    def with_mixed_derivative(self, logits: Tensor, labels: Tensor) -> Any:
        direct = getattr(self.loss, "with_mixed_derivative", None)
        if direct is None or self.shift:
            return None
        found = direct(*aligned("OnlineTrainer", logits, labels, self.shift))
        if found is None:
            return None
        value, slope, mixed = found
        return value, slope.reshape(logits.shape), lambda u: mixed(u.reshape(slope.shape))


def aligned(where: str, logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and labels ``[N]``; where there is one logit for each label, both as they are."""
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    if labels.shape == logits.shape:
        return logits, labels
    if logits.dim() < 2 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{where}: labels must have the shape of the logits, with or without its last dimension, got "
            f"{list(labels.shape)} for {list(logits.shape)}"
        )
    if labels.is_floating_point() and logits.shape[-1] == 1:
        return logits.squeeze(-1), labels
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


def _nothing(closure: Any = None) -> None:
    """What is left for an optimizer that has stepped."""


def _from(loader: Any, first: int) -> Iterator[Any]:
    """The batches without end, of the first round from that one on."""
    while True:
        for position, batch in enumerate(loader):
            if position >= first:
                yield batch
        first = 0
