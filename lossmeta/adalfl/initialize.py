"""AdaLFL's offline initialisation of the loss (Algorithm 1), which is also how ML3 learns its loss, and of the learning
rate (Algorithm 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam, Optimizer

from lossmeta.adalfl._batches import call_model, check_meta_optimizer, endless
from lossmeta.adalfl._state import random_state, set_random_state
from lossmeta.adalfl.differentiable_step import Batch, Loss
from lossmeta._checks import choice

Product = Callable[[list[Tensor]], list[Tensor]]


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
    method: str = "unrolled",
    implicit_solver: str = "neumann",
    implicit_terms: int = 20,
    damping: float = 0.0,
    meta_optimizer: Optimizer | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    r"""Learns a loss whose first steps from random weights lower the task loss (AdaLFL, Algorithm 1).

    In every meta-step a new model takes ``inner_steps`` steps of plain gradient descent with the learned loss. Then the
    task loss of a validation batch is differentiated with respect to the loss's parameters, in one of two ways:

    * ``method="unrolled"``: exactly, through all the inner steps. The parameters of every step are kept and the chain
      is walked backwards, so that memory holds the graph of one step only.
    * ``method="implicit"``: as if the inner steps had ended at a minimum :math:`\theta^*` of the learned loss, by

      .. math:: \frac{\partial \mathcal L_T}{\partial \phi} = - \frac{\partial^2 \mathcal M_\phi}{\partial \phi\,
                \partial \theta} \, (H + \lambda I)^{-1} \, \nabla_\theta \mathcal L_T(\theta^*), \qquad
                H = \frac{\partial^2 \mathcal M_\phi}{\partial \theta^2}

      with the last training batch and products with H only; nothing is kept of the inner steps. Meant for many of
      them: far from a minimum, as after one step, this gradient is not that of what was done.

    Args:
        loss: module ``loss(prediction, target) -> []`` with the parameters to learn; changed in place.
        make_model: returns a newly initialised model. New weights every time: a repeated start ends in NaN.
        train_batches: inputs and target per inner step; started again where it ends. Several inputs of the model are a
            sequence or a mapping, as for :func:`meta_gradient`.
        valid_batches: inputs and target per meta-step; started again where it ends.
        task_loss: function ``task_loss(prediction, target) -> []``.
        steps: :math:`S_{init}`, meta-steps.
        inner_steps: :math:`S_{inner}`.
        learning_rate: :math:`\alpha`, of the inner steps.
        method: ``"unrolled"`` or ``"implicit"``.
        implicit_solver: ``"neumann"``: :math:`\alpha \sum_j (I - \alpha (H + \lambda I))^j` in place of the inverse,
            what unrolling as many steps at the minimum would give; diverges unless the eigenvalues of
            :math:`H + \lambda I` lie between 0 and :math:`2 / \alpha`. ``"cg"``: conjugate gradients, fewer products
            for the same accuracy; for a positive definite :math:`H + \lambda I`. It ends where it meets a direction of
            no or negative curvature, and where that is the first, the meta-step is left out.
        implicit_terms: terms of the series, or iterations; one product with H each.
        damping: :math:`\lambda`. Networks are not convex: without it the inverse may be large or of the wrong sign.
        meta_optimizer: of all trainable parameters of the loss; by default Adam with the paper's rate of 1e-3.
        progress: called with the number of meta-steps done and the last task loss.

    Returns:
        The task loss after the inner steps of every meta-step; NaN where it or its gradient was not finite, and the
        loss was left as it was.

    Raises:
        ValueError: for options out of range, for loaders without batches or with empty ones, for an iterator that ends
            too soon (what the meta-steps before have learned stays), for a loss or a model without parameters to learn,
            for a meta_optimizer of other parameters, and for a loss or task loss that is no scalar.
        TypeError: for batches that are not pairs.

    Sources:
        Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation" (2020).

    Example:
        >>> loss = lossmeta.losses.LossNetwork(8)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> len(initialize(loss, lambda: torch.nn.Linear(4, 3), batches, batches, steps=2))
        2
    """
    _check_numbers("initialize", steps=steps, inner_steps=inner_steps, implicit_terms=implicit_terms)
    _check_rate("initialize", learning_rate)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"initialize: damping must be finite and not negative, got {damping}")
    solver = choice("initialize", "implicit_solver", implicit_solver, SOLVERS)
    methods: dict[str, Callable[..., Any]] = {
        "unrolled": _unrolled,
        "implicit": partial(_implicit, solver=solver, terms=implicit_terms, damping=damping),
    }
    differentiate = choice("initialize", "method", method, methods)
    phi: list[Tensor] = [p for p in loss.parameters() if p.requires_grad]
    if not phi:
        raise ValueError("initialize: loss must have parameters to learn, got none")
    meta_optimizer = meta_optimizer or Adam(phi, lr=1e-3)
    check_meta_optimizer("initialize", loss, meta_optimizer)
    train = endless("initialize", "train_batches", train_batches)
    valid = endless("initialize", "valid_batches", valid_batches)
    history = []
    for step in range(steps):
        chain = [next(train) for _ in range(inner_steps)]
        value, gradients, _ = differentiate(
            loss, phi, make_model(), chain, next(valid), task_loss, learning_rate
        )
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


def initialize_learning_rate(
    make_model: Callable[[], nn.Module],
    train_batches: Iterable[Batch],
    valid_batches: Iterable[Batch],
    task_loss: Loss = F.cross_entropy,
    *,
    learning_rate: float = 0.01,
    meta_learning_rate: float = 1e-3,
    steps: int = 2500,
    inner_steps: int = 1,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[float, list[float]]:
    r"""Learns a learning rate whose first steps from random weights lower the task loss (AdaLFL, Algorithm 3).

    .. math:: \theta_{i+1} = \theta_i - \alpha_t \nabla \mathcal L_T(\theta_i), \qquad
              \alpha_{t+1} = \alpha_t - \eta\, \frac{\partial \mathcal L_T(\theta_{S_{inner}})}{\partial \alpha_t}

    The first half of Meta-LR, with which the paper compares AdaLFL; the second, Algorithm 4, is :class:`OnlineLearner`
    with a loss without parameters and ``learning_rate=`` :math:`\eta`. The derivative is exact, as in
    :func:`initialize`. A step lowers the rate to a thousandth of itself at most: a rate of 0 could not be left again.

    Args:
        make_model: returns a newly initialised model.
        train_batches: inputs and target per inner step; started again where it ends. Several inputs of the model are a
            sequence or a mapping, as for :func:`meta_gradient`.
        valid_batches: inputs and target per meta-step; started again where it ends.
        task_loss: function ``task_loss(prediction, target) -> []``.
        learning_rate: :math:`\alpha_0`.
        meta_learning_rate: :math:`\eta`.
        steps: :math:`S_{init}`, meta-steps.
        inner_steps: :math:`S_{inner}`.
        progress: called with the number of meta-steps done and the last task loss.

    Returns:
        The learning rate, and the task loss after the inner steps of every meta-step; NaN where it or its derivative
        was not finite, and the rate was left as it was.

    Raises:
        ValueError: for options out of range, for loaders without batches or with empty ones, for an iterator that ends
            too soon, for a model without trainable parameters, and for a task loss that is no scalar.
        TypeError: for batches that are not pairs.

    Example:
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> rate, history = initialize_learning_rate(lambda: torch.nn.Linear(4, 3), batches, batches, steps=2)
    """
    where = "initialize_learning_rate"
    _check_numbers(where, steps=steps, inner_steps=inner_steps)
    _check_rate(where, learning_rate)
    if not meta_learning_rate > 0:
        raise ValueError(f"{where}: meta_learning_rate must be positive, got {meta_learning_rate}")
    train, valid = (
        endless(where, "train_batches", train_batches),
        endless(where, "valid_batches", valid_batches),
    )
    history = []
    for step in range(steps):
        chain = [next(train) for _ in range(inner_steps)]
        value, _, slope = _unrolled(task_loss, [], make_model(), chain, next(valid), task_loss, learning_rate)
        finite = bool(value.isfinite() & slope.isfinite())
        if finite:
            learning_rate = max(learning_rate - meta_learning_rate * slope.item(), 1e-3 * learning_rate)
        history.append(value.item() if finite else float("nan"))
        if progress:
            progress(step + 1, history[-1])
    return learning_rate, history


def _unrolled(
    loss: Loss,
    phi: list[Tensor],
    model: nn.Module,
    chain: list[Batch],
    valid: Batch,
    task_loss: Loss,
    learning_rate: float,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The task loss after gradient descent on ``chain``, its gradient with respect to ``phi``, and its derivative with
    respect to the learning rate.

    With theta_{i+1} = theta_i - a g_i(theta_i, phi), the adjoint of theta_i is that of theta_{i+1} minus
    a (d g_i / d theta)' of it; phi collects -a (d g_i / d phi)' of it, and a collects its product with -g_i.
    """
    gradient, theta = _gradient_of(loss, model)
    device = theta[0].device
    visited, states = [], []
    for batch in chain:
        visited.append([p.detach().clone().requires_grad_() for p in theta])
        states.append(([b.clone() for b in model.buffers()], random_state(device)))
        _descend(theta, gradient(visited[-1], batch, False), learning_rate)
    value, adjoint = _validate(task_loss, model, theta, valid)
    end = random_state(device)
    total = [torch.zeros_like(p) for p in phi]
    slope = torch.zeros_like(value)
    for i in reversed(range(len(chain))):
        buffers, random = states[i]
        for b, old in zip(model.buffers(), buffers, strict=True):
            b.copy_(old)
        set_random_state(device, random)
        # The first step's weights lead nowhere further back.
        wanted = [*phi, *(visited[i] if i else ())]
        g = gradient(visited[i], chain[i], bool(wanted))
        slope = slope - _dot(adjoint, g).detach()
        if not wanted:
            break
        products = _transposed(g, wanted, adjoint)
        total = list(torch._foreach_sub(total, products[: len(phi)], alpha=learning_rate)) if phi else []
        if i:
            adjoint = list(torch._foreach_sub(adjoint, products[len(phi) :], alpha=learning_rate))
    set_random_state(device, end)
    return value.detach(), total, slope.detach()


