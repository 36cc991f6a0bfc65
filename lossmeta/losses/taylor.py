"""Taylor polynomial as a learned loss (AdaLFL, Table 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lossmeta._checks import check_same_device
from lossmeta.losses._outputwise import IGNORED, OutputwiseLoss
from lossmeta.ops._precision import accumulation_dtype

_LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(1),
}


class TaylorLoss(OutputwiseLoss):
    r"""A learned polynomial of target and prediction, which AdaLFL's Table 4 compares with its network.

    With :math:`\hat y = f - c_0` and :math:`y' = y - c_1` around the centre :math:`c`, averaged over C outputs,

    .. math:: \ell = a_1 y' + \tfrac12 a_2 y'^2 + \tfrac16 a_3 y'^3 + a_4 \hat y y'
              + \tfrac12 a_5 \hat y y'^2 + \tfrac12 a_6 \hat y^2 y'

    ``coefficients`` :math:`(a_1, \dots, a_6)`, for order 2 :math:`(a_1, a_2, a_4)`, and ``center``
    :math:`(c_0, c_1)` are parameters that start at :math:`0.001 \cdot N(0, 1)`. Until they have been learned,
    minimising this loss serves nothing, and the first call in training warns.

    Args:
        order: 2 (quadratic) or 3 (cubic).
        link: ``"softmax"`` for classification: takes logits and compares probabilities with one-hot targets.
            ``"sigmoid"`` for labels that are on or off on their own. ``"identity"`` for regression.
        weight: weight per class, ``[C]``; that of its class multiplies the loss of a sample, or of a label.
        ignore_index: label that contributes neither loss nor gradient.
        label_smoothing: in [0, 1].
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``, over the samples. With the sigmoid link the mean is
            over the labels that are not ignored, and not over their weights, as that of ``BCEWithLogitsLoss``.
        device: where the parameters are made.
        dtype: dtype of the parameters.

    Shape:
        ``softmax``: those of :class:`torch.nn.CrossEntropyLoss`. ``identity``: both ``[N]`` or ``[N, d...]``.
        ``sigmoid``: both ``[N]``, ``[N, C]`` or ``[N, C, d...]``; the target is 0 or 1 (bool or integers), or floating
        and in between.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit.
        TypeError: when called with something that is not a tensor.

    Example:
        >>> criterion = TaylorLoss(order=2)
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> history = lossmeta.adalfl.initialize(criterion, lambda: torch.nn.Linear(4, 3), batches, batches, steps=2)
        >>> logits = torch.randn(8, 3, requires_grad=True)
        >>> criterion(logits, torch.randint(3, (8,))).backward()
    """

    DEFINING = ("order", "link")
    APPLIED = ("ignore_index", "label_smoothing", "reduction")

    def __init__(
        self,
        order: int = 3,
        *,
        link: str = "softmax",
        weight: Tensor | None = None,
        ignore_index: int = IGNORED,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            link=link,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        if order not in (2, 3):
            raise ValueError(f"TaylorLoss: order must be 2 or 3, got {order}")
        self.order = order
        self.coefficients = nn.Parameter(torch.empty(3 if order == 2 else 6, device=device, dtype=dtype))
        self.center = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws coefficients and centre anew."""
        self._unlearned = True
        nn.init.normal_(self.coefficients, std=0.001)
        nn.init.normal_(self.center, std=0.001)

    def outputwise(self, pred: Tensor, target: Tensor) -> Tensor:
        dtype = accumulation_dtype(pred.dtype)
        check_same_device(self.name, pred=pred, coefficients=self.coefficients)
        f = _LINKS[self.link](pred.to(dtype))
        a = self.coefficients.to(dtype)
        f, y = f - self.center[0], target.to(dtype) - self.center[1]
        if self.order == 2:
            loss = a[0] * y + a[1] / 2 * y**2 + a[2] * f * y
        else:
            loss = y * (a[0] + a[3] * f + a[5] / 2 * f**2 + y * (a[1] / 2 + a[4] / 2 * f + a[2] / 6 * y))
        return loss.mean(1)

    def extra_repr(self) -> str:
        return f"order={self.order}, {super().extra_repr()}"
