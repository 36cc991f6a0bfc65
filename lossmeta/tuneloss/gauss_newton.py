"""The next parameters from the best model: a quadratic of the validation error, in a trust region."""

from __future__ import annotations

import numpy as np

from lossmeta.tuneloss._box import Array, Box

RIDGE = 1e-9  # of a curvature with unit diagonal


def gauss_newton_step(
    box: Box, best: Array, slope: Array, curvature: Array, radius: float, shrinkage: float
) -> Array:
    r"""Entries [k] that minimise the quadratic :math:`c^\top d + d^\top B d / 2` around the best ones.

    Inside the box every coordinate moves by at most ``radius``. Without groups d is the change of the entries. With
    groups it is the change of the coordinates u, and every group of G entries adds
    :math:`\frac{\rho}{G} \sum_g (u_g - \bar u)^2`.

    Args:
        box: k entries and their coordinates.
        best: [k], inside the box.
        slope: c, [k], per entry.
        curvature: B, [k, k], per entry; positive semidefinite up to rounding.
        radius: of the trust region, from 0 to 1.
        shrinkage: :math:`\rho`.
    """
    unit = box.unit(best)
    low, high = np.maximum(0.0, unit - radius), np.minimum(1.0, unit + radius)
    if not box.groups:
        return box.at(
            np.clip(
                box.unit(best + box_qp(curvature, slope, box.at(low) - best, box.at(high) - best)), low, high
            )
        )
    scale = box.slope(best)
    pull = np.zeros((box.size, box.size))
    for group in box.groups:
        count = group.stop - group.start
        pull[group, group] = 2 * shrinkage * (np.eye(count) - 1 / count) / count
    step = box_qp(
        scale[:, None] * curvature * scale + pull, slope * scale + pull @ unit, low - unit, high - unit
    )
    return box.at(np.clip(unit + step, low, high))


def box_qp(curvature: Array, slope: Array, lower: Array, upper: Array) -> Array:
    r"""Minimises :math:`c^\top d + d^\top B d / 2` over :math:`l \le d \le u`, by projected Newton steps.

    B is scaled to a unit diagonal and has 1e-9 added there. The answer satisfies the optimality conditions of that
    problem, or an error says so.

    Args:
        curvature: B, [k, k], symmetric, positive semidefinite up to rounding.
        slope: c, [k].
        lower: [k].
        upper: [k], not below ``lower``.

    Raises:
        ValueError: for numbers that are not finite, and a curvature that is not positive semidefinite.

    Sources:
        Bertsekas, "Projected Newton methods for optimization problems with simple constraints" (1982).
    """
    if not all(np.isfinite(a).all() for a in (curvature, slope, lower, upper)):
        raise ValueError("box_qp: curvature, slope and bounds must be finite, got NaN or infinity")
    diagonal = np.diagonal(curvature)
    scale = np.sqrt(np.maximum(diagonal, max(1e-12 * float(diagonal.max()), 1e-300)))
    b = (curvature + curvature.T) / 2 / scale / scale[:, None] + RIDGE * np.eye(len(slope))
    # The slope's size is immaterial once the step is measured by it.
    c, low, high = slope / scale, lower * scale, upper * scale
    size = max(float(np.abs(c).max()), 1e-300)
    c, low, high = c / size, low / size, high / size
    if float(np.linalg.eigvalsh(b)[0]) <= 0:
        raise ValueError("box_qp: curvature must be positive semidefinite, got a negative eigenvalue")
    x = np.clip(np.zeros_like(c), low, high)
    for _ in range(50 * len(c) + 200):
        gradient = b @ x + c
        if _violation(x, gradient, low, high) <= 1e-11:
            break
        x = _projected_newton(b, c, x, gradient, low, high)
    if _violation(x, b @ x + c, low, high) > 1e-7:
        raise ValueError("box_qp: curvature must be conditioned better for the step to be found")
    return np.clip(x * size / scale, lower, upper)


def _violation(x: Array, gradient: Array, low: Array, high: Array) -> float:
    """How far a gradient step would still move, at most."""
    return float(np.abs(x - np.clip(x - gradient, low, high)).max())


def _projected_newton(b: Array, c: Array, x: Array, gradient: Array, low: Array, high: Array) -> Array:
    """A Newton step of the entries that no bound holds, bent at the bounds and shortened until it descends enough."""
    near = min(1e-3, _violation(x, gradient, low, high))
    held = ((x <= low + near) & (gradient > 0)) | ((x >= high - near) & (gradient < 0))
    direction = -gradient.copy()
    if not held.all():
        free = ~held
        direction[free] = -np.linalg.solve(b[np.ix_(free, free)], gradient[free])
    value, length = x @ (b @ x / 2 + c), 1.0
    for _ in range(60):
        new = np.clip(x + length * direction, low, high)
        promised = -length * (gradient[~held] @ direction[~held]) + gradient[held] @ (x - new)[held]
        if new @ (b @ new / 2 + c) <= value - 1e-4 * promised:
            break
        length /= 2
    return new
