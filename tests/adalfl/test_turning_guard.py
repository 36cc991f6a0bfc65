"""A learned loss that turns against the task is caught, undone and said."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from small_problems import batches, equal, learner, mlp, values
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lossmeta.adalfl import OnlineLearner
from lossmeta.adalfl.turning_guard import TurningGuard
from lossmeta.losses import LossNetwork

QUIET = pytest.mark.filterwarnings("ignore:OnlineLearner")


def guarded() -> tuple[TurningGuard, Adam, Tensor]:
    phi, weight = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
    return TurningGuard([phi], SGD([weight], 0.1), []), Adam([phi], 0.1), phi


def levels(
    losses: list[float], resumed: tuple[int, ...] = ()
) -> tuple[list[int], TurningGuard, Adam, Tensor]:
    """After which losses something was undone."""
    guard, meta, phi = guarded()
    undone = []
    for i, value in enumerate(losses):
        if i in resumed:
            state, other = copy.deepcopy(guard.state()), copy.deepcopy(meta.state_dict())
            guard = TurningGuard([phi], guard.optimizer, [])
            guard.load(state)
            meta = Adam([phi], 0.1)
            meta.load_state_dict(other)
        phi.grad = torch.ones(3)
        if guard.turned(value, meta):
            guard.undo(meta)
            undone.append(i)
        else:
            meta.step()
    return undone, guard, meta, phi


RISING = [2.0 - 0.018 * i for i in range(100)] + [0.2 + 0.1 * i for i in range(40)]
"""From 2 to 0.2 in 100 updates, then up by a tenth per update."""


def test_falling_and_level_losses_are_left_alone() -> None:
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    assert levels([2.0 * math.exp(-i / 100) for i in range(1000)])[0] == []
    assert levels([1.0 + 0.3 * e for e in noise])[0] == []
    assert levels([abs(0.02 + 0.02 * e) for e in noise[:2000]])[0] == []  # near 0
    slow = [2 * math.exp(-i / 100) + 0.3 * abs(e) + i / 10_000 for i, e in enumerate(noise[:2000])]
    assert levels(slow)[0] == []


def test_a_rising_loss_goes_back_to_the_least() -> None:
    undone, guard, meta, phi = levels(RISING[:120])
    assert len(undone) == 1 and 110 <= undone[0] < 120
    assert meta.param_groups[0]["lr"] == pytest.approx(0.01)
    assert guard.kept is not None
    # Adam moves by its rate where the gradient is always the same. It has moved on by a tenth of it since.
    kept = float(guard.kept[0].values[0][0])
    assert kept == pytest.approx(-0.1 * (guard.kept_at - 1), rel=1e-3)
    assert float(phi[0].detach()) == pytest.approx(kept - 0.01 * (119 - undone[0]), abs=0.02)
    assert 90 <= guard.kept_at <= 112


def test_after_three_times_nothing_is_undone_any_more() -> None:
    guard, meta, phi = guarded()
    said = []
    for _ in range(8):
        for value in RISING:
            phi.grad = torch.ones(3)
            if turned := guard.turned(value, meta):
                guard.undo(meta)
                said.append(turned)
            meta.step()
    assert len(said) == guard.alarms == 3
    assert [t.endswith("not watched any longer") for t in said] == [False, False, True]


def test_it_goes_on_from_its_state() -> None:
    whole, resumed = levels(RISING), levels(RISING, (50, 104, 125))
    assert whole[0] == resumed[0] != []
    assert torch.equal(whole[3], resumed[3])
    guard = whole[1]
    guard.load(None)
    assert guard.updates == guard.alarms == 0 and guard.kept is None


class Turning(nn.Module):
    """Cross-entropy times a number, which something makes negative."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.size * F.cross_entropy(f, y)


def turning(**options: Any) -> OnlineLearner:
    loss = Turning()
    return learner(loss, guard=True, meta_optimizer=SGD(loss.parameters(), 0.0), **options)


def test_within_fifty_steps_it_is_undone_and_said() -> None:
    torch.manual_seed(0)
    one = turning()
    pair = batches()
    for _ in range(12):
        one.step(pair[0], pair[0])
    with torch.no_grad():
        one.loss.size.fill_(-20.0)
    steps = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while one.step(pair[0], pair[0]).skipped is None and steps < 50:
            steps += 1
    assert any("OnlineLearner: the task loss has risen from" in str(w.message) for w in caught)
    # The model is one of before, too: from then on it trains as it did.
    assert float(F.cross_entropy(one._step.model.plain(pair[0][0]), pair[0][1])) < 0.5
    assert steps < 50
    assert float(one.loss.size) == 1.0


