"""AdaLFL's offline initialisation of the loss (Algorithm 1), which is also how ML3 learns its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam, Optimizer

from lossmeta.adalfl.differentiable_step import Batch, Loss


def initialize(
    loss: nn.Module,
    make_model: Callable[[], nn.Module],
    train_batches: Iterable[Batch],
    valid_batches: Iterable[Batch],
    task_loss: Loss = F.cross_entropy,
    *,
    steps: int = 2500,
    inner_steps: int = 1,
    learning_rate: float = 0.01,
    meta_optimizer: Optimizer | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    r"""Learns a loss whose first steps from random weights lower the task loss (AdaLFL, Algorithm 1).

    In every meta-step a new model takes ``inner_steps`` steps of plain gradient descent with the learned loss, and the
    task loss of a validation batch is differentiated through all of them. Exactly: the parameters of every inner step
    are kept and the chain is walked backwards, so that memory holds the graph of one step only.

    Args:
        loss: module ``loss(prediction, target) -> []`` with the parameters to learn; changed in place.
        make_model: returns a newly initialised model. New weights every time: a repeated start ends in NaN.
        train_batches: inputs and target per inner step; started again where it ends.
        valid_batches: inputs and target per meta-step; started again where it ends.
        task_loss: function ``task_loss(prediction, target) -> []``.
        steps: :math:`S_{init}`, meta-steps.
        inner_steps: :math:`S_{inner}`.
        learning_rate: :math:`\alpha`, of the inner steps.
        meta_optimizer: of the loss; by default Adam with the paper's rate of 1e-3.
        progress: called with the number of meta-steps done and the last task loss.

    Returns:
        The task loss after the inner steps of every meta-step; NaN where it or its gradient was not finite, and the
        loss was left as it was.

    Raises:
        ValueError: for options out of range, for loaders without batches, and for a loss without parameters.

    Example:
        >>> loss = lossmeta.losses.LossNetwork(8)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> len(initialize(loss, lambda: torch.nn.Linear(4, 3), batches, batches, steps=2))
        2
    """
    for name, number in (("steps", steps), ("inner_steps", inner_steps)):
        if number < 1:
            raise ValueError(f"initialize: {name} must be at least 1, got {number}")
    if not learning_rate > 0:
        raise ValueError(f"initialize: learning_rate must be positive, got {learning_rate}")
    phi: list[Tensor] = [p for p in loss.parameters() if p.requires_grad]
    if not phi:
        raise ValueError("initialize: loss must have parameters to learn, got none")
    meta_optimizer = meta_optimizer or Adam(phi, lr=1e-3)
    train, valid = _endless(train_batches, "train_batches"), _endless(valid_batches, "valid_batches")
    history = []
    for step in range(steps):
        chain = [next(train) for _ in range(inner_steps)]
        value, gradients = _through(loss, phi, make_model(), chain, next(valid), task_loss, learning_rate)
        finite = all(bool(g.isfinite().all()) for g in (value, *gradients))
        if finite:
            for p, g in zip(phi, gradients, strict=True):
                p.grad = g
            meta_optimizer.step()
            meta_optimizer.zero_grad(set_to_none=True)
        history.append(value.item() if finite else float("nan"))
        if progress:
            progress(step + 1, history[-1])
    return history


def _through(
    loss: nn.Module,
    phi: list[Tensor],
    model: nn.Module,
    chain: list[Batch],
    valid: Batch,
    task_loss: Loss,
    learning_rate: float,
) -> tuple[Tensor, list[Tensor]]:
    """The task loss after gradient descent on ``chain``, and its gradient with respect to ``phi``.

    With theta_{i+1} = theta_i - a g_i(theta_i, phi), the adjoint of theta_i is that of theta_{i+1} minus
    a (d g_i / d theta)' of it, and phi collects -a (d g_i / d phi)' of it.
    """
    model.train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    theta: list[Tensor] = [p for p in model.parameters() if p.requires_grad]

    def gradient(at: list[Tensor], batch: Batch, create_graph: bool) -> tuple[Tensor, ...]:
        prediction = functional_call(model, dict(zip(names, at, strict=True)), (batch[0],))
        return torch.autograd.grad(loss(prediction, batch[1]), at, create_graph=create_graph)

    visited, states = [], []
    for batch in chain:
        visited.append([p.detach().clone().requires_grad_() for p in theta])
        states.append((_buffers(model), torch.get_rng_state()))
        g = gradient(visited[-1], batch, False)
        with torch.no_grad():
            torch._foreach_sub_(theta, g, alpha=learning_rate)
    value = task_loss(model(valid[0]), valid[1])
    adjoint = list(torch.autograd.grad(value, theta))
    end = torch.get_rng_state()
    total = [torch.zeros_like(p) for p in phi]
    for i in reversed(range(len(chain))):
        buffers, random = states[i]
        for b, old in zip(model.buffers(), buffers, strict=True):
            b.copy_(old)
        torch.set_rng_state(random)
        # The first step's weights lead nowhere further back.
        wanted = [*phi, *(visited[i] if i else ())]
        g = gradient(visited[i], chain[i], True)
        products = torch.autograd.grad(g, wanted, adjoint, allow_unused=True)
        for t, product in zip(total, products, strict=False):
            if product is not None:
                t.sub_(product, alpha=learning_rate)
        for a, product in zip(adjoint, products[len(phi) :], strict=False):
            if product is not None:
                a.sub_(product, alpha=learning_rate)
    torch.set_rng_state(end)
    return value.detach(), total


def _buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def _endless(batches: Iterable[Batch], name: str) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"initialize: {name} must hold at least one batch, got none")
