"""The next parameters from the best model: a quadratic of the validation error, in a trust region."""

from __future__ import annotations

import numpy as np

from lossmeta.tuneloss._box import Array, Box

RIDGE = 1e-9  # of the scaled curvature
ROUNDING = 1e-4  # below zero, of the largest eigenvalue, as float32 leaves it


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
    r"""Minimises :math:`c^\top d + d^\top B d / 2` over :math:`l \le d \le u`.

    The entries are scaled, and 1e-9 of the cost's largest number is added to B's diagonal. The answer satisfies the
    optimality conditions of that problem, or an error says so. Eigenvalues that rounding made negative count as zero.

    Args:
        curvature: B, [k, k], symmetric, positive semidefinite up to rounding.
        slope: c, [k].
        lower: [k].
        upper: [k], not below ``lower``.

    Raises:
        ValueError: for numbers that are not finite, and a curvature that is not positive semidefinite.
    """
    from scipy.optimize import minimize

    if not all(np.isfinite(a).all() for a in (curvature, slope, lower, upper)):
        raise ValueError("box_qp: curvature, slope and bounds must be finite, got NaN or infinity")
    # Measured in the box's width or in the curvature's, whichever is less, and the cost by its largest number.
    width, size = upper - lower, np.sqrt(np.maximum(np.diagonal(curvature), 0.0))
    wide = np.where(width > 0, width, 1.0)
    scale = np.where(size * wide > 1, 1 / np.where(size > 0, size, 1.0), wide)
    b, c = (curvature + curvature.T) / 2 * scale * scale[:, None], slope * scale
    largest = max(float(np.abs(c).max()), float(np.diagonal(b).max()))
    if largest <= 0:
        return np.clip(np.zeros_like(c), lower, upper)
    values, vectors = np.linalg.eigh(b / largest)
    if values[0] < -ROUNDING * max(float(values[-1]), 1e-9):
        raise ValueError("box_qp: curvature must be positive semidefinite, got a negative eigenvalue")
    b = (vectors * np.maximum(values, 0.0)) @ vectors.T + RIDGE * np.eye(len(c))
    c, low, high = c / largest, lower / scale, upper / scale
    rough = minimize(
        lambda x: (x @ b @ x / 2 + c @ x, b @ x + c),
        np.clip(np.zeros_like(c), low, high),
        jac=True,
        method="L-BFGS-B",
        bounds=np.column_stack([low, high]),
        options={"maxiter": 200, "ftol": 1e-15, "gtol": 1e-12},
    )
    found = _active_set(b, c, np.clip(rough.x, low, high), low, high)
    gradient = b @ found + c
    moved = found - np.clip(found - gradient, low, high)
    if not np.abs(moved).max() <= 1e-9 * (1 + np.abs(b) @ np.abs(found)).max():
        raise ValueError(
            "box_qp: curvature must be conditioned better, got one whose step could not be verified"
        )
    return np.clip(found * scale, lower, upper)


def _active_set(b: Array, c: Array, x: Array, low: Array, high: Array) -> Array:
    """The minimum from a point nearby: bounds are taken up where a step meets them, and left where the cost falls."""
    at_low, at_high = x <= low, x >= high
    for _ in range(20 * len(c) + 100):
        free = ~(at_low | at_high)
        gradient, step = b @ x + c, np.zeros_like(c)
        if free.any():
            step[free] = -np.linalg.solve(b[np.ix_(free, free)], gradient[free])
        room = np.full_like(c, np.inf)
        np.divide(high - x, step, out=room, where=step > 0)
        np.divide(low - x, step, out=room, where=step < 0)
        first = int(room.argmin())
        if room[first] < 1:
            x = np.clip(x + room[first] * step, low, high)
            at_low[first], at_high[first] = step[first] < 0, step[first] > 0
            x[first] = low[first] if at_low[first] else high[first]
            continue
        x = np.clip(x + step, low, high)
        gradient = b @ x + c
        # An entry without room stays where it is.
        fall = np.where(low == high, 0.0, np.where(at_low, -gradient, np.where(at_high, gradient, 0.0)))
        most = int(fall.argmax())
        if fall[most] <= 1e-14 * (1 + np.abs(b[most]) @ np.abs(x)):
            break
        at_low[most] = at_high[most] = False
    return x
