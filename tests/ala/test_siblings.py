"""The controller's reward by advantage over siblings: windows against plain loops, and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import two_processes
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lossmeta.ala import Controller, LossSpace, Parameter, Policy, Robust
from lossmeta.metrics import ErrorRate

CLASSES = 3


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth, so that nothing ties."""
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


class Told:
    """A metric whose values are known beforehand, in the order of windows and children."""

    def __init__(self, *values: float) -> None:
        self.values = itertools.cycle(values)

    def __call__(self, prediction: Tensor, target: Tensor) -> float:
        return next(self.values)


def made(space: LossSpace | None = None, metric: Any = margin, **options: Any) -> Controller:
    options = {"steps": 100, "children": 3, "window": 2, "evaluations": 1, "reward": "advantage", **options}
    return Controller(space or Robust(), metric, data(40, 1), **options)


class Trial:
    """Children, their optimizers and the controller."""

    def __init__(self, controller: Controller, make: Any = None) -> None:
        self.controller = controller
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.models: list[nn.Module] = [copy.deepcopy(first) for _ in controller.losses]
        make = make or (lambda p: SGD(p, 0.1, momentum=0.9))
        self.optimizers: list[Optimizer] = [make(m.parameters()) for m in self.models]

    def train(self, steps: range) -> None:
        for i in steps:
            x, y = data(16, 50 + i)
            for model, optimizer, loss in zip(
                self.models, self.optimizers, self.controller.losses, strict=True
            ):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()

    def run(self, start: int, end: int) -> list[Any]:
        """The reports of the windows that end."""
        found = []
        for i in range(start, end):
            self.train(range(i, i + 1))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(self.controller.step(self.models, self.optimizers))
        return [report for report in found if report is not None]


