"""What happens at the end of a controller's window: a reward, a lesson, and the next actions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta.ala._agent import Agent
from lossmeta.ala._improvement import Improvement
from lossmeta.ala._ranks import of_first_process
from lossmeta.ala._reinforce import Experience
from lossmeta.ala._siblings import Siblings
from lossmeta.ala.space_loss import SpaceLoss


class Learning:
    """Rewards the actions of children, learns from them, and takes the next ones.

    Args:
        losses: of the children.
        agent: that acts.
        returns: what is rewarded, and where the children set out from.
        learn: whether the policy learns.
        record: whether the values of each window are kept.

    Attributes:
        pending: what each child's loss did at the window's start.
        paths: of each child the first steps of windows, and the coordinates that hold in them.
        ties: windows whose metrics told nothing.
        skipped: windows with a metric that was not finite.
    """

    def __init__(
        self,
        losses: Sequence[SpaceLoss],
        agent: Agent,
        returns: Improvement | Siblings,
        learn: bool,
        record: bool,
    ) -> None:
        self.losses, self.agent, self.returns, self.learns = losses, agent, returns, learn
        self.pending: list[Experience | None] = [None] * len(losses)
        self.paths: list[list[tuple[int, Tensor]]] | None = [[] for _ in losses] if record else None
        self.ties = self.skipped = 0

    def end_window(
        self,
        found: Tensor,
        statistics: list[dict[str, Tensor]],
        steps_done: int,
        steps: int,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | None,
    ) -> tuple[Tensor | None, float]:
        """The reward of the last actions, and the policy's mean entropy at the next ones.

        Args:
            found: the metrics of the window, ``[metrics, children]``.
            statistics: of each child, by parameter.
            steps_done: training steps, this one among them.
            steps: of the whole training.
            models: of the children.
            optimizers: of the models, where their states are to be made alike.

        Raises:
            ValueError: for statistics that do not fit the policy. Nothing has changed then.
        """
        grouped = self.agent.grouped(statistics)
        learner = self.agent.ready({name: t.shape[1] for name, t in grouped[0].items()})
        # From here on nothing raises but for want of memory.
        judged = self.returns.judged(found, self.pending, learner)
        self._count(bool(found.isfinite().all()), judged.tied)
        if self.learns:
            learner.learn(judged.latest)
        us = [loss._u for loss in self.losses]
        starts = self.returns.starts(found, us, grouped, models, optimizers)
        entropies, observed = [], {}
        for i, start in enumerate(starts):
            self.pending[i] = None
            if start is not None:
                if start.observer not in observed:
                    observed[start.observer] = self.agent.observe(
                        start.observer, start.u, start.statistics, min(1.0, steps_done / steps)
                    )
                u, self.pending[i], entropy = self.agent.act(
                    start.u, observed[start.observer], learner.policy
                )
                self.losses[i]._set(u)
                entropies.append(entropy)
        # Processes that train one model together train it by the values of the first.
        for loss, u in zip(self.losses, of_first_process([loss._u for loss in self.losses]), strict=True):
            loss._set(u)
        if self.paths is not None:
            for path, loss, start in zip(self.paths, self.losses, starts, strict=True):
                u = start.u if start is not None and self.returns.alike else loss._u
                path.append((steps_done, u.float()))
        return judged.reward, sum(entropies) / len(entropies) if entropies else math.nan

    def _count(self, finite: bool, tied: bool) -> None:
        if not finite:
            if self.skipped == 0:
                warnings.warn(
                    "Controller: the metric was not finite; there is no reward and no action. Look at the learning "
                    "rate, and at what the metric needs of the validation data. Controller.skipped counts such windows",
                    stacklevel=5,
                )
            self.skipped += 1
        elif tied:
            if self.ties == 0:
                warnings.warn(
                    f"Controller: {self.returns.tie}. Where that goes on, the metric does not see what the loss "
                    "changes. Controller.ties counts such windows",
                    stacklevel=5,
                )
            self.ties += 1

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.agent.state_dict(),
            **self.returns.state_dict(),
            "values": [loss._u.clone() for loss in self.losses],
            "pending": [None if e is None else dict(vars(e)) for e in self.pending],
            "paths": None if self.paths is None else [list(path) for path in self.paths],
            "ties": self.ties,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuses the state of a policy of another layout by a ValueError; nothing has changed then."""
        self.agent.load_state_dict(state)
        self.returns.load_state_dict(state)
        for loss, u in zip(self.losses, state["values"], strict=True):
            loss._set(u.clone())
        self.pending = [None if e is None else Experience(**e) for e in state["pending"]]
        self.paths = None if state["paths"] is None else [list(path) for path in state["paths"]]
        self.ties, self.skipped = state["ties"], state["skipped"]
