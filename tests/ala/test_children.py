"""Children in one tensor move as models of their own, each trained alone by a plain loop."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lossmeta.ala import LearningRate, LogitAdjustment, Robust
from lossmeta.ala._children import Alone, Children
from lossmeta.ala._ranks import Ranks
from lossmeta.ala._separable import check_separable
from lossmeta.ala.space import Coordinates

CLASSES = 3
SPACE = LogitAdjustment(torch.tensor([6, 3, 1])) * Robust()


class Residual(nn.Module):
    """With a weight that two layers share, one that is frozen, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, CLASSES)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) * self.gain + self.second(self.frozen(x)))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counting(nn.Module):
    """Draws from Python and puts a new buffer in the place of the old one: vmap is no help."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        x = self.linear(x)
        return x * (1 + 0.1 * random.random() + 0.1 * float(x.detach().mean()))


class Parts(nn.Module):
    """Two inputs, and an output that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x) * scale, "other": x}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    "residual": Residual,
    "convolution": Convolution,
    "counting": Counting,
    "parts": Parts,
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: Adam(p, 0.02, amsgrad=True),
    "adamw": lambda p: AdamW(p, 0.02),
    "rmsprop": lambda p: RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, 0.05),
    "nadam": lambda p: NAdam(p, 0.02),
    "adadelta": lambda p: Adadelta(p, 0.5),
}


def batches(name: str, count: int) -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for _ in range(count):
        x: Any = torch.randn(7, 6, generator=generator)
        inputs = (x, torch.rand(7, 1, generator=generator)) if name == "parts" else x
        found.append((inputs, torch.randint(CLASSES, (7,), generator=generator)))
    return found


