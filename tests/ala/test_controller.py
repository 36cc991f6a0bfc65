"""The controller's windows against plain computations, and everything that can go wrong in one."""

from __future__ import annotations

import copy
import io
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam

from lossmeta.ala import (
    ClassCorrelation,
    Controller,
    ControllerReport,
    DistanceMixture,
    FocalWeighting,
    LearningRate,
    LogitAdjustment,
    LossSpace,
    Parameter,
    Policy,
    Robust,
)
from lossmeta.metrics import ErrorRate, Metric

CLASSES = 3


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth, so that nothing ties."""
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


def made(
    space: LossSpace | None = None, metric: Any = margin, valid: Any = None, **options: Any
) -> Controller:
    options = {"steps": 100, "window": 1, "evaluations": 1, **options}
    return Controller(
        space or ClassCorrelation(CLASSES), metric, data(40, 1) if valid is None else valid, **options
    )


class Margin(Metric):
    """The same as a metric of the library."""

    higher_is_better = True

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([margin(s, labels) for s in scores]).double()


class Told:
    """A metric whose values are known beforehand, and that knows how often it was asked."""

    def __init__(self, *values: float) -> None:
        self.values, self.asked = list(values), 0
        self.__name__ = "told"

    def __call__(self, prediction: Tensor, target: Tensor) -> float:
        self.asked += 1
        return self.values[(self.asked - 1) % len(self.values)]


def restless(space: LossSpace | None = None, **options: Any) -> Controller:
    """One whose metric changes with every step although nothing is trained."""

    def metric(prediction: Tensor, target: Tensor) -> float:
        return math.sin(3 * controller.steps_done) + float(prediction.mean())

    controller = made(space, metric, **options)
    return controller


def run(controller: Controller, steps: int, models: Any = None) -> list[ControllerReport]:
    """The reports of the windows that end; nothing is trained."""
    models = models or [network(i) for i in range(len(controller.losses))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = [controller.step(models) for _ in range(steps)]
    return [r for r in reports if r is not None]


def trained(controller: Controller, model: nn.Module, optimizer: Any, steps: range) -> None:
    for i in steps:
        x, y = data(16, 50 + i)
        optimizer.zero_grad()
        controller(model(x), y).backward()
        optimizer.step()
        controller.step(model)


def equal(a: Any, b: Any) -> bool:
    """To the last bit, NaN included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# ---- Rewards (Eq. 4 and 5).


@given(
    st.integers(1, 6),
    st.floats(0.05, 1.0),
    st.booleans(),
    st.lists(st.floats(-3, 3).map(lambda v: round(v, 2)), min_size=18, max_size=18),
)
def test_the_discounted_sum_and_its_sign(
    window: int, discount: float, higher: bool, values: list[float]
) -> None:
    controller = made(
        metric=Told(*values), window=window, evaluations=window, discount=discount, higher_is_better=higher
    )
    reports = run(controller, 3 * window)
    assert len(reports) == 3 and controller.windows == 3
    sums = []
    for w, report in enumerate(reports):
        weights = [discount ** (window - j) for j in range(1, window + 1)]
        found = math.fsum(g * values[w * window + j] for j, g in enumerate(weights))
        direction = 1 if higher else -1
        assert report.metric.shape == (1, 1)
        assert report.metric.item() == pytest.approx(direction * found / math.fsum(weights), abs=1e-9)
        sums.append(found)
        if w == 0:
            assert report.reward is None
        elif abs(sums[w] - sums[w - 1]) > 1e-9:
            assert report.reward is not None
            assert report.reward.tolist() == [math.copysign(1, direction * (sums[w] - sums[w - 1]))]


@pytest.mark.parametrize(
    ("window", "discount", "evaluations"),
    [(200, 0.9, 4), (10, 1.0, 5), (7, 0.5, 3), (4, 0.9, 1), (5, 0.9, 4), (50, 0.97, 7), (20, 1e-3, 3)],
)
def test_fewer_evaluations(window: int, discount: float, evaluations: int) -> None:
    """Each stands for as large a part of the weights: the last step, and where the next part begins before it."""
    weights = [discount ** (window - j) for j in range(1, window + 1)]
    expected: list[int] = []
    for part in range(evaluations):
        behind, j = 0.0, window
        while j > 1 and behind + weights[j - 1] <= part / evaluations * math.fsum(weights) * (1 + 1e-9):
            behind += weights[j - 1]
            j -= 1
        expected.append(min(j, expected[-1] - 1) if expected else window)
    metric = Told(1.0, 5.0, 2.0)
    controller = made(metric=metric, window=window, evaluations=evaluations, discount=discount)
    asked, model = [], network()
    for step in range(1, window + 1):
        before = metric.asked
        report = controller.step(model)
        asked += [step] * (metric.asked - before)
        assert (report is None) == (step < window)
    assert asked == sorted(expected)
    assert report is not None
    assert report.metric.item() == pytest.approx(sum(([1.0, 5.0, 2.0] * 3)[:evaluations]) / evaluations)


