"""REINFORCE with a moving baseline and replay (ALA, Eq. 3 and Algorithm 1)."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lossmeta.ala.policy import Policy, log_probability

KEPT = 0.9  # of the baseline with every time step
CLIPPED = 0.2  # how far one experience moves the probability of its actions, as a share of what it was
LEARNT_FROM = 4096  # entries of a time step, drawn by chance where there are more: they share the network


@dataclass
class Experience:
    """What one model's entries saw and did at one time step, by the network's name.

    Attributes:
        states: ``[E, D]``.
        actions: -1, 0 and 1, ``[E]``, int8.
        log_p: log-probabilities that the policy gave them then, ``[E]``.
        advantage: what came of it, beyond the baseline.
    """

    states: dict[str, Tensor]
    actions: dict[str, Tensor]
    log_p: dict[str, Tensor]
    advantage: float = 0.0


@dataclass
class Episode:
    """Up to T time steps of one model, with what each brought beyond the baseline."""

    steps: list[Experience] = field(default_factory=list)

    def rewarded(self, experience: Experience, gain: float, length: int) -> list[Experience]:
        """One more step; all of them once there are T, each with the sum of the gains from it on (Eq. 3)."""
        self.steps.append(experience)
        for e in self.steps:
            e.advantage += gain
        if len(self.steps) < length:
            return []
        done, self.steps = self.steps, []
        return done


class Reinforce:
    """Learns a policy from what its actions brought.

    Args:
        policy: that learns.
        learning_rate: of Adam.
        memory: experiences that are kept.
        batch: experiences of an update, of which those of the latest time step are always part.
        generator: that draws the others.
    """

    def __init__(
        self, policy: Policy, learning_rate: float, memory: int, batch: int, generator: torch.Generator
    ) -> None:
        self.policy, self.batch, self.generator = policy, batch, generator
        self.optimizer = torch.optim.Adam(policy.parameters(), learning_rate)
        self.memory: deque[Experience] = deque(maxlen=memory)
        self.baseline = 0.0

    def gains(self, rewards: list[float]) -> list[float]:
        """Of the models that have a reward, beyond the baseline, which then moves towards their mean."""
        found = [reward - self.baseline for reward in rewards]
        if rewards:
            self.baseline = KEPT * self.baseline + (1 - KEPT) * sum(rewards) / len(rewards)
        return found

    def learn(self, latest: list[Experience]) -> None:
        """One step along the policy gradient.

        Eq. 3 is an expectation under the policy as it is, but what is remembered was done by earlier ones. Taken as the
        present one's, it moves the probability of the same few actions again and again, until the policy is
        sure of what was chance. So experiences weigh by the ratio of the probabilities now and then, and one that has
        moved its actions by a fifth moves them no further (Schulman et al., "Proximal Policy Optimization Algorithms",
        2017). Of the latest the ratio is 1: that is REINFORCE.
        """
        if not latest:
            return
        latest = [self._thinned(e) for e in latest]
        others = min(max(0, self.batch - len(latest)), len(self.memory))
        drawn = torch.randperm(len(self.memory), generator=self.generator, device="cpu")[:others].tolist()
        chosen = [*latest, *(self.memory[i] for i in drawn)]
        self.memory.extend(latest)
        with torch.enable_grad():
            loss = torch.zeros((), device="cpu", dtype=torch.float32)
            for name in self.policy.features:
                states = torch.cat([e.states[name] for e in chosen])
                actions = torch.cat([e.actions[name] for e in chosen])
                # The mean over an experience's entries, so that each weighs the same.
                weight = torch.cat(
                    [
                        torch.full((n,), e.advantage / n, device="cpu", dtype=torch.float32)
                        for e in chosen
                        if (n := len(e.actions[name]))
                    ]
                    or [torch.zeros(0, device="cpu", dtype=torch.float32)]
                )
                before = torch.cat([e.log_p[name] for e in chosen])
                ratio = (log_probability(self.policy.of(name)(states), actions) - before).exp()
                clipped = ratio.clamp(1 - CLIPPED, 1 + CLIPPED)
                loss = loss - torch.minimum(weight * ratio, weight * clipped).sum()
            self.optimizer.zero_grad()
            (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def _thinned(self, e: Experience) -> Experience:
        states, actions, log_p = {}, {}, {}
        for name, a in e.actions.items():
            rows: Any = slice(None)
            if len(a) > LEARNT_FROM:
                rows = torch.randint(len(a), (LEARNT_FROM,), generator=self.generator, device="cpu")
            states[name], actions[name], log_p[name] = e.states[name][rows], a[rows], e.log_p[name][rows]
        return Experience(states, actions, log_p, e.advantage)

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": {name: t.clone() for name, t in self.policy.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "memory": [dict(vars(e)) for e in self.memory],
            "baseline": self.baseline,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it keeps the tensors
        self.memory.clear()
        self.memory.extend(Experience(**e) for e in state["memory"])
        self.baseline = state["baseline"]
