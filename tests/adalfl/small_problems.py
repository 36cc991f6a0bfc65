"""Small models, losses and batches, and their meta-gradients by full unrolling, for the tests to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lossmeta.adalfl import OnlineLearner
from lossmeta.losses import LossNetwork


class LossOfEager(nn.Module):
    """The learned loss in plain PyTorch, which can be unrolled."""

    def __init__(self, loss: LossNetwork) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        w1, w2, w3 = self.loss.parameters()

        def activation(x: Tensor) -> Tensor:
            return 0.99 * F.softplus(x, 10.0, 1000.0) + 0.01 * x

        y = F.one_hot(target, pred.shape[1]).to(pred)
        h = activation(torch.stack([y, pred.softmax(1)], -1) @ w1.mT)
        return (activation(h @ w2.mT) @ w3.mT).squeeze(-1).mean(1).mean()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(144, 3),
    ).double()


MODELS = {"mlp": mlp, "cnn": cnn}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1),
    "sgd, nesterov": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "sgd, dampening": lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.3),
    "adam": lambda p: Adam(p, 1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: AdamW(p, 1e-2),
    "rmsprop": lambda p: RMSprop(p, 1e-2, centered=True, momentum=0.9),
    "adagrad": lambda p: Adagrad(p, 1e-1),
}


def batches(count: int = 2, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(7, 1, 8, 8, dtype=dtype), torch.randint(3, (7,))) for _ in range(count)]


def problem(model: str, optimizer: str, history: int) -> tuple[nn.Module, Optimizer, LossNetwork]:
    network = MODELS[model]()
    made = OPTIMIZERS[optimizer](network.parameters())
    for inputs, target in batches(history):
        made.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        made.step()
    return network, made, LossNetwork(8, dtype=torch.float64)


def unrolled(
    model: nn.Module,
    optimizer: Optimizer,
    loss: LossNetwork,
    train: Any,
    valid: Any,
    change: Callable[..., Any] = list,
    eager: Callable[..., Any] = LossOfEager,
) -> list[Tensor]:
    """``create_graph=True`` through the model and through a differentiable optimizer step.

    ``change`` is made to the gradients; ``eager`` makes of the loss one in plain PyTorch.
    """
    model, optimizer = copy.deepcopy((model, optimizer))
    named = dict(model.named_parameters())
    inputs, target = train
    g = torch.autograd.grad(eager(loss)(model(inputs), target), list(named.values()), create_graph=True)
    leaves = [p.detach().clone().requires_grad_() for p in named.values()]
    stepped = [p.clone() for p in leaves]  # no leaves: the step may write to them
    g = change(g)
    for p, gradient in zip(stepped, g, strict=True):
        p.grad = gradient  # type: ignore[assignment]
    position = {id(p): i for i, p in enumerate(named.values())}
    state = {i: optimizer.state[p] for i, p in enumerate(named.values()) if optimizer.state[p]}
    old = optimizer.param_groups
    optimizer.param_groups = [{**o, "differentiable": True, "foreach": False, "fused": None} for o in old]
    for group in optimizer.param_groups:
        group["params"] = [stepped[position[id(p)]] for p in group["params"]]
    fresh = isinstance(optimizer, SGD) and not state
    if fresh:  # torch detaches the first momentum buffer; from a buffer of zeros the step is the same
        for group in optimizer.param_groups:
            group["dampening"] = 0
        state = {i: {"momentum_buffer": torch.zeros_like(p)} for i, p in enumerate(stepped)}
    optimizer.state.clear()
    for i, s in state.items():
        optimizer.state[stepped[i]] = s
    optimizer.defaults["differentiable"] = True
    for s in optimizer.state.values():  # counted in float32 the bias corrections are rounded
        if "step" in s:
            s["step"] = s["step"].double()
    try:
        torch.set_default_dtype(torch.float64)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    output = functional_call(model, dict(zip(named, stepped, strict=True)), (valid[0],))
    return list(torch.autograd.grad(F.cross_entropy(output, valid[1]), list(loss.parameters())))


def relative_error(actual: Any, expected: list[Tensor]) -> float:
    difference = torch.cat([(a - e).flatten() for a, e in zip(actual, expected, strict=True)])
    return (difference.norm() / torch.cat([e.flatten() for e in expected]).norm()).item()


def unrolled_chain(
    model: nn.Module,
    loss: LossNetwork,
    chain: list[Any],
    valid: Any,
    rate: float,
    eager: Callable[..., Any] = LossOfEager,
) -> list[Tensor]:
    """The same through several steps of gradient descent."""
    theta = dict(model.named_parameters())
    plain = eager(loss)
    for x, y in chain:
        value = plain(functional_call(model, theta, (x,)), y)
        g = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - rate * d for (name, p), d in zip(theta.items(), g, strict=True)}
    value = F.cross_entropy(functional_call(model, theta, (valid[0],)), valid[1])
    return list(torch.autograd.grad(value, list(loss.parameters())))


def learner(loss: nn.Module | None = None, model: nn.Module | None = None, **options: Any) -> OnlineLearner:
    model = model or mlp()
    loss = LossNetwork(8, dtype=torch.float64) if loss is None else loss
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    return OnlineLearner(model, optimizer, loss, F.cross_entropy, **options)


def values(module: nn.Module) -> list[Tensor]:
    return [v.clone() for v in module.state_dict().values()]


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
