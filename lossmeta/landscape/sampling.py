"""A loss surface, point by point or coarse to fine."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one
from lossmeta.landscape._objective import Objective
from lossmeta.landscape._points import Points
from lossmeta.landscape._refinement import Mask, refined
from lossmeta.landscape._surface_file import WHERE, SurfaceFile, fingerprint
from lossmeta.landscape.directions import Direction, check_directions, random_directions
from lossmeta.landscape.surface import LossSurface

SAME = 1e-5
"""By how much two evaluations of the same loss may differ, relative to it."""
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
        made = Points(objective, directions, together)
        file = SurfaceFile(
            path,
            surface,
            fingerprint(objective, directions, axes, refine, centre),
            check=lambda: _moved(made, centre),
        )
        file.write()
        sampler = _Sampler(surface, made, file, progress)
        with file.kept():
            if refine is None:
                sampler.evaluate(np.ones(surface.losses.shape, dtype=bool))
            else:
                surface.error = refined(surface, sampler.evaluate, refine)
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
    first, second = (objective.value() for _ in range(2))
    if math.isfinite(first) and abs(first - second) > SAME * abs(first):
        raise ValueError(
            f"{WHERE}: the loss must be the same whenever it is evaluated, got {first} and {second} at the same "
            "weights; look for random numbers that the model or loss_fn draws in evaluation mode"
        )
    return first


def _moved(points: Points, centre: float) -> str | None:
    """What is wrong where other points have changed something, as the statistics of an observer for quantisation."""
    after = points.centre()
    # Of a model that is sure the loss is small, and its rounding is that of the logits.
    dtypes = {p.dtype for p in points.objective.parameters.values()}
    exact = dtypes <= {torch.float64}
    rounding = 10 * torch.finfo(torch.float64 if exact else torch.float32).eps
    if not math.isfinite(centre) or abs(after - centre) <= SAME * abs(centre) + rounding:
        return None
    return (
        f"{WHERE}: the loss must depend on the weights alone, got {centre} before and {after} after other points at "
        "the same weights; look for buffers that move in evaluation mode"
    )


def _can_be_together(objective: Objective, directions: Sequence[Direction]) -> bool:
    try:
        Points(objective, directions, True)
    except (RuntimeError, TypeError, ValueError):
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
    file: SurfaceFile
    progress: bool

    def evaluate(self, wanted: Mask) -> None:
        """All points that are wanted; those that have been evaluated are left as they are."""
        surface = self.surface
        losses, evaluated = (t.numpy().reshape(-1) for t in (surface.losses, surface.evaluated))
        places = np.flatnonzero(wanted.reshape(-1) & ~evaluated)
        axes = [surface.x] if surface.y is None else [surface.x, surface.y]
        at = np.unravel_index(places, wanted.shape)
        coefficients = torch.stack([axis[torch.from_numpy(i)] for axis, i in zip(axes, at, strict=True)], 1)
        with self._shown(len(places)) as advance:

            def seen(number: int, loss: float) -> None:
                losses[places[number]] = loss
                evaluated[places[number]] = True
                advance()
                self.file.grown()

            self.points.evaluate(coefficients, seen)

    @contextmanager
    def _shown(self, count: int) -> Iterator[Callable[[], None]]:
        """What is to be called for each point that is done."""
        if not self.progress or not count:
            yield lambda: None
            return
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("loss surface", total=count)
            yield lambda: bar.advance(task)
