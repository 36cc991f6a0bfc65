"""The loss at many points around a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lossmeta.landscape._affine_layers import AffineLayers
from lossmeta.landscape._few_classes import by_class
from lossmeta.landscape._objective import Objective, Weights
from lossmeta.landscape.directions import Direction
from lossmeta.ops import perturb

BYTES = 16 * 2**20
"""Of the weights at points that are made at once; where one has more, they are made one by one."""
MOST = 64
AGREE = 1e-3
"""By how much a loss may be off where many points go through the model in one call, relative to it."""
HEAP = 31 * 2**20
"""Bytes of a block. Once it is freed, glibc keeps freed blocks up to that size (at most 32 MiB) for the next point.
Otherwise it gives them back, and the kernel clears their pages anew for each, in the time of the arithmetic."""
WORTH = 16
"""Points from which on it is worth three more to find the layers of :class:`AffineLayers`."""
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
"""By how much a loss may be off with them, relative to it."""


class Points:
    """Evaluates an objective at ``weights + sum_k c_k direction_k``.

    Beside the model and the directions it keeps the weights of one point, or of several where they are small. The
    model's parameters are put there, not copied. Where points are evaluated one by one, :class:`AffineLayers` and
    :func:`by_class` spare work, if the loss at a point far from the model is the same to rounding.

    Args:
        objective: to be used within its :meth:`~Objective.quiet`.
        directions: K of them.
        together: whether all points of a chunk go through the model in one call, by ``torch.func.vmap``.
    """

    def __init__(self, objective: Objective, directions: Sequence[Direction], together: bool) -> None:
        self.objective, self.together, self._count = objective, together, len(directions)
        self._given = directions
        parameters = objective.parameters
        self._own = {name: p.data for name, p in parameters.items()}
        self._affine: AffineLayers | None = None
        self._looked = False
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        self.chunk = max(1, min(MOST, BYTES // size))
        self._single = directions if self.chunk == 1 else []
        self._directions = {
            name: torch.stack([d[name].to(p).flatten() for d in directions])
            for name, p in parameters.items()
            if not self._single
        }
        self._made = self._room()
        if together:
            self._check_together()

    @torch.no_grad()
    def evaluate(self, coefficients: Tensor, seen: Callable[[int, float], None]) -> None:
        """The loss at the points ``[B, K]``, one after the other.

        Args:
            coefficients: of the points.
            seen: is told the number of a point and its loss as soon as it is known.

        Raises:
            torch.OutOfMemoryError: where there is no room for one point.
        """
        if self.together:
            self._evaluate_together(coefficients, seen)
            return
        if not self._looked and len(coefficients) >= WORTH:
            self._looked = True
            self._affine = self._found_affine(coefficients)
        torch.empty(HEAP, dtype=torch.uint8, device="cpu")
        with self._quick():
            for start in range(0, len(coefficients), self.chunk):
                chunk = coefficients[start : start + self.chunk]
                rows = [(self.objective.parameters[n], w.unbind()) for n, w in self._points(chunk).items()]
                with self.objective.at(None):  # which puts the model's own weights back
                    for i, point in enumerate(chunk.tolist()):
                        for p, values in rows:
                            p.data = values[i]
                        seen(start + i, self._loss(point))

    @torch.no_grad()
    def centre(self) -> float:
        """The loss at the model's own weights; to be called between points, too."""
        with self.objective.at(self._own):
            return self._loss([0.0] * self._count)

    def _loss(self, point: Sequence[float]) -> float:
        if self._affine is not None:
            self._affine.at(point)
        return self.objective.value_here()

    @contextmanager
    def _quick(self) -> Iterator[None]:
        if self._affine is None:
            yield
            return
        with by_class(self.objective), self._affine.used():
            yield

    def _found_affine(self, coefficients: Tensor) -> AffineLayers | None:
        """``None`` where the loss at the furthest point is another with them, and for weights in half precision."""
        dtypes = {p.dtype for p in self.objective.parameters.values()}
        if not dtypes <= ROUNDING.keys():
            return None
        furthest = coefficients[coefficients.abs().sum(1).argmax()]
        away = {name: w[0] for name, w in self._points(furthest[None]).items()}
        affine = AffineLayers(self.objective, self._given)
        with affine.watching():
            alone = self.objective.value(away)
        try:
            with by_class(self.objective):
                with affine.collecting():
                    self.objective.value()
                with affine.used():
                    affine.at(furthest.tolist())
                    found = self.objective.value(away)
        except Exception:
            return None  # one asks how a tensor lies in memory, say, and has no reason to fail without them
        off = max(ROUNDING[d] for d in dtypes)
        return affine if abs(found - alone) <= off * abs(alone) else None

    def _evaluate_together(self, coefficients: Tensor, seen: Callable[[int, float], None]) -> None:
        start = 0
        while start < len(coefficients):
            chunk = coefficients[start : start + self.chunk]
            try:
                losses = self._losses_together(self._points(chunk), len(chunk)).tolist()
            except torch.OutOfMemoryError:
                if self.chunk == 1:
                    raise
                losses = []
            if not losses:  # not while the error is handled, which holds what did not fit
                self._halve()
                continue
            for i, loss in enumerate(losses):
                seen(start + i, loss)
            start += len(chunk)

    def _room(self) -> Weights:
        return {name: p.new_empty((self.chunk, p.numel())) for name, p in self.objective.parameters.items()}

    def _halve(self) -> None:
        self.chunk //= 2
        self._made.clear()
        self._made = self._room()

    def _check_together(self) -> None:
        """At points away from the model: a loss that has weights from elsewhere would see them unmoved."""
        away = torch.full((min(2, self.chunk), self._count), 0.5, dtype=torch.float64, device="cpu")
        made = self._points(away)
        found = float(self._losses_together(made, len(away))[0])
        alone = self.objective.value({name: w[0] for name, w in made.items()})
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