@given(st.integers(1, 60), st.floats(1e-6, 1.0), st.data())
def test_as_many_evaluations_as_asked_for(window: int, discount: float, drawn: st.DataObject) -> None:
    evaluations = drawn.draw(st.integers(1, window))
    measured = made(window=window, discount=discount, evaluations=evaluations).measured
    assert len(measured) == evaluations and window in measured and min(measured) >= 1


def test_the_first_window_has_the_defaults() -> None:
    controller = made(window=3, evaluations=1)
    model = network()
    for _ in range(2):
        controller.step(model)
        assert controller.policy is None
        assert controller.values["diagonal"].tolist() == [1.0] * 3 and not controller.values["pairs"].any()
    report = controller.step(model)
    assert report is not None and report.reward is None and controller.policy is not None
    assert report.entropy == pytest.approx(math.log(3), rel=0.05)
    assert any(v.any() for v in (controller.values["diagonal"] - 1, controller.values["pairs"]))


def test_several_metrics_with_weights() -> None:
    first, second = Told(1, 2, 3, 3, 2), Told(5, 4, 5, 6, 6)
    controller = made(metric=[(first, 3.0), (second, 1.0)])
    rewards = [r.reward for r in run(controller, 5)][1:]
    assert [r.item() for r in rewards if r is not None] == [0.5, 1.0, 0.25, -0.75]
    assert run(controller, 1)[0].metric.tolist() == [[1.0], [5.0]]


def test_metrics_that_cancel_are_no_tie() -> None:
    controller = made(metric=[(Told(1, 2, 3), 1.0), (Told(3, 2, 1), 1.0)])
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = [controller.step(model) for _ in range(3)]
    assert reports[2] is not None and reports[2].reward is not None
    assert reports[2].reward.item() == 0 and controller.ties == 0


def test_rewarded_on_other_data() -> None:
    """The metric there, the statistics on the validation data."""
    valid, other = data(40, 1), data(15, 2)
    seen = []

    class Seen(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            seen.append((prediction, target))
            return super().statistics(prediction, target, values)

    controller = made(Seen(), margin, valid, rewarded_on=other)
    model = network().eval()
    (report,) = run(controller, 1, model)
    assert report.metric.item() == pytest.approx(margin(model(other[0]), other[1]).item())
    torch.testing.assert_close(seen[0][0], model(valid[0]).detach())
    assert torch.equal(seen[0][1], valid[1])


class Counted:
    """As metrics of torchmetrics are."""

    higher_is_better: bool | None = None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.wrong = self.all = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.wrong += int((prediction.argmax(1) != target).sum())
        self.all += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.wrong / self.all)


@pytest.mark.parametrize(
    "kind", ["metric", "function", "other library", "loader", "batches", "list", "mapping"]
)
def test_kinds_of_metrics_and_of_validation_data(kind: str) -> None:
    x, y = valid = data(40, 1)
    metric: Any = ErrorRate()
    options: dict[str, Any] = {}
    given_data: Any = valid
    if kind == "function":
        metric, options = (lambda p, t: (p.argmax(1) != t).float().mean()), {"higher_is_better": False}
    if kind == "other library":
        with pytest.raises(ValueError, match="higher_is_better must be given, Counted does not say"):
            made(metric=Counted())
        metric, options = Counted(), {"higher_is_better": False}
    if kind == "loader":
        given_data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 15)
    if kind in ("batches", "list"):
        given_data = list(zip(x.split(15), y.split(15), strict=True)) if kind == "batches" else [x, y]
    if kind == "mapping":
        given_data = ({"input": x}, y)
    controller = made(metric=metric, valid=given_data, **options)
    model = network().eval()
    (report,) = run(controller, 1, model)
    expected = (model(x).argmax(1) != y).double().mean()
    assert report.metric.item() == pytest.approx(-expected.item(), abs=1e-7)
    if kind == "other library":
        assert metric.all == 0


