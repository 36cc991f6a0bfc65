"""The online tuner in a training loop: what it learns, when, and what it leaves alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lossmeta.tuneloss import ConvexRegularizer, OnlineReport, OnlineTuner, PiecewiseLinear
from lossmeta.tuneloss._regularizer import NotFitted

Batches = list[tuple[Tensor, Tensor]]


def data(n: int, seed: int, width: int = 30) -> tuple[Tensor, Tensor]:
    """Few samples for many inputs, most of which say nothing: a model overfits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    y = (x[:, 0] + x[:, 1] + 0.5 * torch.randn(n, generator=generator) > 0).long()
    return x, y


def batches(n: int, seed: int, size: int = 10) -> Batches:
    x, y = data(n, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(30, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2)
        )


def linear() -> nn.Linear:
    model = nn.Linear(30, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def train(
    model: nn.Module, optimizer: Optimizer, tuner: OnlineTuner | None, train_data: Batches, epochs: int
) -> list[OnlineReport]:
    reports = []
    for _ in range(epochs):
        for x, y in train_data:
            loss = F.cross_entropy(model(x), y)
            if tuner is not None:
                loss = loss + tuner.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if tuner is not None and (report := tuner.step()) is not None:
                reports.append(report)
    return reports


def full(model: nn.Module, given: Batches, weights: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and its gradient in one pass over all samples."""
    model = model.eval()
    x, y = (torch.cat(parts) for parts in zip(*given, strict=True))
    loss = F.cross_entropy(model(x), y)
    return loss.detach(), torch.autograd.grad(loss, weights)


# ---- What it learns.


@pytest.mark.parametrize("optimizer", [SGD, Adagrad, Adam])
def test_keeps_a_model_from_overfitting(optimizer: Any) -> None:
    train_data, valid = batches(60, 0), batches(200, 1, 64)
    test = data(2000, 2)
    rate = {SGD: 0.3, Adagrad: 0.3, Adam: 0.03}[optimizer]
    ends, reports = [], []
    for tuned in (False, True):
        model = linear()
        tuner = OnlineTuner(model, train_data, valid) if tuned else None
        reports = train(model, optimizer(model.parameters(), lr=rate), tuner, train_data, 60)
        ends.append(F.cross_entropy(model(test[0]), test[1]).item())
    assert ends[1] < 0.75 * ends[0]
    assert 20 < len(reports) < 60 and reports[-1].on and 330 < reports[-1].step <= 360
    # Nearly at the least validation loss, where the plain model is far from its own.
    assert reports[-1].valid_loss < 1.1 * min(r.valid_loss for r in reports)


@pytest.mark.parametrize("by", ["tensor", "all"])
def test_learns_the_difference_of_the_gradients(by: str) -> None:
    """Of the models of the last rounds, over the samples and not over batches, which differ in size."""
    train_data, valid = batches(25, 0), batches(33, 1)
    model = network()
    tuner = OnlineTuner(
        model, train_data, valid, by=by, start="now", lengthen=1, regularizer=ConvexRegularizer(2)
    )
    optimizer = SGD(model.parameters(), lr=0.3)
    by_hand = ConvexRegularizer(2)
    weights = [model[0].weight, model[4].weight]
    for _ in range(3):
        (report,) = train(model, optimizer, tuner, train_data, 1)
        (train_loss, g), (valid_loss, v) = (full(model, d, weights) for d in (train_data, valid))
        model.train()
        groups = [[t.detach().reshape(-1) for t in tensors] for tensors in (weights, g, v)]
        by_hand.observe(*(groups if by == "tensor" else [[torch.cat(vectors)] for vectors in groups]))
        assert report.train_loss == pytest.approx(train_loss.item(), rel=1e-6)
        assert report.valid_loss == pytest.approx(valid_loss.item(), rel=1e-6)
    names = ["0.weight", "4.weight"] if by == "tensor" else ["all"]
    assert list(report.regularizers) == names
    for name, expected in zip(names, by_hand.fit(), strict=True):
        found = report.regularizers[name]
        points = torch.linspace(-1, 1, 200)
        assert (found.slope(points) - expected.slope(points)).abs().mean() < 1e-5


def test_penalty_is_the_sum_over_the_weights() -> None:
    train_data, valid = batches(40, 0), batches(40, 1)
    for by in ("tensor", "all"):
        model = network()
        tuner = OnlineTuner(model, train_data, valid, by=by, start="now")
        assert tuner.penalty().item() == 0 and not tuner.penalty().requires_grad
        train(model, SGD(model.parameters(), lr=0.3), tuner, train_data, 2)
        names = {"0.weight": model[0].weight, "4.weight": model[4].weight}
        rs = {n: tuner.regularizers[n if by == "tensor" else "all"] for n in names}
        expected = sum(rs[n].value(w).sum() for n, w in names.items())
        penalty = tuner.penalty()
        assert penalty.dtype == torch.float32 and penalty.shape == ()
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-6)
        model.zero_grad()
        penalty.backward()
        for n, w in names.items():
            assert w.grad is not None
            torch.testing.assert_close(w.grad.double(), rs[n].slope(w), rtol=1e-5, atol=1e-7)
        assert model[0].bias.grad is None and model[1].weight.grad is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_add_gradient_is_the_gradient_of_the_penalty(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2))
    model = model.to(memory_format=layout)
    x, y = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    tuner = OnlineTuner(model, (x[:4], y[:4]), (x[4:], y[4:]), start="now", every=1)
    assert tuner.add_gradient().item() == 0 and model[0].weight.grad is None
    tuner.step()
    penalty = tuner.penalty()
    (F.cross_entropy(model(x), y) + penalty).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert torch.equal(tuner.add_gradient(), penalty) and not tuner.add_gradient().requires_grad
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    tuner.add_gradient()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)
    model.zero_grad()
    tuner.add_gradient()
    (slope,) = torch.autograd.grad(tuner.penalty(), [model[0].weight])
    assert model[0].weight.grad is not None and torch.equal(model[0].weight.grad, slope)


# ---- When.


def test_waits_for_the_first_rise_of_the_validation_loss() -> None:
    train_data, valid = batches(60, 0), batches(200, 1, 64)
    models = [linear(), linear()]
    optimizers = [SGD(m.parameters(), lr=0.05) for m in models]
    tuner = OnlineTuner(models[0], train_data, valid, lengthen=1)
    last, on = math.inf, False
    for _ in range(40):
        train(models[1], optimizers[1], None, train_data, 1)
        if not on:
            assert tuner.penalty().item() == 0
        (report,) = train(models[0], optimizers[0], tuner, train_data, 1)
        if not on:  # until then the weights are those of plain training
            assert torch.equal(models[0].weight, models[1].weight)
        on = on or report.valid_loss > last
        last = report.valid_loss
        assert report.on == tuner.on == on == bool(report.regularizers)
    assert on and not torch.equal(models[0].weight, models[1].weight)


def test_stays_off_where_the_validation_loss_never_rises() -> None:
    train_data = batches(60, 0)
    model = linear()
    tuner = OnlineTuner(model, train_data, train_data)
    reports = train(model, SGD(model.parameters(), lr=0.05), tuner, train_data, 20)
    losses = [r.valid_loss for r in reports]
    assert losses == sorted(losses, reverse=True)
    assert not tuner.on and not any(r.on for r in reports)
    assert tuner.penalty().item() == 0


def test_rounds() -> None:
    train_data, valid = batches(60, 0), batches(20, 1)
    model = linear()
    tuner = OnlineTuner(model, train_data, valid, every=4, lengthen=1, start="now")
    reports = train(model, SGD(model.parameters(), lr=0.1), tuner, train_data, 2)
    assert [r.step for r in reports] == [4, 8, 12] and tuner.steps_done == 12


def test_rounds_that_grow_longer() -> None:
    """From the round on in which the regulariser is switched on."""
    train_data, valid = batches(60, 0), batches(60, 1)
    model = linear()
    tuner = OnlineTuner(model, train_data, valid, every=4, lengthen=1.5)
    reports = train(model, Adam(model.parameters(), lr=0.1), tuner, train_data, 30)
    first = [report.on for report in reports].index(True)
    steps = [report.step for report in reports]
    assert steps[: first + 1] == list(range(4, 4 * first + 5, 4))
    rounds = [b - a for a, b in zip(steps[first:], steps[first + 1 :], strict=False)]
    assert rounds[:6] == [6, 9, 14, 20, 30, 46] and tuner.steps_done == 180


def test_a_data_loader_says_how_long_an_epoch_is() -> None:
    loader = DataLoader(TensorDataset(*data(60, 0)), batch_size=7, shuffle=True)
    tuner = OnlineTuner(linear(), loader, data(20, 1))
    assert tuner.every == 9


# ---- What it leaves alone.


class Noisy(nn.Module):
    """Draws random numbers of every kind, in evaluation too, and changes a buffer and an attribute."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(30, 8), nn.BatchNorm1d(8)
        self.head, self.dropout = nn.Linear(8, 2), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls += 1
        noise = torch.randn(()) + random.random() + np.random.random()  # noqa: NPY002
        return self.head(self.dropout(self.norm(self.linear(x)))) + 0.001 * noise


def test_everything_else_stays_as_it_is() -> None:
    shuffled = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(*data(60, 0)), batch_size=10, shuffle=True, generator=shuffled)
    model = Noisy()
    model.norm.eval()  # modules have modes of their own
    tuner = OnlineTuner(model, loader, batches(20, 1), every=1, start="now")
    x, y = data(16, 3)
    (F.cross_entropy(model(x), y) + tuner.penalty()).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    generator = shuffled.get_state()
    with torch.no_grad():  # whatever surrounds it
        report = tuner.step()
    assert report is not None and report.on
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(shuffled.get_state(), generator)
    assert model.training and model.dropout.training and not model.norm.training and model.calls == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert torch.is_grad_enabled()


def test_batch_norm_is_as_without() -> None:
    """A tuner that stays off changes no bit of a run with batch normalisation and dropout."""
    train_data = batches(60, 0)
    ends = []
    for tuned in (False, True):
        model = network()
        tuner = OnlineTuner(model, train_data, train_data) if tuned else None
        torch.manual_seed(3)
        train(model, Adam(model.parameters(), lr=1e-3), tuner, train_data, 4)
        assert tuner is None or not tuner.on
        ends.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def test_two_groups_of_the_optimizer_and_frozen_weights() -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    model = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = SGD(
        [{"params": [model[4].weight], "lr": 0.3}, {"params": [model[4].bias, model[1].weight], "lr": 0.01}],
        momentum=0.9,
    )
    frozen = model[0].weight.detach().clone()
    tuner = OnlineTuner(model, train_data, valid, start="now")
    assert list(tuner.weights) == ["4.weight"]
    train(model, optimizer, tuner, train_data, 3)
    assert torch.equal(model[0].weight, frozen) and model[0].weight.grad is None
    assert list(tuner.regularizers) == ["4.weight"]


def test_weights_that_are_frozen_later() -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    tuner = OnlineTuner(model, train_data, valid, start="now", lengthen=1)
    train(model, optimizer, tuner, train_data, 1)
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    reports = train(model, optimizer, tuner, train_data, 6)
    assert torch.equal(model[0].weight, frozen) and reports[-1].skipped is None
    assert reports[-1].regularizers["0.weight"].slopes.tolist() == [0.0]
    tuner.add_gradient()
    assert model[0].weight.grad is None and model[4].weight.grad is not None


def test_shared_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(30, 30), nn.Linear(30, 30)
            self.b.weight = self.a.weight
            self.head = nn.Linear(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).tanh()).tanh())

    assert list(OnlineTuner(Tied(), batches(20, 0), batches(20, 1)).weights) == ["a.weight", "head.weight"]


