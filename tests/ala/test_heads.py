"""Children that differ in a head over a shared trunk, against loops and whole children."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lossmeta.ala import LearningRate, LogitAdjustment, LossSpace, Parameter, Population, Robust
from lossmeta.ala._children import Children
from lossmeta.ala._ranks import Ranks
from lossmeta.metrics import ErrorRate

CLASSES = 3
SPACE = LogitAdjustment(torch.tensor([30, 10, 3])) * Robust()


def data(n: int, seed: int = 0, dtype: Any = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x.to(dtype), (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


class Network(nn.Module):
    """Its head is not the last that happens."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(4, 8, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 6),
            nn.Tanh(),
        )
        self.fc = nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)
        )
        self.temperature = nn.Parameter(torch.ones(CLASSES))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x)) * self.temperature


def network(dropout: float = 0.3) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network(dropout)


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth, so that nothing ties."""
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


def made(model: nn.Module, optimizer: Optimizer | None = None, **options: Any) -> Population:
    options = {
        "children": 4,
        "window": 4,
        "learning_rate": False,
        "fallback": False,  # with a head there is none
        "metric": margin,
        "space": SPACE,
        **options,
    }
    optimizer = optimizer or SGD(model.parameters(), 0.1, momentum=0.9)
    return Population(model, optimizer, options.pop("space"), options.pop("metric"), data(40, 1), **options)


def run(population: Population, steps: range) -> list[Any]:
    return [population.step(data(16, 5 + i)) for i in steps]


def drawn(children: int, space: LossSpace = SPACE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        p.name: (
            torch.rand(children, *([] if p.size is None else [p.size]), generator=generator) * 0.9
        ).double()
        for p in space.parameters
    }


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: Adam(p, 0.02, amsgrad=True),
    "adamw": lambda p: AdamW(p, 0.02),
    "rmsprop": lambda p: RMSprop(p, 0.01, momentum=0.5, centered=True),
}


# ---- A step.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_loops_of_float64(name: str) -> None:
    """The trunk moves by the mean of the children's gradients, and each head by its own."""
    model = network().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    children = Children(model, optimizer, SPACE, None, Ranks(None, 3), model.fc)
    values = drawn(3)
    reference = copy.deepcopy(model)
    heads = [copy.deepcopy(model.fc) for _ in range(3)]
    rest = [p for n, p in reference.named_parameters() if not n.startswith("fc.")]
    # One optimizer of the trunk and one of each head: all are elementwise.
    steppers = [OPTIMIZERS[name](rest), *(OPTIMIZERS[name](h.parameters()) for h in heads)]
    for step in range(4):
        x, y = data(16, 20 + step, torch.float64)
        torch.manual_seed(step)
        losses = children.train(x, y, values)
        assert children.in_turn is None
        torch.manual_seed(step)
        features = reference.trunk(x)
        found = []
        for i, head in enumerate(heads):
            prediction = head(features) * reference.temperature
            found.append(SPACE(prediction, y, {k: v[i] for k, v in values.items()}))
        own = [
            torch.autograd.grad(f, list(h.parameters()), retain_graph=True)
            for f, h in zip(found, heads, strict=True)
        ]
        mean = torch.autograd.grad(torch.stack(found).mean(), rest, allow_unused=True)
        for parameters, gradients in (
            (rest, mean),
            *((list(h.parameters()), g) for h, g in zip(heads, own, strict=True)),
        ):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
        for stepper in steppers:
            stepper.step()
        torch.testing.assert_close(losses, torch.stack(found).detach(), rtol=1e-9, atol=1e-12)
        for key, p in reference.named_parameters():
            if not key.startswith("fc."):
                torch.testing.assert_close(children.weights[key], p, rtol=1e-9, atol=1e-12)
        for key, b in reference.trunk.named_buffers():
            torch.testing.assert_close(children.buffers[f"trunk.{key}"], b, rtol=1e-9, atol=1e-12)
        for i, head in enumerate(heads):
            for key, t in head.state_dict().items():
                kept = children.buffers if f"fc.{key}" in children.buffers else children.weights
                torch.testing.assert_close(kept[f"fc.{key}"][i], t, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        reference.eval()
        x = data(9, 3, torch.float64)[0]
        expected = torch.stack([h.eval()(reference.trunk(x)) * reference.temperature for h in heads])
    torch.testing.assert_close(children.predict(x), expected, rtol=1e-9, atol=1e-12)
    # Nothing of this is in the model yet.
    assert int(model.trunk[1].num_batches_tracked) == 0
    assert torch.equal(model.fc[0].weight, network().double().fc[0].weight)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_at_the_end_of_a_window(name: str) -> None:
    """Heads become their mean, the trunk what it is, and so do the states of the optimizer."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    children = Children(model, optimizer, SPACE, None, Ranks(None, 4), model.fc)
    values = {k: v.float() for k, v in drawn(4).items()}
    for i in range(3):
        children.train(*data(16, i), values)
    weight = torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64)
    with torch.no_grad():
        for key, w in children.weights.items():
            if key.startswith("fc."):
                w[3] = torch.nan
    assert children.finite().tolist() == [True, True, True, False]

    def mean(key: str, t: Tensor) -> Tensor:
        return (
            torch.einsum("b,b...->...", weight[:3], t[:3].double()) if key.startswith("fc.") else t.double()
        )

    expected = {key: mean(key, w.detach()) for key, w in children.weights.items()}
    moments = {
        key: {
            part: mean(key, v)
            for part, v in children.stacked.state[w].items()
            if isinstance(v, Tensor) and v.shape == w.shape
        }
        for key, w in children.weights.items()
        if w in children.stacked.state
    }
    assert len(moments) == len(expected) - 2  # all but those that the model does not use
    children.merge(weight)
    children.spread()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[key], rtol=1e-5, atol=1e-6)
        assert torch.equal(children.weights[key], p.expand_as(children.weights[key]))
        for part, v in moments.get(key, {}).items():
            assert optimizer.state[p][part].shape == p.shape
            torch.testing.assert_close(optimizer.state[p][part].double(), v, rtol=1e-5, atol=1e-6)
    assert int(model.trunk[1].num_batches_tracked) == int(model.fc[1].num_batches_tracked) == 3
    # Two models, of which one is the user's, and the other heads.
    size = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.fc.parameters())
    assert sum(w.numel() for w in children.weights.values()) == size + 3 * head


def test_the_trunk_runs_once() -> None:
    model = network()
    population = made(model, head="fc")
    seen = []
    model.trunk.register_forward_hook(
        lambda module, args, output: seen.append(torch._C._functorch.is_batchedtensor(output))
    )
    model.fc.register_forward_hook(
        lambda module, args, output: seen.append(torch._C._functorch.is_batchedtensor(output))
    )
    run(population, range(1))
    seen.clear()
    run(population, range(1, 2))
    assert seen == [False, True]


# ---- Against whole children.


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_over_a_frozen_trunk_it_is_the_ordinary_population(name: str) -> None:
    found = []
    for head in (None, "fc"):
        model = network()
        for key, p in model.named_parameters():
            p.requires_grad_(key.startswith("fc."))
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        population = made(model, optimizer, head=head)
        torch.manual_seed(3)
        found.append((population, run(population, range(14))))
    (whole, whole_reports), (heads, reports) = found
    for a, b in zip(whole_reports, reports, strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-5)
        assert (a.fitness is None) == (b.fitness is None)
        if a.fitness is not None:
            torch.testing.assert_close(a.fitness, b.fitness, rtol=1e-3, atol=1e-4)
    assert heads.windows == 3
    for key, value in whole.values.items():
        torch.testing.assert_close(value, heads.values[key], rtol=1e-3, atol=1e-3)
    for a, b in zip(whole.model.state_dict().values(), heads.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert any(v.any() for v in heads.values.values())


def test_a_head_that_is_all_of_the_model_is_the_ordinary_population() -> None:
    ends = []
    for head in (None, ""):
        model = network(0.0)
        population = made(model, head=head)
        run(population, range(10))
        ends.append([*model.state_dict().values(), *population.values.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("by", ["name", "module"])
def test_both_ways_to_name_it(by: str) -> None:
    ends = []
    for head in ("fc", by):
        model = network()
        population = made(model, head=model.fc if head == "module" else "fc")
        torch.manual_seed(2)
        run(population, range(6))
        ends.append([*model.state_dict().values(), *population.values.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ---- What can go wrong.


def test_a_child_that_is_lost_leaves_the_trunk_to_the_others() -> None:
    """By its weights, or by a loss that is not finite."""
    model = network(0.0).double()
    model.fc[1].eval()
    start = copy.deepcopy(model)
    for lost in ("weights", "loss"):
        ends = []
        for count in (3, 2):
            own = copy.deepcopy(start)
            children = Children(own, SGD(own.parameters(), 0.1), Scaled(), None, Ranks(None, count), own.fc)
            factor = torch.tensor([1.0, 2.0, 3.0][:count], dtype=torch.float64)
            if count == 3:
                if lost == "weights":
                    with torch.no_grad():
                        children.weights["fc.0.weight"][2, 1, 0] = torch.nan
                else:
                    factor[2] = torch.inf
            for i in range(3):
                children.train(*data(16, i, torch.float64), {"factor": factor})
            ends.append(children)
        for key, w in ends[1].weights.items():
            a = ends[0].weights[key] if key in ends[0].shared else ends[0].weights[key][:2]
            torch.testing.assert_close(a, w, rtol=1e-9, atol=1e-12)
        if lost == "weights":
            assert ends[0].finite().tolist() == [True, True, False]
            assert ends[0].predict(data(5, 0, torch.float64)[0])[2].isnan().all()


class Scaled(LossSpace):
    parameters = (Parameter("factor", default=1.0, scale=1.0, low=-1e9, high=1e9),)

    def transform(self, prediction: Tensor, target: Tensor, values: Any) -> Tensor:
        return prediction * values["factor"]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_whatever_raises_trunk_and_head_start_again(at: int) -> None:
    models = [network(0.0), network(0.0)]
    population, reference = (made(m, head="fc") for m in models)
    run(population, range(4))
    run(reference, range(4))
    start = copy.deepcopy(models[0].state_dict())
    run(population, range(4, 4 + at - 1))
    if at == 4:
        good = population.fitness.each
        population.fitness.each = lambda scores, target: 1 / 0  # type: ignore[assignment, return-value]
        with pytest.raises(ZeroDivisionError):
            run(population, range(1))
        population.fitness.each = good
    else:
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7"):
            population.step((data(16)[0], torch.full((16,), 7)))
    assert all(
        torch.equal(a, b) for a, b in zip(start.values(), models[0].state_dict().values(), strict=True)
    )
    run(population, range(4, 8))
    run(reference, range(4, 8))
    ends = [m.state_dict().values() for m in models]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)) and population.windows == 2


@pytest.mark.parametrize("killed_at", [2, 4, 7, 13])
def test_a_killed_run_resumes_to_the_same_bits(killed_at: int) -> None:
    def start() -> tuple[nn.Module, Adam, Any, Population]:
        model = network()
        optimizer = Adam(model.parameters(), 0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
        return model, optimizer, schedule, made(model, optimizer, head="fc", steps=15, tail=0.2)

    def go_on(parts: Any, steps: range) -> None:
        for i in steps:
            parts[3].step(data(16, 5 + i))
            parts[2].step()

    parts = start()
    torch.manual_seed(7)
    go_on(parts, range(killed_at))
    file = io.BytesIO()
    torch.save(([part.state_dict() for part in parts], torch.get_rng_state()), file)
    go_on(parts, range(killed_at, 15))
    resumed = start()
    file.seek(0)
    states, random = torch.load(file, weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    go_on(resumed, range(killed_at, 15))
    for a, b in zip(parts[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(v, resumed[3].values[k]) for k, v in parts[3].values.items())
    if killed_at < 12:
        whole = made(network())
        with pytest.raises(
            ValueError, match="the weights of the state must be those of this model's children"
        ):
            whole.load_state_dict(states[3])


def test_a_scheduler_is_followed_by_trunk_and_head() -> None:
    model = network(0.0)
    optimizer = SGD(
        [{"params": model.fc.parameters(), "lr": 0.05}, {"params": model.trunk.parameters()}], 0.1
    )
    population = made(model, optimizer, head="fc")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(population, range(1))
        schedule.step()
    assert population.children is not None
    before = {k: w.detach().clone() for k, w in population.children.weights.items()}
    assert not torch.equal(before["trunk.0.weight"], model.trunk[0].weight)
    run(population, range(1, 3))
    assert all(torch.equal(w, before[k]) for k, w in population.children.weights.items())


def test_autocast() -> None:
    """Its casts of the trunk are those of the weights as they are, whether it is entered once or for every pass."""
    model = network(0.0)
    torch.manual_seed(1)
    model.fc = nn.Linear(6, CLASSES)  # type: ignore[assignment]
    population = made(model, head="fc")
    x = data(9, 1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        reports = run(population, range(10))
        children = population.children
        assert children is not None and population.windows == 2
        found = [children.predict(x)]
        children.spread()  # as after a window that is undone
        found.append(children.predict(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(children.predict(x), found[1]) and not torch.equal(*found)
    assert all(r.loss.isfinite() for r in reports)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def test_convolutions_and_a_window_that_is_undone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(36, CLASSES),
    )  # fmt: skip
    population = made(model, head="5", metric=lambda prediction, target: float("nan"))
    start = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="the window was undone"):
        run(population, range(4))
    assert all(torch.equal(a, b) for a, b in zip(start.values(), model.state_dict().values(), strict=True))
    population = made(model, head="5", metric=ErrorRate())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(population, range(4))
    changed = [
        not torch.equal(a, b) for a, b in zip(start.values(), model.state_dict().values(), strict=True)
    ]
    assert all(changed)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fc.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x))


class Behind(nn.Module):
    """Statistics of what the head gives, outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "__init__", lambda self, group, children: vars(self).update(size=2))
    with pytest.raises(
        ValueError, match="head must be left out where processes share the children, got 2 of them"
    ):
        made(network(), head="fc")


