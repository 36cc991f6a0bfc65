"""The loss at many points around a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lossmeta.landscape._objective import Objective, Weights
from lossmeta.landscape.directions import Direction
from lossmeta.ops import perturb

BYTES = 16 * 2**20
"""Of the weights at points that are made at once; where one has more, they are made one by one."""
MOST = 64
AGREE = 1e-3
"""By how much a loss may be off where many points go through the model in one call, relative to it."""


class Points:
    """Evaluates an objective at ``weights + sum_k c_k direction_k``.

    Beside the model and the directions it keeps the weights of one point, or of several where they are small. The
    model's parameters are put there, not copied.

    Args:
        objective: to be used within its :meth:`~Objective.quiet`.
        directions: K of them.
        together: whether all points of a chunk go through the model in one call, by ``torch.func.vmap``.
    """

    def __init__(self, objective: Objective, directions: Sequence[Direction], together: bool) -> None:
        self.objective, self.together, self._count = objective, together, len(directions)
        parameters = objective.parameters
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        self.chunk = max(1, min(MOST, BYTES // size))
        self._single = directions if self.chunk == 1 else []
        self._directions = {
            name: torch.stack([d[name].to(p).flatten() for d in directions])
            for name, p in parameters.items()
            if not self._single
        }
        self._made: Weights = {name: p.new_empty((self.chunk, p.numel())) for name, p in parameters.items()}
        if together:
            self._check_together()

    @torch.no_grad()
    def evaluate(self, coefficients: Tensor, seen: Callable[[int, float], None]) -> None:
        """The loss at the points ``[B, K]``, one after the other.

        Args:
            coefficients: of the points.
            seen: is told the number of a point and its loss as soon as it is known.
        """
        for start in range(0, len(coefficients), self.chunk):
            chunk = coefficients[start : start + self.chunk]
            made = self._points(chunk)
            if self.together:
                for i, loss in enumerate(self._losses_together(made, len(chunk)).tolist()):
                    seen(start + i, loss)
                continue
            rows = [(self.objective.parameters[name], w.unbind()) for name, w in made.items()]
            with self.objective.at(None):  # which puts the model's own weights back
                for i in range(len(chunk)):
                    for p, values in rows:
                        p.data = values[i]
                    seen(start + i, float(self.objective.value_here()))

    def _check_together(self) -> None:
        """At points away from the model: a loss that has weights from elsewhere would see them unmoved."""
        away = torch.full((min(2, self.chunk), self._count), 0.5, dtype=torch.float64, device="cpu")
        made = self._points(away)
        found = float(self._losses_together(made, len(away))[0])
        alone = float(self.objective.value({name: w[0] for name, w in made.items()}))
        if alone == alone and not abs(found - alone) <= AGREE * max(abs(alone), 1e-6):
            raise ValueError(
                f"{self.objective.where}: with together=True the loss must come from the model's parameters alone, got "
                f"{found} in one call and {alone} on its own; use together=False"
            )

    @torch.no_grad()
    def _losses_together(self, made: Weights, count: int) -> Tensor:
        total = torch.zeros(count, dtype=torch.float64, device=self.objective.device)
        for batch, share in self.objective:
            of_batch = torch.func.vmap(lambda w, batch=batch: self.objective.functional_loss(w, batch))(made)
            total += share * of_batch.double()
        return total

    @torch.no_grad()
    def _points(self, coefficients: Tensor) -> Weights:
        """The weights at some points, ``[B, ...]``."""
        found = {}
        for name, p in self.objective.parameters.items():
            base, made = p.detach(), self._made[name][: len(coefficients)]
            if self._single:  # in the place of a copy of all directions side by side, as many passes
                point = made.view(base.shape).copy_(base)
                for direction, c in zip(self._single, coefficients[0].tolist(), strict=True):
                    point.add_(direction[name].to(base), alpha=c)
            else:
                perturb(base.reshape(-1), self._directions[name], coefficients.to(base.device), out=made)
            found[name] = made.view(len(coefficients), *base.shape)
        return found