def test_named_weights_and_unused_ones() -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, 3)))
    tuner = OnlineTuner(model, train_data, valid, parameters=["0.bias", "unused"], start="now")
    train(model, SGD(model.parameters(), lr=0.1), tuner, train_data, 1)
    assert list(tuner.regularizers) == ["0.bias", "unused"]
    assert tuner.regularizers["unused"].slopes.tolist() == [0.0]


def test_precisions_in_one_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(30, 8).bfloat16(), nn.Linear(8, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.high(self.low(x.bfloat16()).double())

    train_data, valid = batches(30, 0), batches(30, 1)
    for by in ("tensor", "all"):
        model = Mixed()
        tuner = OnlineTuner(model, train_data, valid, start="now", by=by)
        train(model, SGD(model.parameters(), lr=0.01), tuner, train_data, 2)
        tuner.penalty().backward()
        assert tuner.on and model.low.weight.dtype == torch.bfloat16


# ---- State.


@pytest.mark.parametrize("lengthen", [1.0, 1.3])
@pytest.mark.parametrize("at", [1, 16, 19, 20, 30, 50])
def test_goes_on_to_the_same_bits(at: int, lengthen: float) -> None:
    """Interrupted inside a round or between two, before and after the regulariser is on."""
    train_data, valid = batches(60, 0), batches(60, 1)
    options = {"every": 4, "lengthen": lengthen}

    def parts() -> tuple[nn.Module, Optimizer, OnlineTuner]:
        model = linear()
        return model, Adam(model.parameters(), lr=0.1), OnlineTuner(model, train_data, valid, **options)

    def run(model: nn.Module, optimizer: Optimizer, tuner: OnlineTuner, steps: Iterator[int]) -> None:
        for i in steps:
            x, y = train_data[i % len(train_data)]
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + tuner.penalty()).backward()
            optimizer.step()
            tuner.step()

    whole, first, second = parts(), parts(), parts()
    run(*whole, iter(range(60)))
    run(*first, iter(range(at)))
    assert first[2].on == (at >= 20)
    saved = copy.deepcopy([part.state_dict() for part in first])
    run(*first, iter(range(at, at + 9)))  # a state is of its time
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    run(*second, iter(range(at, 60)))
    assert torch.equal(whole[0].weight, second[0].weight)
    assert whole[2].on and second[2].on and second[2].steps_done == 60
    one, other = (t.regularizers["weight"] for t in (whole[2], second[2]))
    assert torch.equal(one.knots, other.knots) and torch.equal(one.slopes, other.slopes)