@QUIET
@pytest.mark.parametrize("tensor", [False, True])
def test_learned_rates_go_back_too(tensor: bool) -> None:
    model = mlp()
    rate = torch.tensor(0.1) if tensor else 0.1
    optimizer = SGD(model.parameters(), rate)
    loss = Turning()
    meta = SGD(loss.parameters(), 0.0)
    one = OnlineLearner(
        model, optimizer, loss, F.cross_entropy, guard=True, meta_optimizer=meta, learning_rate=1e-12
    )
    pair = batches()
    for _ in range(12):
        one.step(pair[0], pair[0])
    with torch.no_grad():
        loss.size.fill_(-20.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5) if tensor else 0.5  # as if it had run away
    steps = 0
    while one.step(pair[0], pair[0]).skipped is None and steps < 50:
        steps += 1
    assert steps < 50 and 0.05 < float(optimizer.param_groups[0]["lr"]) < 0.2


@QUIET
def test_a_collapsing_network_is_kept_from_it() -> None:
    """Without a normalised slope, at a high meta rate, on labels of which half are wrong."""
    x, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    wrong = torch.rand(len(y), generator=generator) < 0.4
    given = torch.where(wrong, torch.randint(10, labels.shape, generator=generator), labels)
    errors = {}
    for guard in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        loss = LossNetwork(residual="cross_entropy")
        optimizer = SGD(model.parameters(), 0.03, momentum=0.9)
        meta = Adam(loss.parameters(), 3e-2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OnlineLearner: a LossNetwork with residual")
            one = OnlineLearner(model, optimizer, loss, F.cross_entropy, meta_optimizer=meta, guard=guard)
        generator = torch.Generator().manual_seed(1)
        for _ in range(400):
            i = torch.randint(100, 1000, (64,), generator=generator)
            j = torch.randint(100, (64,), generator=generator)
            one.step((inputs[i], given[i]), (inputs[j], labels[j]))
        errors[guard] = float((model(inputs[1000:]).argmax(1) != labels[1000:]).double().mean())
    assert errors[True] < 0.5 * errors[False], errors


def test_a_warning_that_is_an_error_leaves_all_as_before() -> None:
    one = turning()
    pair = batches()
    for _ in range(12):
        one.step(pair[0], pair[0])
    with torch.no_grad():
        one.loss.size.fill_(-20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            before = copy.deepcopy([one.state_dict(), values(one._step.model.plain)])
            del before[0]["backend"]
            try:
                one.step(pair[0], pair[0])
            except RuntimeWarning:
                break
        else:
            pytest.fail("nothing was caught")
    after = [one.state_dict(), values(one._step.model.plain)]
    del after[0]["backend"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@QUIET
def test_resumes_to_the_same_bits() -> None:
    pair = batches()

    def story(one: OnlineLearner, steps: range) -> None:
        for i in steps:
            if i == 12:
                with torch.no_grad():
                    one.loss.size.fill_(-20.0)
            one.step(pair[0], pair[0])

    model = mlp()
    whole, half = (turning(model=copy.deepcopy(model)) for _ in range(2))
    story(whole, range(60))
    story(half, range(18))
    new = turning()
    new._step.model.plain.load_state_dict(half._step.model.plain.state_dict())
    new.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    new.load_state_dict(copy.deepcopy(half.state_dict()))
    story(new, range(18, 60))
    assert equal(values(new._step.model.plain), values(whole._step.model.plain))
    assert whole.skipped == new.skipped > 0


# ---- Targets of any structure.


class OfPairs(nn.Module):
    """The target is a pair: labels, and how many of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LossNetwork(8, residual="cross_entropy", dtype=torch.float64)

    def forward(self, f: Tensor, target: Any) -> Tensor:
        labels, count = target
        return self.inner(f[:count], labels[:count])


def test_the_slope_ratio_of_targets_that_are_no_tensors() -> None:
    (x, y), valid = batches()

    def plain(f: Tensor, target: Any) -> Tensor:
        return F.cross_entropy(f[: target[1]], target[0][: target[1]])

    one = learner(OfPairs(), slope_of=plain, min_slope=0.5)
    report = one.step((x, (y, 5)), valid)  # type: ignore[arg-type]
    assert float(report.slope_ratio) == pytest.approx(1.0)  # type: ignore[arg-type]
    two = learner(OfPairs(), log_slope=True)
    before = values(two._step.model.plain)
    with pytest.raises(
        TypeError, match=r"task_loss must take the training target, got a tuple; give slope_of"
    ):
        two.step((x, (y, 5)), valid)  # type: ignore[arg-type]
    assert equal(values(two._step.model.plain), before)
