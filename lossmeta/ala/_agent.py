"""What moves the losses of a controller's children: a policy, and what it sees and does."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmeta._checks import dtype_name
from lossmeta.ala._reinforce import Experience, Reinforce
from lossmeta.ala._states import States
from lossmeta.ala.policy import Policy, choose
from lossmeta.ala.space import Coordinates

Statistics = dict[str, Tensor]
"""``[E, S]`` by the network's name."""


@dataclass(frozen=True)
class Training:
    """How a policy learns, see :class:`Controller`."""

    learning_rate: float
    memory: int
    batch: int


class Agent:
    """A policy that moves the coordinates of losses one step down, not at all, or up.

    Args:
        coordinates: that are moved.
        step_size: of an action.
        observers: how many histories of statistics there are.
        options: of a policy that is yet to be made.
        policy: to start from, or the path of one.
        learn: whether it will learn.
        training: of the policy.
        generator: that draws the first weights, the actions and what is remembered.

    Attributes:
        groups: the parameters that a network moves, by its name.
        learner: what learns the policy; ``None`` before it is known how much there is to see.
        states: of each history, by the network's name.

    Raises:
        TypeError: for what is no policy.
        ValueError: for one that moves other parameters, or is frozen where it is to learn.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        step_size: float,
        observers: int,
        options: Mapping[str, Any],
        policy: Policy | str | os.PathLike[str] | None,
        learn: bool,
        training: Training,
        generator: torch.Generator,
    ) -> None:
        self.coordinates, self.step_size, self.observers = coordinates, step_size, observers
        self.options, self.training, self.generator = options, training, generator
        self.groups: dict[str, list[str]] = {}
        for p in coordinates.parameters:
            self.groups.setdefault(p.policy or p.name, []).append(p.name)
        given = Policy.load(policy) if isinstance(policy, (str, os.PathLike)) else policy
        if given is not None and not isinstance(given, Policy):
            raise TypeError(f"Controller: policy must be a Policy or a path, got {type(policy).__name__}")
        for w in () if given is None else given.parameters():
            if w.dtype != torch.float32 or w.device.type != "cpu":
                raise ValueError(
                    f"Controller: policy must be float32 on the CPU, got {dtype_name(w)} on {w.device}; call "
                    "policy.float().cpu()"
                )
            if learn and not w.requires_grad:
                raise ValueError(
                    "Controller: policy must be trainable where it learns, got frozen weights; call "
                    "policy.requires_grad_(), or give learn=False"
                )
        if given is not None and given.features.keys() != self.groups.keys():
            raise ValueError(
                f"Controller: policy must move {', '.join(self.groups)}, as the space asks for, got one that moves "
                f"{', '.join(given.features)}"
            )
        with torch.random.fork_rng(devices=[]):
            # Refuses bad options now, though the statistics are not known yet.
            self._layout = Policy({"any": 1}, **options).layout
        self.learner: Reinforce | None = None
        self.states: list[dict[str, States]] = []
        if given is not None:
            self._begin(given)

    # ---- The policy.

    @property
    def policy(self) -> Policy | None:
        return None if self.learner is None else self.learner.policy

    def ready(self, features: dict[str, int]) -> Reinforce:
        """What learns the policy, made as soon as it is known what there is to see."""
        if self.learner is None:
            return self._begin(self._new_policy(features))
        if self.learner.policy.features != features:
            raise ValueError(
                f"Controller: policy must see {features} statistics of an entry, as the space has them, got one that "
                f"sees {self.learner.policy.features}"
            )
        return self.learner

    def _begin(self, policy: Policy) -> Reinforce:
        t = self.training
        self.learner = Reinforce(policy, t.learning_rate, t.memory, t.batch, self.generator)
        self.states = [{name: States(policy, name) for name in self.groups} for _ in range(self.observers)]
        return self.learner

    def _new_policy(self, features: dict[str, int]) -> Policy:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds the GPUs too.
            torch.default_generator.manual_seed(
                int(torch.randint(1 << 31, (), generator=self.generator, device="cpu"))
            )
            return Policy(features, **self.options)

    # ---- A time step.

    def grouped(self, statistics: list[dict[str, Tensor]]) -> list[Statistics]:
        """Those of each child by parameter, as the networks see them."""
        for name, members in self.groups.items():
            widths = {p: statistics[0][p].shape[1] for p in members}
            if len(set(widths.values())) > 1:
                raise ValueError(
                    f"Controller: parameters that share the policy {name!r} must have equally many statistics of an "
                    f"entry, got {widths}"
                )
        return [
            {name: torch.cat([seen[p] for p in members]) for name, members in self.groups.items()}
            for seen in statistics
        ]

    def observe(
        self, observer: int, u: Tensor, statistics: Statistics, progress: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """One more time step of a history: the states and which entries are known, by the network's name.

        Args:
            observer: which history.
            u: coordinates that the statistics are of.
            statistics: on validation data.
            progress: of the training, in [0, 1].
        """
        c = self.coordinates
        place = ((u - c.low) / (c.high - c.low) * 2 - 1).float()  # between the bounds, in [-1, 1]
        return {
            name: self.states[observer][name].observe(
                statistics[name], torch.cat([place[c.places[p]] for p in members]), progress
            )
            for name, members in self.groups.items()
        }

    def act(
        self, u: Tensor, observed: dict[str, tuple[Tensor, Tensor]], policy: Policy
    ) -> tuple[Tensor, Experience, float]:
        """One action of each entry: the coordinates then, the experience, and the policy's mean entropy."""
        u = u.clone()
        seen, done, likely = {}, {}, {}
        entropy, entries = 0.0, 0
        for name, members in self.groups.items():
            states, known = observed[name]
            uniform = torch.rand(len(states), generator=self.generator, device="cpu", dtype=torch.float32)
            actions, log_p, spread = choose(policy.of(name), states, uniform)
            actions = actions.where(known, 0)
            entropy += spread
            entries += len(states)
            start = 0
            for p in members:
                place = self.coordinates.places[p]
                count = place.stop - place.start
                u[place] += self.step_size * actions[start : start + count].double()
                start += count
            whole = bool(known.all())
            seen[name] = states if whole else states[known]
            done[name] = actions if whole else actions[known]
            likely[name] = log_p if whole else log_p[known]
        return u, Experience(seen, done, likely), entropy / entries

    # ---- State.

    def state_dict(self) -> dict[str, Any]:
        return {
            "layout": None if self.learner is None else copy.deepcopy(self.learner.policy.layout),
            "learner": None if self.learner is None else self.learner.state_dict(),
            "states": [{name: s.state_dict() for name, s in states.items()} for states in self.states],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuses the state of a policy of another layout by a ValueError; nothing has changed then."""
        layout = state["layout"]
        if layout is None:
            self.learner, self.states = None, []
        else:
            own = (
                {**self._layout, "features": layout["features"]}
                if self.policy is None
                else self.policy.layout
            )
            if layout != own:
                raise ValueError(f"Controller: the state must be of a policy of layout {own}, got {layout}")
            self.ready(layout["features"]).load_state_dict(state["learner"])
            for history, saved in zip(self.states, state["states"], strict=True):
                for name, s in history.items():
                    s.load_state_dict(saved[name])
        self.generator.set_state(state["generator"])
