"""What the controller's policy learns (ALA, Eq. 3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from controllers import Told, equal, made, network, restless, run
from torch import Tensor, nn
from toy_problem import CLASSES, data

from lossmeta.ala import (
    ClassCorrelation,
    Controller,
    LogitAdjustment,
    LossSpace,
    Policy,
    Robust,
)


def advantages(rewards: list[float], length: int) -> list[float]:
    """Of whole episodes: the sum of what came from each step on, beyond the moving average of what came before."""
    gains, average = [], 0.0
    for r in rewards:
        gains.append(r - average)
        average = 0.9 * average + 0.1 * r
    found = []
    for start in range(0, len(rewards) - length + 1, length):
        episode = gains[start : start + length]
        found += [math.fsum(episode[t:]) for t in range(length)]
    return found


@pytest.mark.parametrize("episode", [1, 2, 3])
def test_returns_to_go(episode: int) -> None:
    values = [1, 2, 3, 2, 5, 6, 7, 7]
    controller = made(metric=Told(*values), episode=episode)
    run(controller, len(values))
    rewards = [float(np.sign(b - a)) for a, b in pairwise(values)]
    assert controller.learner is not None
    found = [e.advantage for e in controller.learner.memory]
    assert found == pytest.approx(advantages(rewards, episode), abs=1e-12)


@pytest.mark.parametrize("space", [ClassCorrelation(CLASSES), Robust() * LogitAdjustment(torch.ones(3))])
def test_the_gradient_of_the_policy(space: LossSpace) -> None:
    """Means over experiences and over the entries of each, by autograd in float64; nothing is clipped yet."""
    values = [1, 2, 1, 4, 3]
    controller = made(space, Told(*values), batch=100)
    run(controller, 4)
    assert controller.policy is not None and controller.learner is not None
    policy = copy.deepcopy(controller.policy).double()
    run(controller, 1)
    experiences = list(controller.learner.memory)
    rewards = [float(np.sign(b - a)) for a, b in pairwise(values)]
    assert len(experiences) == 4
    objective = torch.zeros((), dtype=torch.float64)
    for e, advantage in zip(experiences, advantages(rewards, 1), strict=True):
        for name in policy.features:
            p = torch.softmax(policy.of(name)(e.states[name].double()), 1)
            ratio = p[torch.arange(len(p)), e.actions[name].long() + 1] / e.log_p[name].double().exp()
            assert ((ratio - 1).abs() < 0.2).all()
            objective = objective + advantage * ratio.mean() / len(experiences)
    expected = torch.autograd.grad(-objective, list(policy.parameters()))
    assert any(g.abs().max() > 1e-3 for g in expected)
    for p, g in zip(controller.policy.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), g, rtol=1e-4, atol=1e-7)


def test_what_is_remembered() -> None:
    controller = made(children=2, memory=5, batch=4)
    models = [network(0), network(1)]
    for _ in range(12):
        run(controller, 1, models)
        assert controller.learner is not None and len(controller.learner.memory) <= 5
    assert len(controller.learner.memory) == 5


def test_an_update_takes_the_latest_and_others_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = made(Robust(), memory=8, batch=4)
    run(controller, 12)
    assert controller.learner is not None and controller.policy is not None
    rows = []
    forward = nn.Sequential.forward

    def counted(self: nn.Sequential, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            rows.append(x)
        return forward(self, x)

    monkeypatch.setattr(nn.Sequential, "forward", counted)
    run(controller, 1, nn.Linear(4, CLASSES))
    (taken,) = rows
    assert len(taken) == 4
    assert torch.equal(taken[0], controller.learner.memory[-1].states["q"][0])
    assert len({tuple(row.tolist()) for row in taken}) == 4


def test_without_learning_no_weight_changes() -> None:
    policy = Policy({"class pairs": 2})
    start = copy.deepcopy(policy.state_dict())
    controller = restless(policy=policy, learn=False)
    run(controller, 8)
    assert controller.policy is policy and equal(dict(start), dict(policy.state_dict()))
    assert controller.values["pairs"].any()
    learning = restless(policy=policy)
    run(learning, 8)
    assert learning.policy is policy and not equal(dict(start), dict(policy.state_dict()))


def bandit(
    metric: Callable[[Controller], float], windows: int, space: LossSpace, **options: Any
) -> Controller:
    """Nothing but the values counts."""
    controller = made(
        space, lambda prediction, target: metric(controller), data(6, 1), steps=windows, **options
    )
    run(controller, windows, nn.Linear(4, CLASSES))
    return controller


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("space", [Robust(), LogitAdjustment(torch.ones(3))])
def test_it_learns_what_is_rewarded(space: LossSpace, seed: int) -> None:
    """The higher every value the better."""

    def metric(controller: Controller) -> float:
        return float(controller.losses[0]._u.sum())

    controller = bandit(metric, 300, space, seed=seed)
    high = controller.coordinates.high
    assert (controller.losses[0]._u >= high - 1.5).all()


@pytest.mark.parametrize("seed", range(3))
def test_it_does_not_learn_what_is_not_rewarded(seed: int) -> None:
    """From rewards that are all 0."""
    controller = bandit(lambda controller: 1.0, 150, Robust(), seed=seed)
    assert controller.ties == 149
    assert run(controller, 1, nn.Linear(4, CLASSES))[0].entropy > 0.9 * math.log(3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("space", [Robust(), ClassCorrelation(CLASSES)])
def test_noise_teaches_nothing(space: LossSpace, seed: int) -> None:
    """Rewards by chance leave the policy undecided, although it sees each of them again."""
    generator = torch.Generator().manual_seed(seed)
    controller = bandit(lambda controller: float(torch.rand((), generator=generator)), 100, space, seed=seed)
    assert run(controller, 1, nn.Linear(4, CLASSES))[0].entropy > 0.9 * math.log(3)
