"""Algorithm LearnLoss: a linear loss from models whose validation error is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lossmeta.tuneloss import _inputs, solvers
from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._program import Certificate
from lossmeta.tuneloss._statement import Statement

NAME = "learn_loss"


@dataclass(frozen=True, eq=False)
class LearnedLoss:
    """The linear loss λ·φ(θ), and how it was found.

    Attributes:
        values: λ, [k], inside the box.
        multiplier: α >= 0, by which the validation error was multiplied to compare it with the loss. At 0 the loss does
            not follow the error: no loss in the box does better, or the data leave λ open.
        matched: the model that has the least loss among all given, by its index in ``errors``.
        cost: of Eq. 6, ε included.
        feasible: whether λ in the box can make a model that of least loss, for the models that were tried, in ascending
            order of error. All but the last are ``False``; a linear program's dual proved it.
        solver: that gave λ; ``"none"`` where all components are fixed and α is 0.
        certificate: what was verified of λ and α.
    """

    values: Array
    multiplier: float
    matched: int
    cost: float
    feasible: tuple[bool, ...]
    solver: str
    certificate: Certificate


def learn_loss(
    errors: Any,
    features: Any,
    lower: Any,
    upper: Any,
    *,
    gradients: Sequence[Any] | Array | None = None,
    jacobians: Sequence[Any] | Array | None = None,
    grams: Any = None,
    eps: float | str = "balanced",
    solver: str = "auto",
) -> LearnedLoss:
    r"""Finds the linear loss that agrees best with validation errors (Algorithm LearnLoss, Eq. 6).

    .. math:: \min_{\lambda, \alpha \ge 0} \sum_{i=1}^m (\lambda \cdot \phi_i - \alpha e_i)^2
              + \varepsilon \sum_{i=1}^m |J_i \lambda - \alpha g_i|^2

    with λ in the box, and such that the best of the m models has the least loss among them. Where no such λ exists,
    the second best model takes its place, and so on (Theorem 3).

    Features count all of the loss: the task's own is one, whose λ is fixed by ``lower == upper``.

    Every λ is verified before it is returned. Where the data leave λ open (``certificate.rank`` is below
    ``certificate.unknowns``), one near the box's point of least size is taken. A feature that is 0 for all models, with
    its gradients, takes its bound nearest to 0. Equal models are fine.

    Args:
        errors: validation errors e, [m].
        features: φ of the models, [m, k]; float64, as are all other arrays.
        lower: bounds of λ, [k]; ``-inf`` for none.
        upper: bounds of λ, [k]; ``inf`` for none.
        gradients: of the validation error, m vectors :math:`g_i` [n]; n may differ among models.
        jacobians: of the features, m matrices :math:`J_i` [n, k].
        grams: instead of both, [m, k + 1, k + 1]: the products of the columns of :math:`[J_i, g_i]`, g last. Squares
            halve the digits: with raw gradients, λ is more exact.
        eps: ε >= 0, or ``"balanced"`` for :math:`\sum |g_i|^2 / \sum |J_i|_F^2` (Appendix B.2).
        solver: ``"daqp"``, ``"clarabel"``, ``"osqp"`` or ``"cvxpy"``; ``"auto"`` tries the first three in this order
            until an answer is verified.

    Raises:
        TypeError: for arguments that are no arrays of numbers.
        ValueError: for shapes that do not fit, numbers that are not finite, lower bounds above upper ones, a box with
            λ = 0 in it, one model without gradients, Gram matrices that are none, and unknown names.
        ImportError: for a solver by name that is not installed.
        NotCertified: where no solver's answer could be verified.

    Source:
        Streeter, *Learning Effective Loss Functions Efficiently*, 2019, section 3.

    Example:
        >>> features = [[1.0, 0.3], [0.5, 0.9], [0.4, 2.0]]  # log loss, and a regulariser
        >>> errors = [1.06, 0.68, 0.8]
        >>> found = lossmeta.tuneloss.learn_loss(errors, features, [1.0, 0.0], [1.0, 10.0])
        >>> found.values.round(3), round(found.multiplier, 3), found.matched
        (array([1. , 0.2]), 1.0, 1)
    """
    found_errors, found_features = _inputs.models(NAME, errors, features)
    m, k = found_features.shape
    low, high = _inputs.box(NAME, lower, upper, k)
    _inputs.refuse_zero(NAME, low, high)
    names = solvers.order(NAME, solver)
    second = _inputs.gradient_factor(NAME, m, k, gradients, jacobians, grams, eps)
    first = np.column_stack([found_features, -found_errors])
    blocks = [first] if second is None else [first, second]
    statement = Statement.of(found_features, low, high, blocks)
    if statement is None:
        raise _inputs.zero_features(NAME)
    feasible: list[bool] = []
    for model in np.argsort(found_errors, kind="stable"):
        program = statement.program(int(model))
        found = None if program is None else solvers.solve(NAME, program, names)
        feasible.append(found is not None)
        if found is not None:
            chosen, answer = found
            unscaled = statement.unscaled(answer.values)
            values = np.clip(unscaled[:k], low, high)
            violation = max(statement.violation(values, int(model)), answer.certificate.violation)
            certificate = replace(answer.certificate, violation=violation)
            if not certificate.holds:
                raise solvers.NotCertified(
                    f"{NAME}: scaling left a violation of {violation:.1e}; scale the features"
                )
            return LearnedLoss(
                values=values,
                multiplier=float(unscaled[k]),
                matched=int(model),
                cost=certificate.cost * statement.unit,
                feasible=tuple(feasible),
                solver=chosen,
                certificate=certificate,
            )
    raise solvers.NotCertified(f"{NAME}: no model was found to be one of least loss, though one must be")
