"""The copy under the plain loss: what it is, when the model becomes it, and when not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lossmeta.ala import LogitAdjustment, Population, Robust
from lossmeta.ala._fitness import Fitness
from lossmeta.metrics import ErrorRate, WorstClassRecall

STEPS = 30


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


def made(kind: type[Optimizer] = SGD, **options: Any) -> Population:
    model = network()
    given: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if kind is SGD else {"lr": 0.01}
    options = {"window": 6, "steps": STEPS, "tail": 0.2, "children": 4, **options}
    optimizer = kind(model.parameters(), **given)
    return Population(model, optimizer, Robust(), margin, data(40, 1), **options)


def run(population: Population, start: int = 0, end: int = STEPS) -> Population:
    for i in range(start, end):
        population.step(data(16, 5 + i))
    return population


def decide(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    monkeypatch.setattr(Fitness, "ahead", lambda self, predictions, target: ahead)


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)  # type: ignore[misc]


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_the_copy_is_plain_training(kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, ahead=False)
    population = run(made(kind))
    model = network()
    optimizer = kind(model.parameters(), **population.optimizer.defaults)
    for i in range(STEPS):
        x, y = data(16, 5 + i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert population.fell_back and population.windows > 1
    assert_same(population.model, model, rtol=1e-4, atol=1e-5)
    for p, q in zip(population.model.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[q].items():
            torch.testing.assert_close(population.optimizer.state[p][key], value, rtol=1e-4, atol=1e-6)
    assert population.values == {"q": 0, "learning_rate": 0}
    schedule = population.schedule()
    assert schedule.steps == [0] and schedule.values["q"] == 0


def test_the_population_is_not_touched_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, ahead=True)
    without, beside = run(made(fallback=False)), run(made())
    assert beside.fell_back is False and without.fell_back is None
    assert_same(without.model, beside.model, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without.mean, beside.mean)


@pytest.mark.filterwarnings("ignore:Population. no child had a finite fitness")
@pytest.mark.parametrize(
    ("kind", "undone", "stop"),
    [(SGD, 0, None), (SGD, 0, 4), (SGD, 1, None), (SGD, 1, 9), (Adam, 0, None), (Adam, 0, 4)],
)
def test_the_copy_where_a_window_is_undone(
    undone: int, stop: int | None, kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew with the first one, optimizer and all, also after a stop; a later one it keeps.

    Adam's count of steps is all the children's, and loses the later one.
    """
    decide(monkeypatch, ahead=False)
    of, nan, measured = Fitness.of, torch.full((5,), torch.nan, dtype=torch.float64), [0]

    def fails(self: Fitness, predict: Any) -> Tensor:
        measured[0] += 1
        return nan if 2 * undone < measured[0] <= 2 * undone + 2 else of(self, predict)

    monkeypatch.setattr(Fitness, "of", fails)
    population = run(made(kind), 0, stop or STEPS)
    if stop:
        second = made(kind)
        second.model.load_state_dict(population.model.state_dict())
        second.optimizer.load_state_dict(copy.deepcopy(population.optimizer.state_dict()))
        second.load_state_dict(copy.deepcopy(population.state_dict()))
        population = run(second, stop)
    model = network()
    optimizer = kind(model.parameters(), **population.optimizer.defaults)
    for i in range(6 if not undone else 0, STEPS):
        x, y = data(16, 5 + i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert population.skipped == 1 and population.fell_back
    assert_same(population.model, model, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("between", [True, False])
def test_a_model_changed_between_windows(
    between: bool, kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy sets out from it; from a model that nobody touched it does not."""
    decide(monkeypatch, ahead=False)
    population, model = made(kind), network()
    optimizer = kind(model.parameters(), **population.optimizer.defaults)
    changed = False
    for i in range(STEPS):
        x, y = data(16, 5 + i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        report = population.step((x, y))
        if between and report.fitness is not None and not changed:
            changed = True
            with torch.no_grad():
                for p, q in zip(population.model.parameters(), model.parameters(), strict=True):
                    q.copy_(p.mul_(0.5))
                for b, c in zip(population.model.buffers(), model.buffers(), strict=True):
                    c.copy_(b)
            optimizer.load_state_dict(copy.deepcopy(population.optimizer.state_dict()))
    assert changed is between and population.fell_back
    assert_same(population.model, model, rtol=1e-4, atol=1e-5)


def test_where_steps_are_not_given_settle_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    decide(monkeypatch, ahead=False)
    population = run(made(steps=None), 0, 20)
    assert population.fell_back is None
    population.settle()
    assert population.fell_back is True
    population.step(data(16))  # goes on alone, under the plain loss
    assert population.values["q"] == 0


@pytest.mark.parametrize("stop", [3, 14, 27])
@pytest.mark.parametrize("ahead", [False, True])
def test_to_the_same_bits(stop: int, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first window, in a later one and in the tail."""
    decide(monkeypatch, ahead)
    whole = run(made())
    first = run(made(), 0, stop)
    second = made()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, stop)
    assert second.fell_back is not ahead
    assert_same(whole.model, second.model, rtol=0, atol=0)


def test_a_state_without_the_copy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fallback=True .* got 4, False"):
        made().load_state_dict(run(made(fallback=False), 0, 8).state_dict())


def test_models_that_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(self.layer.bias.detach().sum()) > -9 else -self.layer(x)

    decide(monkeypatch, ahead=False)
    torch.manual_seed(0)
    model, plain = Awkward(), Awkward()
    plain.load_state_dict(model.state_dict())
    population = Population(
        model, SGD(model.parameters(), 0.1), Robust(), margin, data(40, 1), window=5, steps=20, children=2
    )
    optimizer = SGD(plain.parameters(), 0.1)
    for i in range(20):
        x, y = data(16, i)
        population.step((x, y))
        assert population.settled or population.in_turn is not None
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert population.fell_back
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


# ---- Who is ahead.


def fitness(metric: Any = None) -> Fitness:
    return Fitness("X", metric or ErrorRate(), data(4), None, 0.3)


def scores(right: Tensor, labels: Tensor) -> Tensor:
    """Certain, of the label or of another class."""
    return 30.0 * F.one_hot(torch.where(right, labels, (labels + 1) % 3), 3).float()


def test_ahead_by_more_than_a_standard_error() -> None:
    labels = torch.arange(300) % 3
    theirs = scores(torch.arange(300) >= 60, labels)
    for gained, expected in ((0, False), (1, False), (30, True), (-30, False)):
        # Some are gained and others lost; the standard error of the difference is about sqrt(20 + gained) samples.
        right = torch.arange(300) >= 60
        right[:10] = True
        right[60:70] = False
        if gained > 0:
            right[10 : 10 + gained] = True
        else:
            right[70 : 70 - gained] = False
        assert fitness().ahead(torch.stack([scores(right, labels), theirs]), labels) is expected


def test_the_error_is_that_of_the_difference() -> None:
    """Against its formula for a difference of error rates, the standard deviation over samples by sqrt(N)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    first, second = (torch.rand(600, generator=generator) < p for p in (0.8, 0.7))
    found = fitness()._error(torch.stack([scores(first, labels), scores(second, labels)]), labels)
    assert found == pytest.approx(float((first.float() - second.float()).std()) / 600**0.5, rel=0.35)


def test_what_is_not_finite_is_not_ahead() -> None:
    labels = torch.arange(30) % 3
    good = scores(torch.ones(30, dtype=torch.bool), labels)
    bad = torch.full_like(good, torch.nan)
    assert fitness().ahead(torch.stack([good, bad]), labels)
    assert not fitness().ahead(torch.stack([bad, good]), labels)
    assert not fitness().ahead(torch.stack([bad, bad]), labels)


def test_a_metric_that_halves_do_not_suit() -> None:
    def strict(prediction: Tensor, target: Tensor) -> Tensor:
        if len(target) < 20:
            raise ValueError("too few")
        return (prediction.argmax(1) == target).float().mean()

    labels = torch.arange(30) % 3
    better, worse = (scores(torch.arange(30) >= n, labels) for n in (2, 9))
    assert fitness(strict).ahead(torch.stack([better, worse]), labels)
    assert not fitness(strict).ahead(torch.stack([worse, better]), labels)
    assert not fitness(strict).ahead(torch.stack([better, better]), labels)


# ---- On data.


def trained(noise: float, seed: int, metric: Any = None) -> Population:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    wrong = torch.rand(len(y), generator=generator) < noise
    labels = torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    valid = x[order[900:1100]], y[order[900:1100]]
    population = Population(model, optimizer, Robust(), metric or ErrorRate(), valid, steps=300)
    for _ in range(300):
        rows = order[:900][torch.randint(900, (64,), generator=generator)]
        population.step((x[rows], labels[rows]))
    return population


def test_wrong_labels_are_worth_the_search() -> None:
    assert [trained(0.5, seed).fell_back for seed in range(3)] == [False] * 3


@pytest.mark.filterwarnings("ignore:.*all children had the same fitness")
def test_a_metric_that_sees_nothing_leaves_the_plain_loss() -> None:
    assert trained(0.0, 0, lambda p, t: 1.0).fell_back


def test_one_child_has_no_copy() -> None:
    model = network()
    population = Population(
        model,
        SGD(model.parameters(), 0.1),
        LogitAdjustment(torch.tensor([5, 3, 1])),
        WorstClassRecall(3),
        data(40, 1),
        children=1,
        window=5,
        steps=20,
    )
    run(population, 0, 20)
    assert population.fell_back is None and population.plain is None
