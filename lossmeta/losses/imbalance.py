"""Losses for classes of very different frequency or difficulty."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._checks import (
    FLOATS,
    check_not_negative_and_finite,
    check_number,
    check_positive_and_finite,
    check_tensors,
    dtype_name,
)
from lossmeta.losses._classification import ClassificationLoss
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops.adjusted_cross_entropy import adjusted_cross_entropy


class LogitAdjustedLoss(ClassificationLoss):
    r"""Cross-entropy of logits to which the frequency of the classes has been added, against rare classes.

    .. math:: \ell = -\log \mathrm{softmax}(x + \tau \log \pi)_y

    :math:`\pi` is the share of each class among the training data. The logits need not learn it then; used as they are,
    without adjustment, they aim at the balanced error instead of the error. At :math:`\tau = 0` the loss is
    cross-entropy. :class:`lossmeta.ala.LogitAdjustment` adapts :math:`\tau` to a metric.

    Args:
        counts: of the training samples of each class, ``[C]``, or their shares: only the ratios count. All positive: a
            class without samples may count as 0.1 of one.
        tau: :math:`\tau`, finite. The paper's default of 1 is consistent for the balanced error; more favours rare
            classes further.
        weight: weight per class, ``[C]``, beside the adjustment.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``.

    The buffer ``log_priors``, ``[C]``, is :math:`\log \pi`, in the dtype of floating counts and the default dtype of
    integer ones.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for counts that are not as above or another option outside its values, and when called for shapes,
            dtypes, devices or labels that do not fit. On CUDA, where looking would wait for the device, a label out of
            range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Menon et al., "Long-tail Learning via Logit Adjustment" (2021), Eq. 10.

    Example:
        >>> criterion = lossmeta.losses.LogitAdjustedLoss(torch.tensor([90, 10]))  # was: torch.nn.CrossEntropyLoss()
        >>> round(criterion(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # log 10: the rare class costs more
        2.3026
    """

    log_priors: Tensor

    def __init__(
        self,
        counts: Tensor,
        tau: float = 1.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        n = _checked_counts(type(self).__name__, counts)
        super().__init__(
            weight=weight, ignore_index=ignore_index, reduction=reduction, num_classes=(len(n), "counts")
        )
        check_number(self.name, "tau", tau)
        if not math.isfinite(tau):
            raise ValueError(f"{self.name}: tau must be finite, got {tau}")
        self.tau = float(tau)
        self.register_buffer("log_priors", _placed((n / n.sum()).log(), counts))

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits + self.tau * self.log_priors.to(logits.dtype), labels, reduction="none")

    def mean_of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        shift = self.tau * self.log_priors.to(accumulation_dtype(logits.dtype))
        return adjusted_cross_entropy(logits, labels, shift=shift, ignore_index=self.ignore_index)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.log_priors)}, tau={self.tau}, {super().extra_repr()}"


class LDAMLoss(ClassificationLoss):
    r"""Label-distribution-aware margins: rare classes must win by more.

    .. math::
        \ell = -\log \frac{e^{s (x_y - \Delta_y)}}{e^{s (x_y - \Delta_y)} + \sum_{c \ne y} e^{s x_c}},
        \qquad \Delta_c \propto n_c^{-1/4}

    The largest margin is ``max_margin``. A margin says something only on a known scale: x are meant to be cosines, in
    [-1, 1], of normalised features and normalised class weights, as in the paper. At ``max_margin=0`` and ``scale=1``
    the loss is cross-entropy. The authors add class weights for the last epochs: set ``weight`` then, whose mean is
    that of ``CrossEntropyLoss``.

    Args:
        counts: n of the training samples of each class, ``[C]``, all positive.
        max_margin: of the rarest class, at least 0. The default, like that of ``scale``, is that of the published code.
        scale: s, positive.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``.

    The buffer ``margins``, ``[C]``, is :math:`\Delta`, in the dtype of floating counts and the default dtype of integer
    ones.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for counts that are not as above or another option outside its values, and when called for shapes,
            dtypes, devices or labels that do not fit. On CUDA, where looking would wait for the device, a label out of
            range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss" (2019).

    Example:
        >>> criterion = lossmeta.losses.LDAMLoss(torch.tensor([1600, 100]))
        >>> criterion.margins.tolist()
        [0.25, 0.5]
    """

    margins: Tensor

    def __init__(
        self,
        counts: Tensor,
        max_margin: float = 0.5,
        scale: float = 30.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        n = _checked_counts(type(self).__name__, counts)
        super().__init__(
            weight=weight, ignore_index=ignore_index, reduction=reduction, num_classes=(len(n), "counts")
        )
        check_number(self.name, "max_margin", max_margin)
        check_not_negative_and_finite(self.name, "max_margin", max_margin)
        check_number(self.name, "scale", scale)
        check_positive_and_finite(self.name, "scale", scale)
        self.max_margin, self.scale = float(max_margin), float(scale)
        self.register_buffer("margins", _placed(self.max_margin * (n.min() / n) ** 0.25, counts))

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
        moved = logits - own * self.margins.to(logits.dtype)
        return F.cross_entropy(self.scale * moved, labels, reduction="none")

    def extra_repr(self) -> str:
        return (
            f"num_classes={len(self.margins)}, max_margin={self.max_margin}, scale={self.scale}, "
            f"{super().extra_repr()}"
        )


class FocalLoss(ClassificationLoss):
    r"""Cross-entropy in which samples that the model already gets right count less.

    .. math:: \ell = -\alpha_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(x)

    It is for one class of C. At :math:`\gamma = 0` it is cross-entropy. Wrong labels are samples that the model gets
    wrong, and count more. :class:`FocalWeightedLoss` is another loss, for embeddings.

    Args:
        gamma: :math:`\gamma`, at least 0. The default is the paper's.
        weight: :math:`\alpha`, weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. The mean is weighted as that of ``CrossEntropyLoss``; to divide
            by the number of samples instead, take the mean of ``"none"``.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit. On CUDA, where looking would wait for the device, a label out of range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Lin et al., "Focal Loss for Dense Object Detection" (2017), Eq. 4 and 5, with the softmax in the place of the
        sigmoid.

    Example:
        >>> criterion = lossmeta.losses.FocalLoss()  # was: torch.nn.CrossEntropyLoss()
        >>> round(criterion(torch.zeros(1, 2), torch.tensor([1])).item(), 4)  # log 2, over 4
        0.1733
    """

    def __init__(
        self,
        gamma: float = 2.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_number(self.name, "gamma", gamma)
        check_not_negative_and_finite(self.name, "gamma", gamma)
        self.gamma = float(gamma)

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        surprise = F.cross_entropy(logits, labels, reduction="none")
        if self.gamma == 0:
            return surprise
        # At p = 1 the power has no derivative for gamma < 1; the loss has, and it is 0.
        sure = surprise == 0
        s = surprise.masked_fill(sure, 1)
        # Beyond 100 the power is 1, and infinite s times a derivative of 0 would be NaN.
        power = (-torch.expm1(-s.clamp_max(100))) ** self.gamma
        return (power * s).masked_fill(sure, 0)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


def _checked_counts(name: str, counts: Tensor) -> Tensor:
    """In float64 on the CPU."""
    check_tensors(name, counts=counts)
    if counts.dim() != 1 or not len(counts):
        raise ValueError(f"{name}: counts must be [C] with C at least 1, got {list(counts.shape)}")
    if counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"{name}: counts must be integers or floats, got {dtype_name(counts)}")
    if counts.is_meta:
        raise ValueError(f"{name}: counts must hold values, got a tensor on the meta device")
    n = counts.detach().cpu().double()
    for c in (~((n > 0) & n.isfinite())).nonzero()[:1].flatten().tolist():
        raise ValueError(
            f"{name}: counts must be positive and finite, got {counts[c].item()} for class {c}"
            + ("; leave the class out or count it as 0.1" if n[c] == 0 else "")
        )
    return n


def _placed(values: Tensor, counts: Tensor) -> Tensor:
    dtype = counts.dtype if counts.dtype in FLOATS else torch.get_default_dtype()
    return values.to(counts.device, dtype)
