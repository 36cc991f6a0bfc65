"""A loss surface, point by point or coarse to fine."""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one
from lossmeta.landscape._objective import Objective
from lossmeta.landscape._points import Points
from lossmeta.landscape.directions import Direction, check_directions, random_directions
from lossmeta.landscape.surface import LossSurface, read, write

WHERE = "loss_surface"
SAME = 1e-5
"""By how much two evaluations of the same loss may differ, relative to it."""
COARSEST = 8
"""Steps of the grid between the first points where ``refine`` is given."""
SAFETY = 4.0
"""What ``refine`` is divided by before a surplus counts as small."""

Span = float | tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]


def loss_surface(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    *,
    directions: Sequence[Direction] | None = None,
    span: Span = 1.0,
    points: int | tuple[int, int] = 51,
    refine: float | None = None,
    output: Output = None,
    autocast: torch.dtype | None = None,
    together: bool | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    seed: int = 0,
) -> LossSurface:
    r"""Evaluates the mean loss on a grid around a model's weights.

    .. math:: L_{ij} = L(\theta + a_i\,\delta_1 + b_j\,\delta_2)

    The model is in evaluation mode meanwhile. Afterwards, or after an exception or an interrupt, weights, buffers, mode
    and random numbers are as before. Only parameters with ``requires_grad`` move.

    Args:
        model: any module; of ``DistributedDataParallel`` the module inside. Tied parameters move once.
        loss_fn: ``loss_fn(prediction, target) -> []``, the mean over the samples of a batch; where the batches are
            mappings, ``loss_fn(output, batch)``; ``None`` takes the ``loss`` of the output, as transformers give it.
        data: a pair (inputs, target), or batches: pairs, or mappings that the model takes as keyword arguments. They
            are read once and kept on the model's device, so that all points see the same samples. Batches count by
            their samples; where a loss is a mean over something else, as over labels that are not ignored, give one.
        directions: one or two, see :func:`random_directions`, :func:`line` and :func:`pca_directions`, or the vectors
            of :func:`hessian_eigenvalues`; by default two random ones with filter normalisation.
        span: the coefficients go from -span to span; or from the first to the second of two numbers; or a pair of such
            pairs, one for each direction.
        points: G, or G and H.
        refine: share of the range of the losses, 0.01 say: the grid is sampled coarse to fine, and points where
            interpolation is good to that share, by what it was off at their neighbours and at points drawn by chance,
            are not evaluated. That is for pictures. What is narrower than an eighth of the grid may be missed, and
            curvature of a range far wider than what it is asked for is that of the interpolation.
        output: what of the model's output is the prediction: a key, a position or a function.
        autocast: dtype under which the model runs, ``torch.bfloat16``.
        together: whether many points go through the model in one call, by ``torch.func.vmap``; by default on a GPU,
            where the model and the loss can be batched. On a CPU that saves nothing.
        path: a safetensors file that is written as the surface grows. Where it is there already, what is in it is not
            evaluated again.
        progress: whether to show a bar.
        seed: of the default directions.

    Returns:
        The surface. Points at which the loss is not finite are kept so, and said in a warning.

    Raises:
        ValueError: for options outside the values above, directions that do not fit the model, a model without
            trainable parameters or with such that are sparse, sharded or not real, no data, a loss that differs between
            two evaluations at the same weights, and a file of another surface.
        TypeError: for data that is neither a pair nor batches.
        OSError: where the file cannot be written at the start; later that is a warning.

    Source:
        Li, Xu, Taylor, Studer and Goldstein, "Visualizing the Loss Landscape of Neural Nets" (2018).

    Example:
        >>> model, samples = torch.nn.Linear(4, 3), (torch.randn(20, 4), torch.randint(3, (20,)))
        >>> surface = loss_surface(model, torch.nn.functional.cross_entropy, samples, points=11)
        >>> surface.losses.shape, surface.curvature().shape
        (torch.Size([11, 11]), torch.Size([9, 9]))
    """
    objective = Objective(WHERE, model, loss_fn, data, output=output, autocast=autocast)
    if directions is None:
        directions = random_directions(model, 2, seed=seed)
    if len(directions) not in (1, 2):
        raise ValueError(f"{WHERE}: directions must be one or two, got {len(directions)}")
    check_directions(WHERE, objective.parameters, directions)
    axes = _axes(len(directions), span, points)
    if refine is not None and not 0 < refine < 1:
        raise ValueError(f"{WHERE}: refine must lie in (0, 1), got {refine}")
    with objective.quiet():
        centre = _centre(objective)
        if together is None:
            together = objective.device.type == "cuda" and _can_be_together(objective, directions)
        surface = _empty(axes, objective.samples)
        file = _File(path, surface, _fingerprint(objective, directions, axes, refine, centre))
        file.write()
        sampler = _Sampler(surface, Points(objective, directions, together), file, progress)
        with file.kept():
            if refine is None:
                sampler.evaluate(np.ones(surface.losses.shape, dtype=bool))
            else:
                surface.error = _refined(sampler, refine)
            _check_unmoved(objective, centre)
            file.finished = True
    if surface.holes:
        warnings.warn(
            f"{WHERE}: the loss must be finite to be drawn, got {surface.holes} points of {surface.losses.numel()} at "
            "which it is not; they are kept as they are; a smaller span may do without them",
            RuntimeWarning,
            stacklevel=2,
        )
    return surface


