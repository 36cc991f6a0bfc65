"""Training with labels that are partly wrong, by a few that are right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lossmeta._batches import Batch, Loss, checked_batches
from lossmeta._checks import check_at_least_one, check_positive_and_finite
from lossmeta._model_state import RandomState, evaluating
from lossmeta.adalfl._clean_batches import WHERE, CleanBatches, is_pair
from lossmeta.adalfl.averaged_weights import AveragedWeights
from lossmeta.adalfl.learned_loss import default_meta_rate, to_learn
from lossmeta.adalfl.online import OnlineLearner
from lossmeta.adalfl.records import StepReport
from lossmeta.adalfl.relabelling import Drawn, Relabelling
from lossmeta.losses import LossNetwork

RANK = 1_000_003  # seeds of two processes lie this far apart
MOST_CLASSES = 4096  # for which labels are drawn without being asked for


class CleanLearner:
    r"""Trains a model on labels of which some are wrong, with a loss learned from a few that are right.

    Each step descends

    .. math:: \mathcal M_\phi(\text{training batch}) + w\,\mathcal L_T(\text{clean batch})

    and moves :math:`\phi` by what the step did to :math:`\mathcal L_T` on the next clean batch (AdaLFL, Algorithm 2);
    the first step is judged by its own. What the model becomes is an exponential moving average of the weights. Part
    of the training labels is drawn anew in each step by what that average makes of them (:class:`Relabelling`): the
    loss is learned where the shape of a loss can tell wrong labels from right ones, and the draws serve where it
    cannot, as with classes that are taken for each other, or where the clean samples are learned by heart and teach
    the loss nothing. ``docs/results/adalfl-noise.md`` has what that is worth. A weight decay of 0.005 helped on most
    data there. Keep some samples that judge.

    Args:
        model: in training mode; may be wrapped in ``DistributedDataParallel``.
        optimizer: the model's; SGD with momentum is what was measured.
        clean: samples with right labels, a pair (inputs, labels) of tensors or batches such as a DataLoader, on the
            model's device. They are gone through again and again, a pair in an order of its own. Where there are none,
            samples like the training ones that are held out of it will do with ``clean_weight=0``, if wrong labels are
            spread over all classes; not where classes are taken for certain others.
        loss: what is learned, ``loss(prediction, target) -> []``; by default a
            ``LossNetwork(residual="cross_entropy", normalize_slope=True)``, which starts as cross-entropy.
        task_loss: function of the same arguments, what is really to be lowered.
        clean_weight: :math:`w`; 0 leaves the clean batches to the loss.
        meta_rate: Adam's, of the loss; by default the one that the loss names as its ``meta_rate``, which is 3e-3 for
            the default loss.
        batch_size: of the clean batches, where ``clean`` is a pair.
        decay: of the average, see :class:`AveragedWeights`.
        relabel: whether a share of the training labels is drawn anew in each step, see :class:`Relabelling`, by what
            the averaged model makes of them; where they are class indices of the model's outputs. By default with the
            default loss alone, for another one may have its own idea of what a label says, and up to 4096 classes, for
            it keeps a number for each pair of them.
        guard: see :class:`OnlineLearner`; the average goes back with the model.
        seed: of the order of the clean samples; processes of a ``DistributedDataParallel`` model have others.
        options: of :class:`OnlineLearner`: ``meta_every``, ``autocast``, ``learning_rate`` and so on.

    Attributes:
        learner: the :class:`OnlineLearner`.
        loss: the learned loss.
        averaged: a copy of the model with the averaged weights, in evaluation mode, for predictions at any time.
        relabelling: draws labels anew, and has in ``transition`` what labels the classes seem to bear; ``None`` before
            the first step and without ``relabel``.

    Raises:
        ValueError: for no clean data, clean labels that are none of the model's classes, options out of range, and a
            task loss other than cross-entropy without a loss.
        TypeError: for clean data that is neither a pair nor batches.
        Warning: where a class has no clean sample.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        >>> clean = torch.randn(30, 4), torch.arange(30) % 3
        >>> learner = lossmeta.adalfl.CleanLearner(model, optimizer, clean)
        >>> for inputs, labels in [(torch.randn(8, 4), torch.randint(3, (8,)))]:
        ...     report = learner.step((inputs, labels))  # was: loss.backward(), optimizer.step()
        >>> learner.finish()  # the model has the averaged weights
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        clean: Batch | Iterable[Batch],
        *,
        loss: nn.Module | None = None,
        task_loss: Loss = F.cross_entropy,
        clean_weight: float = 1.0,
        meta_rate: float | None = None,
        batch_size: int = 64,
        decay: float = 0.995,
        relabel: bool | None = None,
        guard: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if meta_rate is not None:
            check_positive_and_finite(WHERE, "meta_rate", meta_rate)
        is_pair(clean)  # refuses what is neither, before anything is made
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(f"{WHERE}: the model must have trainable parameters, got none")
        if loss is None and not (task_loss is F.cross_entropy or isinstance(task_loss, nn.CrossEntropyLoss)):
            raise ValueError(
                f"{WHERE}: loss must be given with a task_loss of its own: the default one starts as cross-entropy; "
                'LossNetwork(link="identity", residual="squared_error", normalize_slope=True) is for regression'
            )
        self._relabel = loss is None if relabel is None else relabel
        self._most_classes = MOST_CLASSES if relabel is None else None
        self.relabelling: Relabelling | None = None
        if loss is None:
            dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPUs too
                loss = LossNetwork(residual="cross_entropy", normalize_slope=True, device="cpu", dtype=dtype)
            loss.to(parameter.device)
        if "meta_optimizer" not in options and (phi := to_learn(loss)):
            rate = default_meta_rate(loss) if meta_rate is None else meta_rate
            options["meta_optimizer"] = Adam(phi, rate, fused=parameter.device.type in ("cpu", "cuda"))
        elif meta_rate is not None:
            raise ValueError(
                f"{WHERE}: meta_rate must be left out with a meta_optimizer, which has its own, and for a loss without "
                "parameters"
            )
        self.learner = OnlineLearner(
            model, optimizer, loss, task_loss, clean_weight=clean_weight, guard=guard, **options
        )
        self.loss, self._wrapped = loss, model
        self._model = self.learner._step.model.plain
        self._task_loss = task_loss
        own = self.learner._step.model
        rank = torch.distributed.get_rank(own.group) if own.distributed else 0
        self._ignored = getattr(task_loss, "ignore_index", -100)
        self._seed = seed + RANK * rank
        self._clean = CleanBatches(clean, batch_size, self._seed, self._count_classes, self._ignored)
        self._average = AveragedWeights(self._model, decay)
        if self.learner._guard:
            self.learner._guard.others.append(self._average)

    @property
    def averaged(self) -> nn.Module:
        return self._average.model

    @torch.no_grad()
    def _count_classes(self, inputs: Any, labels: Tensor) -> int | None:
        model = self.learner._step.model
        start = RandomState(model.device)
        with evaluating(self._model):
            prediction = model.predict(inputs)
        start.bring_back()
        shape = prediction.shape
        of_classes = len(shape) > 1 and shape[1] > 1 and labels.shape == shape[:1] + shape[2:]
        return shape[1] if of_classes else None

    def step(self, train_batch: Batch | Sequence[Batch]) -> StepReport:
        """One training step, with the next clean batch, in the place of ``loss.backward(); optimizer.step()``.

        Args:
            train_batch: inputs and labels, or a list of such pairs for one step of them all.

        Raises:
            ValueError: for a model in evaluation mode, and as :meth:`OnlineLearner.step`; as there, everything is as
                before then, but that the clean batch has been taken.
            TypeError: as :meth:`OnlineLearner.step`.
        """
        if not self._wrapped.training:
            raise ValueError(
                f"{WHERE}: the model must be in training mode, got one in evaluation mode; call model.train()"
            )
        clean = next(self._clean)
        batches = checked_batches("OnlineLearner", "train_batch", train_batch)
        found = [self._relabelled(batch) for batch in batches] if self._relabel else []
        report = self.learner.step([batch for batch, _ in found] if found else batches, clean)
        self._average.update()
        if self.relabelling:
            self.relabelling.learn(*(drawn for _, drawn in found if drawn))
        return report

    @torch.no_grad()
    def _relabelled(self, batch: Batch) -> tuple[Batch, Drawn | None]:
        inputs, labels = batch
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.uint8):
            return batch, None
        logits = self.learner._step.model.predict_by(self.averaged, inputs)
        shape = logits.shape
        if len(shape) < 2 or labels.shape != shape[:1] + shape[2:] or labels.device != logits.device:
            return batch, None
        if self._most_classes and shape[1] > self._most_classes:
            self._relabel = False
            return batch, None
        if self.relabelling is None:
            self.relabelling = self._new_relabelling(shape[1], logits.device)
        drawn = self.relabelling.draw(logits, labels)
        return (inputs, drawn.labels), drawn

    def _new_relabelling(self, classes: int, device: torch.device) -> Relabelling:
        return Relabelling(classes, seed=self._seed, ignore_index=self._ignored, device=device)

    def steps(self, train_batches: Iterable[Batch], epochs: int = 1) -> Iterator[StepReport]:
        """Takes the steps of whole epochs, one for each report that is asked for.

        Args:
            train_batches: a DataLoader, or a list of batches.
            epochs: how often to go through them.

        Raises:
            ValueError: for training data without a batch, or that ends before the last epoch.
        """
        check_at_least_one(WHERE, "epochs", epochs)
        for epoch in range(epochs):
            count = 0
            for batch in train_batches:
                count += 1
                # A DataLoader gives lists; a list of batches would be something else.
                yield self.step(tuple(batch) if isinstance(batch, list) else batch)
            if not count:
                raise ValueError(
                    f"{WHERE}: train_batches must hold at least one batch each time they are gone through, got none "
                    f"in epoch {epoch}; give a list or a DataLoader"
                )

    def finish(self, last_stage: int = 0) -> None:
        """Gives the model the averaged weights.

        Args:
            last_stage: steps on the clean batches alone that follow, with the optimizer as it is; in trials none paid
                where ``clean_weight`` was 1.

        Raises:
            ValueError: for a negative ``last_stage``.
        """
        if last_stage < 0:
            raise ValueError(f"{WHERE}: last_stage must not be negative, got {last_stage}")
        self._average.give()
        step, optimizer = self.learner._step, self.learner.optimizer
        for _ in range(last_stage):
            inputs, labels = next(self._clean)
            optimizer.zero_grad()
            with step.model.step():
                prediction = step.model.train(inputs)
                self._task_loss(step.model.for_losses(prediction), labels).backward()  # type: ignore[no-untyped-call]
            step.clipping([p.grad for p in step.model.names if p.grad is not None])
            optimizer.step()
        optimizer.zero_grad()
        if last_stage:
            self._average.take()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model, its optimizer and the place in a DataLoader, which are the caller's to save."""
        return {
            "learner": self.learner.state_dict(),
            "averaged": self._average.state_dict(),
            "clean": self._clean.state(),
            "relabelling": self.relabelling and self.relabelling.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self._average.load_state_dict(state["averaged"])
        self._clean.load(state["clean"])
        relabelling = state.get("relabelling")
        self.relabelling = None
        if relabelling and self._relabel:
            self.relabelling = self._new_relabelling(
                len(relabelling["seen"]), self.learner._step.model.device
            )
            self.relabelling.load_state_dict(relabelling)


def learn_with_clean(
    model: nn.Module,
    optimizer: Optimizer,
    train_batches: Iterable[Batch],
    clean: Batch | Iterable[Batch],
    *,
    epochs: int,
    last_stage: int = 0,
    **options: Any,
) -> CleanLearner:
    """Trains a model on labels of which some are wrong, by a few that are right, see :class:`CleanLearner`.

    For whoever owns the loop, :class:`CleanLearner` takes single steps.

    Args:
        model: in training mode; it ends with the averaged weights.
        optimizer: the model's.
        train_batches: a DataLoader, or a list of batches (inputs, labels).
        clean: samples with right labels, a pair of tensors or batches.
        epochs: how often to go through ``train_batches``.
        last_stage: see :meth:`CleanLearner.finish`.
        options: of :class:`CleanLearner`.

    Returns:
        The learner, whose ``loss`` is the learned one.

    Raises:
        ValueError: as :class:`CleanLearner` and its methods.
        TypeError: as :class:`CleanLearner` and its methods.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        >>> noisy = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
        >>> clean = torch.randn(30, 4), torch.arange(30) % 3
        >>> learner = lossmeta.adalfl.learn_with_clean(model, optimizer, noisy, clean, epochs=2)
    """
    learner = CleanLearner(model, optimizer, clean, **options)
    for _ in learner.steps(train_batches, epochs):
        pass
    learner.finish(last_stage)
    return learner
