"""Whether some point of a box satisfies linear inequalities, decided by an LP and proven by its dual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._program import REACH

LARGEST = 1.0


@dataclass(frozen=True, eq=False)
class Margin:
    """The largest t <= 1 for which some y in the box has rows y >= right + t.

    Attributes:
        values: such a y, [n].
        reached: its t.
        bound: no point has a larger one, by the LP's dual; within 1000 sizes of ``values`` where the box is wider.
    """

    values: Array
    reached: float
    bound: float


def margin(rows: Array, right: Array, lower: Array, upper: Array) -> Margin | None:
    """By HiGHS; ``None`` where that has no answer."""
    from scipy.optimize import linprog

    n = len(lower)
    if not len(rows):
        return Margin(np.clip(0.0, lower, upper), LARGEST, LARGEST)
    result = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-rows, np.ones((len(rows), 1))]),
        b_ub=-right,
        bounds=np.column_stack([np.append(lower, -np.inf), np.append(upper, LARGEST)]),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if result.x is None:
        return None
    y = np.clip(result.x[:n], lower, upper)
    reached = min(LARGEST, float((rows @ y - right).min()))
    # t <= Σ_i w_i (rows y - right)_i for all weights w >= 0 that sum up to 1.
    weights = (-np.asarray(result.ineqlin.marginals)).clip(0)
    bound = LARGEST
    if weights.sum() > 0:
        weights /= weights.sum()
        slope = weights @ rows
        reach = REACH * max(1.0, float(np.abs(y).max(initial=0.0)))
        furthest = np.where(slope > 0, np.minimum(upper, y + reach), np.maximum(lower, y - reach))
        bound = min(LARGEST, float(slope @ furthest - weights @ right))
    return Margin(y, reached, bound)