def drawn(children: int, space: Any = SPACE) -> dict[str, Tensor]:
    c = Coordinates(space)
    u = torch.randn(children, c.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {k: v.float() for k, v in c.values(c.clip(u)).items()}


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_moves_as_alone(name: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    data, values = batches(name, 5), drawn(4)
    # A state of the optimizer from before goes on in every child.
    Alone(model, made, SPACE, None).train(*data[0], {k: v[:1] for k, v in values.items()})
    start, start_state = copy.deepcopy(model), copy.deepcopy(made.state_dict())

    children = Children(model, made, SPACE, None, Ranks(None, 4))
    losses = []
    for step, batch in enumerate(data[1:]):
        seed_all(step)
        losses.append(children.train(*batch, values))
    assert (children.in_turn is None) == (name != "counting"), children.in_turn
    predictions = [children.predict(inputs) for inputs, _ in data[:1]] if name != "counting" else []

    for i in range(4):
        alone = copy.deepcopy(start)
        other = OPTIMIZERS[optimizer]([p for p in alone.parameters() if p.requires_grad])
        other.load_state_dict(copy.deepcopy(start_state))
        own = {k: v[i] for k, v in values.items()}
        for step, (inputs, target) in enumerate(data[1:]):
            seed_all(step)
            other.zero_grad()
            output = alone(*inputs)["logits"] if name == "parts" else alone(inputs)
            loss = SPACE(output, target, own)
            loss.backward()
            other.step()
            torch.testing.assert_close(losses[step][i], loss.detach(), rtol=1e-4, atol=1e-5)
        for key, p in alone.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(children.weights[key][i], p.detach(), rtol=1e-3, atol=1e-5)
        for key, b in alone.named_buffers():
            torch.testing.assert_close(children.buffers[key][i], b, rtol=1e-4, atol=1e-6)
        if predictions:
            inputs = data[0][0]
            alone.eval()
            with torch.no_grad():
                expected = alone(*inputs)["logits"] if name == "parts" else alone(inputs)
            torch.testing.assert_close(predictions[0][i], expected, rtol=1e-3, atol=1e-4)
    # Nothing of this is in the model yet.
    for a, b in zip(model.state_dict().values(), start.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_merging(optimizer: str) -> None:
    torch.manual_seed(0)
    model = Convolution()
    made = OPTIMIZERS[optimizer](model.parameters())
    children = Children(model, made, SPACE, None, Ranks(None, 4))
    for batch in batches("mlp", 3):
        children.train(*batch, drawn(4))
    weight = torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64)
    with torch.no_grad():
        for w in children.weights.values():
            w[3] = torch.nan  # lost, and left out
    expected = {
        k: torch.einsum("b,b...->...", weight[:3], w[:3].double()) for k, w in children.weights.items()
    }
    means = torch.einsum("b,bc->c", weight[:3], children.buffers["layers.2.running_mean"][:3].double())
    states = {
        name: {
            key: torch.einsum("b,b...->...", weight[:3], v[:3].double())
            for key, v in children.stacked.state[w].items()
            if key != "step" and isinstance(v, Tensor) and v.shape == w.shape
        }
        for name, w in children.weights.items()
    }
    children.merge(weight)
    children.spread()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
        for b in range(4):
            assert torch.equal(children.weights[name][b], p)
        for key, value in states[name].items():
            torch.testing.assert_close(made.state[p][key].double(), value, rtol=1e-4, atol=1e-6)
            assert torch.equal(children.stacked.state[children.weights[name]][key][2], made.state[p][key])
    torch.testing.assert_close(model.layers[2].running_mean.double(), means, rtol=1e-5, atol=1e-6)
    assert model.layers[2].num_batches_tracked == 3
    # The optimizer goes on by itself, as from a state of its own.
    if optimizer != "sgd":
        assert set(made.state_dict()["state"]) == set(range(len(list(model.parameters()))))
    Alone(model, made, SPACE, None).train(*batches("mlp", 1)[0], drawn(1))
    children.train(*batches("mlp", 1)[0], drawn(4))


def test_the_learning_rate_of_each_child() -> None:
    space = Robust() * LearningRate()
    factors = torch.tensor([0.5, 1.0, 3.0])
    values = {"q": torch.zeros(3), "learning_rate": factors.log()}
    for make in (lambda p, lr: SGD(p, lr, momentum=0.9), lambda p, lr: AdamW(p, lr, weight_decay=0.1)):
        torch.manual_seed(0)
        model = MODELS["mlp"]()
        children = Children(model, make(model.parameters(), 0.02), space, None, Ranks(None, 3))  # type: ignore[arg-type]
        for batch in batches("mlp", 3):
            children.train(*batch, values)
        for i, factor in enumerate(factors.tolist()):
            alone = copy.deepcopy(model)
            optimizer = make(alone.parameters(), 0.02 * factor)  # type: ignore[arg-type]
            one = copy.deepcopy(model)
            with_factor = Alone(one, make(one.parameters(), 0.02), space, None)  # type: ignore[arg-type]
            for inputs, target in batches("mlp", 3):
                optimizer.zero_grad()
                F.cross_entropy(alone(inputs), target).backward()
                optimizer.step()
                with_factor.train(inputs, target, {k: v[i : i + 1] for k, v in values.items()})
            for name, p in alone.named_parameters():
                torch.testing.assert_close(children.weights[name][i], p.detach(), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(one.get_parameter(name).detach(), p.detach(), rtol=1e-4, atol=1e-6)


def test_a_scheduler_is_followed() -> None:
    torch.manual_seed(0)
    model, reference = (copy.deepcopy(m) for m in [MODELS["mlp"]()] * 2)
    made, other = SGD(model.parameters(), 0.1), SGD(reference.parameters(), 0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (made, other)]
    children = Children(model, made, Robust(), None, Ranks(None, 2))
    for inputs, target in batches("mlp", 4):
        children.train(inputs, target, {"q": torch.zeros(2)})
        made._opt_called = True
        other.zero_grad()
        F.cross_entropy(reference(inputs), target).backward()
        other.step()
        for schedule in schedules:
            schedule.step()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(children.weights[name][1], p.detach())


def test_autocast() -> None:
    torch.manual_seed(0)
    model = MODELS["mlp"]()
    children = Children(model, SGD(model.parameters(), 0.1), SPACE, None, Ranks(None, 2))
    inputs, target = batches("mlp", 1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert children.predict(inputs).dtype == torch.bfloat16
        losses = children.train(inputs, target, drawn(2))
    assert losses.dtype == torch.float32
    children.predict(inputs)
    assert children.in_turn is None
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in children.weights.values())
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="must not be float16"):
        children.train(inputs, target, drawn(2))


class Normalised(SGD):
    """Divides the gradients by the norm of all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for g in gradients:
            g /= norm
        super().step()


class Noisy(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad += torch.randn_like(p)
        super().step()


@pytest.mark.parametrize("kind", [Normalised, Noisy, torch.optim.LBFGS, torch.optim.Adafactor])
def test_optimizers_that_see_more_than_one_weight_are_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match=f"by its own gradient, got {kind.__name__}"):
        check_separable(kind(nn.Linear(2, 2).parameters(), lr=0.1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_elementwise_optimizers_are_taken(optimizer: str) -> None:
    model = nn.Linear(2, 2)
    check_separable(OPTIMIZERS[optimizer]([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}]))


def test_what_a_step_of_other_weights_would_pass_by_is_refused() -> None:
    """Hooks and replaced methods; a scheduler's is none."""
    model = nn.Linear(6, CLASSES)
    made = SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.StepLR(made, 1)
    Children(model, made, SPACE, None, Ranks(None, 2))
    handle = made.register_step_pre_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="got hooks on its step"):
        Children(model, made, SPACE, None, Ranks(None, 2))
    handle.remove()
    handle = model.weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(ValueError, match="got hooks on its weights' gradients"):
        Children(model, made, SPACE, None, Ranks(None, 2))
    handle.remove()
    other = SGD(model.parameters(), 0.1)
    other.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="got a replaced step"):
        Children(model, other, SPACE, None, Ranks(None, 2))


def test_options_of_a_gpu_are_no_reason_to_refuse() -> None:
    """The trial's weights are on the CPU, whatever the optimizer's implementation is."""
    for options in ({"capturable": True}, {"lr": torch.tensor(0.1), "foreach": False}, {"foreach": True}):
        assert check_separable(Adam(nn.Linear(2, 2).parameters(), **options)) == {"exp_avg", "exp_avg_sq"}


def test_a_state_of_another_model_changes_nothing() -> None:
    one, other = (nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False))
    states = [Children(m, SGD(m.parameters(), 0.1), SPACE, None, Ranks(None, 2)) for m in (one, other)]
    before = {k: w.detach().clone() for k, w in states[0].weights.items()}
    with torch.no_grad():
        states[1].weights["weight"].fill_(7)
    with pytest.raises(ValueError, match="the buffers of the state must be those"):
        states[0].load_state_dict(states[1].state_dict())
    assert all(torch.equal(w, before[k]) for k, w in states[0].weights.items())


def test_refuses() -> None:
    model = nn.Linear(6, CLASSES)
    with pytest.raises(ValueError, match=r"parameters of the model alone, got one \[3\] that is not"):
        Children(
            model, SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], 0.1), SPACE, None, Ranks(None, 2)
        )
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="weight is still to be made; run it on a batch first"):
        Children(lazy, SGD(lazy.parameters(), 0.1), SPACE, None, Ranks(None, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="must hold a parameter to train"):
        Children(frozen, SGD(frozen.parameters(), 0.1), SPACE, None, Ranks(None, 2))