def test_a_state_is_safe_to_load_from_a_file(tmp_path: Any) -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    model = linear()
    tuner = OnlineTuner(model, train_data, valid, start="now")
    train(model, SGD(model.parameters(), lr=0.1), tuner, train_data, 2)
    torch.save(tuner.state_dict(), tmp_path / "state.pt")
    other = OnlineTuner(model, train_data, valid, start="now")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.penalty(), tuner.penalty())


def test_refuses_the_state_of_another() -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    state = OnlineTuner(linear(), train_data, valid).state_dict()
    for model, options in ((network(), {}), (linear(), {"by": "all"})):
        with pytest.raises(ValueError, match=r"^OnlineTuner: the state must be of the weights"):
            OnlineTuner(model, train_data, valid, **options).load_state_dict(state)
    tuner = OnlineTuner(linear(), train_data, valid, regularizer=ConvexRegularizer(3))
    with pytest.raises(ValueError, match="window 3, got 5"):
        tuner.load_state_dict({**state, "steps_done": 7})
    assert tuner.steps_done == 0
    tuner = OnlineTuner(linear(), train_data, valid)
    older = {name: value for name, value in state.items() if name != "until"}
    with pytest.raises(ValueError, match="must have until, got one without"):
        tuner.load_state_dict({**older, "steps_done": 7})
    assert tuner.steps_done == 0