def test_outputs_of_models() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "scores": self.inner(x)}

    model = Model()
    reference = run(made(), 1, model.inner)[0].metric
    for output in ("scores", lambda found: found["scores"]):
        assert torch.equal(run(made(output=output), 1, model)[0].metric, reference)
    with pytest.raises(TypeError, match="Controller: the model must return a tensor, or output must say"):
        made().step(model)


# ---- Children.


def test_children_have_their_own_losses_and_share_a_policy() -> None:
    controller = made(children=3, seed=4)
    models = [network(i).eval() for i in range(3)]
    (report,) = run(controller, 1, models)
    x, y = data(40, 1)
    expected = torch.stack([margin(m(x), y) for m in models]).double()
    torch.testing.assert_close(report.metric[0], expected.detach())
    pairs = [loss.values["pairs"].tolist() for loss in controller.losses]
    assert len({str(p) for p in pairs}) > 1
    assert controller.values["pairs"].tolist() == pairs[0]
    assert controller.learner is not None and controller.policy is controller.learner.policy
    run(controller, 1, models)
    assert len(controller.learner.memory) == 3
    with pytest.raises(ValueError, match="with 3 children the loss must be one of losses"):
        controller(models[0](x), y)
    loss = controller.losses[1](models[1](x), y)
    assert loss == controller.space(
        models[1](x), y, {k: v.float() for k, v in controller.losses[1].values.items()}
    )


def test_children_are_rewarded_for_what_they_did() -> None:
    controller = made(metric=Told(1, 5, 2, 4), children=2)
    second = run(controller, 2)[1]
    assert second.reward is not None and second.reward.tolist() == [1, -1]


def test_a_wrong_number_of_models() -> None:
    controller = made(children=2)
    for models in (network(), [network()], [network()] * 3):
        with pytest.raises(ValueError, match=r"model must be 2 models, one of each child, got \d"):
            controller.step(models)
    assert controller.steps_done == 0


def test_a_child_that_diverges_leaves_the_others_their_rewards() -> None:
    nan = float("nan")
    controller = made(metric=Told(nan, 1, nan, 2, nan, 1), children=2)
    reports = run(controller, 3)
    assert [r.reward[1].item() for r in reports[1:] if r.reward is not None] == [1, -1]
    assert controller.skipped == 3 and not controller.losses[0]._u.any()
    assert controller.learner is not None and len(controller.learner.memory) == 2


def test_what_the_policy_sees() -> None:
    """Of each child its own statistics, where its entries stand, and how far the training is."""
    controller = restless(window=3, children=2, steps=24, valid=data(40, 1))
    models = [network(0).eval(), network(1).eval()]
    assert controller.space.parameters[0].policy == "class pairs"
    seen, places = [], []
    for _ in range(8):
        places.append([[controller.losses[i].values[n] for n in ("diagonal", "pairs")] for i in range(2)])
        run(controller, 3, models)
        seen.append([e.states["class pairs"] for e in controller.pending if e is not None])
    x, y = data(40, 1)
    for window, (found, stood) in enumerate(zip(seen, places, strict=True)):
        for state, (diagonal, pairs), model in zip(found, stood, models, strict=True):
            assert state.shape == (6, 24) and state[:, -1].tolist() == pytest.approx([(window + 1) / 8] * 6)
            expected = torch.cat([(diagonal - 0.1) / 1.9 * 2 - 1, pairs])
            torch.testing.assert_close(state[:, -2], expected.float())
            if window == 0:
                statistics = controller.space.statistics(model(x), y, {})
                both = torch.cat([statistics["diagonal"], statistics["pairs"]])
                now = (both - both.mean(0)) / both.std(0, correction=0)
                torch.testing.assert_close(state[:, :2], now, rtol=1e-3, atol=1e-3)
    assert seen[-1][0][:, -1].tolist() == [1.0] * 6
    run(controller, 3, models)
    assert all(e is not None and (e.states["class pairs"][:, -1] == 1).all() for e in controller.pending)


# ---- What the policy learns (Eq. 3).


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


# ---- Actions.


