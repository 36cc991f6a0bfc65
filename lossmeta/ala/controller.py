"""The paper's controller: a policy that moves loss parameters while the model trains."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lossmeta
from lossmeta._batches import Batch, Output
from lossmeta.ala._agent import Agent, Training
from lossmeta.ala._controller_options import SHARED, are_siblings, check_models, check_numbers, check_same_run
from lossmeta.ala._improvement import Improvement
from lossmeta.ala._learning import Learning
from lossmeta.ala._measurement import Measurement, measured_at
from lossmeta.ala._reinforce import Experience, Reinforce
from lossmeta.ala._siblings import Siblings
from lossmeta.ala.policy import PARTS, Policy
from lossmeta.ala.records import ControllerReport
from lossmeta.ala.schedule import Schedule
from lossmeta.ala.space import LEARNING_RATE, Coordinates, LossSpace
from lossmeta.ala.space_loss import SpaceLoss


class Controller:
    r"""Adapts a loss to a metric by a learned policy, as the paper does.

    After every K training steps the policy sees validation statistics of each entry of the loss's parameters, and moves
    it one step down, not at all, or up: :math:`\Phi_{t+1} = \Phi_t + a_t`. Its reward is whether the metric, higher
    the better here, then improved (Eq. 4 and 5),

    .. math:: r_t = \mathrm{sign}(M_{t+1} - M_t), \qquad M_{t+1} = \sum_{j=1}^K \gamma^{K-j} M(f_{w_j}),

    and it learns by REINFORCE with a moving baseline, from the latest rewards and from remembered ones (Eq. 3).
    Training goes on as ever, in the caller's loop. In the first K steps the loss has its default values.

    Processes that train one model together must all call :meth:`step`; the values of the first one hold.

    For most purposes :class:`Population` is the better choice: ``docs/results/ala.md`` has the comparison.

    Args:
        space: of losses.
        metric: what the loss is adapted to: a metric of :mod:`lossmeta.metrics`, a single one of torchmetrics, or a
            function ``metric(prediction, target) -> number``; or several as pairs ``(metric, weight)``, whose rewards
            are averaged with these weights.
        valid: what statistics and metric are measured on: a batch ``(inputs, target)``, or batches that start again
            where they end. All of it is predicted ``evaluations`` times every K steps: that is what a controller costs.
        steps: of the whole training.
        children: models that train side by side, each with a loss of its own, and share the policy.
        window: K.
        discount: :math:`\gamma`.
        evaluations: at how many of the K steps the metric is measured. They split the weights of Eq. 4 evenly; K of
            them are the sum as it stands.
        step_size: of an action, in units of each parameter's scale. The paper's :math:`\beta = 0.1` is one unit of
            :class:`ClassCorrelation` and :class:`DistanceMixture`.
        episode: T, time steps whose rewards an action answers for.
        hidden: sizes of the policy's hidden layers.
        history: time steps that the policy sees.
        parts: what the policy sees, see :class:`Policy`.
        learning_rate: of the policy, by Adam.
        memory: experiences that are remembered.
        batch: experiences that an update of the policy takes, the latest ones among them.
        rewarded_on: what the metric is measured on where that is not ``valid``, such as training data.
        policy: to start from: a :class:`Policy`, which then learns in place, or the path of a file. ``hidden``,
            ``history`` and ``parts`` are then the policy's own.
        learn: whether the policy learns.
        reward: ``"sign"``, the paper's, or ``"advantage"``: children start each window alike and see the same batches,
            and the reward is :math:`(M_i - \bar M) / \mathrm{std} M` over them, without a baseline. At a window's end
            models, optimizers' states and losses become means with the softmax of twice that as weights; in the first,
            the best child's. It takes 2 children or more, ``episode=1`` and ``step(models, optimizers)``; windows of 20
            steps are usual. Dropout's random numbers are for the caller to keep the same.
        record: whether the values of each window are kept for :meth:`schedule`: 4 bytes an entry and window.
        higher_is_better: the metric's direction; asked of the metric where it is not given, for a function ``True``.
        output: what of the model's output is the prediction, see :func:`lossmeta.adalfl.meta_gradient`.
        seed: of the policy's first weights, its actions and its memory.

    Attributes:
        losses: of the children, each a :class:`SpaceLoss`.
        policy: as learned so far.
        steps_done: training steps so far.
        windows: finished ones.
        ties: windows without a change of the metric, or a difference among siblings, whose reward is 0.
        skipped: windows whose metric was not finite: they bring no reward and no action.

    Raises:
        TypeError: for arguments of another type.
        ValueError: for options out of range, a space that adapts the learning rate, which is not the loss's, a policy
            that sees other statistics than the space has, validation data without samples, and ``reward="advantage"``
            with one child or longer episodes.

    Sources:
        Huang et al., "Addressing the Loss-Metric Mismatch with Adaptive Loss Alignment" (2019).

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> (x, y), valid = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(2)]
        >>> controller = lossmeta.ala.Controller(
        ...     lossmeta.ala.ClassCorrelation(3), lossmeta.metrics.ErrorRate(), valid, steps=600
        ... )
        >>> for _ in range(600):
        ...     loss = controller(model(x), y)  # was: torch.nn.functional.cross_entropy(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     report = controller.step(model)
        >>> controller.windows, list(controller.values)
        (3, ['diagonal', 'pairs'])
    """

    def __init__(
        self,
        space: LossSpace,
        metric: Any,
        valid: Batch | Iterable[Batch],
        *,
        steps: int,
        children: int = 1,
        window: int = 200,
        discount: float = 0.9,
        evaluations: int = 4,
        step_size: float = 1.0,
        episode: int = 1,
        hidden: Sequence[int] = (32, 32),
        history: int = 10,
        parts: Sequence[str] = PARTS,
        learning_rate: float = 1e-3,
        memory: int = 100,
        batch: int = 32,
        rewarded_on: Batch | Iterable[Batch] | None = None,
        policy: Policy | str | os.PathLike[str] | None = None,
        learn: bool = True,
        reward: str = "sign",
        record: bool = True,
        higher_is_better: bool | None = None,
        output: Output = None,
        seed: int = 0,
    ) -> None:
        check_numbers(
            counts={
                "steps": steps,
                "children": children,
                "window": window,
                "evaluations": evaluations,
                "episode": episode,
                "memory": memory,
                "batch": batch,
            },
            seed=seed,
            discount=discount,
            step_size=step_size,
            learning_rate=learning_rate,
        )
        siblings = are_siblings(reward, children, episode)
        self.space, self.coordinates = space, Coordinates(space, "Controller")
        if LEARNING_RATE in self.coordinates.places:
            raise ValueError(
                f"Controller: space must not adapt the {LEARNING_RATE}, which is the optimizer's; leave LearningRate "
                "out, or use Population"
            )
        self.measurement = Measurement(
            space, self.coordinates, metric, valid, rewarded_on, higher_is_better, output
        )
        self.steps, self.window, self.step_size, self.reward = steps, window, step_size, reward
        self.measured = measured_at(window, discount, evaluations)
        self.losses = [SpaceLoss(space) for _ in range(children)]
        weights = self.measurement.weights
        returns: Improvement | Siblings = (
            Siblings(self.coordinates, weights, self.losses)
            if siblings
            else Improvement(weights, children, episode)
        )
        agent = Agent(
            self.coordinates,
            step_size,
            returns.observers,
            {"hidden": hidden, "history": history, "parts": parts},
            policy,
            learn,
            Training(learning_rate, memory, batch),
            torch.Generator().manual_seed(seed),
        )
        self.learning = Learning(self.losses, agent, returns, learn, record)
        self.sum: Tensor | None = None  # of the metrics in this window so far, [metrics, children]
        self.steps_done = self.windows = 0

    # ---- What the user sees.

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of the only child; with several use ``losses``."""
        if len(self.losses) > 1:
            raise ValueError(
                f"Controller: with {len(self.losses)} children the loss must be one of losses, got a call of the "
                "controller"
            )
        found: Tensor = self.losses[0](prediction, target)
        return found

    @property
    def values(self) -> dict[str, Tensor]:
        """Of the first child's loss, by name, on the CPU. Move them by ``losses[0].move_to``."""
        return self.losses[0].values

    @property
    def policy(self) -> Policy | None:
        """``None`` before the first window has ended, unless one was given."""
        return self.learning.agent.policy

    @property
    def learner(self) -> Reinforce | None:
        return self.learning.agent.learner

    @property
    def pending(self) -> list[Experience | None]:
        return self.learning.pending

    @property
    def paths(self) -> list[list[tuple[int, Tensor]]] | None:
        return self.learning.paths

    @property
    def ties(self) -> int:
        return self.learning.ties

    @property
    def skipped(self) -> int:
        return self.learning.skipped

    def save_policy(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy, and how it was learned, for ``Controller(policy=path)``.

        Raises:
            ValueError: before the first window has ended, when there is no policy yet.
            OSError: where the file cannot be written.
        """
        policy = self.policy
        if policy is None:
            raise ValueError(
                f"Controller.save_policy: a window of {self.window} steps must have ended, got {self.steps_done} steps"
            )
        if self.learning.learns:
            policy.record = self._record()
        policy.save(path)

    def _record(self) -> dict[str, Any]:
        """How policy and values came about."""
        return {
            "lossmeta": lossmeta.__version__,
            "space": [
                [p.name, p.count, p.low, p.high, p.scale, list(p.defaults)]
                for p in self.coordinates.parameters
            ],
            "metric": self.measurement.names,
            "weights": self.measurement.weights,
            "reward": self.reward,
            "steps": self.steps,
            "steps_done": self.steps_done,
            "window": self.window,
            "step_size": self.step_size,
            "children": len(self.losses),
            "learned": self.learning.learns,
        }

    def schedule(self, child: int = 0) -> Schedule:
        """The values of a child's loss by training step, to train under once more.

        Of siblings these are the values that all of a window have set out from.

        Raises:
            ValueError: before the first window has ended, and where they were not recorded.
        """
        if self.paths is None:
            raise ValueError("Controller: record must be True for a schedule, got False")
        record = {"controller": "Controller", **self._record()}
        return Schedule.of_path("Controller", self.space, self.paths[child], record)

    @torch.inference_mode(False)  # where the policy cannot learn
    def step(
        self, model: nn.Module | Sequence[nn.Module], optimizers: Sequence[Optimizer] | None = None
    ) -> ControllerReport | None:
        """To be called after every step of the optimizer; measures the metric now and then, and moves the loss.

        Whatever raises, in the model, the metric or the statistics: nothing has changed, and the step is not counted.

        Args:
            model: that trains, or of several children a list.
            optimizers: of the models, for ``reward="advantage"``, which makes all alike at the end of a window.

        Returns:
            At the end of a window what happened, else ``None``.

        Raises:
            TypeError: for what is no model, or no optimizer.
            ValueError: for another number of models than ``children``, a metric that is no number, a space whose
                statistics do not fit its parameters, and a policy that sees another number of them. With
                ``reward="advantage"`` for models or optimizers that cannot be made alike, and batches that differed.
        """
        place = self.steps_done % self.window + 1
        weight, last = self.measured.get(place), place == self.window
        if weight is not None:
            models: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
            check_models(models, len(self.losses))
            self.learning.returns.check(models, optimizers, last)
            seen = [self.measurement.of(m, loss, last) for m, loss in zip(models, self.losses, strict=True)]
            found = weight * torch.stack([values for values, _ in seen], 1)
            found = found if self.sum is None else self.sum.to(found.device) + found
            if last:
                found, statistics = found.cpu(), [statistics for _, statistics in seen]
                with torch.autocast("cpu", enabled=False):
                    reward, entropy = self.learning.end_window(
                        found, statistics, self.steps_done + 1, self.steps, models, optimizers
                    )
                self.sum = None
                self.steps_done += 1
                self.windows += 1
                return ControllerReport(found / sum(self.measured.values()), reward, entropy)
            self.sum = found
        self.steps_done += 1
        return None

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on to the same bits, beside the models' and the optimizers' own."""
        return {
            "run": {what: self._record()[what] for what in SHARED},
            **self.learning.state_dict(),
            "sum": self.sum,
            "steps_done": self.steps_done,
            "windows": self.windows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: for the state of another space, bounds or scales of it, step size, window, reward, number of
                children or layout of the policy. Nothing has changed then.
        """
        check_same_run(self._record(), state.get("run", {}))
        self.learning.load_state_dict(state)
        self.sum, self.steps_done, self.windows = state["sum"], state["steps_done"], state["windows"]
