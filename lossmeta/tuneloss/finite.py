"""The best linear loss for a finite set of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lossmeta.tuneloss import _inputs
from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._margin import margin
from lossmeta.tuneloss._program import VIOLATION
from lossmeta.tuneloss._statement import argmin_rows, units
from lossmeta.tuneloss.solvers import SLACK, NotCertified

NAME = "finite_argmin"


@dataclass(frozen=True, eq=False)
class FiniteArgmin:
    """The best model that a linear loss can choose among given ones.

    Attributes:
        model: its index in ``errors``.
        values: λ, [k], of the loss that is least there, with the largest margin.
        margin: by which that loss is less than at any other model, per unit length of the difference of their features,
            in scaled units and at most 1. It is 0 for a tie, and at least -1e-8 where it takes rounding to have one.
        feasible: whether λ in the box can make a model that of least loss, for the models that were tried, in ascending
            order of error. All but the last are ``False``; a linear program's dual proved it.
    """

    model: int
    values: Array
    margin: float
    feasible: tuple[bool, ...]


def finite_argmin(errors: Any, features: Any, lower: Any, upper: Any) -> FiniteArgmin:
    r"""Minimises the error of :math:`\arg\min_i \lambda \cdot \phi_i` over λ in a box, exactly (Theorem 2).

    For every model, in ascending order of its error, a linear program says whether some λ makes its loss the least.
    Equal models tie with each other and are fine.

    Args:
        errors: [m].
        features: φ of the models, [m, k]; float64, as are the bounds.
        lower: bounds of λ, [k]; ``-inf`` for none.
        upper: bounds of λ, [k]; ``inf`` for none.

    Raises:
        TypeError: for arguments that are no arrays of numbers.
        ValueError: for shapes that do not fit, numbers that are not finite, lower bounds above upper ones, and a box
            with λ = 0 in it, for which all models tie.
        NotCertified: where HiGHS's answer could not be verified.

    Source:
        Streeter, *Learning Effective Loss Functions Efficiently*, 2019, Theorem 2.

    Example:
        >>> features = [[1.0, 0.0], [0.6, 0.6], [0.0, 1.0]]  # the second is the least for no λ
        >>> lossmeta.tuneloss.finite_argmin([0.3, 0.1, 0.2], features, [1.0, 0.0], [1.0, 4.0]).model
        2
    """
    found_errors, found_features = _inputs.models(NAME, errors, features)
    k = found_features.shape[1]
    low, high = _inputs.box(NAME, lower, upper, k)
    _inputs.refuse_zero(NAME, low, high)
    found_units = units(found_features, low, high)
    if found_units is None:
        raise _inputs.zero_features(NAME)
    scale = found_units[0]
    low_scaled, high_scaled = low / scale, high / scale
    nearest = np.clip(0.0, low_scaled, high_scaled)
    free = low < high
    feasible: list[bool] = []
    for model in np.argsort(found_errors, kind="stable"):
        found = argmin_rows(found_features, int(model), scale, free, nearest)
        best = (
            margin(found.rows, found.right, low_scaled[free], high_scaled[free]) if found.possible else None
        )
        if found.possible and best is None:
            raise NotCertified(f"{NAME}: HiGHS gave no answer for model {model}; scale the features")
        feasible.append(best is not None and best.bound >= -SLACK)
        if best is None or not feasible[-1]:
            continue
        if best.reached < -VIOLATION:
            raise NotCertified(
                f"{NAME}: HiGHS left a violation of {-best.reached:.1e} for model {model}; scale the features"
            )
        y = nearest.copy()
        y[free] = best.values
        return FiniteArgmin(int(model), np.clip(y * scale, low, high), best.reached, tuple(feasible))
    raise NotCertified(f"{NAME}: no model was found to be one of least loss, though one must be")