@given(
    st.sampled_from([0.1, 0.37, 1.0, 4.0]),
    st.integers(0, 100),
    st.sampled_from(["correlation", "mixture", "focal", "product"]),
)
def test_every_entry_moves_by_a_step_or_stays_or_is_stopped_by_its_bounds(
    step_size: float, seed: int, kind: str
) -> None:
    spaces: dict[str, LossSpace] = {
        "correlation": ClassCorrelation(CLASSES),
        "mixture": DistanceMixture(),
        "focal": FocalWeighting(),
        "product": Robust() * LogitAdjustment(torch.ones(3)),
    }
    controller = made(spaces[kind], step_size=step_size, seed=seed)
    model = network()
    for _ in range(6):
        before = controller.values
        run(controller, 1, model)
        for p in spaces[kind].parameters:
            start, end = before[p.name].reshape(-1), controller.values[p.name].reshape(-1)
            assert (end >= p.low - 1e-12).all() and (end <= p.high + 1e-12).all()
            options = torch.stack(
                [(start + a * step_size * p.scale).clamp(p.low, p.high) for a in (-1, 0, 1)]
            )
            assert ((options - end).abs() < 1e-12).any(0).all()


def test_the_matrix_stays_symmetric() -> None:
    space = ClassCorrelation(4)
    valid = (torch.randn(30, 4), torch.randint(4, (30,)))
    controller = made(space, valid=valid)
    run(controller, 5, nn.Linear(4, 4))
    v = controller.values
    phi = space.matrix(v["diagonal"], v["pairs"])
    assert torch.equal(phi, phi.T) and v["pairs"].unique().numel() > 1
    assert (phi - torch.diag(phi.diag())).abs().max() <= 1 and phi.diag().min() >= 0.1


def test_entries_without_statistics_stay() -> None:
    """Without any sample of the last class, and with one of a single class."""
    x, y = data(40, 1)
    controller = made(valid=(x[y < 2], y[y < 2]))
    run(controller, 8)
    rows, columns = controller.space.rows, controller.space.columns  # type: ignore[attr-defined]
    assert controller.values["diagonal"][2] == 1 and (controller.values["diagonal"][:2] != 1).any()
    assert not controller.values["pairs"][columns == 2].any()
    one = made(valid=(x[y == 1], y[y == 1]))
    run(one, 8)
    assert one.values["diagonal"][[0, 2]].tolist() == [1, 1] and not one.values["pairs"].any()
    assert rows.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "space",
    [
        Robust(),
        ClassCorrelation(CLASSES),
        DistanceMixture(),
        FocalWeighting(),
        LogitAdjustment(torch.ones(3)),
    ],
)
def test_validation_data_of_one_sample(space: LossSpace) -> None:
    x, y = data(40, 1)
    controller = made(space, valid=(x[:1], y[:1]))
    reports = run(controller, 6)
    assert controller.windows == 6 and all(math.isfinite(r.entropy) for r in reports)
    assert all(v.isfinite().all() for v in controller.values.values())