# ---- What goes wrong.


def test_a_round_that_is_not_finite_is_skipped() -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    model = linear()
    optimizer = SGD(model.parameters(), lr=0.1)
    tuner = OnlineTuner(model, train_data, valid, start="now", every=1)
    train(model, optimizer, tuner, train_data[:1], 1)
    kept = tuner.regularizers["weight"]
    window = tuner.state_dict()["regularizer"]
    good = model.weight.detach().clone()
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            tuner.penalty()
            model.weight[0, 0] = bad
        if bad is math.nan:
            with pytest.warns(UserWarning, match="OnlineTuner: a loss was not finite"):
                report = tuner.step()
        else:
            report = tuner.step()
        assert report is not None and report.skipped is not None and report.on
    assert tuner.skipped == 2 and tuner.regularizers["weight"] is kept
    assert len(tuner.state_dict()["regularizer"]["models"]) == len(window["models"]) == 1
    with torch.no_grad():
        model.weight.copy_(good)
        tuner.penalty()
    report = tuner.step()
    assert report is not None and report.skipped is None and tuner.skipped == 2


def test_gradients_that_are_not_finite_are_not_learned_from() -> None:
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        # Finite, with an infinite slope.
        return (
            F.cross_entropy(prediction, target) + 0 * prediction.sum() + (prediction * 0).abs().sqrt().sum()
        )

    model = linear()
    tuner = OnlineTuner(model, batches(20, 0), batches(20, 1), task_loss=loss, start="now", every=1)
    with pytest.warns(UserWarning, match="a gradient on the training data was not finite"):
        report = tuner.step()
    assert report is not None and not report.on and report.skipped is not None and tuner.steps_done == 1


