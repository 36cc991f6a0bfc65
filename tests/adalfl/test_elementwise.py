"""Optimizers without a closed form: their own step in float64 gives the derivative, or they are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import batches, equal, mlp, relative_error, unrolled, values
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from lossmeta._optimizers import unwrapped
from lossmeta.adalfl import OnlineLearner, meta_gradient
from lossmeta.adalfl.step_jacobian import check_has_derivative
from lossmeta.losses import LossNetwork


class MySGD(SGD):
    """A subclass that does what its base does."""


class Damped(Optimizer):
    """By no means one of torch's: momentum that a cube root bends."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.mul_(0.9).add_(p.grad)
                p.sub_(group["lr"] * m / (1 + m.abs()))


OTHERS: dict[str, Callable[..., Optimizer]] = {
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2, weight_decay=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2, weight_decay=1e-2),
    "subclass": lambda p: MySGD(p, 0.1, momentum=0.9, nesterov=True),
}


def trained(make: Callable[..., Optimizer], steps: int) -> tuple[Any, Optimizer, LossNetwork]:
    network = mlp()
    optimizer = make(network.parameters())
    for inputs, target in batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        optimizer.step()
    return network, optimizer, LossNetwork(8, dtype=torch.float64)


@pytest.mark.parametrize("history", [3, 8])
@pytest.mark.parametrize("name", OTHERS)
def test_the_derivative_is_that_of_unrolling(name: str, history: int) -> None:
    network, optimizer, loss = trained(OTHERS[name], history)
    train, valid = batches()
    expected = unrolled(network, optimizer, loss, train, valid)
    plain = copy.deepcopy((network, optimizer))
    actual = meta_gradient(network, optimizer, loss, F.cross_entropy, train, valid).gradients
    assert relative_error(actual, expected) < 1e-5  # some keep numbers in float32
    plain[1].zero_grad()
    loss(plain[0](train[0]), train[1]).backward()
    plain[1].step()
    torch.testing.assert_close(network.state_dict(), plain[0].state_dict())
    torch.testing.assert_close(optimizer.state_dict(), plain[1].state_dict())


def test_an_optimizer_that_nobody_knows() -> None:
    network, optimizer, loss = trained(Damped, 2)
    train, valid = batches()
    momenta = [optimizer.state[p]["m"].clone() for p in network.parameters()]
    weights = dict(network.named_parameters())
    g = torch.autograd.grad(loss(network(train[0]), train[1]), list(weights.values()), create_graph=True)
    m = [0.9 * old + x for old, x in zip(momenta, g, strict=True)]
    after = {n: p - 0.05 * x / (1 + x.abs()) for (n, p), x in zip(weights.items(), m, strict=True)}
    value = F.cross_entropy(torch.func.functional_call(network, after, (valid[0],)), valid[1])
    expected = list(torch.autograd.grad(value, list(loss.parameters())))
    actual = meta_gradient(network, optimizer, loss, F.cross_entropy, train, valid).gradients
    assert relative_error(actual, expected) < 1e-6


def test_float32_and_weights_that_get_no_gradient() -> None:
    class Partly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = mlp().float(), torch.nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, loss = Partly(), LossNetwork(8)
    one = OnlineLearner(model, torch.optim.NAdam(model.parameters(), 1e-2), loss, F.cross_entropy)
    for _ in range(3):
        assert one.step(*batches(dtype=torch.float32)).skipped is None
    assert torch.equal(model.unused, torch.ones(3))


class Normalised(Damped):
    """As LAMB or LARS: the step of a weight depends on the whole layer's gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm())


class Signed(Damped):
    """As Lion."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


class Noisy(Damped):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + torch.randn_like(p)))


class Rounded(Damped):
    """As some of old: it computes in float32 whatever its weights are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                w = p.float()
                p.copy_(w - group["lr"] * p.grad.float())


class Routed(Damped):
    """As Muon: matrices are treated as a whole, from a size on."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                whole = p.dim() == 2 and min(p.shape) >= 7
                p.sub_(group["lr"] * (p.grad / p.grad.norm() if whole else p.grad))


class Wide(Damped):
    """As Muon with a bound that no toy weight reaches."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                whole = p.dim() == 2 and min(p.shape) >= 20
                p.sub_(group["lr"] * (p.grad / p.grad.norm() if whole else p.grad))


class Adaptive(Damped):
    """As LARS: only where there is weight decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad / p.grad.norm() if group.get("weight_decay") else p.grad))


