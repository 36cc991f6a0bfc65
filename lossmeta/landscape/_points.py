"""The loss at many points around a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lossmeta.landscape._objective import Objective, Weights
from lossmeta.landscape.directions import Direction
from lossmeta.ops import perturb

BYTES = 16 * 2**20
"""Of the weights at points that are made at once; where one has more, they are made one by one."""
MOST = 64

At = Callable[[Weights], Tensor]
"""The mean loss at some weights, ``[]``, in float64."""


class Points:
    """Evaluates an objective at ``weights + sum_k c_k direction_k``.

    Beside the model and the directions it keeps the weights of one point, or of several where they are small. Small
    models on a CPU are evaluated by as many threads as torch has, each point by one of them: they have too little to do
    for several threads at one point. A loss does not depend on their number.

    Args:
        objective: to be used within its :meth:`~Objective.quiet`.
        directions: K of them.
        together: whether all points of a chunk go through the model in one call, by ``torch.func.vmap``.
    """

    def __init__(self, objective: Objective, directions: Sequence[Direction], together: bool) -> None:
        self.objective, self.together = objective, together
        parameters = objective.parameters
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        self.chunk = max(1, min(MOST, BYTES // size))
        self._evaluators = [] if together else self._make_evaluators()
        self._single = directions if self.chunk == 1 else []
        self._directions = {
            name: torch.stack([d[name].to(p).flatten() for d in directions])
            for name, p in parameters.items()
            if not self._single
        }
        self._made: Weights = {name: p.new_empty((self.chunk, p.numel())) for name, p in parameters.items()}

    def _make_evaluators(self) -> list[At]:
        small = self.chunk > 1 and self.objective.device.type == "cpu"
        try:
            twins = [_Twin(self.objective) for _ in range(torch.get_num_threads() if small else 1)]
        except Exception:  # whatever a model does that cannot be copied
            return [self.objective.value]
        return [twin.value for twin in twins]

    def losses(self, coefficients: Tensor) -> Iterator[Tensor]:
        """Of the points ``[B, K]``, in float64, chunk by chunk."""
        threads = torch.get_num_threads()
        chunks = coefficients.split(self.chunk) if len(coefficients) else ()
        if len(self._evaluators) < 2:
            for chunk in chunks:
                yield self._losses(chunk)
            return
        with ThreadPoolExecutor(
            len(self._evaluators), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            try:
                for chunk in chunks:
                    yield self._losses(chunk, pool)
            finally:
                torch.set_num_threads(threads)

    @torch.no_grad()
    def _losses(self, coefficients: Tensor, pool: ThreadPoolExecutor | None = None) -> Tensor:
        count = len(coefficients)
        made = {
            name: self._make(name, p.detach(), coefficients) for name, p in self.objective.parameters.items()
        }
        if self.together:
            total = torch.zeros(count, dtype=torch.float64, device=self.objective.device)
            for batch, share in self.objective:
                of_batch = torch.func.vmap(lambda w, batch=batch: self.objective.loss(w, batch))(made)
                total += share * of_batch.double()
            return total.cpu()
        points = [dict(zip(made, rows, strict=True)) for rows in zip(*made.values(), strict=True)]
        workers = len(self._evaluators)

        def of_each(number: int) -> list[Tensor]:
            """Of every so many points."""
            return [self._evaluators[number](point) for point in points[number::workers]]

        found = list((pool.map if pool else map)(of_each, range(workers)))
        return torch.stack([found[i % workers][i // workers] for i in range(count)]).cpu()

    def _make(self, name: str, base: Tensor, coefficients: Tensor) -> Tensor:
        """Values of a parameter at some points, ``[B, ...]``."""
        made = self._made[name][: len(coefficients)]
        if self._single:  # in the place of a copy of all directions side by side, as many passes
            point = made.view(base.shape).copy_(base)
            for direction, c in zip(self._single, coefficients[0].tolist(), strict=True):
                point.add_(direction[name].to(base), alpha=c)
        else:
            perturb(base.reshape(-1), self._directions[name], coefficients.to(base.device), out=made)
        return made.view(len(coefficients), *base.shape)


class _Twin:
    """A model like the objective's, whose weights are put where they are wanted: no copy, and no call by names."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.model: nn.Module = objective.twin()
        own = dict(self.model.named_parameters())
        self.parameters = {name: own[name] for name in objective.parameters}

    def value(self, weights: Weights) -> Tensor:
        for name, p in self.parameters.items():
            p.data = weights[name]
        with torch.no_grad():
            found = [
                share * self.objective.loss_of(self.model, batch).double() for batch, share in self.objective
            ]
        return found[0] if len(found) == 1 else torch.stack(found).sum()