def test_whatever_raises_nothing_has_changed() -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    model = network()
    fails = False

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        if fails:
            raise KeyboardInterrupt
        return F.cross_entropy(prediction, target)

    tuner = OnlineTuner(model, train_data, valid, task_loss=loss, start="now", every=3)
    train(model, SGD(model.parameters(), lr=0.1), tuner, train_data[:5], 1)
    before = tuner.state_dict()
    fails = True
    tuner.penalty()
    with pytest.raises(KeyboardInterrupt):
        tuner.step()
    assert tuner.steps_done == before["steps_done"] == 5 and model.training
    assert len(tuner.state_dict()["regularizer"]["models"]) == 1

    class Broken(ConvexRegularizer):
        def fit(self) -> list[PiecewiseLinear]:
            raise KeyError("broken")

    fails = False
    tuner.penalty()
    tuner.regularizer.__class__ = Broken
    with pytest.raises(KeyError, match="broken"):
        tuner.step()
    assert tuner.steps_done == 5 and len(tuner.state_dict()["regularizer"]["models"]) == 1


def test_a_round_without_a_solution_keeps_the_regulariser() -> None:
    class Failing(ConvexRegularizer):
        def fit(self) -> list[PiecewiseLinear]:
            raise NotFitted("none")

    train_data, valid = batches(60, 0), batches(60, 1)
    model = linear()
    tuner = OnlineTuner(model, train_data, valid, start="now", every=1)
    train(model, SGD(model.parameters(), lr=0.1), tuner, train_data[:1], 1)
    kept = tuner.regularizers["weight"]
    tuner.regularizer.__class__ = Failing
    tuner.penalty()
    with pytest.warns(
        UserWarning, match=r"^OnlineTuner: no regulariser was found \(none\); the regulariser stays"
    ):
        report = tuner.step()
    assert report is not None and report.skipped == "no regulariser was found (none)" and report.on
    assert tuner.regularizers["weight"] is kept and tuner.steps_done == 2
    assert len(tuner.state_dict()["regularizer"]["models"]) == 2  # the model counts


def test_warns_of_a_loss_without_the_penalty() -> None:
    train_data, valid = batches(20, 0), batches(20, 1)
    model = linear()
    tuner = OnlineTuner(model, train_data, valid, start="now", every=1)
    train(model, SGD(model.parameters(), lr=0.1), tuner, train_data, 2)
    with pytest.warns(UserWarning, match=r"tuner.penalty\(\) added in every step"):
        tuner.step()


class Empty(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_data_that_are_empty() -> None:
    with pytest.raises(ValueError, match=r"^OnlineTuner: train must hold at least one batch"):
        OnlineTuner(linear(), [], batches(20, 1))
    with pytest.raises(ValueError, match=r"^OnlineTuner: valid must hold at least one sample"):
        OnlineTuner(linear(), batches(20, 0), (torch.zeros(0, 30), torch.zeros(0, dtype=torch.int64)))
    tuner = OnlineTuner(linear(), batches(20, 0), DataLoader(Empty()), every=1)
    with pytest.raises(ValueError, match=r"^OnlineTuner: valid must hold at least one batch each time"):
        tuner.step()
    assert tuner.steps_done == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"model": "model"}, TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: {"model": nn.DataParallel(linear())}, TypeError, "must not be wrapped, got DataParallel"),
        (lambda: {"model": nn.BatchNorm1d(3)}, ValueError, "two or more dimensions, got none"),
        (lambda: {"model": linear().requires_grad_(False)}, ValueError, "trainable parameter"),
        (lambda: {"parameters": ["other"]}, ValueError, "must be of the model, got 'other'"),
        (lambda: {"parameters": []}, ValueError, "one or more different tensors, got none"),
        (lambda: {"parameters": ["weight", "weight"]}, ValueError, "one or more different tensors"),
        (lambda: {"parameters": "weight"}, TypeError, "a list of names"),
        (lambda: {"train": iter(batches(20, 0))}, ValueError, "got an iterator"),
        (lambda: {"train": 3}, TypeError, r"train must be a batch \(inputs, target\) or batches, got int"),
        (lambda: {"valid": torch.zeros(3)}, TypeError, "valid must be a batch"),
        (lambda: {"valid": (1, 2, 3)}, TypeError, "valid must be a pair"),
        (lambda: {"train": data(20, 0)}, ValueError, "every must be given"),
        (lambda: {"train": DataLoader(Empty())}, ValueError, "every must be given"),
        (lambda: {"every": 0}, ValueError, "every must be at least 1, got 0"),
        (lambda: {"lengthen": 0.9}, ValueError, "lengthen must be a number of at least 1, got 0.9"),
        (lambda: {"lengthen": math.nan}, ValueError, "lengthen must be a number of at least 1, got nan"),
        (lambda: {"by": "layer"}, ValueError, "by must be one of 'tensor', 'all'"),
        (lambda: {"start": "later"}, ValueError, "start must be one of 'overfit', 'now'"),
        (lambda: {"task_loss": 1.0}, TypeError, "task_loss must be callable"),
        (
            lambda: {"regularizer": "l2"},
            TypeError,
            "regularizer must learn as ConvexRegularizer does, got str",
        ),
    ],
)
def test_refuses(change: Callable[[], dict[str, Any]], error: type[Exception], message: str) -> None:
    arguments = {"model": linear(), "train": batches(20, 0), "valid": batches(20, 1), **change()}
    with pytest.raises(error, match=f"^OnlineTuner: .*{message}"):
        OnlineTuner(**arguments)


