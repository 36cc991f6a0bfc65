"""The derivative of a few inner steps, by walking them backwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossmeta._batches import Batch, Loss
from lossmeta._model_state import ModelState, RandomState
from lossmeta.adalfl.inner_steps import check_repeated, descend, dot, gradient_of, transposed, validate


def unrolled(
    loss: Loss,
    phi: list[Tensor],
    model: nn.Module,
    chain: list[Batch],
    valid: Batch,
    task_loss: Loss,
    learning_rate: float,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The task loss after gradient descent on ``chain``, and its derivatives in ``phi`` and in the learning rate.

    With theta_{i+1} = theta_i - a g_i(theta_i, phi), the adjoint of theta_i is that of theta_{i+1} minus
    a (d g_i / d theta)' of it; phi collects -a (d g_i / d phi)' of it, and a collects its product with -g_i. The way
    back computes the g_i again.
    """
    gradient, theta = gradient_of(loss, model)
    device = theta[0].device
    visited, states = [], []
    for batch in chain:
        visited.append([p.detach().clone().requires_grad_() for p in theta])
        states.append(ModelState(model, device))
        taken = gradient(visited[-1], batch, False)
        descend(theta, taken, learning_rate)
    value, adjoint = validate(task_loss, model, theta, valid)
    end = RandomState(device)
    total = [torch.zeros_like(p) for p in phi]
    slope = torch.zeros_like(value)
    for i in reversed(range(len(chain))):
        states[i].bring_back()
        # The first step's weights lead nowhere further back.
        wanted = [*phi, *(visited[i] if i else ())]
        g = gradient(visited[i], chain[i], bool(wanted))
        if i == len(chain) - 1:
            check_repeated(taken, g)
        slope = slope - dot(adjoint, g).detach()
        if not wanted:
            break
        products = transposed(g, wanted, adjoint)
        total = list(torch._foreach_sub(total, products[: len(phi)], alpha=learning_rate)) if phi else []
        if i:
            adjoint = list(torch._foreach_sub(adjoint, products[len(phi) :], alpha=learning_rate))
    end.bring_back()
    return value.detach(), total, slope.detach()