# ---- What is asked for.


def _axes(count: int, span: Span, points: int | tuple[int, int]) -> list[Tensor]:
    numbers = tuple(map(index, points)) if isinstance(points, Sequence) else (index(points),) * count
    if len(numbers) != count:
        raise ValueError(f"{WHERE}: points must be one number or {count}, got {len(numbers)}")
    ends: Any = span
    if isinstance(span, (int, float)):
        ends = ((-span, span),) * count
    elif all(isinstance(s, (int, float)) for s in span):
        ends = (span,) * count
    if len(ends) != count or any(len(pair) != 2 for pair in ends):
        raise ValueError(f"{WHERE}: span must be a number, a pair, or a pair for each direction, got {span}")
    for (low, high), number in zip(ends, numbers, strict=True):
        check_at_least_one(WHERE, "points", number)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"{WHERE}: span must lead from a smaller to a larger finite number, got {low}, {high}"
            )
    return [
        torch.linspace(float(low), float(high), n, dtype=torch.float64, device="cpu")
        if n > 1
        else torch.tensor([(low + high) / 2], dtype=torch.float64, device="cpu")
        for (low, high), n in zip(ends, numbers, strict=True)
    ]


def _centre(objective: Objective) -> float:
    """The loss at the weights as they are, which must be the same again."""
    first, second = (float(objective.value()) for _ in range(2))
    if math.isfinite(first) and abs(first - second) > SAME * abs(first):
        raise ValueError(
            f"{WHERE}: the loss must be the same whenever it is evaluated, got {first} and {second} at the same "
            "weights; look for random numbers that the model or loss_fn draws in evaluation mode"
        )
    return first


def _check_unmoved(objective: Objective, centre: float) -> None:
    """Refuses what other points have changed, as the statistics of an observer for quantisation."""
    after = float(objective.value())
    if math.isfinite(centre) and not abs(after - centre) <= SAME * abs(centre):
        raise ValueError(
            f"{WHERE}: the loss must depend on the weights alone, got {centre} before and {after} after the surface at "
            "the same weights; look for buffers that move in evaluation mode"
        )