def test_where_nothing_is_known_nothing_moves() -> None:
    """Nor does it matter what the defaults of PyTorch are."""

    class Blind(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            return {"q": torch.full((1, 2), torch.nan)}

    model, valid = network(), data(40, 1)
    torch.set_default_dtype(torch.float64)
    try:
        controller = restless(Blind(), valid=valid)
        run(controller, 4, model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert controller.values["q"] == 0 and controller.windows == 4
    assert all(p.isfinite().all() for p in controller.policy.parameters())  # type: ignore[union-attr]


def test_labels_that_do_not_count() -> None:
    x, y = data(40, 1)
    few = y.clone()
    few[::2] = -100

    def counted(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, ignore_index=-100)

    for space in (ClassCorrelation(CLASSES), Robust(), LogitAdjustment(torch.ones(3))):
        controller, reference = made(space, counted, (x, few)), made(space, counted, (x[1::2], y[1::2]))
        run(controller, 5)
        run(reference, 5)
        assert equal(controller.values, reference.values)


# ---- Metrics that are no use.


def test_a_metric_that_is_not_finite() -> None:
    controller = made(metric=Told(1, float("nan"), float("inf"), 2, 3, float("-inf")))
    model = network()
    run(controller, 1, model)
    values = controller.values
    with pytest.warns(
        UserWarning, match="the metric was not finite; there is no reward and no action"
    ) as said:
        reports = [controller.step(model) for _ in range(2)]
    assert len(said) == 1 and said[0].filename == __file__
    assert controller.skipped == 2 and equal(values, controller.values)
    assert controller.learner is not None and not controller.learner.memory
    assert all(r is not None and math.isnan(r.entropy) for r in reports)
    recovered, last = run(controller, 2, model)
    assert controller.skipped == 2 and controller.windows == 5
    assert last.reward is not None and last.reward.item() == 1 and len(controller.learner.memory) == 1
    baseline = controller.learner.baseline
    (lost,) = run(controller, 1, model)
    assert lost.reward is not None and lost.reward.isnan().all()
    assert len(controller.learner.memory) == 1 and controller.learner.baseline == baseline


def test_a_metric_that_is_not_finite_at_first() -> None:
    controller = made(metric=Told(float("nan"), 1, 2))
    first, second, third = run(controller, 3)
    assert first.reward is None and second.reward is None
    assert third.reward is not None and third.reward.item() == 1 and controller.skipped == 1


def test_a_model_that_diverges_is_skipped() -> None:
    for space in (ClassCorrelation(CLASSES), DistanceMixture(), FocalWeighting(), Robust()):
        controller, model = made(space), network()
        run(controller, 2, model)
        before = controller.values
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        run(controller, 2, model)
        assert controller.skipped == 2 and equal(before, controller.values)


def test_a_metric_that_never_changes() -> None:
    controller = made(metric=Told(0.5))
    model = network()
    with pytest.warns(UserWarning, match="the metric has not changed; the reward is 0") as said:
        reports = [controller.step(model) for _ in range(4)]
    assert len(said) == 1 and said[0].filename == __file__
    assert controller.ties == 3 and controller.skipped == 0
    assert [r.reward.item() for r in reports[1:] if r is not None and r.reward is not None] == [0, 0, 0]


def test_warnings_that_are_errors_change_nothing() -> None:
    controller = made(metric=Told(0.5), seed=2)
    run(controller, 1)
    before = controller.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has not changed"):
            controller.step(network())
    assert equal(before, controller.state_dict())


def test_whatever_raises_nothing_has_changed() -> None:
    class Stop(Exception):
        pass

    where = ""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            if where == "model":
                raise Stop
            return self.inner(x)

    def metric(prediction: Tensor, target: Tensor) -> Any:
        if where == "metric":
            raise Stop
        return prediction[0] if where == "no number" else margin(prediction, target)

    class Space(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            if where == "statistics":
                raise Stop
            found = super().statistics(prediction, target, values)
            return {"q": {"none": found["q"][:0], "more": found["q"][:, [0, 0, 0]]}.get(where, found["q"])}

    controller, reference = (made(Space(), metric, window=2, evaluations=2, seed=1) for _ in range(2))
    models = [Model(), Model()]
    for step in range(12):
        for where in ("model", "metric", "statistics", "no number", "none", "more"):
            if step % 2 == 0 and where in ("statistics", "none", "more"):
                continue  # they are looked at in the end
            if step == 1 and where == "more":
                continue  # it is not known yet what there is
            before = controller.state_dict()
            with pytest.raises((Stop, ValueError)):
                controller.step(models[0])
            assert controller.steps_done == step and equal(before, controller.state_dict())
            assert all(m.training for m in models[0].modules())
        where = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.step(models[0])
            reference.step(models[1])
    assert equal(controller.state_dict(), reference.state_dict()) and controller.windows == 6


def test_validation_data_that_ends() -> None:
    x, y = data(40, 1)
    controller = made(valid=iter([(x, y)]))
    run(controller, 1)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="valid must hold at least one batch each time it is gone through"):
        controller.step(network())
    assert equal(before, controller.state_dict())


def test_statistics_of_parameters_that_share_a_policy() -> None:
    class Space(LossSpace):
        parameters = (
            Parameter("a", 0.0, 1.0, -1, 1, policy="both"),
            Parameter("b", 0.0, 1.0, -1, 1, policy="both"),
        )

        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            return {"a": torch.zeros(1, 2), "b": torch.zeros(1, 3)}

    controller = made(Space())
    before = controller.state_dict()
    with pytest.raises(ValueError, match="'both' must have equally many statistics of an entry"):
        controller.step(network())
    assert equal(before, controller.state_dict())


@pytest.mark.parametrize("size", [1e18, 1e25, 1e38])
def test_statistics_of_any_size(size: float) -> None:
    class Space(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            return {"q": size * torch.randn(1, 2)}

    controller = made(Space(), Told(1, 2, 1, 1.5))
    reports = run(controller, 10)
    assert all(math.isfinite(r.entropy) for r in reports)
    assert all(p.isfinite().all() for p in controller.policy.parameters())  # type: ignore[union-attr]


# ---- Models, modes, random numbers, defaults of PyTorch.


def test_modes_and_buffers_stay() -> None:
    model = network()
    model[0].eval()  # type: ignore[index]
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    run(made(), 4, model)
    assert equal(dict(state), dict(model.state_dict())) and modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["alone", "loader", "policy", "path", "noisy model"])
def test_global_random_numbers_stay(how: str, tmp_path: Path) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            random.random()
            np.random.rand()  # noqa: NPY002
            return super().forward(x) + torch.randn(CLASSES)

    options: dict[str, Any] = {}
    if how == "loader":
        options["valid"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(40, 1)), 7)
    model = Noisy(4, CLASSES) if how == "noisy model" else network()
    policy = Policy({"class pairs": 2})
    policy.save(tmp_path / "p")
    options |= {"policy": {"policy": policy}, "path": {"policy": tmp_path / "p"}}.get(how, {})
    start = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    run(made(**options), 5, model)
    assert torch.equal(start[0], torch.get_rng_state()) and start[1] == random.getstate()
    assert (start[2] == np.random.get_state()[1]).all()  # type: ignore[index] # noqa: NPY002


def test_the_random_numbers_of_gpus_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(seed: int) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refused)
    run(made(), 2, nn.Linear(4, CLASSES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("space", [ClassCorrelation(CLASSES), Robust(), DistanceMixture(), FocalWeighting()])
def test_models_of_other_dtypes(space: LossSpace, dtype: torch.dtype) -> None:
    x, y = data(40, 1)
    controller = made(space, valid=(x.to(dtype), y))
    model = network().to(dtype)
    run(controller, 4, model)
    assert controller.windows == 4 and controller.skipped == 0
    loss = controller(model(x.to(dtype)), y)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["correlation", "mixture", "focal", "robust"])
def test_other_defaults_of_pytorch(kind: str, tmp_path: Path) -> None:
    spaces = {
        "correlation": lambda: ClassCorrelation(CLASSES),
        "mixture": DistanceMixture,
        "focal": FocalWeighting,
    }
    model, valid, found = network(), data(40, 1), []
    Policy({"class pairs" if kind == "correlation" else "q" if kind == "robust" else "phi": 2}).save(
        tmp_path / "p"
    )
    try:
        for other in (False, True):
            if other:
                torch.set_default_device("meta")
                torch.set_default_dtype(torch.float64)
            controller = made(spaces.get(kind, Robust)(), Margin(), valid, policy=tmp_path / "p", seed=3)
            run(controller, 6, model)
            state = controller.state_dict()
            # The count of Adam's steps is of the default dtype.
            found.append([state["learner"]["policy"], *(v for k, v in state.items() if k != "learner")])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert equal(*found)


def test_inference_mode_and_autocast() -> None:
    plain = restless(seed=1)
    model = network()
    run(plain, 6, model)
    controller = restless(seed=1)
    with torch.inference_mode():
        run(controller, 6, model)
    assert equal(plain.state_dict(), controller.state_dict())
    x, y = data(8)
    controller(model(x), y).backward()
    controller = made(seed=1, metric=Told(1, 2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        reports = run(controller, 3, model)
    assert all(r.entropy <= math.log(3) for r in reports)


# ---- What a user does in between.


def test_the_values_can_be_moved() -> None:
    controller = made(Robust(), window=4, evaluations=1, step_size=0.25)
    model = network()
    run(controller, 2, model)
    controller.losses[0].move_to(q=0.6)
    run(controller, 2, model)
    assert abs(controller.values["q"].item() - 0.6) == pytest.approx(0.075) or controller.values["q"] == 0.6
    before = controller.state_dict()
    for wrong in ({"q": 1.2}, {"q": float("nan")}, {"p": 0.5}, {"q": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="SpaceLoss: "):
            controller.losses[0].move_to(**wrong)
    assert equal(before, controller.state_dict())


def test_the_schedule_says_what_held_when() -> None:
    controller = made(window=3, evaluations=1, children=2)
    with pytest.raises(ValueError, match="a window must have ended before there is a schedule"):
        controller.schedule()
    models, held = [network(0), network(1)], []
    for _ in range(10):
        held.append(controller.losses[1].values)
        run(controller, 1, models)
    schedule = controller.schedule(1)
    for values in held:
        for name, v in schedule.values.items():
            torch.testing.assert_close(v, values[name], rtol=1e-6, atol=1e-6)
        schedule.step()
    with pytest.raises(ValueError, match="record must be True"):
        made(record=False).schedule()


def resumable() -> tuple[nn.Module, Adam, Controller]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    )
    controller = made(
        LogitAdjustment(torch.tensor([30, 10, 3])) * Robust(), window=5, evaluations=3, episode=2
    )
    return model, Adam(model.parameters(), 0.02), controller


@pytest.mark.parametrize("killed_at", [0, 3, 5, 12, 15, 20, 33])
def test_a_killed_run_resumes_to_the_same_bits(killed_at: int) -> None:
    model, optimizer, controller = resumable()
    torch.manual_seed(7)
    file = io.BytesIO()
    trained(controller, model, optimizer, range(killed_at))
    torch.save(
        (model.state_dict(), optimizer.state_dict(), controller.state_dict(), torch.get_rng_state()), file
    )
    trained(controller, model, optimizer, range(killed_at, 40))

    other, other_optimizer, resumed = resumable()
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    other_optimizer.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    torch.set_rng_state(states[3])
    trained(resumed, other, other_optimizer, range(killed_at, 40))
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    assert equal(controller.state_dict(), resumed.state_dict()) and resumed.windows == 8


@pytest.mark.parametrize("at", [0, 7, 10])
@pytest.mark.parametrize("episode", [1, 3])
def test_a_state_is_a_snapshot(at: int, episode: int) -> None:
    """Nothing that follows changes it, so that one can go back to it, also twice."""
    controller = restless(window=2, evaluations=2, episode=episode, children=2)
    models = [network(0), network(1)]
    run(controller, at, models)
    state = controller.state_dict()
    kept = copy.deepcopy(state)
    run(controller, 9, models)
    assert equal(state, kept)
    end = controller.state_dict()
    for _ in range(2):
        controller.load_state_dict(state)
        assert equal(controller.state_dict(), kept)
        run(controller, 9, models)
        assert equal(state, kept) and equal(controller.state_dict(), end)


@pytest.mark.parametrize("at", [1, 4])
def test_a_state_holds_the_policy_that_was_given(at: int, tmp_path: Path) -> None:
    """Whatever has become of it, or of its file."""
    policy = Policy({"class pairs": 2})
    policy.save(tmp_path / "p")
    controller = restless(window=2, policy=policy)
    model = network()
    run(controller, at, model)
    state = controller.state_dict()
    run(controller, 12, model)
    Policy({"class pairs": 2}).save(tmp_path / "p")
    resumed = restless(window=2, policy=tmp_path / "p")
    resumed.load_state_dict(state)
    run(resumed, 12, model)
    assert equal(controller.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"space": ClassCorrelation(4)},
        {"space": Robust()},
        {"children": 2},
        {"hidden": (8,)},
        {"hidden": (32, 32, 32)},
        {"history": 3},
        {"parts": ("history",)},
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_states_of_others_are_refused(other: dict[str, Any], steps: int) -> None:
    state_of = restless()
    run(state_of, 3)
    controller = made(valid=(torch.randn(9, 4), torch.randint(3, (9,))), **other)
    run(controller, steps, [nn.Linear(4, 4 if "space" in other else 3) for _ in controller.losses])
    before = controller.state_dict()
    with pytest.raises(ValueError, match="Controller: the state must be of"):
        controller.load_state_dict(state_of.state_dict())
    assert equal(before, controller.state_dict())


# ---- Transfer.


def test_a_policy_of_three_classes_drives_ten(tmp_path: Path) -> None:
    first = restless()
    with pytest.raises(ValueError, match="a window of 1 steps must have ended, got 0 steps"):
        first.save_policy(tmp_path / "p")
    run(first, 20)
    first.save_policy(tmp_path / "p")
    ten = (torch.randn(60, 4), torch.randint(10, (60,)))
    second = made(ClassCorrelation(10), valid=ten, policy=tmp_path / "p", learn=False)
    run(second, 5, nn.Linear(4, 10))
    assert second.values["pairs"].any() and second.policy is not None and first.policy is not None
    assert equal(dict(second.policy.state_dict()), dict(first.policy.state_dict()))
    record = second.policy.record
    assert record["metric"] == ["metric"] and record["steps_done"] == 20 and record["step_size"] == 1.0


def test_policies_that_do_not_fit_are_refused() -> None:
    for features in ({"q": 2}, {"class pairs": 2, "more": 1}):
        with pytest.raises(ValueError, match="policy must move class pairs, as the space asks for"):
            made(policy=Policy(features))
    controller = made(policy=Policy({"class pairs": 3}))
    before = controller.state_dict()
    with pytest.raises(ValueError, match=r"policy must see .*: 2.* of an entry, .* got one that sees .*: 3"):
        controller.step(network())
    assert equal(before, controller.state_dict())
    with pytest.raises(ValueError, match="policy must be float32 on the CPU, got float64 on cpu"):
        made(policy=Policy({"class pairs": 2}).double())
    with pytest.raises(FileNotFoundError):
        made(policy="no such file")


# ---- Refused.


def nothing() -> Iterator[Any]:
    return iter(())


def test_refuses() -> None:
    for name in ("steps", "children", "window", "evaluations", "episode", "memory", "batch"):
        with pytest.raises(ValueError, match=f"Controller: {name} must be at least 1, got 0"):
            made(**{name: 0})
        for wrong in (2.0, "2", None):
            with pytest.raises(TypeError, match=f"Controller: {name} must be an int, got"):
                made(**{name: wrong})
    for options, message in (
        ({"window": 3, "evaluations": 4}, "evaluations must be at most the window's 3, got 4"),
        ({"discount": 0.0}, "discount must be positive"),
        ({"discount": 1.1}, r"discount must lie in \[0, 1\]"),
        ({"step_size": 0.0}, "step_size must be positive and finite"),
        ({"step_size": math.inf}, "step_size must be positive and finite"),
        ({"learning_rate": -1.0}, "learning_rate must be positive and finite"),
        ({"hidden": (0,)}, "hidden must be at least 1"),
        ({"history": 0}, "history must be at least 1"),
        ({"parts": ("future",)}, "parts must be among history, change, values, progress, got future"),
        ({"space": LossSpace()}, "space must have at least one parameter"),
        ({"space": Robust() * LearningRate()}, "space must not adapt the learning_rate"),
        ({"metric": []}, "metric must be one, or pairs"),
        ({"metric": [ErrorRate()]}, "metric must be one, or pairs"),
        ({"metric": [(ErrorRate(), 0.0)]}, "a metric's weight must be positive and finite"),
        (
            {"valid": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))},
            "valid must hold at least one sample",
        ),
        (
            {"rewarded_on": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))},
            "rewarded_on must hold at least one sample",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)  # type: ignore[arg-type]
    for options, message in (
        ({"space": nn.CrossEntropyLoss()}, "space must be a LossSpace, got CrossEntropyLoss"),
        ({"metric": 3}, "metric must be a metric or a function, got int"),
        ({"valid": torch.zeros(3)}, "valid must be a pair"),
        ({"rewarded_on": 3}, "rewarded_on must be a pair"),
        ({"policy": 3}, "policy must be a Policy or a path, got int"),
        ({"seed": 1.5}, "seed must be an int, got float"),
        ({"discount": "much"}, None),
        ({"step_size": "much"}, None),
        ({"learning_rate": "much"}, None),
        ({"hidden": 8}, None),
        ({"history": 2.5}, None),
        ({"parts": 3}, None),
    ):
        with pytest.raises(TypeError, match=message):
            made(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid must hold at least one batch"):
        made(valid=nothing()).step(network())
    for wrong in (3, None, "model", [3], F.relu):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            made().step(wrong)


# ---- Several processes.

PROCESS = """
import os, sys, time, torch, torch.distributed as dist
from torch import nn
from lossmeta.ala import ClassCorrelation, Controller

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(rank)
valid = torch.randn(20, 4), torch.randint(3, (20,))
def margin(prediction, target):
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()
controller = Controller(ClassCorrelation(3), margin, valid, steps=30, window=3, evaluations=1, seed=rank)
model, found = nn.Linear(4, 3), []
for _ in range(30):
    controller.step(model)
    found.append(controller.values)
torch.save([found, controller.paths], f"{folder}/{rank}.pt")
# Gloo's threads sometimes abort a process that ends in the usual way: leave at once, when both have their results.
open(f"{folder}/{rank}.done", "w").close()
while not os.path.exists(f"{folder}/{1 - rank}.done"):
    time.sleep(0.01)
os._exit(0)
"""


def test_two_processes_have_the_values_of_the_first(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second) and first[0][-1]["pairs"].any()


def test_a_frozen_policy_cannot_learn() -> None:
    policy = Policy({"class pairs": 2}).requires_grad_(False)
    with pytest.raises(ValueError, match="policy must be trainable where it learns"):
        made(policy=policy)
    controller = made(policy=policy, learn=False)
    controller.step(network())
    assert controller.windows == 1


def test_the_state_of_other_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="windows of 3 steps, got 1"):
        made(window=3).load_state_dict(made().state_dict())
