"""How a method of the AdaLFL paper trains a model: one trial of a comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.adalfl import OnlineLearner, Snapshot, initialize, initialize_learning_rate
from lossmeta.losses import LossNetwork, TaylorLoss
from lossmeta.recipes._problems import Problem, Splits

# Every random number of a trial follows from its seed; methods differ in nothing else.
WEIGHTS, LOSS, RESETS, OFFLINE_TRAIN, OFFLINE_VALIDATION, TRAIN, VALIDATION, NOISE = (
    1_000_003 * (i + 1) for i in range(8)
)

SNAPSHOTS = 20


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        label: of the row.
        column: the paper's column, see ``_paper``.
        tuned: whether the learning rate is the one tuned for plain training, or the task's base rate.
        parts: of the data that are trained on.
        loss: a key of ``LOSSES``, or ``None`` for the task loss itself.
        inner_steps: of Algorithm 1, or of 3 without a learned loss, at the base rate; 0 leaves it out.
        online: meta learning rate of Algorithm 2; 0 keeps the loss as it is.
        learning_rate: step size of Algorithm 4 for the base learning rate; 0 keeps it.
        normalize: whether the loss's slope is scaled to the task loss's.
        objective: the parts of the data whose task loss Algorithm 2 lowers.
    """

    label: str
    column: str | None = None
    tuned: bool = False
    parts: tuple[str, ...] = ("train",)
    loss: str | None = None
    inner_steps: int = 0
    online: float = 0.0
    learning_rate: float = 0.0
    normalize: bool = False
    objective: tuple[str, ...] = ("validation",)


LOSSES: dict[str, Callable[[bool], nn.Module]] = {
    "network": lambda regression: LossNetwork(link=link(regression)),
    "relu": lambda regression: LossNetwork(link=link(regression), activation="relu", output="softplus"),
    "quadratic": lambda regression: TaylorLoss(2, link=link(regression)),
    "cubic": lambda regression: TaylorLoss(3, link=link(regression)),
    "residual": lambda regression: LossNetwork(
        link=link(regression), residual="squared_error" if regression else "cross_entropy"
    ),
}


def link(regression: bool) -> str:
    return "identity" if regression else "softmax"


class TaskLoss(nn.Module):
    """Squared error or cross-entropy; as a loss without parameters it serves to learn a learning rate alone."""

    def __init__(self, regression: bool) -> None:
        super().__init__()
        self.function = F.mse_loss if regression else F.cross_entropy

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.function(prediction, target)


