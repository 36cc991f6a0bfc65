"""The loss on a line or a plane through a model's weights."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lossmeta import _safetensors
from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one
from lossmeta.landscape._objective import Objective
from lossmeta.landscape._points import Points
from lossmeta.landscape.directions import Direction, random_directions
from lossmeta.ops import gaussian_curvature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHERE = "loss_surface"
FORMAT = 1
HEADER = "lossmeta_surface"
SAME = 1e-5
"""By how much two evaluations of the same loss may differ, relative to it."""
COARSEST = 8
"""Steps of the grid between the first points where ``refine`` is given."""
SAFETY = 4.0
"""What ``refine`` is divided by before a surplus counts as small."""

Span = float | tuple[float, float] | tuple[tuple[float, float], tuple[float, float]]


@dataclass
class LossSurface:
    r"""The loss :math:`L(\theta + a\,\delta_1 + b\,\delta_2)` on a grid.

    Attributes:
        losses: ``[G, H]``, or ``[G]`` on a line; float64, on the CPU. What is not finite is kept so.
        x: ``[G]``, the coefficients a; rows of ``losses``.
        y: ``[H]``, the coefficients b, or ``None`` on a line.
        evaluated: of the shape of ``losses``: whether the loss was evaluated there; it was interpolated elsewhere.
        samples: that the loss is a mean over.
        error: with ``refine``, the estimate of the largest error of interpolation; 0 where all was evaluated.
    """

    losses: Tensor
    x: Tensor
    y: Tensor | None
    evaluated: Tensor
    samples: int
    error: float = 0.0

    @property
    def holes(self) -> int:
        """How many of the losses are not finite."""
        return int((~self.losses.isfinite()).sum())

    def curvature(self) -> Tensor:
        """Gaussian curvature of the graph at the interior points, ``[G - 2, H - 2]``; NaN beside holes.

        Raises:
            ValueError: for a line, and fewer than three points in a row.
        """
        if self.y is None or min(self.losses.shape) < 3:
            raise ValueError(
                f"LossSurface: curvature needs a plane of at least 3 × 3 points, got {list(self.losses.shape)}"
            )
        finite = self.losses.where(self.losses.isfinite(), torch.nan)
        return gaussian_curvature(finite, _spacing(self.x), _spacing(self.y))

    def nonconvexity(self) -> float:
        """The mean Gaussian curvature of the interior points, the index of ALA's figure 4; holes left out."""
        return float(self.curvature().nanmean())

    def mean_absolute_curvature(self) -> float:
        """The mean of |K| over the interior points, holes left out."""
        return float(self.curvature().abs().nanmean())

    def saddle_share(self) -> float:
        """The share of the interior points with negative curvature, holes left out."""
        curvature = self.curvature()
        known = curvature[~curvature.isnan()]
        return float((known < 0).double().mean()) if len(known) else math.nan

    def plot(self, *, kind: str = "contour", path: Tensor | None = None, title: str = "") -> Figure:
        """A figure, see :func:`lossmeta.landscape.plot_surface`."""
        from lossmeta.landscape.plots import plot_surface

        return plot_surface(self, kind=kind, path=path, title=title)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, in one step.

        Raises:
            OSError: where it cannot be written.
        """
        _write(path, self, "")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> LossSurface:
        """What :meth:`save` wrote, or :func:`loss_surface` where it was finished.

        Raises:
            ValueError: for another file, one that is damaged, and a surface that is not finished.
            OSError: where there is none.
        """
        surface, _, finished = _read(path)
        if not finished:
            raise ValueError(
                f"LossSurface: {os.fspath(path)} must be finished, got one that was stopped; call loss_surface with "
                "this path again"
            )
        return surface


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
            are read once and kept on the model's device, so that all points see the same samples.
        directions: one or two, see :func:`random_directions`, :func:`line` and :func:`pca_directions`; by default two
            random ones with filter normalisation.
        span: the coefficients go from -span to span; or from the first to the second of two numbers; or a pair of such
            pairs, one for each direction.
        points: G, or G and H.
        refine: share of the range of the losses, 0.01 say: the grid is sampled coarse to fine, and points where
            interpolation is good to that share, by what it was off at their neighbours, are not evaluated.
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
        OSError: where the file cannot be written; what was written before stays.

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
    _check_directions(objective, directions)
    axes = _axes(len(directions), span, points)
    if refine is not None and not 0 < refine < 1:
        raise ValueError(f"{WHERE}: refine must lie in (0, 1), got {refine}")
    with objective.quiet():
        centre = _centre(objective)
        if together is None:
            together = objective.device.type == "cuda" and _can_be_together(objective, directions)
        surface = _empty(axes, objective.samples)
        file = _File(path, surface, _fingerprint(objective, directions, axes, refine, centre))
        sampler = _Sampler(surface, Points(objective, directions, together), file, progress)
        with file.kept():
            if refine is None:
                sampler.evaluate(np.ones(surface.losses.shape, dtype=bool))
            else:
                surface.error = _refined(sampler, refine)
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


def _check_directions(objective: Objective, directions: Sequence[Direction]) -> None:
    if len(directions) not in (1, 2):
        raise ValueError(f"{WHERE}: directions must be one or two, got {len(directions)}")
    for i, direction in enumerate(directions):
        wrong = [
            name
            for name, p in objective.parameters.items()
            if name not in direction or direction[name].shape != p.shape
        ]
        if wrong or len(direction) != len(objective.parameters):
            extra = [n for n in direction if n not in objective.parameters]
            raise ValueError(
                f"{WHERE}: directions must have a tensor like each trainable parameter, got direction {i} without "
                f"{wrong[:3]} and with others {extra[:3]}; make it of this model as it is"
            )
        if not all(bool(t.isfinite().all()) for t in direction.values()):
            raise ValueError(f"{WHERE}: directions must be finite, got direction {i}, which is not")
        if not any(bool(t.any()) for t in direction.values()):
            raise ValueError(f"{WHERE}: directions must lead somewhere, got direction {i}, which is 0")


def _axes(count: int, span: Span, points: int | tuple[int, int]) -> list[Tensor]:
    numbers = (points,) * count if isinstance(points, int) else tuple(points)
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
            raise ValueError(f"{WHERE}: span must lead from a smaller to a larger finite number, got {low}, {high}")
    return [torch.linspace(*pair, n, dtype=torch.float64) for pair, n in zip(ends, numbers, strict=True)]


def _centre(objective: Objective) -> float:
    """The loss at the weights as they are, which must be the same again."""
    first, second = (float(objective.value(dict(objective.parameters))) for _ in range(2))
    if math.isfinite(first) and abs(first - second) > SAME * abs(first):
        raise ValueError(
            f"{WHERE}: the loss must be the same whenever it is evaluated, got {first} and {second} at the same weights; "
            "look for random numbers that the model or loss_fn draws in evaluation mode"
        )
    return first


def _can_be_together(objective: Objective, directions: Sequence[Direction]) -> bool:
    try:
        next(Points(objective, directions, True).losses(torch.zeros(2, len(directions), dtype=torch.float64)))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _spacing(axis: Tensor) -> float:
    return float(axis[-1] - axis[0]) / (len(axis) - 1)


def _empty(axes: Sequence[Tensor], samples: int) -> LossSurface:
    shape = [len(axis) for axis in axes]
    return LossSurface(
        torch.full(shape, torch.nan, dtype=torch.float64),
        axes[0],
        axes[1] if len(axes) == 2 else None,
        torch.zeros(shape, dtype=torch.bool),
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
    """Samples coarse to fine; gives the estimate of the largest error of what is interpolated.

    On each level the points of the next one are predicted by cubic splines. A point is evaluated where the predictions
    around it were off by more than the tolerance on the level before; where they were not, it keeps the prediction, and
    an eighth of what they were off is taken for its error, half the order at which that of smooth functions falls.
    """
    surface = sampler.surface
    shape, step = surface.losses.shape, COARSEST
    values = np.full(shape, np.nan)
    off = np.full(shape, np.inf)
    grid = _grid(shape, step)
    sampler.evaluate(_mask(shape, grid))
    error = 0.0
    while step > 1:
        known = np.ix_(*grid)
        evaluated = surface.evaluated.numpy()
        values[known] = np.where(evaluated[known], surface.losses.numpy()[known], values[known])
        if not np.isfinite(values[known]).all():  # a hole, across which nothing can be interpolated
            sampler.evaluate(np.ones(shape, dtype=bool))
            return 0.0
        step //= 2
        finer = _grid(shape, step)
        predicted = _interpolated(surface, values, grid, finer)
        wanted, places = _mask(shape, finer), np.ix_(*finer)
        spread = float(np.nanmax(values[known]) - np.nanmin(values[known]))
        around = _around(off, grid, finer)
        wanted[places] &= around > refine * spread / SAFETY
        sampler.evaluate(wanted)
        evaluated, losses = surface.evaluated.numpy(), surface.losses.numpy()
        found = np.where(evaluated[places], losses[places], predicted)
        off[places] = np.where(evaluated[places], np.abs(losses[places] - predicted), around / 8)
        values[places] = found
        missing = ~evaluated[places]
        error = max(error, float((around / 8)[missing].max(initial=0.0)))
        grid = finer
    places = np.ix_(*grid)
    missing = ~surface.evaluated.numpy()
    surface.losses[torch.from_numpy(missing)] = torch.from_numpy(values[missing])
    return error if missing.any() else 0.0


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
    nearest = [np.abs(fine[:, None] - coarse[None]).argmin(1) for fine, coarse in zip(finer, grid, strict=True)]
    return largest[np.ix_(*nearest)]


# ---- The file.


def _fingerprint(
    objective: Objective, directions: Sequence[Direction], axes: Sequence[Tensor], refine: float | None, centre: float
) -> dict[str, Any]:
    """What two surfaces of one file must have in common."""
    products = [
        sum(float((a[n].double() * b[n].double()).sum()) for n in a)
        for i, a in enumerate(directions)
        for b in directions[: i + 1]
    ]
    weights = sum(float(p.detach().double().square().sum()) for p in objective.parameters.values())
    ends = [[float(axis[0]), float(axis[-1]), len(axis)] for axis in axes]
    return {
        "loss": centre if math.isfinite(centre) else str(centre),
        "weights": weights,
        "directions": products,
        "axes": ends,
        "samples": objective.samples,
        "refine": refine,
        "autocast": str(objective.autocast),
    }


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
        found, fingerprint, _ = _read(self.path)
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
        import time

        if self.path is not None and time.monotonic() - self._written > 5.0:
            self.write()
            self._written = time.monotonic()

    def write(self) -> None:
        if self.path is not None:
            _write(self.path, self.surface, json.dumps(self.fingerprint), self.finished)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes what there is at the end, however it comes."""
        try:
            yield
        finally:
            self.write()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return bool(a == b)