def _implicit(
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
    """The same by the implicit function theorem at the last parameters; no derivative for the learning rate, on which
    a minimum does not depend."""
    gradient, theta = _gradient_of(loss, model)
    for batch in chain:
        _descend(theta, gradient(theta, batch, False), learning_rate)
    value, v = _validate(task_loss, model, theta, valid)
    g = gradient(theta, chain[-1], True)

    def product(x: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_add(_transposed(g, theta, x, retain_graph=True), x, alpha=damping))

    solution = solver(product, v, terms, learning_rate)
    return value.detach(), [-m for m in _transposed(g, phi, solution)], None


def _neumann(product: Product, v: list[Tensor], terms: int, rate: float) -> list[Tensor]:
    """rate sum_{j < terms} (I - rate A)^j v."""
    term, total = v, [x.clone() for x in v]
    for _ in range(terms - 1):
        term = list(torch._foreach_sub(term, product(term), alpha=rate))
        torch._foreach_add_(total, term)
    torch._foreach_mul_(total, rate)
    return total


def _conjugate_gradients(product: Product, v: list[Tensor], terms: int, rate: float) -> list[Tensor]:
    """A^-1 v for a positive definite A; NaN where already v itself shows that it is not."""
    x = [torch.zeros_like(r) for r in v]
    residual, direction = [r.clone() for r in v], v
    square = start = _dot(residual, residual)
    for i in range(terms):
        # Nothing is left but rounding.
        if square <= torch.finfo(square.dtype).eps ** 2 * start:
            break
        moved = product(direction)
        curvature = _dot(direction, moved)
        if not curvature > 0:
            return x if i else [torch.full_like(r, torch.nan) for r in v]
        length = square / curvature
        torch._foreach_add_(x, torch._foreach_mul(direction, length))
        torch._foreach_sub_(residual, torch._foreach_mul(moved, length))
        square, before = _dot(residual, residual), square
        direction = list(torch._foreach_add(residual, torch._foreach_mul(direction, square / before)))
    return x


SOLVERS = {"neumann": _neumann, "cg": _conjugate_gradients}


def _gradient_of(
    loss: Loss, model: nn.Module
) -> tuple[Callable[[list[Tensor], Batch, bool], list[Tensor]], list[Tensor]]:
    """The gradient of the loss as a function of the model's parameters, and these; 0 for those that it leaves out."""
    model.train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("AdaLFL: make_model must return a model with trainable parameters, got one without")

    def gradient(at: list[Tensor], batch: Batch, create_graph: bool) -> list[Tensor]:
        state = dict(zip(named, at, strict=True))
        prediction = call_model(lambda *a, **k: functional_call(model, state, a, k), batch[0])
        value = _scalar("loss", loss(prediction, batch[1]))
        return _gradients(value, at, create_graph=create_graph)

    return gradient, list(named.values())


def _validate(
    task_loss: Loss, model: nn.Module, theta: list[Tensor], batch: Batch
) -> tuple[Tensor, list[Tensor]]:
    """The task loss and its gradient."""
    value = _scalar("task_loss", task_loss(call_model(model, batch[0]), batch[1]))
    return value, _gradients(value, theta)


def _transposed(
    g: list[Tensor], inputs: list[Tensor], vectors: list[Tensor], retain_graph: bool = False
) -> list[Tensor]:
    """(d g / d inputs)' vectors."""
    differentiable = [(x, v) for x, v in zip(g, vectors, strict=True) if x.requires_grad]
    if not differentiable:  # both the loss and the model are linear
        return [torch.zeros_like(p) for p in inputs]
    outputs, along = map(list, zip(*differentiable, strict=True))
    return _gradients(outputs, inputs, along, retain_graph=retain_graph)


def _gradients(outputs: Any, inputs: list[Tensor], vectors: Any = None, **options: Any) -> list[Tensor]:
    """Of what autograd returns several may be one tensor, expanded, or one of ``vectors``: not to be written to."""
    found = torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]


def _scalar(argument: str, value: Tensor) -> Tensor:
    if value.dim():
        raise ValueError(
            f"AdaLFL: {argument} must reduce to a scalar (reduction='mean'), got {list(value.shape)}"
        )
    return value


@torch.no_grad()
def _descend(theta: list[Tensor], gradient: list[Tensor], rate: float) -> None:
    torch._foreach_sub_(theta, gradient, alpha=rate)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _check_numbers(where: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {number}")


def _check_rate(where: str, learning_rate: float) -> None:
    if not learning_rate > 0:
        raise ValueError(f"{where}: learning_rate must be positive, got {learning_rate}")
