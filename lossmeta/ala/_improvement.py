"""Children that go ways of their own, rewarded where they improve (ALA, Eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta.ala._agent import Statistics
from lossmeta.ala._reinforce import Episode, Experience, Reinforce

Pending = Sequence[Experience | None]
"""What each child's loss did at the window's start; ``None`` where it did nothing."""


@dataclass(frozen=True)
class Judged:
    """What a window has brought.

    Attributes:
        reward: of each child, NaN where there is none; ``None`` where there is none at all.
        tied: whether no metric tells anything.
        latest: experiences that have what they need to be learned from.
    """

    reward: Tensor | None
    tied: bool
    latest: list[Experience]


@dataclass(frozen=True)
class Start:
    """Where a child sets out from.

    Attributes:
        observer: whose history of statistics it goes on with.
        u: the coordinates of its loss.
        statistics: on validation data.
    """

    observer: int
    u: Tensor
    statistics: Statistics


class Improvement:
    """Rewards the sign of the change of each metric; a baseline moves after them.

    Args:
        weights: of the metrics.
        children: how many.
        episode: T.

    Attributes:
        alike: whether the children of a window set out from the same.
        observers: histories of statistics: each child has its own.
        tie: what is said of the first window that is tied.
    """

    alike = False
    tie = "the metric has not changed; the reward is 0"

    def __init__(self, weights: list[float], children: int, episode: int) -> None:
        self.observers, self.episode = children, episode
        self.weights = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.episodes = [Episode() for _ in range(children)]
        self.before: Tensor | None = None  # the metrics of the last window, [metrics, children]

    def check(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer] | None, last: bool) -> None:
        if optimizers is not None:
            raise ValueError(
                'Controller: optimizers must be given for reward="advantage" alone, got some; leave them out'
            )

    def judged(self, found: Tensor, pending: Pending, learner: Reinforce) -> Judged:
        """Of metrics ``[metrics, children]``."""
        finite = found.isfinite().all(0)
        before = self.before
        self.before = found.where(finite, found if before is None else before)
        if not self.before.isfinite().all(0).any():
            self.before = None
        if before is None:
            return Judged(None, False, [])
        # The sign of NaN is 0.
        sign = (found - before).sign().where(finite & before.isfinite().all(0), torch.nan)
        reward = (self.weights @ sign) / self.weights.sum()
        rewarded = [
            (i, experience, float(reward[i]))
            for i, experience in enumerate(pending)
            if experience is not None and math.isfinite(float(reward[i]))
        ]
        gains = learner.gains([r for _, _, r in rewarded])
        latest: list[Experience] = []
        for (i, experience, _), gain in zip(rewarded, gains, strict=True):
            latest += self.episodes[i].rewarded(experience, gain, self.episode)
        return Judged(reward, not sign.any(), latest)

    def starts(
        self,
        found: Tensor,
        us: list[Tensor],
        statistics: list[Statistics],
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | None,
    ) -> list[Start | None]:
        """Each goes on from where it is; one whose metric is not finite does not move."""
        finite = found.isfinite().all(0)
        return [
            Start(i, u, seen) if finite[i] else None
            for i, (u, seen) in enumerate(zip(us, statistics, strict=True))
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "episodes": [[dict(vars(e)) for e in episode.steps] for episode in self.episodes],
            "before": self.before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.episodes = [Episode([Experience(**e) for e in steps]) for steps in state["episodes"]]
        self.before = state["before"]