class Projected(Damped):
    """As AdamP: what is along the weights is left out where there is little of it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                step, cosine = p.grad, F.cosine_similarity(p.view(-1), p.grad.view(-1), 0)
                if p.dim() > 1 and cosine.abs() < 0.01:
                    step = step - (p * step).sum() / (p * p).sum() * p
                p.sub_(group["lr"] * step)


class Brain(Damped):
    """Keeps its moments in bfloat16, and mends them in place."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.bfloat16))
                m.lerp_(p.grad.to(torch.bfloat16), 0.1)
                p.sub_(group["lr"] * m)


def test_each_group_is_tried() -> None:
    model, loss = mlp(), LossNetwork(8).double()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
    ]
    with pytest.raises(
        TypeError, match="got Adaptive, whose step for one weight depends on the gradients of others"
    ):
        OnlineLearner(model, Adaptive(groups), loss, F.cross_entropy)
    OnlineLearner(model, Adaptive(model.parameters()), loss, F.cross_entropy)


def test_the_shapes_of_all_groups_of_the_same_options_are_tried() -> None:
    model, loss = torch.nn.Linear(20, 20).double(), LossNetwork(8).double()
    groups = [{"params": [model.bias]}, {"params": [model.weight]}]
    with pytest.raises(
        TypeError, match="got Wide, whose step for one weight depends on the gradients of others"
    ):
        OnlineLearner(model, Wide(groups), loss, F.cross_entropy)


def test_an_empty_parameter_is_no_reason() -> None:
    model, loss = torch.nn.Linear(4, 3).double(), LossNetwork(8).double()
    model.empty = torch.nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
    OnlineLearner(model, torch.optim.NAdam(model.parameters(), 1e-2), loss, F.cross_entropy)


def test_the_shapes_of_the_model_are_tried() -> None:
    model = torch.nn.Linear(20, 20).double()
    with pytest.raises(
        TypeError, match="got Routed, whose step for one weight depends on the gradients of others"
    ):
        OnlineLearner(model, Routed(model.parameters()), LossNetwork(8).double(), F.cross_entropy)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Rounded, "got Rounded, whose step computes in a lower precision than float64"),
        (Projected, "got Projected, whose step for one weight depends on the gradients of others"),
        (Brain, "got Brain, whose step|got Brain, which cannot be stepped"),
        (Normalised, "got Normalised, whose step for one weight depends on the gradients of others"),
        (Signed, "got Signed, whose step does not depend on the size of the gradient"),
        (Noisy, "got Noisy, whose step is random"),
        (torch.optim.LBFGS, "got LBFGS, which cannot be stepped on its own"),
        (torch.optim.Rprop, "got Rprop, whose step does not depend on the size"),
        (
            torch.optim.Adafactor,
            "got Adafactor, whose step for one weight depends on the gradients of others",
        ),
    ],
)
def test_what_has_no_derivative_is_refused_before_any_step(
    make: Callable[..., Optimizer], reason: str
) -> None:
    model, loss = mlp(), LossNetwork(8).double()
    before, random = values(model), torch.get_rng_state()
    with pytest.raises(TypeError, match=reason) as raised:
        OnlineLearner(model, make(model.parameters()), loss, F.cross_entropy)
    assert equal(values(model), before) and torch.equal(torch.get_rng_state(), random)
    assert "approximate=True" in str(raised.value)
    if make is not torch.optim.LBFGS:  # the remedy works
        one = OnlineLearner(model, make(model.parameters()), loss, F.cross_entropy, approximate=True)
        assert one.step(*batches()).skipped is None


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got str"):
        check_has_derivative("adam")  # type: ignore[arg-type]


def test_a_wrapper_that_takes_the_class_of_what_it_wraps() -> None:
    class LightningOptimizer:
        """As Lightning makes it."""

        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer
            kinds = (type(self), type(optimizer))
            self.__class__ = type("Lightning" + type(optimizer).__name__, kinds, {})

        def __getattr__(self, name: str) -> Any:
            return getattr(self.optimizer, name)

    model, loss = mlp(), LossNetwork(8).double()
    inner = SGD(model.parameters(), 1e-2)
    wrapped: Any = LightningOptimizer(inner)
    assert type(wrapped).__name__ == "LightningSGD"
    assert unwrapped(wrapped) is inner
    assert OnlineLearner(model, wrapped, loss, F.cross_entropy).step(*batches()).skipped is None


def test_wrappers_and_schedulers() -> None:
    class AcceleratedOptimizer(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    inner = Adam(model.parameters(), 1e-2)
    assert unwrapped(AcceleratedOptimizer(AcceleratedOptimizer(inner))) is inner
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    loss = LossNetwork(8).double()
    one = OnlineLearner(model, AcceleratedOptimizer(inner), loss, F.cross_entropy)
    for _ in range(2):
        assert one.step(*batches()).skipped is None
        scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(1e-4)