@dataclass
class Trials:
    """Runs methods on one seed's data; what Algorithm 1 has learned is kept for the methods that share it."""

    problem: Problem
    splits: Splits
    seed: int
    device: torch.device
    offline_steps: int
    history: list[Snapshot] = field(default_factory=list)
    _initialised: dict[tuple[Any, ...], tuple[dict[str, Tensor], float | None, float]] = field(
        default_factory=dict
    )

    def run(self, method: Method, rate: float) -> dict[str, Any]:
        """Trains a model; its errors, ``None`` where training diverged, and what it took.

        ``history`` then holds how the loss changed.
        """
        self.history = []
        task_loss = TaskLoss(self.splits.regression)
        loss, rate, offline_seconds = self._prepared(method, rate, task_loss)
        model = self._model(self.seed + WEIGHTS)
        optimizer = SGD(model.parameters(), rate, **self.problem.optimizer_options)  # type: ignore[arg-type]
        batches = self._batches(method.parts, TRAIN)
        start = self._now()
        learner, diverged = None, False
        with _seeded(self.seed + NOISE):
            try:
                if method.online or method.learning_rate:
                    learner = OnlineLearner(
                        model,
                        optimizer,
                        loss,
                        task_loss,
                        meta_optimizer=Adam(loss.parameters(), method.online) if method.online else None,
                        learning_rate=method.learning_rate,
                        snapshot_every=max(1, self.problem.steps // SNAPSHOTS),
                    )
                    objective = self._batches(method.objective, VALIDATION)
                    for _ in range(self.problem.steps):
                        learner.step(next(batches), next(objective))
                else:
                    for _ in range(self.problem.steps):
                        inputs, target = next(batches)
                        optimizer.zero_grad()
                        loss(model(inputs), target).backward()
                        optimizer.step()
            except RuntimeError as error:
                if "the learned loss is" not in str(error):
                    raise
                diverged = True
        seconds = self._now() - start
        if learner is not None:
            self.history = learner.history
        errors = {name: self.splits.evaluate(model, name) for name in ("selection", "test")}
        diverged = diverged or not all(map(math.isfinite, errors.values()))
        return {
            **{name: None if diverged else error for name, error in errors.items()},
            "slope_ratio": None if diverged else self._slope_ratio(model, loss, task_loss),
            "rate": rate,
            "final_rate": float(optimizer.param_groups[0]["lr"]),
            "seconds": seconds,
            "offline_seconds": offline_seconds,
            "skipped": int(learner.skipped) if learner is not None else 0,
        }

    def loss(self, method: Method) -> nn.Module:
        """A loss of the method's kind, not yet learned."""
        return (
            LOSSES[method.loss](self.splits.regression) if method.loss else TaskLoss(self.splits.regression)
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _model(self, seed: int) -> nn.Module:
        with _seeded(seed):
            return self._new_model()

    def _new_model(self) -> nn.Module:
        return self.problem.model(self.splits.features, self.splits.outputs).to(self.device)

    def _batches(self, parts: tuple[str, ...], stream: int) -> Any:
        return self.splits.batches(self.splits.joined(*parts), self.problem.batch, self.seed + stream)

    def _prepared(self, method: Method, rate: float, task_loss: nn.Module) -> tuple[nn.Module, float, float]:
        """The loss and the learning rate that training starts with, and the seconds that learning them took."""
        with _seeded(self.seed + LOSS):
            loss = self.loss(method).to(self.device)
        seconds = 0.0
        if method.inner_steps:
            key = (method.loss, method.inner_steps)
            if key not in self._initialised:
                start = self._now()
                learned_rate = self._initialise(loss, method, task_loss)
                state = {name: t.clone() for name, t in loss.state_dict().items()}
                self._initialised[key] = state, learned_rate, self._now() - start
            state, learned_rate, seconds = self._initialised[key]
            rate = rate if learned_rate is None else learned_rate
            loss.load_state_dict(state)
        if method.normalize:
            loss.normalize_slope = True  # type: ignore[assignment]
        return loss, rate, seconds

    def _initialise(self, loss: nn.Module, method: Method, task_loss: nn.Module) -> float | None:
        """Algorithm 1 changes the loss; without a learned loss Algorithm 3 returns a learning rate."""
        options: dict[str, Any] = {
            "train_batches": self._batches(("train",), OFFLINE_TRAIN),
            "valid_batches": self._batches(("validation",), OFFLINE_VALIDATION),
            "task_loss": task_loss,
            "learning_rate": self.problem.rate,
            "steps": self.offline_steps,
            "inner_steps": method.inner_steps,
        }
        with _seeded(self.seed + RESETS):
            if method.loss is None:
                return initialize_learning_rate(self._new_model, **options)[0]
            initialize(loss, self._new_model, **options)
        return None

    def _slope_ratio(self, model: nn.Module, loss: nn.Module, task_loss: nn.Module) -> float:
        """How many times larger the learned loss's mean absolute slope is than the task loss's, on training data."""
        inputs, target = next(self._batches(("train",), TRAIN))
        model.eval()  # no dropout: the trial's random numbers are drawn
        with torch.no_grad():
            prediction = model(inputs)
        slopes = []
        for function in (loss, task_loss):
            f = prediction.detach().requires_grad_()
            (slope,) = torch.autograd.grad(function(f, target), f)
            slopes.append(slope.abs().mean().item())
        return slopes[0] / slopes[1] if slopes[1] else 1.0


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random numbers from a seed; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