def equal(a: Any, b: Any) -> bool:
    """To the last bit, NaN included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# ---- A window.


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.02), lambda p: SGD(p, 0.1)]
)
def test_a_window_in_float64(make: Any) -> None:
    """Rewards, weights, momenta, buffers and coordinates are what the formulas say of the children as trained."""
    trial = Trial(made(Robust() * Vector(), children=4), make)
    controller = trial.controller
    assert trial.run(0, 2)[0].reward is None
    for start in (2, 4):
        trial.train(range(start, start + 1))
        assert controller.step(trial.models, trial.optimizers) is None
        trial.train(range(start + 1, start + 2))
        before = [
            ({k: t.double() for k, t in m.state_dict().items()}, copy.deepcopy(o.state_dict()["state"]))
            for m, o in zip(trial.models, trial.optimizers, strict=True)
        ]
        us = torch.stack([loss._u for loss in controller.losses])
        assert any(not torch.equal(us[0], u) for u in us)
        x, y = data(40, 1)
        found = []
        for model in trial.models:
            with torch.no_grad():
                found.append(margin(copy.deepcopy(model).eval()(x), y).double())
        f = torch.stack(found)
        advantage = (f - f.mean()) / f.std(correction=0)
        weight = (2 * advantage).softmax(0)
        report = controller.step(trial.models, trial.optimizers)
        assert report is not None and report.reward is not None
        torch.testing.assert_close(report.reward, advantage, rtol=1e-4, atol=1e-4)
        for model, optimizer in zip(trial.models, trial.optimizers, strict=True):
            for name, t in model.state_dict().items():
                expected = sum(float(w) * b[name] for w, (b, _) in zip(weight, before, strict=True))
                torch.testing.assert_close(t.double(), expected, rtol=1e-4, atol=1e-5)
            for i, state in optimizer.state_dict()["state"].items():
                for key, t in state.items():
                    if t is not None:
                        mean = sum(float(w) * s[i][key] for w, (_, s) in zip(weight, before, strict=True))
                        torch.testing.assert_close(t, mean, rtol=1e-4, atol=1e-5)
        mean_u = (weight[:, None] * us).sum(0)
        for loss in controller.losses:
            moved = loss._u - mean_u
            # One action away, or at a bound.
            c = controller.coordinates
            reached = torch.stack([c.clip(mean_u + a) - mean_u for a in (-1, 0, 1)])
            assert ((moved - reached).abs().amin(0) < 1e-4).all()
        torch.testing.assert_close(
            controller.paths[0][-1][1].double() if controller.paths else None, mean_u, atol=1e-4, rtol=0
        )
    # All the same, but with memories of their own.
    for model in trial.models[1:]:
        assert equal(dict(model.state_dict()), dict(trial.models[0].state_dict()))
        assert next(model.parameters()).data_ptr() != next(trial.models[0].parameters()).data_ptr()


def test_the_gradient_of_the_objective() -> None:
    """-1/B sum_i A_i mean_e log pi(a_ie | s_e), by autograd in float64; the latest alone are learned from."""
    space = Robust() * Vector()
    metric = Told(*[0.0] * 4, 1.0, 2.0, 4.0, 1.5)
    trial = Trial(made(space, metric, children=4, batch=1, window=1))
    controller = trial.controller
    trial.run(0, 1)
    policy = copy.deepcopy(controller.policy).double()  # type: ignore[union-attr]
    pending = [e for e in controller.pending if e is not None]
    assert len(pending) == 4
    states = {name: [e.states[name] for e in pending] for name in policy.features}
    for same in states.values():  # all children see the same
        assert all(torch.equal(s, same[0]) for s in same)
    trial.run(1, 2)
    f = torch.tensor([1.0, 2.0, 4.0, 1.5], dtype=torch.float64)
    advantage = (f - f.mean()) / f.std(correction=0)
    objective = torch.zeros((), dtype=torch.float64)
    for a, e in zip(advantage, pending, strict=True):
        for name in policy.features:
            log_p = torch.log_softmax(policy.of(name)(e.states[name].double()), 1)
            taken = log_p[torch.arange(len(log_p)), e.actions[name].long() + 1]
            objective = objective + a * taken.mean() / 4
    expected = torch.autograd.grad(-objective, list(policy.parameters()))
    assert any(g.abs().max() > 1e-3 for g in expected)
    for p, g in zip(controller.policy.parameters(), expected, strict=True):  # type: ignore[union-attr]
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), g, rtol=1e-4, atol=1e-7)


class Vector(LossSpace):
    parameters = (Parameter("bent", default=0.0, scale=0.5, low=-9.0, high=9.0, size=CLASSES),)

    def transform(self, prediction: Tensor, target: Tensor, values: Any) -> Tensor:
        return prediction + values["bent"]


def test_without_an_advantage_nothing_is_learned() -> None:
    """Nor by the momentum of what was learned before."""
    trial = Trial(made(metric=Told(1, 2, 3, 1, 2, 3, 5, 5, 5), window=1))
    controller = trial.controller
    trial.run(0, 2)
    assert controller.policy is not None and controller.learner is not None
    before = copy.deepcopy(controller.policy.state_dict())
    remembered = len(controller.learner.memory)
    trial.train(range(2, 3))
    with pytest.warns(
        UserWarning, match="all children had the same metric; nothing is learned from that"
    ) as w:
        report = controller.step(trial.models, trial.optimizers)
    assert len(w) == 1 and w[0].filename == __file__
    assert report is not None and report.reward is not None and not report.reward.any()
    assert equal(before, dict(controller.policy.state_dict())) and controller.ties == 1
    assert len(controller.learner.memory) == remembered == 3
    trial.run(3, 4)
    assert not equal(before, dict(controller.policy.state_dict()))


def test_the_first_window_ends_with_the_best() -> None:
    """Whose children may have begun differently, so that their mean is none of them."""
    trial = Trial(made(metric=Told(1, 3, 2), window=1))
    for i, model in enumerate(trial.models):
        with torch.no_grad():
            model[0].weight.fill_(float(i))  # type: ignore[index, union-attr, operator]
    trial.train(range(1))
    best = copy.deepcopy(trial.models[1].state_dict())
    trial.controller.step(trial.models, trial.optimizers)
    assert all(equal(dict(best), dict(m.state_dict())) for m in trial.models)


def test_several_metrics_with_weights() -> None:
    first, second = Told(0, 0, 0, 1, 2, 3), Told(0, 0, 0, 5, 5, 8)
    trial = Trial(made(metric=[(first, 3.0), (second, 1.0)], window=1))
    (_, report) = trial.run(0, 2)
    a = torch.tensor([-1.5, 0, 1.5], dtype=torch.float64) / math.sqrt(1.5)
    b = torch.tensor([-1.0, -1, 2], dtype=torch.float64) / math.sqrt(2)
    torch.testing.assert_close(report.reward, (3 * a + b) / 4)


def test_a_child_that_is_not_finite_has_no_part() -> None:
    trial = Trial(made(metric=Told(1, 2, 3, 1, math.nan, 2), window=1))
    controller = trial.controller
    trial.run(0, 1)
    trial.train(range(1, 2))
    with torch.no_grad():
        trial.models[1][0].weight.fill_(torch.nan)  # type: ignore[index, union-attr, operator]
    with pytest.warns(UserWarning, match="the metric was not finite"):
        report = controller.step(trial.models, trial.optimizers)
    assert report is not None and report.reward is not None
    assert report.reward.isnan().tolist() == [False, True, False] and controller.skipped == 1
    assert all(t.isfinite().all() for m in trial.models for t in m.state_dict().values())
    assert controller.learner is not None and len(controller.learner.memory) == 2
    assert all(e is not None for e in controller.pending)


def test_where_no_child_is_finite_nothing_moves() -> None:
    trial = Trial(made(metric=Told(1, 2, 3, *[math.nan] * 3, 3, 1, 2), window=1))
    controller = trial.controller
    trial.run(0, 1)
    trial.train(range(1, 2))
    states = [copy.deepcopy(dict(m.state_dict())) for m in trial.models]
    us = [loss._u.clone() for loss in controller.losses]
    with pytest.warns(UserWarning, match="the metric was not finite"):
        report = controller.step(trial.models, trial.optimizers)
    assert report is not None and report.reward is not None and report.reward.isnan().all()
    assert equal(states, [dict(m.state_dict()) for m in trial.models]) and math.isnan(report.entropy)
    assert equal(us, [loss._u for loss in controller.losses]) and controller.pending == [None] * 3
    # The best of them goes on, for they have not begun alike.
    trial.train(range(2, 3))
    best = copy.deepcopy(dict(trial.models[0].state_dict()))
    report = controller.step(trial.models, trial.optimizers)
    assert report is not None and report.reward is None
    assert all(equal(best, dict(m.state_dict())) for m in trial.models)
    assert equal(controller.paths[0][-1][1], us[0].float())  # type: ignore[index]


# ---- Learning.


class Bandit(LossSpace):
    """Each entry is an arm; the metric likes one end of it."""

    parameters = (Parameter("arm", default=0.0, scale=0.01, low=-1.0, high=1.0, size=4),)

    def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
        return {"arm": torch.stack([values["arm"] * 0 + 1, values["arm"] * 0 - 1], 1)}


@pytest.mark.filterwarnings("ignore:Controller. all children had the same metric")
@pytest.mark.parametrize("better", [1.0, -1.0])
def test_the_better_action_is_learned(better: float) -> None:
    """Whose effect is small beside a trend and noise that all children share."""
    noise = torch.Generator().manual_seed(0)
    asked = itertools.count()
    common = [0.0]

    def metric(prediction: Tensor, target: Tensor) -> float:
        child = next(asked) % 4
        if child == 0:
            common[0] = 100 * float(torch.randn((), generator=noise))
        return common[0] + better * float(controller.losses[child]._u.sum())

    controller = made(
        Bandit(),
        metric,
        children=4,
        window=1,
        learning_rate=1e-2,
        parts=("history",),
        history=1,
        steps=150,
    )
    models = [nn.Linear(4, CLASSES) for _ in range(4)]
    optimizers = [SGD(m.parameters(), 0.1) for m in models]
    for _ in range(150):
        controller.step(models, optimizers)
    assert controller.policy is not None
    (experience, *_) = [e for e in controller.pending if e is not None]
    with torch.no_grad():
        p = torch.softmax(controller.policy.of("arm")(experience.states["arm"]), 1)
    assert (p[:, 2 if better > 0 else 0] > 0.6).all(), p


# ---- State.


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_a_killed_run_resumes_to_the_same_bits(killed_at: int) -> None:
    trial = Trial(made(), lambda p: Adam(p, 0.02))
    trial.run(0, killed_at)
    file = io.BytesIO()
    torch.save(
        (
            trial.controller.state_dict(),
            [m.state_dict() for m in trial.models],
            [o.state_dict() for o in trial.optimizers],
        ),
        file,
    )
    file.seek(0)
    state, models, optimizers = torch.load(file, weights_only=False)
    resumed = Trial(made(), lambda p: Adam(p, 0.02))
    resumed.controller.load_state_dict(state)
    for own, saved in ((resumed.models, models), (resumed.optimizers, optimizers)):
        for part, s in zip(own, saved, strict=True):  # type: ignore[var-annotated]
            part.load_state_dict(s)
    trial.run(killed_at, 11)
    resumed.run(killed_at, 11)
    assert equal(trial.controller.state_dict(), resumed.controller.state_dict())
    for a, b in zip((*trial.models, *trial.optimizers), (*resumed.models, *resumed.optimizers), strict=True):
        assert equal(dict(a.state_dict()), dict(b.state_dict()))
    assert trial.controller.windows == 5


def test_seeds() -> None:
    states = []
    for seed in (0, 0, 1):
        trial = Trial(made(seed=seed))
        trial.run(0, 8)
        states.append([trial.controller.values["q"], dict(trial.models[0].state_dict())])
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


def test_a_schedule_and_a_policy_of_siblings(tmp_path: Any) -> None:
    trial = Trial(made())
    trial.run(0, 8)
    controller = trial.controller
    assert controller.schedule(0).steps == [2, 4, 6, 8]
    assert equal(controller.schedule(0).path, controller.schedule(2).path)
    controller.save_policy(tmp_path / "p")
    assert Policy.load(tmp_path / "p").record["reward"] == "advantage"
    other = Trial(made(policy=tmp_path / "p", learn=False))
    other.run(0, 6)
    assert equal(dict(controller.policy.state_dict()), dict(other.controller.policy.state_dict()))  # type: ignore[union-attr]
    assert other.controller.learner is not None and not other.controller.learner.memory


# ---- Refused.


def test_options_that_contradict_each_other() -> None:
    for options, message in (
        ({"children": 1}, 'children must be 2 or more for reward="advantage", which is over siblings, got 1'),
        ({"episode": 2}, 'episode must be 1 for reward="advantage"'),
        ({"reward": "much"}, "reward must be one of 'sign', 'advantage', got 'much'"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)
    with pytest.raises(TypeError, match="reward must be one of"):
        made(reward=3)
    trial = Trial(made(reward="sign"))
    with pytest.raises(ValueError, match='optimizers must be given for reward="advantage" alone, got some'):
        trial.run(0, 2)


def test_children_that_cannot_be_made_alike() -> None:
    trial = Trial(made(window=1))
    controller, models, optimizers = trial.controller, trial.models, trial.optimizers
    frozen = SGD([*models[0].parameters()][:2], 0.1)
    other = nn.Linear(4, CLASSES)
    for given, steppers, message in (
        (models, None, 'optimizers must be given for reward="advantage", .* got None'),
        (models, optimizers[:2], "optimizers must be 3, one of each child, got 2"),
        (models[:2], optimizers, "model must be 3 models, one of each child, got 2"),
        ([models[0]] * 3, optimizers, "models must have weights of their own, got some that share them"),
        (
            [*models[:2], other],
            optimizers,
            "parameters and buffers of the same shapes and dtypes, got others",
        ),
        (
            models,
            optimizers[::-1],
            "optimizers must each hold the same parameters of its own model, got others",
        ),
        (models, [frozen, *optimizers[1:]], "optimizers must each hold the same parameters of its own model"),
    ):
        before = controller.state_dict()
        with pytest.raises(ValueError, match=message):
            controller.step(given, steppers)
        assert equal(before, controller.state_dict()) and controller.steps_done == 0
    with pytest.raises(TypeError, match=r"optimizers must be torch\.optim\.Optimizer, got int"):
        controller.step(models, [3, 4, 5])  # type: ignore[list-item]


def test_batches_that_differ() -> None:
    """Those of the training, not what else is looked at."""
    trial = Trial(made(window=2))
    trial.run(0, 1)
    x, y = data(16, 9)
    for i, (model, loss) in enumerate(zip(trial.models, trial.controller.losses, strict=True)):
        loss(prediction=model(x), target=y).backward()
        with torch.no_grad():
            loss(model(x), (y + i) % CLASSES)
    trial.controller.step(trial.models, trial.optimizers)
    trial.run(2, 3)
    before = copy.deepcopy(trial.models[0].state_dict())
    for i, (model, loss) in enumerate(zip(trial.models, trial.controller.losses, strict=True)):
        loss(model(x), torch.full_like(y, i)).backward()
    before = copy.deepcopy(trial.models[0].state_dict())
    with pytest.raises(
        ValueError, match=r"must train on the same batches, .* with the sums \[13.0, 29.0, 45.0\]"
    ):
        trial.controller.step(trial.models, trial.optimizers)
    assert equal(dict(before), dict(trial.models[0].state_dict())) and trial.controller.windows == 1


def test_wrong_labels_do_less_harm_to_a_child_of_siblings() -> None:
    """The children's metric, after some windows, is better than under the default alone."""
    generator = torch.Generator().manual_seed(0)
    x, y = data(300, 3)
    noisy = torch.where(
        torch.rand(300, generator=generator) < 0.4, torch.randint(3, (300,), generator=generator), y
    )

    def trained(adapted: bool) -> float:
        controller = made(
            metric=ErrorRate(), steps=400, children=4, window=20, evaluations=2, higher_is_better=False
        )
        trial = Trial(controller, lambda p: SGD(p, 0.2, momentum=0.9))
        draws = torch.Generator().manual_seed(1)
        for _ in range(400):
            rows = torch.randint(300, (32,), generator=draws)
            parts = zip(trial.models, trial.optimizers, controller.losses, strict=True)
            for model, optimizer, loss in list(parts)[: 4 if adapted else 1]:
                optimizer.zero_grad()
                loss_value = (
                    loss(model(x[rows]), noisy[rows])
                    if adapted
                    else F.cross_entropy(model(x[rows]), noisy[rows])
                )
                loss_value.backward()
                optimizer.step()
            if adapted:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    controller.step(trial.models, trial.optimizers)
        test = data(2000, 9)
        with torch.no_grad():
            return float((trial.models[0].eval()(test[0]).argmax(1) != test[1]).double().mean())

    plain, adapted = trained(False), trained(True)
    assert adapted < plain, (plain, adapted)


PROCESS = """
import copy
from torch import nn
from lossmeta.ala import Controller, Robust

torch.manual_seed(0)
models = [nn.Linear(4, 3) for _ in range(3)]
optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
torch.manual_seed(rank)
valid = torch.randn(20, 4), torch.randint(3, (20,))
def margin(prediction, target):
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()
controller = Controller(
    Robust(), margin, valid, steps=30, children=3, window=3, evaluations=1, seed=rank, reward="advantage"
)
for step in range(30):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    for model, optimizer, loss in zip(models, optimizers, controller.losses):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    controller.step(models, optimizers)
torch.save([controller.paths, [dict(m.state_dict()) for m in models]], f"{folder}/{rank}.pt")
"""


def test_two_processes_recombine_as_the_first(tmp_path: Path) -> None:
    """Whose validation data differ, so that each would by itself have other weights."""
    two_processes.run(PROCESS, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second) and any(u.any() for _, u in first[0][0])
