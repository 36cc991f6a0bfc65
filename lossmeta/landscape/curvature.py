"""Curvature of a loss surface without a grid, and its record over a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one
from lossmeta.landscape._objective import Objective, kept
from lossmeta.landscape.directions import Direction, check_directions, random_directions
from lossmeta.landscape.sampling import Span, loss_surface
from lossmeta.landscape.surface import LossSurface


@dataclass(frozen=True)
class Curvature:
    r"""Derivatives of :math:`f(a, b) = L(\theta + a\,\delta_1 + b\,\delta_2)` at some points.

    Attributes:
        loss: ``[K]``, f.
        gradient: ``[K, 2]``, :math:`f_a, f_b`.
        hessian: ``[K, 2, 2]``, the second derivatives.
    """

    loss: Tensor
    gradient: Tensor
    hessian: Tensor

    @property
    def gaussian(self) -> Tensor:
        r"""``[K]``, :math:`(f_{aa} f_{bb} - f_{ab}^2) / (1 + f_a^2 + f_b^2)^2`."""
        steep = (1 + self.gradient.square().sum(1)).square()
        determinant = self.hessian[:, 0, 0] * self.hessian[:, 1, 1] - self.hessian[:, 0, 1] ** 2
        return determinant / steep


def exact_curvature(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    directions: Sequence[Direction],
    at: Tensor | None = None,
    *,
    output: Output = None,
) -> Curvature:
    r"""Gaussian curvature of the graph of the loss over a plane, by exact derivatives along two directions.

    .. math:: f_a = \langle \nabla L, \delta_1 \rangle, \qquad f_{ab} = \langle \delta_1, \nabla^2 L\, \delta_2 \rangle

    It needs no grid, and costs two backward passes and two second ones over the data for each point. Where the model
    has kinks, as with ReLU, it is that of the piece that the weights are in, while differences on a grid see the kinks
    too.

    Args:
        model: as for :func:`loss_surface`.
        loss_fn: as for :func:`loss_surface`.
        data: as for :func:`loss_surface`.
        directions: two.
        at: ``[K, 2]``, coefficients a and b; the model itself by default.
        output: as for :func:`loss_surface`.

    Returns:
        float64, on the CPU.

    Raises:
        ValueError: for other than two directions or such that do not fit the model, ``at`` of another shape, and as
            :func:`loss_surface`.
        TypeError: for data that is neither a pair nor batches.

    Example:
        >>> model, samples = torch.nn.Linear(4, 3), (torch.randn(20, 4), torch.randint(3, (20,)))
        >>> found = exact_curvature(model, torch.nn.functional.cross_entropy, samples, random_directions(model))
        >>> bool(found.gaussian >= 0)  # the loss of a linear model is convex
        True
    """
    where = "exact_curvature"
    objective = Objective(where, model, loss_fn, data, output=output)
    if len(directions) != 2:
        raise ValueError(f"{where}: directions must be two, got {len(directions)}")
    check_directions(where, objective.parameters, directions)
    at = torch.zeros(1, 2, dtype=torch.float64, device="cpu") if at is None else at.double().cpu()
    if at.dim() != 2 or at.shape[1] != 2:
        raise ValueError(f"{where}: at must have shape [K, 2], got {list(at.shape)}")
    one, two = ({n: d[n].to(p) for n, p in objective.parameters.items()} for d in directions)
    losses, gradients, hessians = [], [], []
    with objective.quiet():
        for a, b in at.tolist():
            point = {n: p.detach() + a * one[n] + b * two[n] for n, p in objective.parameters.items()}
            losses.append(objective.value(point))
            slope = objective.gradient(point)
            gradients.append([_dot(slope, one), _dot(slope, two)])
            of_one, of_two = objective.hessian_products([one, two], point)
            mixed = (_dot(of_one, two) + _dot(of_two, one)) / 2
            hessians.append([[_dot(of_one, one), mixed], [mixed, _dot(of_two, two)]])
    return Curvature(
        *(torch.tensor(x, dtype=torch.float64, device="cpu") for x in (losses, gradients, hessians))
    )


def _dot(a: Direction, b: Direction) -> float:
    return float(sum((x.double() * b[n].double()).sum() for n, x in a.items()))


@dataclass
class CurvatureTracker:
    """Records the curvature of the surface around a model while it trains, as ALA's figure 4.

    The directions are the same random numbers in every epoch, scaled by the weights of that epoch.

    Args:
        loss_fn: as for :func:`loss_surface`; the loss that is to be compared, whatever the training descends.
        data: as for :func:`loss_surface`; read once.
        every: epochs from one record to the next.
        points: of the grid, in each direction.
        span: of the grid.
        seed: of the directions.
        output: as for :func:`loss_surface`.

    Attributes:
        epochs: of the records.
        surfaces: one for each of them.

    Raises:
        ValueError: for ``every`` below 1, fewer than three points, and as :func:`loss_surface`.

    Example:
        >>> model, samples = torch.nn.Linear(4, 3), (torch.randn(20, 4), torch.randint(3, (20,)))
        >>> tracker = CurvatureTracker(torch.nn.functional.cross_entropy, samples, every=5, points=5)
        >>> for epoch in range(10):
        ...     tracker.record(model, epoch)  # after each epoch of a training
        >>> tracker.epochs, len(tracker.nonconvexity)
        ([0, 5], 2)
    """

    loss_fn: Callable[..., Tensor] | None
    data: Any
    every: int = 1
    points: int = 11
    span: Span = 0.5
    seed: int = 0
    output: Output = None
    epochs: list[int] = field(default_factory=list)
    surfaces: list[LossSurface] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_at_least_one("CurvatureTracker", "every", self.every)
        self.data = kept(self.data)  # the same samples in every record
        if self.points < 3:
            raise ValueError(f"CurvatureTracker: points must be at least 3, got {self.points}")

    def record(self, model: nn.Module, epoch: int) -> LossSurface | None:
        """The surface around the model, if one is due in this epoch."""
        if epoch % self.every:
            return None
        surface = loss_surface(
            model,
            self.loss_fn,
            self.data,
            directions=random_directions(model, seed=self.seed),
            span=self.span,
            points=self.points,
            output=self.output,
        )
        self.epochs.append(epoch)
        self.surfaces.append(surface)
        return surface

    @property
    def nonconvexity(self) -> list[float]:
        """The mean Gaussian curvature of each record."""
        return [surface.nonconvexity() for surface in self.surfaces]

    @property
    def mean_absolute_curvature(self) -> list[float]:
        """The mean of |K| of each record."""
        return [surface.mean_absolute_curvature() for surface in self.surfaces]

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self.epochs), "surfaces": [vars(surface).copy() for surface in self.surfaces]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = list(state["epochs"])
        self.surfaces = [LossSurface(**found) for found in state["surfaces"]]
