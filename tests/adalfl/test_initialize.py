"""Algorithm 1 against full unrolling, and what it must refuse."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import LossOfEager, batches, cnn, mlp, relative_error, unrolled_chain
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam

from lossmeta.adalfl import BackendError, initialize, initialize_learning_rate
from lossmeta.adalfl.inner_steps import check_repeated
from lossmeta.adalfl.unrolled import unrolled
from lossmeta.losses import LossNetwork, TaylorLoss


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_equals_full_unrolling(make: Any, inner_steps: int) -> None:
    model, loss = make(), LossNetwork(8, dtype=torch.float64)
    *chain, valid = batches(inner_steps + 1)
    drawn = torch.get_rng_state()
    expected = unrolled_chain(copy.deepcopy(model), loss, chain, valid, 0.2)
    torch.set_rng_state(drawn)
    _, actual, _ = unrolled(loss, list(loss.parameters()), model, chain, valid, F.cross_entropy, 0.2)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("learned", [True, False], ids=["with the loss", "alone"])
def test_derivative_for_the_learning_rate(learned: bool, inner_steps: int) -> None:
    model = cnn()
    loss = LossNetwork(8, dtype=torch.float64) if learned else F.cross_entropy
    phi = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    *chain, valid = batches(inner_steps + 1)
    drawn = torch.get_rng_state()
    rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    other = copy.deepcopy(model)
    eager = LossOfEager(loss) if isinstance(loss, LossNetwork) else F.cross_entropy
    theta = dict(other.named_parameters())
    for x, y in chain:
        value = eager(functional_call(other, theta, (x,)), y)
        g = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - rate * d for (name, p), d in zip(theta.items(), g, strict=True)}
    task = F.cross_entropy(functional_call(other, theta, (valid[0],)), valid[1])
    (expected,) = torch.autograd.grad(task, rate)
    torch.set_rng_state(drawn)
    value, _, actual = unrolled(loss, phi, model, chain, valid, F.cross_entropy, 0.2)
    torch.testing.assert_close(value, task.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


def test_learning_rate_ends_where_one_step_goes_furthest() -> None:
    """Algorithm 3 on (w - 1)^2 from w = 0: a step is 2 a, so that a = 1/2 is best."""

    def make() -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    both = [(torch.ones(1, 1), torch.ones(1, 1))]
    seen: list[int] = []
    options: dict[str, Any] = {"steps": 40, "meta_learning_rate": 0.05}
    rate, history = initialize_learning_rate(
        make, both, both, F.mse_loss, progress=lambda n, value: seen.append(n), **options
    )
    assert rate == pytest.approx(0.5, abs=1e-4)
    assert history[0] == pytest.approx(0.98**2)
    assert history[-1] < 1e-6
    assert seen == list(range(1, 41))
    # The first update: a' = a - eta d(1 - 2 a)^2 / da.
    options["steps"] = 1
    rate, _ = initialize_learning_rate(make, both, both, F.mse_loss, learning_rate=0.1, **options)
    assert rate == pytest.approx(0.1 + 0.05 * 4 * 0.8)
    rate, _ = initialize_learning_rate(make, both, both, F.mse_loss, learning_rate=2.0, **options)
    assert rate == pytest.approx(2.0 - 0.05 * 12)
    rate, _ = initialize_learning_rate(
        make, both, both, F.mse_loss, learning_rate=6.0, steps=1, meta_learning_rate=1
    )
    assert rate == pytest.approx(6e-3)
    broken = [(torch.full((1, 1), float("nan")), torch.ones(1, 1))]
    rate, history = initialize_learning_rate(make, broken, both, F.mse_loss, steps=1)
    assert rate == 0.01
    assert history[0] != history[0]


def test_learns() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
    x = x + y[:, None, None, None]
    loss = LossNetwork(8)
    seen: list[int] = []
    history = initialize(
        loss,
        lambda: mlp().float(),
        [(x[:32], y[:32])],
        [(x[32:], y[32:])],
        steps=150,
        learning_rate=0.1,
        meta_optimizer=Adam(loss.parameters(), 1e-2),
        progress=lambda n, value: seen.append(n),
    )
    assert seen == list(range(1, 151))
    assert sum(history[-30:]) / 30 < sum(history[:30]) / 30 - 0.1


def test_a_diverging_start_leaves_the_loss_alone() -> None:
    loss = LossNetwork(8)
    before = copy.deepcopy(loss.state_dict())

    def broken() -> nn.Module:
        model = mlp().float()
        with torch.no_grad():
            model[1].weight.fill_(float("nan"))  # type: ignore[index]
        return model

    both = batches(1, torch.float32)
    (value,) = initialize(loss, broken, both, both, steps=1)
    assert value != value
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), before.values(), strict=True))


def test_bad_input() -> None:
    loss, both = LossNetwork(8), batches(1, torch.float32)

    def make() -> nn.Module:
        return mlp().float()

    for options in ({"steps": 0}, {"inner_steps": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            initialize(loss, make, both, both, **options)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        initialize(loss, make, both, both, learning_rate=0.0)
    with pytest.raises(ValueError, match="valid_batches must hold at least one batch, got none"):
        initialize(loss, make, both, [], steps=1)
    with pytest.raises(ValueError, match="loss must have parameters to learn, got none"):
        initialize(nn.CrossEntropyLoss(), make, both, both)
    for options in ({"steps": 0}, {"inner_steps": 0}):
        with pytest.raises(ValueError, match=r"^initialize_learning_rate: .* must be at least 1, got 0$"):
            initialize_learning_rate(make, both, both, **options)
    for options in ({"learning_rate": 0.0}, {"meta_learning_rate": -1.0}):
        with pytest.raises(
            ValueError, match=r"^initialize_learning_rate: .*learning_rate must be positive, got"
        ):
            initialize_learning_rate(make, both, both, **options)


@pytest.mark.parametrize(
    ("batches_of", "kind", "message"),
    [
        (lambda b: [], ValueError, "{} must hold at least one batch, got none"),
        (lambda b: iter(()), ValueError, "{} must hold at least one batch, got none"),
        (
            lambda b: iter([b, b]),
            ValueError,
            "{} must start again where it ends, got an iterator that ended after 2 batches; give a list or a "
            "DataLoader, or an iterator without end",
        ),
        (
            lambda b: [(b[0][:0], b[1][:0])],
            ValueError,
            r"a batch of {} must hold at least one sample, got a target \[0\]",
        ),
        (
            lambda b: [(b[0], b[0], b[1])],
            TypeError,
            r"a batch of {} must be a pair \(inputs, target\), got tuple of 3; several .*",
        ),
        (
            lambda b: [b[0]],
            TypeError,
            r"a batch of {} must be a pair \(inputs, target\), got Tensor; several .*",
        ),
    ],
    ids=["empty", "exhausted", "iterator", "no samples", "three", "inputs only"],
)
@pytest.mark.parametrize("which", ["train_batches", "valid_batches"])
def test_bad_batches(which: str, batches_of: Any, kind: type[Exception], message: str) -> None:
    """Weights and loss are those of the last complete meta-step, of which only the iterator allows two."""
    loss, good = LossNetwork(8), batches(1, torch.float32)
    loaders: dict[str, Any] = {"train_batches": good, "valid_batches": good, which: batches_of(good[0])}
    seen: list[list[Tensor]] = [[p.detach().clone() for p in loss.parameters()]]

    def progress(n: int, value: float) -> None:
        seen.append([p.detach().clone() for p in loss.parameters()])

    def make() -> nn.Module:
        return mlp().float()

    with pytest.raises(kind, match=f"^initialize: {message.format(which)}$"):
        initialize(loss, make, **loaders, steps=5, progress=progress)
    assert len(seen) == (3 if "iterator" in message else 1)
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], loss.parameters(), strict=True))
    with pytest.raises(kind, match=f"^initialize_learning_rate: {message.format(which)}$"):
        initialize_learning_rate(make, **{**loaders, which: batches_of(good[0])}, steps=5)


def test_an_iterator_without_end_and_batches_of_other_sizes() -> None:
    def endless() -> Any:
        while True:
            for size in (7, 3, 1):
                yield torch.randn(size, 1, 8, 8), torch.randint(3, (size,))

    history = initialize(LossNetwork(8), lambda: mlp().float(), endless(), endless(), steps=4, inner_steps=2)
    assert len(history) == 4
    assert all(value == value for value in history)


# ---- What autograd returns, and models that meta_gradient takes.


class Offsets(nn.Module):
    """Parameters whose gradients are one tensor, an expanded one, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3, dtype=torch.float64)
        self.a, self.b, self.c, self.unused = (
            nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(1)).tanh() + (self.a + self.b) + self.c.sum()


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_gradients_that_autograd_shares_or_expands(inner_steps: int) -> None:
    model, loss = Offsets(), TaylorLoss(order=3, dtype=torch.float64)
    with torch.no_grad():
        for p in loss.parameters():
            p.normal_()
    *chain, valid = batches(inner_steps + 1)
    theta = {name: p for name, p in model.named_parameters() if name != "unused"}
    for x, y in chain:
        value = loss(functional_call(model, theta, (x,)), y)
        g = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - 0.2 * d for (name, p), d in zip(theta.items(), g, strict=True)}
    task = F.cross_entropy(functional_call(model, theta, (valid[0],)), valid[1])
    expected = list(torch.autograd.grad(task, list(loss.parameters())))
    unused = model.unused.detach().clone()
    value, actual, _ = unrolled(loss, list(loss.parameters()), model, chain, valid, F.cross_entropy, 0.2)
    torch.testing.assert_close(value, task.detach())
    assert relative_error(actual, expected) < 1e-10
    assert torch.equal(model.unused, unused)
    assert not any(t.requires_grad for t in actual)


