"""The features whose non-negative sums are the convex, piecewise-linear regularisers (TuneLoss, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Batch
from lossmeta._checks import check_at_least_one
from lossmeta.ops import pwl_statistics
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.tuneloss._weights import flat, trainable
from lossmeta.tuneloss.piecewise_linear import PiecewiseLinear


class ConvexPWL:
    r"""2 X hinges, summed over the weights of a model: a feature for a vector of 2 X parameters.

    .. math:: \phi_k = \sum_j \max(0, \theta_j - a_k), \qquad \phi_{X + k} = \sum_j \max(0, a_k - \theta_j)

    Their sums with coefficients :math:`\lambda \ge 0` are :math:`\sum_j r(\theta_j)` with the convex r that change
    slope at the knots :math:`a_1, \dots, a_X`.

    Args:
        knots: a, [X], finite and strictly ascending.
        parameters: names of the model's parameters that hold the weights. ``None`` takes the trainable ones of two or
            more dimensions, so that biases and the scales of normalisation layers are left out.

    Attributes:
        knots: a, [X], float64 on the CPU.
        size: 2 X.

    Raises:
        TypeError: for parameters that are no names.
        ValueError: for knots of another shape, none, that are not finite, or do not ascend.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), Eq. 4.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> feature = lossmeta.tuneloss.ConvexPWL.at_quantiles(model, count=3)
        >>> feature(model).shape
        torch.Size([6])
        >>> feature.function([0.0, 0.0, 1.0, 2.0, 0.0, 0.0]).slopes
        tensor([-2.,  0.,  0.,  1.], dtype=torch.float64)
    """

    uses_data = False

    def __init__(self, knots: Any, *, parameters: Sequence[str] | None = None) -> None:
        self.knots = torch.as_tensor(knots, dtype=torch.float64, device="cpu").detach().clone()
        if self.knots.dim() != 1 or not len(self.knots):
            raise ValueError(f"ConvexPWL: knots must be [X] with X >= 1, got {list(self.knots.shape)}")
        if not self.knots.isfinite().all() or not (self.knots.float().diff() > 0).all():
            raise ValueError(
                "ConvexPWL: knots must be finite and strictly ascending in float32, got others; leave out equal ones"
            )
        self.parameters = None if parameters is None else list(parameters)
        if isinstance(parameters, str):
            raise TypeError(f"ConvexPWL: parameters must be a list of names, got {parameters!r}")

    @classmethod
    def at_quantiles(
        cls, weights: Tensor | nn.Module, count: int = 50, *, parameters: Sequence[str] | None = None
    ) -> ConvexPWL:
        """With knots between which there are equally many weights, from the least to the greatest (Appendix B.3).

        Args:
            weights: of any shape, or a model that has them.
            count: X. Of equal knots one is kept, so that there may be fewer.
            parameters: names of the model's parameters, as above.

        Raises:
            TypeError: for weights that are neither.
            ValueError: for a count below 1, and weights that are none or not finite.
        """
        check_at_least_one("ConvexPWL", "count", count)
        if isinstance(weights, nn.Module):
            given = flat(list(trainable("ConvexPWL", weights, parameters).values()))
        elif isinstance(weights, Tensor):
            given = weights.detach().reshape(-1)
        else:
            raise TypeError(f"ConvexPWL: weights must be a tensor or a model, got {type(weights).__name__}")
        if not len(given) or not given.isfinite().all():
            raise ValueError("ConvexPWL: weights must be one or more finite numbers, got others")
        # Single precision, in which knots must differ.
        ordered = given.cpu().float().sort().values
        steps = torch.arange(count, dtype=torch.float64, device="cpu") / max(1, count - 1)
        at = (steps * (len(ordered) - 1)).round().long()
        return cls(ordered[at].unique(), parameters=parameters)

    @property
    def size(self) -> int:
        return 2 * len(self.knots)

    def __call__(self, model: nn.Module, batch: Batch | None = None) -> Tensor:
        """[2 X], whatever the batch; differentiable in the weights."""
        weights = trainable("ConvexPWL", model, self.parameters).values()
        first, *others = [self.value(w) for w in weights]
        for other in others:
            first = first + other
        return first

    def value(self, weights: Tensor) -> Tensor:
        """[2 X] of weights of any shape, in their precision, float32 at least; differentiable.

        A hinge has no slope at its own knot.
        """
        found: Tensor = _Hinges.apply(weights.reshape(-1), self.knots.to(weights.device))
        return found.to(accumulation_dtype(weights.dtype))

    def statistics(self, weights: Tensor, gradients: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What LearnLoss needs, see :func:`lossmeta.ops.pwl_statistics`, in one pass and without gradient.

        Args:
            weights: [P].
            gradients: R gradients, [R, P] of the weights' dtype.

        Returns:
            The features [2 X], their Gram matrix [2 X, 2 X], and their products with the gradients [2 X, R]; float64.
        """
        return pwl_statistics(weights, gradients, self.knots.to(weights.device))

    def function(self, coefficients: Any) -> PiecewiseLinear:
        """The regulariser r of coefficients [2 X], all at least 0, less its value at 0.

        Raises:
            ValueError: for another number of coefficients, and negative ones.
        """
        given = torch.as_tensor(coefficients, dtype=torch.float64, device="cpu").detach()
        if given.shape != (self.size,) or not (given >= 0).all():
            raise ValueError(
                f"ConvexPWL: coefficients must be [{self.size}] and at least 0, got {list(given.shape)} with the least "
                f"{float(given.min()) if given.numel() else None}"
            )
        return PiecewiseLinear(self.knots, _slopes(given))


def _slopes(coefficients: Tensor) -> Tensor:
    """[X + 1] of coefficients [2 X]: the hinges that rise below an interval, less those that fall above it."""
    up, down = coefficients.chunk(2)
    zero = coefficients.new_zeros(1)
    return torch.cat([zero, up.cumsum(0)]) - torch.cat([down.flip(0).cumsum(0).flip(0), zero])


class _Hinges(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor, knots: Tensor) -> Tensor:
        return pwl_statistics(weights, None, knots)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        weights, knots = ctx.saved_tensors
        up, down = grad.chunk(2)
        zero = grad.new_zeros(1)
        rising = torch.cat([zero, up.cumsum(0)])
        falling = torch.cat([down.flip(0).cumsum(0).flip(0), zero])
        x = weights.detach().to(accumulation_dtype(weights.dtype))
        knots = knots.to(x.dtype)
        below, up_to = torch.searchsorted(knots, x), torch.searchsorted(knots, x, right=True)
        return (rising[below] - falling[up_to]).to(weights.dtype), None