def _can_be_together(objective: Objective, directions: Sequence[Direction]) -> bool:
    try:
        Points(objective, directions, True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _empty(axes: Sequence[Tensor], samples: int) -> LossSurface:
    shape = [len(axis) for axis in axes]
    return LossSurface(
        torch.full(shape, torch.nan, dtype=torch.float64, device="cpu"),
        axes[0],
        axes[1] if len(axes) == 2 else None,
        torch.zeros(shape, dtype=torch.bool, device="cpu"),
        samples,
    )


# ---- Sampling.


@dataclass
class _Sampler:
    """Evaluates points of a surface that are not known yet."""

    surface: LossSurface
    points: Points
    file: _File
    progress: bool

    def evaluate(self, wanted: np.ndarray[Any, Any]) -> None:
        """All points that are wanted; those that have been evaluated are left as they are."""
        surface = self.surface
        places = (torch.from_numpy(wanted) & ~surface.evaluated).nonzero()
        axes = [surface.x] if surface.y is None else [surface.x, surface.y]
        coefficients = torch.stack([axis[places[:, i]] for i, axis in enumerate(axes)], 1)
        start = 0
        for losses in self._shown(self.points.losses(coefficients), len(places)):
            at = tuple(places[start : start + len(losses)].T)
            surface.losses[at] = losses
            surface.evaluated[at] = True
            start += len(losses)
            self.file.grown()

    def _shown(self, chunks: Iterator[Tensor], count: int) -> Iterator[Tensor]:
        if not self.progress or not count:
            yield from chunks
            return
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("loss surface", total=count)
            for losses in chunks:
                yield losses
                bar.advance(task, len(losses))


def _refined(sampler: _Sampler, refine: float) -> float:
    """Samples coarse to fine; gives an estimate of the largest error of what is interpolated.

    On each level the points of the next one are predicted by cubic splines, within the range of what has been
    evaluated. A point is evaluated where the predictions around it were off by more than the tolerance on the level
    before. Where they were not it keeps the prediction. What they were off is taken for its error, and half of that for
    the next level, on which a smooth function has a sixteenth. In the end some of the points that were predicted are
    evaluated, drawn by chance. Where they are off by more than was asked, all are evaluated; otherwise the estimate is
    at least twice what they are off.
    """
    surface = sampler.surface
    shape, step = surface.losses.shape, COARSEST
    values, off = np.full(shape, np.nan), np.full(shape, np.inf)
    grid = _grid(shape, step)
    # Not surface.evaluated: a file may hold points of a later level.
    taken = _mask(shape, grid)
    sampler.evaluate(taken)
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
        sampler.evaluate(wanted)
        taken |= wanted
        losses, now = surface.losses.numpy()[places], taken[places]
        values[places] = np.where(now, losses, predicted.clip(low, high))
        off[places] = np.where(now, np.abs(losses - predicted), around / 2)
        error = max(error, float(around[~now].max(initial=0.0)))
        grid = finer
    if np.isfinite(values).all() and not taken.all():
        spots = _spots(~taken)
        sampler.evaluate(spots)
        taken |= spots
        furthest = float(np.abs(surface.losses.numpy() - values)[spots].max())
        if furthest <= refine * spread:
            missing = torch.from_numpy(~taken)
            surface.losses[missing] = torch.from_numpy(values)[missing]
            surface.evaluated.copy_(torch.from_numpy(taken))
            return max(error, 2 * furthest) if missing.any() else 0.0
    sampler.evaluate(np.ones(shape, dtype=bool))
    return 0.0


def _spots(free: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A fiftieth of the points that are free, eight at least, drawn the same way every time."""
    places = np.flatnonzero(free)
    count = min(len(places), max(8, len(places) // 50))
    spots = np.zeros(free.size, dtype=bool)
    spots[np.random.default_rng(0).choice(places, count, replace=False)] = True
    return spots.reshape(free.shape)


Grid = list[np.ndarray[Any, Any]]


def _grid(shape: Sequence[int], step: int) -> Grid:
    return [np.unique(np.append(np.arange(0, n, step), n - 1)) for n in shape]


def _mask(shape: Sequence[int], grid: Grid) -> np.ndarray[Any, Any]:
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


# ---- The file.


def _fingerprint(
    objective: Objective,
    directions: Sequence[Direction],
    axes: Sequence[Tensor],
    refine: float | None,
    centre: float,
) -> dict[str, Any]:
    """What two surfaces of one file must have in common."""
    ends = [[float(axis[0]), float(axis[-1]), len(axis)] for axis in axes]
    return {
        "loss": centre if math.isfinite(centre) else str(centre),
        "weights": _digest(objective.parameters),
        "directions": [_digest(direction) for direction in directions],
        "axes": ends,
        "samples": objective.samples,
        "refine": refine,
        "autocast": str(objective.autocast),
    }


def _digest(tensors: Direction) -> str:
    """Of names and bits."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        for piece in t.detach().flatten().split(2**20):
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass
class _File:
    """Where a surface is kept while it grows."""

    path: str | os.PathLike[str] | None
    surface: LossSurface
    fingerprint: dict[str, Any]
    finished: bool = False
    _written: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.path is None or not os.path.exists(self.path):
            return
        found, fingerprint, _ = read(self.path)
        differing = [k for k, v in self.fingerprint.items() if not _same(v, fingerprint.get(k))]
        if differing:
            raise ValueError(
                f"{WHERE}: {os.fspath(self.path)} must hold the same surface, got one that differs in "
                f"{', '.join(differing)}; choose another path or remove it"
            )
        self.surface.losses.copy_(found.losses)
        self.surface.evaluated.copy_(found.evaluated)

    def grown(self) -> None:
        """Writes what there is, from time to time."""
        if self.path is not None and time.monotonic() - self._written > 5.0:
            self._try_to_write()
            self._written = time.monotonic()

    def write(self) -> None:
        if self.path is not None:
            write(self.path, self.surface, self.fingerprint, self.finished)

    def _try_to_write(self) -> None:
        """A disk that has become full does not end what is computed."""
        try:
            self.write()
        except OSError as error:
            warnings.warn(
                f"{WHERE}: {os.fspath(self.path or '')} could not be written ({error}); the surface is returned all "
                "the same",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes what there is at the end, however it comes."""
        try:
            yield
        finally:
            self._try_to_write()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return bool(a == b)