def _write(
    path: str | os.PathLike[str], surface: LossSurface, fingerprint: str, finished: bool = True
) -> None:
    tensors = {"losses": surface.losses, "evaluated": surface.evaluated, "x": surface.x}
    if surface.y is not None:
        tensors["y"] = surface.y
    description = {
        "format": FORMAT,
        "samples": surface.samples,
        "error": surface.error,
        "finished": finished,
        "fingerprint": fingerprint,
    }
    _safetensors.write(path, tensors, HEADER, json.dumps(description))


def _read(path: str | os.PathLike[str]) -> tuple[LossSurface, dict[str, Any], bool]:
    where = f"LossSurface: {os.fspath(path)}"
    description, tensors = _safetensors.read(where, path, HEADER, FORMAT)
    try:
        losses, evaluated, x, y = (tensors.get(n) for n in ("losses", "evaluated", "x", "y"))
        shape = [len(axis) for axis in (x, y) if axis is not None]
        if losses is None or evaluated is None or x is None:
            raise KeyError("losses, evaluated or x")
        if list(losses.shape) != shape or evaluated.shape != losses.shape:
            raise ValueError(f"losses {list(losses.shape)} on axes of {shape}")
        surface = LossSurface(
            losses.double(), x.double(), y, evaluated.bool(), int(description["samples"]), float(description["error"])
        )
        fingerprint = json.loads(description["fingerprint"] or "{}")
        return surface, fingerprint, bool(description["finished"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} must be a surface that was saved whole, got one without {error}; remove it") from error