def test_refuses_workers_that_do_one_pass_at_a_time() -> None:
    loader = DataLoader(TensorDataset(*data(20, 0)), batch_size=5, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match=r"^OnlineTuner: train must not have persistent workers"):
        OnlineTuner(linear(), loader, batches(20, 1))


def test_refuses_losses_that_are_no_number() -> None:
    def each(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target, reduction="none")

    tuner = OnlineTuner(linear(), batches(20, 0), batches(20, 1), task_loss=each, every=1)
    with pytest.raises(ValueError, match=r"^OnlineTuner: task_loss must reduce to a scalar"):
        tuner.step()


# ---- Other models and data.


def test_several_inputs_and_a_picked_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(30, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"scores": self.linear(x * scale), "x": x}

    x, y = data(20, 0)
    given = [((x, torch.ones(20, 1)), y)], [({"x": x, "scale": torch.ones(20, 1)}, y)]
    tuner = OnlineTuner(Two(), *given, start="now", output="scores")
    report = tuner.step()
    assert report is not None and report.train_loss == report.valid_loss
    assert tuner.regularizers["linear.weight"].slopes.abs().max() < 1e-6


def test_regression_and_recurrence() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(12, 3, 4, generator=generator), torch.randn(12, 1, generator=generator))
        for _ in range(2)
    ]
    tuner = OnlineTuner(Recurrent(), pairs[:1], pairs[1], task_loss=F.mse_loss, start="now")
    report = tuner.step()
    assert report is not None and report.on and len(report.regularizers) == 3


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    train_data, valid = batches(60, 0), batches(60, 1)
    model = network()
    tuner = OnlineTuner(model, train_data, valid, start="now", lengthen=1)
    with pytest.raises(ValueError, match=r"^OnlineTuner: a regulariser must be on to be drawn"):
        tuner.plot()
    reports = train(model, SGD(model.parameters(), lr=0.1), tuner, train_data, 3)
    axes = tuner.plot().axes
    assert [a.get_title() for a in axes] == ["0.weight", "0.weight", "4.weight", "4.weight"]
    x, y = (torch.as_tensor(v) for v in axes[2].lines[0].get_data())
    torch.testing.assert_close(y, tuner.regularizers["4.weight"].value(x))
    assert float(x.min()) == pytest.approx(model[4].weight.min().item())
    axes = tuner.plot(reports).axes
    assert len(axes) == 5 and len(axes[0].lines) == 3  # with a bar that says which step is which


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def test_defaults_of_torch_do_not_matter(request: pytest.FixtureRequest) -> None:
    train_data, valid = batches(60, 0), batches(60, 1)
    found = []
    for _ in range(2):
        model = linear()
        if found:
            request.getfixturevalue("elsewhere")
        tuner = OnlineTuner(model, train_data, valid, start="now")
        train(model, SGD(model.parameters(), lr=0.1), tuner, train_data, 2)
        found.append((model.weight.detach().clone(), tuner.penalty().detach()))
        if len(found) == 1:
            first = tuner.state_dict()
    tuner.load_state_dict(first)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))
