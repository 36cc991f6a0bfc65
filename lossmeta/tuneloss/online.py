"""TuneLoss online: a regulariser that is learned while the model trains, in the user's own loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta._batches import Batch, Loss, Output
from lossmeta._checks import check_at_least_one, choice
from lossmeta._model_state import refuse_shards
from lossmeta.ops.pwl_penalty import pwl_penalty, with_slope
from lossmeta.tuneloss import _plot
from lossmeta.tuneloss._data_set import DataSet
from lossmeta.tuneloss._full_gradient import FullGradient
from lossmeta.tuneloss._regularizer import NotFitted, Regularizer
from lossmeta.tuneloss._weights import finite, flat, trainable
from lossmeta.tuneloss.convex_regularizer import ConvexRegularizer
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all"
LONGEST = 1e9  # of a round, in those of the beginning


@dataclass(frozen=True)
class OnlineReport:
    """The end of a round.

    Attributes:
        step: training steps so far.
        train_loss: the task's loss on the training data.
        valid_loss: on the validation data.
        on: whether the model trains under a regulariser from here on.
        skipped: why nothing was learned from the round, or ``None``.
        regularizers: by the names of their weights; empty before it is on.
    """

    step: int
    train_loss: float
    valid_loss: float
    on: bool
    skipped: str | None = None
    regularizers: Mapping[str, PiecewiseLinear] = field(default_factory=dict)


class OnlineTuner:
    r"""Keeps a model from overfitting by a regulariser :math:`\sum_j r(\theta_j)` that is learned as it trains.

    After every round the gradients of the loss on all training data and on all validation data are compared, at the
    weights as they are. The convex r whose slopes come nearest to their difference then pulls where the validation loss
    pulls, see :class:`ConvexRegularizer`. It is switched on when the validation loss first rises from one round to the
    next (Appendix B.3), and learned anew after every round from there on. Rounds grow longer.

    The training loop stays yours, with any optimizer::

        loss = task_loss(model(inputs), target) + tuner.penalty()
        loss.backward()
        optimizer.step()
        tuner.step()

    The gradients are those of the model in evaluation mode and of the task's loss alone: dropout, augmentation that the
    training data do not have here, and the optimizer's weight decay are no part of them, and come on top of r.

    Args:
        model: that is trained, not wrapped.
        train: the training data: a batch ``(inputs, target)``, or batches that start again where they end, such as a
            DataLoader. Tensors are moved to the model's device.
        valid: the validation data, of the same kind. They must not be training data; the model fits them a little.
        task_loss: ``task_loss(prediction, target)``, a mean over samples, in training and validation.
        regularizer: that learns r; :class:`ConvexRegularizer` by default.
        every: steps of a round; ``None``: an epoch, which is as many steps as ``train`` has batches.
        lengthen: factor, at least 1, by which a round is longer than the one before it, once the regulariser is on. A
            round costs two thirds of an epoch of a softmax regression; with 1.1 there are about 36 in 300 epochs.
        by: ``"tensor"`` learns an r for each parameter tensor, ``"all"`` one for all of them.
        parameters: names of the model's parameters that are regularised. ``None`` takes the trainable ones of two or
            more dimensions, so that biases and the scales of normalisation layers are left out.
        start: ``"overfit"``, at the first rise of the validation loss; or ``"now"``, after the first round.
        output: what of the model's output is the prediction, see :func:`lossmeta.adalfl.meta_gradient`.

    Attributes:
        on: whether a regulariser is in force.
        regularizers: by the names of their weights (``"all"`` with ``by="all"``); empty while off.
        steps_done: training steps so far.
        skipped: rounds after which a loss, a gradient or a weight was not finite, or no solver found an answer. The
            regularisers stay as they were.

    Raises:
        TypeError: for arguments of another type, and a model that is wrapped.
        ValueError: for options out of range, a model without trainable weights, empty data, iterators, and training
            data of unknown length without ``every``.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.3 and Appendix B.3.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> train, valid = [[(torch.randn(16, 4), torch.randint(3, (16,)))] for _ in range(2)]
        >>> tuner = lossmeta.tuneloss.OnlineTuner(model, train, valid, start="now")
        >>> for inputs, target in train:
        ...     loss = torch.nn.functional.cross_entropy(model(inputs), target) + tuner.penalty()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     report = tuner.step()
        >>> report.on, list(tuner.regularizers)
        (True, ['weight'])
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batch | Iterable[Batch],
        valid: Batch | Iterable[Batch],
        *,
        task_loss: Loss = F.cross_entropy,
        regularizer: Regularizer | None = None,
        every: int | None = None,
        lengthen: float = 1.1,
        by: str = "tensor",
        parameters: Sequence[str] | None = None,
        start: str = "overfit",
        output: Output = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"OnlineTuner: model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(
                f"OnlineTuner: model must not be wrapped, got {type(model).__name__}; processes would learn "
                "regularisers of their own"
            )
        refuse_shards("OnlineTuner", model, "train it on one device")
        if not callable(task_loss):
            raise TypeError(f"OnlineTuner: task_loss must be callable, got {type(task_loss).__name__}")
        self.regularizer: Regularizer = ConvexRegularizer() if regularizer is None else regularizer
        if not all(callable(getattr(self.regularizer, name, None)) for name in ("observe", "fit")):
            raise TypeError(
                f"OnlineTuner: regularizer must learn as ConvexRegularizer does, got {type(regularizer).__name__}"
            )
        self.by_tensor = choice("OnlineTuner", "by", by, {"tensor": True, ALL: False})
        self.waits = choice("OnlineTuner", "start", start, {"overfit": True, "now": False})
        self.model = model
        self.weights = trainable("OnlineTuner", model, parameters)
        self.train = DataSet("OnlineTuner", "train", train, shared=True)
        self.valid = DataSet("OnlineTuner", "valid", valid, shared=False)
        if every is None and self.train.length is None:
            raise ValueError(
                "OnlineTuner: every must be given where the training data do not say how many steps an epoch has, "
                "got None"
            )
        self.every = every if every is not None else int(self.train.length or 0)
        check_at_least_one("OnlineTuner", "every", self.every)
        if not 1 <= lengthen < math.inf:
            raise ValueError(f"OnlineTuner: lengthen must be a number of at least 1, got {lengthen}")
        self.lengthen = float(lengthen)
        self._stretch = 1.0  # how many times `every` this round is
        self._until = self.every  # the step that ends it
        self.regularizers: dict[str, PiecewiseLinear] = {}
        self.steps_done = self.skipped = 0
        self._rises = not self.waits
        self._last = math.inf  # the last round's validation loss
        self._gradient = FullGradient("OnlineTuner", model, task_loss, output)
        self._placed: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._unasked = 0  # steps since the penalty was last asked for

    @property
    def on(self) -> bool:
        return bool(self.regularizers)

    def penalty(self) -> Tensor:
        r"""The learned regulariser of the weights as they are, :math:`\sum_j r(\theta_j)`, to be added to the loss.

        Returns:
            A number, differentiable in the regularised weights; 0 while there is no regulariser.
        """
        self._unasked = 0
        total = self._zero()
        if self.on:
            for name, p in self.weights.items():
                value = pwl_penalty(p.reshape(-1), *self._function(name, p))
                total = total + value.to(total.device)
        return total

    @torch.no_grad()
    def add_gradient(self) -> Tensor:
        """Adds the gradient of :meth:`penalty` to ``.grad``: the same training step, in one pass over the weights.

        Instead of the penalty in the loss, for large models with small batches::

            task_loss(model(inputs), target).backward()
            tuner.add_gradient()
            optimizer.step()
            tuner.step()

        Call it before gradients are clipped and, with a ``GradScaler``, after ``unscale_``.

        Returns:
            The penalty, without gradient.
        """
        self._unasked = 0
        total = self._zero()
        if self.on:
            for name, p in self.weights.items():
                if not p.requires_grad:  # frozen since
                    continue
                theta, grad = p.detach().reshape(-1), p.grad
                if grad is not None and grad.is_contiguous():
                    value, _ = with_slope(theta, *self._function(name, p), add_to=grad.view(-1))
                else:
                    value, slope = with_slope(theta, *self._function(name, p))
                    slope = slope.view(p.shape).to(p.dtype)
                    p.grad = slope if grad is None else grad + slope
                total = total + value.to(total.device)
        return total

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(iter(self.weights.values())).device, dtype=torch.float32)

    def _function(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Knots and slopes for one of the weights, on its device."""
        key = name if self.by_tensor else ALL, weight.device, weight.dtype
        if key not in self._placed:
            self._placed[key] = self.regularizers[key[0]].placed(weight.device, weight.dtype)
        return self._placed[key]

    def step(self) -> OnlineReport | None:
        """Counts a training step; call it after ``optimizer.step()``. The last of a round learns the regulariser.

        Mode, buffers, random numbers and ``.grad`` of the model stay as they are. Whatever raises, nothing has changed,
        and the step is not counted.

        Returns:
            A report after the last step of a round, else ``None``.

        Raises:
            ValueError: for data that have become empty.
            Whatever the model, the data and the task's loss raise.
        """
        self._unasked += 1
        if self.on and self._unasked == 2:
            warnings.warn(
                "OnlineTuner: the loss must have tuner.penalty() added in every step, or add_gradient() be called, got "
                "a step with neither; the regulariser does nothing there",
                stacklevel=2,
            )
        if self.steps_done + 1 < self._until:
            self.steps_done += 1
            return None
        (train_loss, train), (valid_loss, valid) = self._gradient(
            list(self.weights.values()), self.train, self.valid
        )
        groups = [self._grouped(list(tensors)) for tensors in (self.weights.values(), train, valid)]
        problem = _not_finite(train_loss, valid_loss, *groups)
        if problem is None:
            rises = self._rises or valid_loss > self._last
            problem = self._learn(groups, train_loss, valid_loss, fit=rises)
            self._rises, self._last = rises, valid_loss
        self.steps_done += 1
        if self.on:
            self._stretch = min(self._stretch * self.lengthen, LONGEST)
        self._until = self.steps_done + round(self.every * self._stretch)
        if problem is not None:
            self.skipped += 1
            if self.skipped == 1:
                warnings.warn(
                    f"OnlineTuner: {problem}; the regulariser stays as it is. OnlineTuner.skipped counts such rounds",
                    stacklevel=2,
                )
        return OnlineReport(
            self.steps_done, train_loss, valid_loss, self.on, problem, dict(self.regularizers)
        )

    def _learn(
        self, groups: list[list[Tensor]], train_loss: float, valid_loss: float, *, fit: bool
    ) -> str | None:
        """Takes the model into the window, and learns the regularisers anew; or says why not."""
        weights, train, valid = groups
        before = self.regularizer.state_dict()
        try:
            self.regularizer.observe(weights, train, valid, train_loss, valid_loss)
            found = self.regularizer.fit() if fit else []
        except NotFitted as error:
            return f"no regulariser was found ({error})"
        except BaseException:
            self.regularizer.load_state_dict(before)
            raise
        if fit:
            names = list(self.weights) if self.by_tensor else [ALL]
            self.regularizers, self._placed = dict(zip(names, found, strict=True)), {}
        return None

    def _grouped(self, tensors: list[Tensor]) -> list[Tensor]:
        return [flat([t]) for t in tensors] if self.by_tensor else [flat(tensors)]

    def plot(self, reports: Sequence[OnlineReport] = ()) -> Figure:
        """Draws the regularisers and their slopes over the range of the weights, as the paper's Figure 3 b does.

        Args:
            reports: of the rounds whose regularisers are drawn, one curve each from dark (first) to bright (last);
                none for the one in force.

        Returns:
            A ``matplotlib.figure.Figure`` with a row for each group of weights: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
            ValueError: while there is no regulariser.
        """
        drawn = [(r.step, r.regularizers) for r in reports if r.on] or (
            [(self.steps_done, self.regularizers)] if self.on and not reports else []
        )
        if not drawn:
            raise ValueError("OnlineTuner: a regulariser must be on to be drawn, got none")
        spans = dict(
            zip(self.regularizers or drawn[0][1], self._grouped(list(self.weights.values())), strict=True)
        )
        rows = {name: [found[name] for _, found in drawn] for name in spans}
        ends = {name: (float(v.min()), float(v.max())) for name, v in spans.items()}
        return _plot.draw("OnlineTuner", rows, ends, [step for step, _ in drawn])

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on to the same bits, beside the model's, the optimizer's and the data's own."""
        return {
            "weights": self._layout(),
            "regularizer": self.regularizer.state_dict(),
            "functions": {n: (r.knots.clone(), r.slopes.clone()) for n, r in self.regularizers.items()},
            "rises": self._rises,
            "last": self._last,
            "steps_done": self.steps_done,
            "skipped": self.skipped,
            "stretch": self._stretch,
            "until": self._until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: for the state of other weights, of another regularizer, and an older one. Nothing has
                changed then.
        """
        if state["weights"] != self._layout():
            raise ValueError(
                f"OnlineTuner: the state must be of the weights {self._layout()}, got {state['weights']}"
            )
        functions = {name: PiecewiseLinear(*pair) for name, pair in state["functions"].items()}
        if missing := _NUMBERS - state.keys():
            raise ValueError(
                f"OnlineTuner: the state must have {', '.join(sorted(missing))}, got one without"
            )
        self.regularizer.load_state_dict(state["regularizer"])
        self.regularizers, self._placed = functions, {}
        self._rises, self._last = bool(state["rises"]), float(state["last"])
        self.steps_done, self.skipped = int(state["steps_done"]), int(state["skipped"])
        self._stretch, self._until = float(state["stretch"]), int(state["until"])

    def _layout(self) -> dict[str, list[int]]:
        """Names and shapes, grouped as they are."""
        shapes = {name: list(p.shape) for name, p in self.weights.items()}
        return shapes if self.by_tensor else {ALL: [p.numel() for p in self.weights.values()], **shapes}


_NUMBERS = {"rises", "last", "steps_done", "skipped", "stretch", "until"}


def _not_finite(
    train_loss: float,
    valid_loss: float,
    weights: list[Tensor],
    train: list[Tensor],
    valid: list[Tensor],
) -> str | None:
    """What of a round is NaN or infinite."""
    if not (math.isfinite(train_loss) and math.isfinite(valid_loss)):
        return (
            f"a loss was not finite ({train_loss} on the training data, {valid_loss} on the validation data)"
        )
    for what, vectors in (
        ("a weight", weights),
        ("a gradient on the training data", train),
        ("a gradient on the validation data", valid),
    ):
        if not all(map(finite, vectors)):
            return f"{what} was not finite"
    return None
