"""The derivative of inner steps as if they had ended at a minimum, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lossmeta._batches import Batch, Loss
from lossmeta.adalfl.inner_steps import descend, dot, gradient_of, transposed, validate

Product = Callable[[list[Tensor]], list[Tensor]]


def implicit(
    loss: Loss,
    phi: list[Tensor],
    model: nn.Module,
    chain: list[Batch],
    valid: Batch,
    task_loss: Loss,
    learning_rate: float,
    *,
    solver: Callable[[Product, list[Tensor], int, float], list[Tensor]],
    terms: int,
    damping: float,
) -> tuple[Tensor, list[Tensor], None]:
    """The task loss after gradient descent on ``chain``, and its gradient with respect to ``phi``.

    The gradient is that of the implicit function theorem at the last parameters. There is none with respect to the
    learning rate: a minimum does not depend on it.
    """
    gradient, theta = gradient_of(loss, model)
    for batch in chain:
        descend(theta, gradient(theta, batch, False), learning_rate)
    value, v = validate(task_loss, model, theta, valid)
    g = gradient(theta, chain[-1], True)

    def product(x: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_add(transposed(g, theta, x, retain_graph=True), x, alpha=damping))

    solution = solver(product, v, terms, learning_rate)
    return value.detach(), [-m for m in transposed(g, phi, solution)], None


def neumann(product: Product, v: list[Tensor], terms: int, rate: float) -> list[Tensor]:
    """rate sum_{j < terms} (I - rate A)^j v."""
    term, total = v, [x.clone() for x in v]
    for _ in range(terms - 1):
        term = list(torch._foreach_sub(term, product(term), alpha=rate))
        torch._foreach_add_(total, term)
    torch._foreach_mul_(total, rate)
    return total


def conjugate_gradients(product: Product, v: list[Tensor], terms: int, rate: float) -> list[Tensor]:
    """A^-1 v for a positive definite A; NaN where already v itself shows that it is not."""
    x = [torch.zeros_like(r) for r in v]
    residual, direction = [r.clone() for r in v], v
    square = start = dot(residual, residual)
    for i in range(terms):
        # Nothing is left but rounding.
        if square <= torch.finfo(square.dtype).eps ** 2 * start:
            break
        moved = product(direction)
        curvature = dot(direction, moved)
        if not curvature > 0:
            return x if i else [torch.full_like(r, torch.nan) for r in v]
        length = square / curvature
        torch._foreach_add_(x, torch._foreach_mul(direction, length))
        torch._foreach_sub_(residual, torch._foreach_mul(moved, length))
        square, before = dot(residual, residual), square
        direction = list(torch._foreach_add(residual, torch._foreach_mul(direction, square / before)))
    return x


SOLVERS = {"neumann": neumann, "cg": conjugate_gradients}
