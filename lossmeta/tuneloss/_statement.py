"""Algorithm LearnLoss's program in scaled unknowns, from features, bounds and the factor of its cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lossmeta.tuneloss._box import Array
from lossmeta.tuneloss._least_squares import SumOfSquares, triangle
from lossmeta.tuneloss._program import Program

CONSTANT_ROW = 1e-9  # a row of fixed unknowns alone may be violated by


def units(columns: Array, lower: Array, upper: Array) -> tuple[Array, float] | None:
    """Units [k] of unknowns in which columns [r, k] have one length, and the point of the box nearest to 0 has size 1.

    The length is the second. ``None`` where that point is 0, columns of zeros aside.
    """
    length = np.sqrt(np.einsum("ij,ij->j", columns, columns))
    size = float(np.abs(np.clip(0.0, lower, upper) * length).max())
    return (size / np.where(length > 0, length, size), size) if size else None


@dataclass(frozen=True, eq=False)
class Rows:
    """Constraints rows y >= right: rows have length 1 together with what the fixed unknowns add to them.

    Attributes:
        rows: [r, n].
        right: [r].
        possible: whether those of fixed unknowns alone are satisfied.
        length: [m], by which each was divided; 0 for equal models, which are no constraint.
    """

    rows: Array
    right: Array
    possible: bool
    length: Array


def argmin_rows(features: Array, model: int, scale: Array, free: NDArray[np.bool_], nearest: Array) -> Rows:
    """That the loss of one model is at most that of every other: (features_i - features_model) λ >= 0.

    Args:
        features: [m, k].
        model: its index.
        scale: [k], of which λ = scale y.
        free: [k], those of y that are not fixed.
        nearest: [k], where the others are.
    """
    differences = (features - features[model]) * scale
    rows, constant = differences[:, free], differences[:, ~free] * nearest[~free]
    length = np.sqrt(np.einsum("ij,ij->i", rows, rows) + np.abs(constant).sum(axis=1) ** 2)
    differ = length > 0
    rows = rows[differ] / length[differ, None]
    right = -constant[differ].sum(axis=1) / length[differ]
    moves = rows.any(axis=1)
    possible = bool((right[~moves] <= CONSTANT_ROW).all())
    return Rows(rows[moves], right[moves], possible, length)


@dataclass(frozen=True, eq=False)
class Statement:
    """min over λ in the box and α >= 0 of |blocks (λ, α)|², as a program of n scaled unknowns.

    Attributes:
        features: [m, k].
        cost: of the n unknowns.
        scale: [k + 1]; λ and α are ``scale * y``.
        lower: [k + 1], of y.
        upper: [k + 1], of y.
        nearest: [k + 1], the point of the box that is nearest to 0.
        free: [k + 1]; n of them are. The others are fixed, or all features and gradients of theirs are 0.
        unit: of the cost: that of (λ, α) is ``unit`` times the scaled one.
    """

    features: Array
    cost: SumOfSquares
    scale: Array
    lower: Array
    upper: Array
    nearest: Array
    free: NDArray[np.bool_]
    unit: float

    @classmethod
    def of(cls, features: Array, lower: Array, upper: Array, blocks: list[Array]) -> Statement | None:
        """``None`` where λ = 0 is in the box, but for features that are 0."""
        low, high = np.append(lower, 0.0), np.append(upper, np.inf)
        # Free columns first: what the fixed ones add is then below their triangle.
        order = np.argsort(low == high, kind="stable")
        # Long rows first: Householder's reflections would take digits from short rows above them.
        first = sorted(blocks, key=lambda block: -float(np.abs(block).max(initial=0.0)))
        factor = triangle(block[:, order] for block in first)[:, np.argsort(order)]
        found = units(factor, low, high)
        if found is None:
            return None
        scale, size = found
        free = (low < high) & factor.any(axis=0)
        low, high, nearest = low / scale, high / scale, np.clip(0.0, low, high) / scale
        factor = factor * scale / size
        offset = factor[:, ~free] @ nearest[~free]
        return cls(features, SumOfSquares(factor[:, free], offset), scale, low, high, nearest, free, size**2)

    def _argmin_rows(self, model: int) -> Rows:
        k = self.features.shape[1]
        return argmin_rows(self.features, model, self.scale[:k], self.free[:k], self.nearest[:k])

    def program(self, model: int) -> Program | None:
        """With that model as argmin; ``None`` where fixed unknowns alone exclude it."""
        found = self._argmin_rows(model)
        if not found.possible:
            return None
        rows = np.hstack([found.rows, np.zeros((len(found.rows), int(self.free[-1])))])
        return Program(self.cost, rows, found.right, self.lower[self.free], self.upper[self.free])

    def violation(self, values: Array, model: int) -> float:
        """By how much more than any other's the model's loss is with λ, [k], in units of the rows."""
        excess = (self.features[model] - self.features) @ values
        length = self._argmin_rows(model).length
        return max(0.0, float((excess / np.where(length > 0, length, 1.0)).max()))

    def unscaled(self, y: Array) -> Array:
        """λ and α, [k + 1]."""
        found = self.nearest.copy()
        found[self.free] = y
        return found * self.scale