def test_refuses() -> None:
    model = network()
    for head, message in (
        (
            "classifier",
            "head must be a module of the model, whose children are trunk, fc, unused, got 'classifier'",
        ),
        ("trunk.9", "head must be a module of the model, .* got 'trunk.9'"),
        (nn.Linear(6, 3), "head must be a module of the model, got another Linear"),
        ("trunk.2", "head must have a parameter that the optimizer trains, got a ReLU without any"),
    ):
        with pytest.raises(ValueError, match=message):
            made(model, head=head)
    with pytest.raises(TypeError, match="head must be the name of a module, or a module, got int"):
        made(model, head=3)
    for options in ({"children": 1}, {"space": SPACE * LearningRate()}):
        with pytest.raises(
            ValueError, match="head must be left out with one child, and where the space adapts"
        ):
            made(model, head="fc", **options)
    assert list(made(model, head="fc", learning_rate=True).values) == ["tau", "margin", "q"]
    with pytest.raises(
        ValueError, match="head must have a parameter that the optimizer trains, got a Sequential"
    ):
        made(model, SGD(model.trunk.parameters(), 0.1), head="fc")
    with pytest.raises(ValueError, match=r"got one that shares weight \[4, 4\] with a Linear outside"):
        made(Tied(), head="fc", space=Robust())
    population = made(model, head="unused")
    with pytest.raises(ValueError, match="head must have a part in the model's predictions"):
        run(population, range(1))
    behind = made(Behind(), head="fc")
    with pytest.raises(ValueError, match="head must be left out for a model whose children run in turn"):
        run(behind, range(1))
    # A second try is refused as well, and nothing has moved.
    with pytest.raises(ValueError, match="head must be left out for a model whose children run in turn"):
        run(behind, range(1))
    assert int(behind.model.norm.num_batches_tracked) == 0  # type: ignore[union-attr, arg-type]
