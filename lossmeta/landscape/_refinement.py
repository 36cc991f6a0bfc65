"""Which points of a loss surface to evaluate, and what to take for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lossmeta.landscape.surface import LossSurface

COARSEST = 8
"""Steps of the grid between the first points where ``refine`` is given."""
SAFETY = 4.0
"""What ``refine`` is divided by before a surplus counts as small."""

Grid = list[np.ndarray[Any, Any]]
Mask = np.ndarray[Any, Any]
"""Of the points of the surface."""


def refined(surface: LossSurface, evaluate: Callable[[Mask], None], refine: float) -> float:
    """Samples coarse to fine; gives an estimate of the largest error of what is interpolated.

    On each level the points of the next one are predicted by cubic splines, within the range of what has been
    evaluated. A point is evaluated where the predictions around it were off by more than the tolerance on the level
    before. Where they were not it keeps the prediction. What they were off is taken for its error, and half of that for
    the next level, on which a smooth function has a sixteenth. In the end some of the points that were predicted are
    evaluated, drawn by chance. Where they are off by more than was asked, all are evaluated; otherwise the estimate is
    at least twice what they are off.

    Args:
        surface: without a loss, or with some of a run that was stopped; it is filled.
        evaluate: puts the losses of the points of a mask into it.
        refine: the tolerance, as a share of the range of the losses.
    """
    shape, step = surface.losses.shape, COARSEST
    values, off = np.full(shape, np.nan), np.full(shape, np.inf)
    grid = _grid(shape, step)
    # Not surface.evaluated: a file may hold points of a later level.
    taken = _mask(shape, grid)
    evaluate(taken)
    values[taken] = surface.losses.numpy()[taken]
    error = spread = 0.0
    while step > 1:
        known = np.ix_(*grid)
        if not np.isfinite(values[known]).all():  # a hole, across which nothing can be interpolated
            break
        step //= 2
        finer = _grid(shape, step)
        places = np.ix_(*finer)
        low, high = float(values[taken].min()), float(values[taken].max())
        spread = high - low
        predicted = _interpolated(surface, values, grid, finer)
        around = _around(off, grid, finer)
        wanted = _mask(shape, finer)
        wanted[places] &= around > refine * spread / SAFETY
        wanted &= ~taken
        evaluate(wanted)
        taken |= wanted
        losses, now = surface.losses.numpy()[places], taken[places]
        values[places] = np.where(now, losses, predicted.clip(low, high))
        off[places] = np.where(now, np.abs(losses - predicted), around / 2)
        error = max(error, float(around[~now].max(initial=0.0)))
        grid = finer
    if np.isfinite(values).all() and not taken.all():
        spots = _spots(~taken)
        evaluate(spots)
        taken |= spots
        furthest = float(np.abs(surface.losses.numpy() - values)[spots].max())
        if furthest <= refine * spread:
            missing = torch.from_numpy(~taken)
            surface.losses[missing] = torch.from_numpy(values)[missing]
            surface.evaluated.copy_(torch.from_numpy(taken))
            return max(error, 2 * furthest) if missing.any() else 0.0
    evaluate(np.ones(shape, dtype=bool))
    return 0.0


def _spots(free: Mask) -> Mask:
    """A fiftieth of the points that are free, eight at least, drawn the same way every time."""
    places = np.flatnonzero(free)
    count = min(len(places), max(8, len(places) // 50))
    spots = np.zeros(free.size, dtype=bool)
    spots[np.random.default_rng(0).choice(places, count, replace=False)] = True
    return spots.reshape(free.shape)


def _grid(shape: Sequence[int], step: int) -> Grid:
    return [np.unique(np.append(np.arange(0, n, step), n - 1)) for n in shape]


def _mask(shape: Sequence[int], grid: Grid) -> Mask:
    mask = np.zeros(tuple(shape), dtype=bool)
    mask[np.ix_(*grid)] = True
    return mask


def _interpolated(
    surface: LossSurface, values: np.ndarray[Any, Any], grid: Grid, finer: Grid
) -> np.ndarray[Any, Any]:
    """Cubic splines along each direction in turn, of lower order where there are fewer than four points."""
    from scipy.interpolate import make_interp_spline

    axes = [surface.x.numpy()] if surface.y is None else [surface.x.numpy(), surface.y.numpy()]
    found = values[np.ix_(*grid)]
    for i, axis in enumerate(axes):
        known = axis[grid[i]]
        if len(known) > 1:
            spline = make_interp_spline(known, found, k=min(3, len(known) - 1), axis=i)
            found = spline(axis[finer[i]])
    return found


def _around(off: np.ndarray[Any, Any], grid: Grid, finer: Grid) -> np.ndarray[Any, Any]:
    """For each point of the finer grid, the largest value among its neighbours on the coarser one."""
    from scipy.ndimage import maximum_filter

    largest = maximum_filter(off[np.ix_(*grid)], size=3, mode="nearest")
    nearest = [
        np.abs(fine[:, None] - coarse[None]).argmin(1) for fine, coarse in zip(finer, grid, strict=True)
    ]
    return largest[np.ix_(*nearest)]
