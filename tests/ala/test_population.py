"""The population's windows against a plain loop, and everything that can go wrong in one."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam
from toy_problem import CLASSES, Counted, data, margin

from lossmeta.ala import LearningRate, LogitAdjustment, LossSpace, Population, Robust
from lossmeta.metrics import ErrorRate, Metric, WorstClassRecall


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def made(space: LossSpace | None = None, metric: Any = None, valid: Any = None, **options: Any) -> Population:
    model = network()
    options = {"learning_rate": False, **options}
    return Population(
        model,
        SGD(model.parameters(), 0.1, momentum=0.9),
        space or Robust(),
        metric or ErrorRate(),
        data(40, 1) if valid is None else valid,
        **options,
    )


def batches(count: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [data(16, seed + i) for i in range(count)]


def same(state: dict[str, Tensor], model: nn.Module) -> int:
    """How many of the tensors are."""
    return sum(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_a_window_in_loops() -> None:
    """Values, weights and momenta after two windows are those of models trained one by one."""
    population = made(
        metric=margin, children=4, window=4, spread=0.8, spread_decay=0.5, least_spread=0.5, seed=3
    )
    model, momenta = network(), [torch.zeros_like(p) for p in network().parameters()]
    generator = torch.Generator().manual_seed(3)
    mean, spread = torch.zeros(1, dtype=torch.float64), 0.8
    valid, all_batches = data(40, 1), batches(8)
    noise = 0.3 * torch.randn(4, 40, CLASSES, generator=torch.Generator().manual_seed(0))
    for window in range(2):
        draws = torch.randn(2, 1, generator=generator, dtype=torch.float64)
        tried = (mean + spread * torch.cat([draws, -draws])).clamp(0, 1 / 0.3)
        ends, fitness = [], []
        for u in tried:
            child, states = copy.deepcopy(model), [m.clone() for m in momenta]
            q, found = float(u * 0.3), []
            for step, (x, y) in enumerate(all_batches[4 * window : 4 * window + 4]):
                p = torch.softmax(child(x), 1).gather(1, y[:, None])
                loss = ((1 - p**q) / q).mean() if q else F.cross_entropy(child(x), y)
                gradients = torch.autograd.grad(loss, list(child.parameters()))
                with torch.no_grad():
                    for w, m, g in zip(child.parameters(), states, gradients, strict=True):
                        m.mul_(0.9).add_(g)
                        w -= 0.1 * m
                    if step >= 2:
                        z = child(valid[0])
                        found += [margin(z + n, valid[1]) for n in (0 * noise[0], *noise)]
            ends.append((child, states))
            fitness.append(float(torch.stack(found).mean()))
        f = torch.tensor(fitness, dtype=torch.float64)
        weight = (2 * (f - f.mean()) / f.std(correction=0)).softmax(0)
        mean = (mean + weight @ (tried - mean)).clamp(0, 1 / 0.3)
        spread = max(0.5, 0.5 * spread)
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                p.copy_(
                    sum(float(w) * list(c.parameters())[k] for w, (c, _) in zip(weight, ends, strict=True))
                )
                momenta[k] = sum(float(w) * s[k] for w, (_, s) in zip(weight, ends, strict=True))
        for batch in all_batches[4 * window : 4 * window + 4]:
            report = population.step(batch)
        assert report.fitness is not None
        torch.testing.assert_close(report.fitness, f, rtol=1e-4, atol=1e-5)
        assert population.values["q"].item() == pytest.approx(0.3 * float(mean), rel=1e-3, abs=1e-5)
        assert population.spread == spread and population.windows == window + 1
        for p, other, m in zip(population.model.parameters(), model.parameters(), momenta, strict=True):
            torch.testing.assert_close(p, other, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                population.optimizer.state[p]["momentum_buffer"], m, rtol=1e-3, atol=1e-5
            )


def test_the_learning_rate_adapts_too() -> None:
    """By default, and as the space that says so."""
    population, other = made(learning_rate=True, metric=margin), made(Robust() * LearningRate(), margin)
    run(population, 40)
    run(other, 40)
    assert list(population.values) == ["q", "learning_rate"] and population.values["learning_rate"] != 0
    assert all(torch.equal(population.values[k], other.values[k]) for k in population.values)
    assert same(other.model.state_dict(), population.model) == 4
    assert made(LogitAdjustment(torch.ones(3)), children=1, learning_rate=True).values.keys() == {
        "tau",
        "margin",
    }


def test_the_end_is_trained_alone_at_the_mean_of_the_last_third() -> None:
    population = made(metric=margin, steps=100, window=10, tail=0.1, fallback=False)
    traced = []
    for i, batch in enumerate(batches(100)):
        before = copy.deepcopy(population.model.state_dict())
        population.step(batch)
        if i < 90:
            assert not population.settled
            if (i + 1) % 10 == 0:
                traced.append(population.values["q"])
        else:
            assert population.settled and population.children is None
            assert population.values["q"].item() == pytest.approx(float(torch.stack(traced[-3:]).mean()))
            assert same(before, population.model) == 0
    assert population.windows == 9 and population.steps_done == 100


def test_a_window_that_would_not_be_finished_is_not_begun() -> None:
    population = made(metric=margin, steps=25, window=10, tail=0.0)
    for batch in batches(25):
        population.step(batch)
    assert population.windows == 2 and population.settled
    # And nothing is lost of one that is broken off.
    population = made(metric=margin, window=10)
    for batch in batches(5):
        population.step(batch)
    start = copy.deepcopy(population.model.state_dict())
    population.settle()
    assert same(start, population.model) == 0
    population.settle()
    population.step(batches(1)[0])


def test_a_window_that_is_broken_off_leaves_out_who_diverged() -> None:
    for lost in (1, 8):
        population = made(metric=margin, window=10, fallback=False)
        run(population, 3)
        assert population.children is not None
        start = copy.deepcopy(population.model.state_dict())
        with torch.no_grad():
            population.children.weights["0.bias"][:lost] = torch.nan
        population.settle()
        assert all(p.isfinite().all() for p in population.model.parameters())
        assert same(start, population.model) == (4 if lost == 8 else 0)


def digits() -> tuple[tuple[Tensor, Tensor], ...]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, valid, test = order[:900], order[900:1100], order[1100:]
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(900, generator=generator) < 0.4
    noisy = torch.where(wrong, torch.randint(10, (900,), generator=generator), y[train])
    return (x[train], noisy), (x[valid], y[valid]), (x[test], y[test])


def trained(space: LossSpace | None, steps: int = 400, **options: Any) -> float:
    train, valid, test = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    population = space and Population(model, optimizer, space, ErrorRate(), valid, steps=steps, **options)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        rows = torch.randint(900, (64,), generator=generator)
        if population:
            population.step((train[0][rows], train[1][rows]))
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return float(ErrorRate().each(model(test[0])[None], test[1]))


def test_wrong_labels_do_less_harm() -> None:
    """Digits, 40 % of the labels redrawn: found without being told."""
    plain, adapted = trained(None), trained(Robust())
    assert adapted < plain - 0.05, (plain, adapted)


# ---- Metrics.


class Steady(Metric):
    higher_is_better = True

    def __init__(self, value: float) -> None:
        self.value = value

    def each(self, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.full((len(scores),), self.value, dtype=torch.float64)


def run(population: Population, steps: int) -> list[Any]:
    return [population.step(batch) for batch in batches(steps)]


def test_where_all_tie_the_values_stay() -> None:
    population = made(metric=Steady(0.5), window=4)
    start = copy.deepcopy(population.model.state_dict())
    with pytest.warns(UserWarning, match="all children had the same fitness; the values stay") as said:
        run(population, 12)
    assert len(said) == 1 and population.ties == 3 and population.spread == 1.5
    assert population.values["q"] == 0
    # The children's mean goes on.
    assert not torch.equal(start["0.weight"], population.model.state_dict()["0.weight"])


def test_a_window_without_any_finite_fitness_is_undone() -> None:
    population = made(metric=Steady(float("nan")), window=4)
    start = copy.deepcopy(population.model.state_dict())
    with pytest.warns(UserWarning, match="no child had a finite fitness; the window was undone") as said:
        run(population, 8)
    assert len(said) == 1 and population.skipped == 2 and population.values["q"] == 0
    assert same(start, population.model) == len(start)
    population.fitness.each = ErrorRate().each
    run(population, 4)
    assert population.skipped == 2 and population.windows == 3


def test_a_child_that_diverges_is_left_out() -> None:
    space = Robust() * LearningRate()
    population = made(space, margin, window=4, children=4)
    population.coordinates.high[1] = population.coordinates.scale[1] * 1e9
    assert population.children is not None
    population.tried[1, 1] = 1e4
    population._on_device = {}
    (*_, report) = run(population, 4)
    assert report.fitness.isfinite().tolist() == [True, False, True, True]
    assert all(p.isfinite().all() for p in population.model.parameters())
    run(population, 1)
    assert all(w.isfinite().all() for w in population.children.weights.values())


@pytest.mark.parametrize("kind", ["metric", "function", "number", "loader", "batches", "list"])
def test_kinds_of_metrics_and_of_validation_data(kind: str) -> None:
    """All say the same, so that all end in the same bits."""
    x, y = data(40, 1)

    def accuracy(prediction: Tensor, target: Tensor) -> Any:
        value = (prediction.argmax(1) == target).double().mean()
        return float(value) if kind == "number" else value

    metric: Any = accuracy if kind in ("function", "number") else ErrorRate()
    parts = list(zip(x.split(15), y.split(15), strict=True))
    valid: Any = parts if kind == "batches" else (x, y)
    if kind == "loader":
        valid = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 15)
    if kind == "list":
        valid = [x, y]
    population, reference = made(metric=metric, valid=valid, window=5), made(window=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(population, 20)
        run(reference, 20)
    assert population.values["q"].item() == pytest.approx(reference.values["q"].item(), abs=1e-9)


def test_a_metric_that_is_no_number_is_an_error_and_changes_nothing() -> None:
    population = made(metric=lambda prediction, target: prediction.argmax(1), window=3)
    start = copy.deepcopy(population.model.state_dict())
    with pytest.raises(ValueError, match=r"metric must give one number, got \[40\]"):
        run(population, 3)
    assert same(start, population.model) == len(start)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_whatever_raises_the_window_starts_again(at: int) -> None:
    """The model is as at its start, and what follows as if nothing had been."""
    population, reference = (made(metric=margin, window=5) for _ in range(2))
    run(population, 5)
    run(reference, 5)
    start = copy.deepcopy(population.model.state_dict())
    run(population, at - 1)
    good = population.fitness.each
    if at == 5:
        population.fitness.each = lambda scores, target: 1 / 0  # type: ignore[assignment, return-value]
        with pytest.raises(ZeroDivisionError):
            run(population, 1)
        population.fitness.each = good
    else:
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7"):
            population.step((data(16)[0], torch.full((16,), 7)))
    assert same(start, population.model) == len(start)
    run(population, 5)
    run(reference, 5)
    assert population.windows == reference.windows == 2
    assert torch.equal(population.values["q"], reference.values["q"])
    assert same(reference.model.state_dict(), population.model) == len(start)


def test_weights_that_somebody_else_has_changed() -> None:
    """Between windows the children set out from them; inside of one they would be lost."""
    population = made(metric=margin, window=4)
    run(population, 4)
    with torch.no_grad():
        population.model[0].weight.zero_()  # type: ignore[index, union-attr, operator]
    population.step(batches(1)[0])
    assert population.children is not None
    assert population.children.weights["0.weight"][:8].abs().max() < 0.1
    with torch.no_grad():
        population.model[0].weight.fill_(3.0)  # type: ignore[index, union-attr, operator]
    with pytest.raises(ValueError, match="must stay as they are inside a window"):
        run(population, 3)
    assert (population.model[0].weight == 3).all()  # type: ignore[index, union-attr]
    run(population, 4)
    assert population.windows == 2


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    population = made(metric=margin, window=4)
    run(population, 1)
    population.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="must stay those of the start"):
        run(population, 1)


def test_validation_data_of_few_samples_or_classes() -> None:
    for valid in ((torch.randn(1, 4), torch.tensor([1])), (torch.randn(6, 4), torch.full((6,), 2))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            population = made(metric=WorstClassRecall(CLASSES), valid=valid, window=3)
            run(population, 9)
        assert population.windows == 3 and population.skipped == 0


# ---- One child.


def test_one_child_moves_the_margins_by_the_metric() -> None:
    space = LogitAdjustment(torch.tensor([30, 10, 3]))
    population = made(space, margin, children=1, window=4)
    plain = network()
    optimizer = SGD(plain.parameters(), 0.1, momentum=0.9)
    for x, y in batches(4):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    run(population, 4)
    for p, q in zip(population.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    x, y = data(40, 1)
    noise = 0.3 * torch.randn(4, 40, CLASSES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = plain(x)
        gains = []
        for c in range(CLASSES):
            shift = torch.zeros(CLASSES)
            shift[c] = 0.3
            copies = [z + n for n in (0 * noise[0], *noise)]
            gains.append(sum(float(margin(s + shift, y) - margin(s - shift, y)) for s in copies))
    slope = torch.tensor(gains, dtype=torch.float64)
    slope -= slope.mean()
    torch.testing.assert_close(
        population.values["margin"], -0.5 * slope / slope.abs().max(), rtol=1e-3, atol=1e-4
    )
    assert population.values["tau"] == 0
    with pytest.raises(ValueError, match="children must be 2 or more for a space without margins"):
        made(children=1)


# ---- What a user does in between.


def test_the_values_can_be_moved() -> None:
    population = made(metric=margin, window=4)
    population.move_to(q=0.6)
    assert population.values["q"].item() == pytest.approx(0.6)
    run(population, 2)
    population.move_to(q=0.9)  # this window goes on as it is
    assert population.values["q"].item() == pytest.approx(0.6)
    run(population, 2)
    assert population.values["q"].item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"q must lie in \[0.0, 1.0\], got 2"):
        population.move_to(q=2)
    assert population.values["q"].item() == pytest.approx(0.9)


@pytest.mark.parametrize("killed_at", [3, 10, 17, 27])
@pytest.mark.parametrize("children", [1, 4])
def test_a_killed_run_resumes_to_the_same_bits(killed_at: int, children: int) -> None:
    def start() -> tuple[nn.Module, Adam, Population]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
        )
        optimizer = Adam(model.parameters(), 0.02)
        space = LogitAdjustment(torch.tensor([30, 10, 3])) * Robust()
        return model, optimizer, Population(
            model, optimizer, space, margin, data(40, 1), steps=30, window=5, tail=0.2, children=children
        )  # fmt: skip

    model, optimizer, population = start()
    torch.manual_seed(7)
    file = io.BytesIO()
    for i, batch in enumerate(batches(30)):
        if i == killed_at:
            parts = (model.state_dict(), optimizer.state_dict(), population.state_dict())
            torch.save((*parts, torch.get_rng_state()), file)
        if i == 12:
            population.move_to(q=0.4)
        population.step(batch)

    other_model, other_optimizer, resumed = start()
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other_model.load_state_dict(states[0])
    other_optimizer.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    torch.set_rng_state(states[3])
    for i, batch in enumerate(batches(30)):
        if i >= killed_at:
            if i == 12:
                resumed.move_to(q=0.4)
            resumed.step(batch)
    for a, b in zip(model.state_dict().values(), other_model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(population.values[k], resumed.values[k]) for k in population.values)
    with pytest.raises(ValueError, match="the state must be of"):
        made(LogitAdjustment(torch.ones(3))).load_state_dict(states[2])


def test_a_scheduler_of_the_users_optimizer_is_followed() -> None:
    population = made(metric=margin, window=4)
    schedule = torch.optim.lr_scheduler.StepLR(population.optimizer, 1, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(population, 1)
        schedule.step()
    assert population.children is not None
    before = {k: w.detach().clone() for k, w in population.children.weights.items()}
    run(population, 2)
    assert all(torch.equal(w, before[k]) for k, w in population.children.weights.items())


def test_the_children_draw_what_one_model_would() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    population = Population(
        model, SGD(model.parameters(), 0.0), Robust(), margin, data(9, 1), window=4, learning_rate=False
    )
    torch.manual_seed(3)
    losses = [population.step(batch).loss for batch in batches(2)]
    torch.manual_seed(3)
    for (x, y), loss in zip(batches(2), losses, strict=True):
        q = population.coordinates.values(population.tried)["q"]
        p = torch.softmax(model(x), 1).gather(1, y[:, None])[:, 0].double()
        expected = torch.stack(
            [((1 - p ** float(v)) / float(v)).mean() if v else -p.log().mean() for v in q]
        ).mean()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)


# ---- Refused.


def test_several_processes_are_told_that_they_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="each of the 2 processes trains a model and values of its own"):
        made()


def endless_nothing() -> Iterator[Any]:
    return iter(())


def test_refuses() -> None:
    for options, message in (
        ({"children": 3}, "children must be even, or 1, got 3"),
        ({"children": 0}, "children must be even, or 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"spread": 0.0}, "spread must be positive"),
        ({"spread_decay": 1.1}, r"spread_decay must lie in \[0, 1\]"),
        ({"tail": 2.0}, r"tail must lie in \[0, 1\]"),
        ({"steps": 10}, "steps must be at least the 20 of a window, got 10"),
        ({"space": LossSpace()}, "space must have at least one parameter"),
        (
            {"valid": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))},
            "valid must hold at least one sample",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)  # type: ignore[arg-type]
    for options, message in (
        ({"space": nn.CrossEntropyLoss()}, "space must be a LossSpace, got CrossEntropyLoss"),
        ({"metric": 3}, "metric must be a metric or a function, got int"),
        ({"valid": torch.zeros(3)}, "valid must be a pair"),
    ):
        with pytest.raises(TypeError, match=message):
            made(**options)  # type: ignore[arg-type]
    population = made(valid=endless_nothing(), window=2)
    with pytest.raises(ValueError, match="valid must hold at least one batch"):
        run(population, 2)
    model = network()
    for wrong, message in (
        (3, "model must be a torch.nn.Module"),
        (nn.DataParallel(model), "must not be wrapped"),
    ):
        with pytest.raises(TypeError, match=message):
            Population(wrong, SGD(model.parameters(), 0.1), Robust(), ErrorRate(), data(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got int"):
        Population(model, 3, Robust(), ErrorRate(), data(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a pair \(inputs, target\)"):
        made().step(torch.zeros(3))  # type: ignore[arg-type]


def test_a_metric_of_another_library() -> None:
    with pytest.raises(
        ValueError, match="higher_is_better must be given, Counted does not say its direction"
    ):
        made(metric=Counted())
    metric = Counted()
    population, reference = made(metric=metric, window=5, higher_is_better=False), made(window=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(population, 10)
        run(reference, 10)
    assert population.values["q"].item() == pytest.approx(reference.values["q"].item(), abs=1e-9)
    assert metric.all == 0
