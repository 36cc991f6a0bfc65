"""Softmax regressions trained to the minimum of their losses."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lossmeta._checks import check_at_least_one, check_positive
from lossmeta.recipes._softmax_regression import Coefficients, SoftmaxRegression, starting_weights
from lossmeta.recipes._softmax_regression_loss import Loss, Scales, inner


@dataclass(frozen=True, eq=False)
class Minimum:
    """What :func:`minimise` found.

    Attributes:
        weights: [B, C, D].
        gradient: [B], the largest entry of the gradient, by absolute value.
        iterations: [B], int64.
    """

    weights: Tensor
    gradient: Tensor
    iterations: Tensor


@torch.no_grad()
def minimise(
    problem: SoftmaxRegression,
    coefficients: Coefficients,
    start: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    iterations: int = 5000,
) -> Minimum:
    """The weights that minimise B losses, by L-BFGS.

    One evaluation of all losses is an iteration: those whose step lowered them enough go on, the others halve it.
    Losses that are done stay as they are, and leave the batch as far as it remains a block of repetitions times losses.

    Args:
        problem: R repetitions.
        coefficients: of B = R V losses.
        start: weights [B, C, D]; zeros by default.
        tolerance: on the largest entry of the gradient, by absolute value. Rounding keeps float32 from less than 1e-5.
        iterations: at most. A warning says how many losses have not come to the tolerance.

    Raises:
        ValueError: for a start of another shape or one that is not finite, and options out of range.
    """
    check_positive("minimise", "tolerance", tolerance)
    check_at_least_one("minimise", "iterations", iterations)
    begin = starting_weights(problem, coefficients, start)
    search = _Search(Loss(problem, begin, Scales.of(problem, coefficients)))
    weights = torch.empty_like(begin)
    norms = weights.new_empty(weights.shape[:2])
    used = torch.zeros(weights.shape[:2], dtype=torch.int64, device=weights.device)
    rows, columns = (torch.arange(size, device=weights.device) for size in weights.shape[:2])
    for iteration in range(iterations + 1):
        size = search.gradient.abs().amax((2, 3))
        place = rows[:, None], columns
        weights[place], norms[place] = search.weights, size
        search.pending &= size > tolerance
        if iteration == iterations or not search.pending.any():
            break
        used[place] += search.pending
        keep = search.pending.any(1), search.pending.any(0)
        if keep[0].sum() * keep[1].sum() <= search.pending.numel() / 2:
            rows, columns = rows[keep[0]], columns[keep[1]]
            search.keep(*keep)
        search.step()
    if not (norms <= tolerance).all():
        warnings.warn(
            f"minimise: the gradients' largest entries must come to {tolerance:g}, got up to {norms.max():g} in "
            f"{int((~(norms <= tolerance)).sum())} of {norms.numel()} losses; allow more iterations, "
            "or a larger tolerance",
            stacklevel=2,
        )
    return Minimum(weights.flatten(0, 1), norms.flatten(), used.flatten())


class _Search:
    """L-BFGS of R V losses in step.

    Attributes:
        weights: [R, V, C, D].
        gradient: there.
        pending: [R, V], those that go on.
    """

    memory = 10
    shortest = (
        2.0**-40
    )  # a step that is not shorter than this and lowers nothing says that rounding is all that is left

    def __init__(self, loss: Loss) -> None:
        self.problem, self.scales, self.weights = loss.problem, loss.scales, loss.weights
        self.values, self.gradient = loss.values, loss.gradient()
        self.pending = torch.ones_like(self.values, dtype=torch.bool)
        # Steps, changes of the gradient, and one over their inner products; 0 where a loss had none.
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []
        self.scale = 1 / inner(self.gradient, self.gradient).sqrt().clamp(min=1)
        self.direction, self.length = -self.scale * self.gradient, torch.ones_like(self.scale)

    def step(self) -> None:
        new = Loss(self.problem, self.weights + self.length * self.direction, self.scales)
        gradient = new.gradient()
        slope = (self.length * inner(self.gradient, self.direction))[..., 0, 0]
        rounding = 10 * torch.finfo(slope.dtype).eps * self.values.abs()
        lower = new.values <= self.values + 1e-4 * slope + rounding
        accepted = self.pending & lower
        on = accepted[..., None, None]
        moved = torch.where(on, self.length * self.direction, 0)
        change = torch.where(on, gradient - self.gradient, 0)
        product = inner(moved, change)
        curved = product > torch.finfo(product.dtype).tiny
        safe = torch.where(curved, product, 1)
        self.history.append((moved, change, torch.where(curved, 1 / safe, 0)))
        del self.history[: -self.memory]
        squared = torch.where(curved, inner(change, change), 1)
        self.scale = torch.where(curved, safe / squared, self.scale)
        self.weights = torch.where(on, new.weights, self.weights)
        self.values = torch.where(accepted, new.values, self.values)
        self.gradient = torch.where(on, gradient, self.gradient)
        self.direction = torch.where(on, self._direction(), self.direction)
        self.length = torch.where(on, 1, self.length / 2)
        self.pending = self.pending & (self.length[..., 0, 0] >= self.shortest)

    def _direction(self) -> Tensor:
        """The two-loop recursion."""
        found, shares = -self.gradient, []
        for moved, change, one_over in reversed(self.history):
            shares.append(one_over * inner(moved, found))
            found = found - shares[-1] * change
        found = self.scale * found
        for (moved, change, one_over), share in zip(self.history, reversed(shares), strict=True):
            found = found + (share - one_over * inner(change, found)) * moved
        return torch.where(inner(found, self.gradient) < 0, found, -self.scale * self.gradient)

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        """Some repetitions, and some losses of each."""

        def block(x: Tensor) -> Tensor:
            return x[rows][:, columns]

        self.problem, self.scales = self.problem.rows(rows), self.scales.block(rows, columns)
        for name in ("weights", "values", "gradient", "pending", "scale", "direction", "length"):
            setattr(self, name, block(getattr(self, name)))
        self.history = [(block(a), block(b), block(c)) for a, b, c in self.history]
