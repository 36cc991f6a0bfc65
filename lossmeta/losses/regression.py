"""Losses for regression beside those of ``torch.nn``; for Huber's take :class:`torch.nn.HuberLoss`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossmeta._checks import (
    REDUCTIONS,
    check_float,
    check_number,
    check_positive_and_finite,
    check_same_device,
    check_tensors,
    choice,
)
from lossmeta.ops._precision import accumulation_dtype


class _ResidualLoss(nn.Module):
    """Base of losses of target - prediction; a subclass gives ``of_residuals(r) -> `` as many losses."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.name = type(self).__name__
        choice(self.name, "reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def of_residuals(self, r: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        check_tensors(self.name, pred=pred, target=target)
        check_float(self.name, pred=pred, target=target)
        check_same_device(self.name, target=target, pred=pred)
        if pred.shape != target.shape:
            raise ValueError(
                f"{self.name}: pred and target must have the same shape, got {list(pred.shape)} and "
                f"{list(target.shape)}; nothing is broadcast"
            )
        dtype = accumulation_dtype(torch.promote_types(pred.dtype, target.dtype))
        losses = self.of_residuals(target.to(dtype) - pred.to(dtype))
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.mean()


class TukeyLoss(_ResidualLoss):
    r"""Tukey's biweight: a residual beyond c costs the same however large it is, and has no gradient.

    .. math::
        \ell = \frac{c^2}{6} \Bigl(1 - \bigl(1 - \min(|r|/c, 1)^2\bigr)^3\Bigr), \qquad r = y - f

    Small residuals cost :math:`r^2/2`. The loss is not convex: start from a model that is roughly right, or from one
    that Huber's loss (:class:`torch.nn.HuberLoss`) has trained.

    Args:
        c: positive, in units of the target. At the default residuals that are normal with standard deviation 1 lose 5 %
            of efficiency against least squares; multiply it by a robust estimate of the scale of the residuals, such as
            1.4826 times their median absolute deviation.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over all elements.

    Shape:
        Prediction and target of the same shape, whatever it is. float64 stays; float32, bfloat16 and float16 are
        computed and returned in float32.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes or devices that do not
            fit. Nothing is broadcast.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Beaton and Tukey, "The Fitting of Power Series, Meaning Polynomials, Illustrated on Band-Spectroscopic Data"
        (1974).

    Example:
        >>> criterion = lossmeta.losses.TukeyLoss(c=3.0)  # was: torch.nn.MSELoss()
        >>> criterion(torch.zeros(1), torch.tensor([100.0])).item()  # 3²/6
        1.5
    """

    def __init__(self, c: float = 4.685, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_number(self.name, "c", c)
        check_positive_and_finite(self.name, "c", c)
        self.c = float(c)

    def of_residuals(self, r: Tensor) -> Tensor:
        r = r.clamp(-self.c, self.c)
        u = (r / self.c) ** 2
        return (
            r**2 / 2 * (1 - u + u**2 / 3)
        )  # (1 - (1 - u)^3) / 6 = u (1 - u + u²/3) / 2, where nothing cancels

    def extra_repr(self) -> str:
        return f"c={self.c}, reduction={self.reduction!r}"


class PinballLoss(_ResidualLoss):
    r"""Pinball loss, which a quantile of the target minimises.

    .. math:: \ell = \max(\tau r, (\tau - 1) r), \qquad r = y - f

    The share :math:`\tau` of the targets lies below the best prediction. At 1/2 it is half the absolute error
    (:class:`torch.nn.L1Loss`); further out it answers outliers on one side. At r = 0 the derivative in r is taken as
    :math:`\tau - 1/2`.

    Args:
        quantile: :math:`\tau` in (0, 1).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over all elements.

    Shape:
        Prediction and target of the same shape, whatever it is. float64 stays; float32, bfloat16 and float16 are
        computed and returned in float32.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes or devices that do not
            fit. Nothing is broadcast.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Koenker and Bassett, "Regression Quantiles" (1978).

    Example:
        >>> criterion = lossmeta.losses.PinballLoss(0.75)  # was: torch.nn.L1Loss()
        >>> criterion(torch.zeros(2), torch.tensor([4.0, -4.0])).item()  # the mean of 3 and 1
        2.0
    """

    def __init__(self, quantile: float, *, reduction: str = "mean") -> None:
        super().__init__(reduction)
        check_number(self.name, "quantile", quantile)
        if not 0 < quantile < 1:
            raise ValueError(f"{self.name}: quantile must lie in (0, 1), got {quantile}")
        self.quantile = float(quantile)

    def of_residuals(self, r: Tensor) -> Tensor:
        return torch.maximum(self.quantile * r, (self.quantile - 1) * r)

    def extra_repr(self) -> str:
        return f"quantile={self.quantile}, reduction={self.reduction!r}"