@pytest.mark.parametrize("method", ["unrolled", "implicit"])
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_that_do_not_depend_on_the_parameters(learned: bool, method: str) -> None:
    """A loss that is linear in the prediction, with a linear model."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phi = nn.Parameter(torch.ones(()))

        def forward(self, pred: Tensor, target: Tensor) -> Tensor:
            return (self.phi if learned else self.phi.detach()) * pred.mean()

    loss = Linear()
    both = [(torch.ones(1, 1), torch.ones(1, 1))]
    initialize(
        loss,
        lambda: nn.Linear(1, 1),
        both,
        both,
        F.mse_loss,
        steps=1,
        inner_steps=2,
        method=method,
        damping=1.0,
    )
    assert (loss.phi.item() != 1.0) == learned


@pytest.mark.parametrize("method", ["unrolled", "implicit"])
def test_several_inputs(method: str) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)
            nn.init.ones_(self.inner.weight)
            nn.init.zeros_(self.inner.bias)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a * b)

    a, b, y = torch.randn(8, 4), torch.randn(8, 4), torch.randint(3, (8,))
    histories = []
    for inputs in ((a, b), [a, b], {"b": b, "a": a}):
        torch.manual_seed(0)
        histories.append(
            initialize(
                LossNetwork(8),
                Product,
                [(inputs, y)],
                [(inputs, y)],
                steps=2,
                inner_steps=2,
                method=method,
                damping=10.0,
            )
        )
        initialize_learning_rate(Product, [(inputs, y)], [(inputs, y)], steps=1)
    assert histories[0] == histories[1] == histories[2]
    assert histories[0][0] == histories[0][0]


@pytest.mark.parametrize("method", ["unrolled", "implicit"])
def test_losses_and_models_that_do_not_fit(method: str) -> None:
    both, loss = batches(1, torch.float32), LossNetwork(8)

    def make() -> nn.Module:
        return mlp().float()

    def of_samples(pred: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(pred, target, reduction="none")

    options: dict[str, Any] = {"steps": 1, "method": method}
    with pytest.raises(ValueError, match=r"^AdaLFL: task_loss must reduce to a scalar .*, got \[7\]$"):
        initialize(loss, make, both, both, of_samples, **options)
    with pytest.raises(ValueError, match=r"^AdaLFL: loss must reduce to a scalar .*, got \[7\]$"):
        initialize(LossNetwork(8, reduction="none"), make, both, both, **options)
    with pytest.raises(
        ValueError, match=r"^AdaLFL: make_model must return a model with trainable parameters"
    ):
        initialize(loss, nn.Flatten, both, both, **options)
    with pytest.raises(
        ValueError, match=r"^AdaLFL: make_model must return a model with trainable parameters"
    ):
        initialize_learning_rate(nn.Flatten, both, both, steps=1)


def test_a_meta_optimizer_of_other_parameters() -> None:
    both, loss = batches(1, torch.float32), LossNetwork(8)
    of_a_copy = Adam(copy.deepcopy(loss).parameters())
    with pytest.raises(
        ValueError,
        match=r"^initialize: meta_optimizer must have all .* of the loss and no others, got 3 others, "
        r"and of the loss's all but \['input_weight', 'hidden_weight', 'output_weight'\]; make",
    ):
        initialize(loss, lambda: mlp().float(), both, both, steps=1, meta_optimizer=of_a_copy)


class Scaled(nn.Module):
    """Its passes draw random numbers: its own, or from where nobody looks."""

    elsewhere = random.Random(0)

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.inner, self.hidden, self.own = mlp(), hidden, random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * ((self.elsewhere if self.hidden else self.own).random() + 0.5)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_passes_that_cannot_be_repeated_are_refused(inner_steps: int) -> None:
    given, loss = batches(4), LossNetwork(8).double()
    before = [p.detach().clone() for p in loss.parameters()]
    options: dict[str, Any] = {"steps": 2, "inner_steps": inner_steps}
    with pytest.raises(BackendError, match="a repeated pass of an inner step gave another gradient"):
        initialize(loss, lambda: Scaled(hidden=True), given, given, **options)
    with pytest.raises(BackendError, match="a repeated pass of an inner step gave another gradient"):
        initialize_learning_rate(lambda: Scaled(hidden=True), given, given, **options)
    assert all(torch.equal(p, q) for p, q in zip(loss.parameters(), before, strict=True))
    # The remedy works, and a generator that the model owns is replayed.
    assert len(initialize(loss, lambda: Scaled(hidden=True), given, given, method="implicit", **options)) == 2
    assert len(initialize(loss, lambda: Scaled(hidden=False), given, given, **options)) == 2


def test_a_repeated_gradient_where_the_first_was_0() -> None:
    with pytest.raises(BackendError, match="gave another gradient"):
        check_repeated([torch.zeros(3)], [torch.ones(3)])
    check_repeated([torch.zeros(3)], [torch.zeros(3)])
