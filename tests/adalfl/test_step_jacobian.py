"""The closed forms against finite differences of the optimizers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lossmeta.adalfl.step_jacobian import StepJacobian

MAKE: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "sgd, maximize": lambda p: SGD(p, 0.1, maximize=True, weight_decay=0.1),
    "sgd, momentum": lambda p: SGD(p, 0.1, momentum=0.9),
    "sgd, dampening": lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "sgd, nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: Adam(p, 1e-3),
    "adam, weight decay": lambda p: Adam(p, 1e-3, weight_decay=0.1),
    "adam, amsgrad": lambda p: Adam(p, 1e-3, amsgrad=True),
    "adam, maximize": lambda p: Adam(p, 1e-3, maximize=True, weight_decay=0.1),
    "adam, decoupled": lambda p: Adam(p, 1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw": lambda p: AdamW(p, 1e-3, weight_decay=0.1),
    "adamw, amsgrad": lambda p: AdamW(p, 1e-3, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, 1e-3),
    "rmsprop, centred": lambda p: RMSprop(p, 1e-3, centered=True, weight_decay=0.1),
    "rmsprop, momentum": lambda p: RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "rmsprop, maximize": lambda p: RMSprop(p, 1e-3, maximize=True),
    "adagrad": lambda p: Adagrad(p, 1e-2, lr_decay=0.1),
    "adagrad, weight decay": lambda p: Adagrad(p, 1e-2, weight_decay=0.1, maximize=True),
}


def warmed(make: Callable[..., Optimizer], steps: int) -> tuple[Tensor, Optimizer]:
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    optimizer = make([parameter])
    for _ in range(steps):
        parameter.grad = torch.randn(6, generator=generator, dtype=torch.float64)
        optimizer.step()
    return parameter, optimizer


def product(make: Callable[..., Optimizer], steps: int, g: Tensor, v: Tensor) -> Tensor:
    parameter, optimizer = warmed(make, steps)
    parameter.grad = g.clone()
    jacobian = StepJacobian(optimizer)
    before = parameter.detach().clone()
    optimizer.step()
    (product,), factor = jacobian.products([v.clone()], [before])
    return factor * product


def step(make: Callable[..., Optimizer], steps: int, g: Tensor) -> Tensor:
    parameter, optimizer = warmed(make, steps)
    before = parameter.detach().clone()
    parameter.grad = g.clone()
    optimizer.step()
    return before - parameter.detach()


@pytest.mark.filterwarnings("ignore:AdaLFL. the first step")
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", MAKE)
def test_against_finite_differences(name: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(6, generator=generator, dtype=torch.float64)
    v = torch.randn(6, generator=generator, dtype=torch.float64)
    h = 1e-6
    columns = []
    for j in range(6):
        e = torch.zeros(6, dtype=torch.float64)
        e[j] = h
        columns.append((step(MAKE[name], steps, g + e) - step(MAKE[name], steps, g - e)) / (2 * h))
    jacobian = torch.stack(columns, 1)
    assert (jacobian - jacobian.diag().diag()).abs().max() < 1e-12
    actual = product(MAKE[name], steps, g, v)
    expected = jacobian @ v
    # On the first step of an adaptive optimizer the derivative is 0 but for eps: the differences are all rounding.
    assert (actual - expected).abs().max() <= 1e-8 * expected.abs().max() + 1e-9


def test_amsgrad_with_a_larger_past() -> None:
    # The past maximum rules: the derivative no longer passes through the second moment.
    make = MAKE["adam, amsgrad"]
    g, v = torch.full((6,), 1e-2, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    h = 1e-5
    expected = (step(make, 3, g + h) - step(make, 3, g - h)) / (2 * h)
    torch.testing.assert_close(product(make, 3, g, v), expected, rtol=1e-7, atol=0)


@pytest.mark.filterwarnings("ignore:AdaLFL. the first step")
@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "rmsprop, centred", "adagrad"])
def test_dead_elements_have_derivative_zero(name: str) -> None:
    g = torch.tensor([0.0, 1, 0, 2, 0, 3], dtype=torch.float64)

    def fresh() -> tuple[Tensor, Optimizer]:
        parameter = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
        return parameter, MAKE[name]([parameter])

    parameter, optimizer = fresh()
    parameter.grad = g
    jacobian = StepJacobian(optimizer)
    optimizer.step()
    (w,), _ = jacobian.products([torch.ones(6, dtype=torch.float64)], [torch.zeros(6, dtype=torch.float64)])
    assert w.isfinite().all()
    assert w[[0, 2, 4]].tolist() == [0, 0, 0]


def test_groups_have_their_own_options() -> None:
    a, b = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    unused = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([{"params": [a, unused]}, {"params": [b], "lr": 0.5, "momentum": 0.9}], lr=0.1)
    a.grad, b.grad = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    jacobian = StepJacobian(optimizer)
    optimizer.step()
    v = torch.ones(3, dtype=torch.float64)
    assert [p is q for (p, *_), q in zip(jacobian.stepped, (a, b), strict=True)] == [True, True]
    products, factor = jacobian.products([v.clone(), v.clone()], [v, v])
    assert factor == 1.0
    torch.testing.assert_close(products, [0.1 * v, 0.5 * v])


def test_refusals() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    other = torch.optim.Adamax([parameter])
    assert StepJacobian(other, approximate=True).products([parameter.grad], [parameter.grad])[1] > 0
    with_hook = SGD([parameter], lr=0.1)
    with_hook.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="step hooks"):
        StepJacobian(with_hook)
    twice: Any = SGD([parameter], lr=0.1)
    twice.param_groups.append({**twice.param_groups[0]})
    with pytest.raises(ValueError, match="one group of the optimizer, got one in two"):
        StepJacobian(twice)
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="dense and real, got sparse"):
        StepJacobian(SGD([parameter], lr=0.1))


@pytest.mark.parametrize(
    ("name", "fresh"), [("adam", True), ("adagrad", True), ("rmsprop", True), ("sgd, momentum", False)]
)
def test_first_adaptive_step_learns_nearly_nothing(name: str, fresh: bool) -> None:
    parameter, optimizer = warmed(MAKE[name], 0)
    parameter.grad = torch.ones(6, dtype=torch.float64)
    assert StepJacobian(optimizer).learns_nearly_nothing == fresh
    optimizer.step()
    assert not StepJacobian(optimizer).learns_nearly_nothing
