"""AdaLFL's offline initialisation of the loss (Algorithm 1) and of the learning rate (Algorithm 3).

ML3 learns its loss by the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.optim import Adam, Optimizer

from lossmeta._batches import Batch, Loss, endless
from lossmeta._checks import check_at_least_one, check_positive, choice
from lossmeta.adalfl.implicit import SOLVERS, implicit
from lossmeta.adalfl.learned_loss import check_meta_optimizer, to_learn
from lossmeta.adalfl.learned_rate import descended
from lossmeta.adalfl.unrolled import unrolled
from lossmeta.losses._parameters import mark_learned, project


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
        BackendError: for a model that does not compute the same when an inner step is computed again, which
            ``"unrolled"`` does.

    Sources:
        Lorraine, Vicol and Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation" (2020).

    Example:
        >>> loss = lossmeta.losses.LossNetwork(8)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> len(initialize(loss, lambda: torch.nn.Linear(4, 3), batches, batches, steps=2))
        2
    """
    check_at_least_one("initialize", "steps", steps)
    check_at_least_one("initialize", "inner_steps", inner_steps)
    check_at_least_one("initialize", "implicit_terms", implicit_terms)
    check_positive("initialize", "learning_rate", learning_rate)
    if not 0 <= damping < float("inf"):
        raise ValueError(f"initialize: damping must be finite and not negative, got {damping}")
    solver = choice("initialize", "implicit_solver", implicit_solver, SOLVERS)
    methods: dict[str, Callable[..., Any]] = {
        "unrolled": unrolled,
        "implicit": partial(implicit, solver=solver, terms=implicit_terms, damping=damping),
    }
    differentiate = choice("initialize", "method", method, methods)
    phi = to_learn(loss)
    if not phi:
        raise ValueError("initialize: loss must have parameters to learn, got none")
    meta_optimizer = meta_optimizer or Adam(phi, lr=1e-3)
    check_meta_optimizer("initialize", loss, meta_optimizer)
    mark_learned(loss)
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
            project(loss)
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
        BackendError: for a model that does not compute the same when an inner step is computed again.

    Example:
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> rate, history = initialize_learning_rate(lambda: torch.nn.Linear(4, 3), batches, batches, steps=2)
    """
    where = "initialize_learning_rate"
    check_at_least_one(where, "steps", steps)
    check_at_least_one(where, "inner_steps", inner_steps)
    check_positive(where, "learning_rate", learning_rate)
    check_positive(where, "meta_learning_rate", meta_learning_rate)
    train, valid = (
        endless(where, "train_batches", train_batches),
        endless(where, "valid_batches", valid_batches),
    )
    history = []
    for step in range(steps):
        chain = [next(train) for _ in range(inner_steps)]
        value, _, slope = unrolled(task_loss, [], make_model(), chain, next(valid), task_loss, learning_rate)
        finite = bool(value.isfinite() & slope.isfinite())
        if finite:
            learning_rate = descended(learning_rate, slope, meta_learning_rate)
        history.append(value.item() if finite else float("nan"))
        if progress:
            progress(step + 1, history[-1])
    return learning_rate, history
