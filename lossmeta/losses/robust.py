"""Losses that wrong labels harm less than they harm cross-entropy, and that need nothing but the labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._checks import check_not_negative_and_finite, check_number, choice
from lossmeta.losses._classification import ClassificationLoss
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops.adjusted_cross_entropy import adjusted_cross_entropy

MODES = {"soft": 0.95, "hard": 0.8}


class GeneralizedCrossEntropy(ClassificationLoss):
    r"""Generalised cross-entropy :math:`L_q`, between cross-entropy and absolute error.

    .. math:: \ell = \frac{1 - p_y^q}{q}, \qquad p = \mathrm{softmax}(x)

    A sample's gradient is that of its cross-entropy times :math:`p_y^q`: labels that the model contradicts weigh less.
    :math:`q \to 0` is cross-entropy. At q = 1 the loss is :math:`1 - p_y`, half the absolute error, which wrong labels
    that are spread evenly over the classes do not harm, and which is slow to train with many classes.

    Args:
        q: in (0, 1]. The default is the paper's.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit. On CUDA, where looking would wait for the device, a label out of range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels" (2018),
        Eq. 6, without its truncation.

    Example:
        >>> criterion = lossmeta.losses.GeneralizedCrossEntropy(q=1.0)  # was: torch.nn.CrossEntropyLoss()
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).item()
        0.75
    """

    def __init__(
        self,
        q: float = 0.7,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        check_number(self.name, "q", q)
        if not 0 < q <= 1:
            raise ValueError(
                f"{self.name}: q must lie in (0, 1], got {q}"
                + ("; torch.nn.CrossEntropyLoss is its limit at 0" if q == 0 else "")
            )
        self.q = float(q)

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        q = max(self.q, 1e-30)  # where q s would be no normal number, the loss is s to the rounding
        u = q * F.cross_entropy(logits, labels, reduction="none")
        # Near 0 the difference cancels; elsewhere the derivative of expm1, its value plus 1, does.
        return torch.where(u < 0.5, -torch.expm1(-u), 1 - torch.exp(-u)) / q

    def mean_of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        q = torch.full((), self.q, dtype=accumulation_dtype(logits.dtype), device=logits.device)
        return adjusted_cross_entropy(logits, labels, exponent=q, ignore_index=self.ignore_index)

    def extra_repr(self) -> str:
        return f"q={self.q}, {super().extra_repr()}"


class SymmetricCrossEntropy(ClassificationLoss):
    r"""Cross-entropy plus its reverse, in which prediction and label have changed places.

    .. math::
        \ell = -\alpha \log p_y - \beta \sum_c p_c \log t_c
             = -\alpha \log p_y - \beta A (1 - p_y), \qquad p = \mathrm{softmax}(x)

    t is the one-hot label, and the logarithm of its zeros is taken as A. The second term is bounded, and evenly spread
    wrong labels do not harm it; the first makes it trainable. Of :math:`\beta` and A only the product counts.

    Args:
        alpha: :math:`\alpha`, at least 0: the weight of cross-entropy. The default is the authors' for CIFAR-10; for
            CIFAR-100 they took ``alpha=6, beta=0.1``.
        beta: :math:`\beta`, at least 0: the weight of the reverse.
        log_zero: A, negative. The published code has :math:`\log 10^{-4} \approx -9.2`.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for an option outside the values above, for ``alpha`` and ``beta`` both 0, and when called for
            shapes, dtypes, devices or labels that do not fit. On CUDA, where looking would wait for the device, a label
            out of range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels" (2019).

    Example:
        >>> criterion = lossmeta.losses.SymmetricCrossEntropy(alpha=0, beta=1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3])).item()  # 4 times 3/4
        3.0
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        log_zero: float = -4.0,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        for argument, number in (("alpha", alpha), ("beta", beta), ("log_zero", log_zero)):
            check_number(self.name, argument, number)
        check_not_negative_and_finite(self.name, "alpha", alpha)
        check_not_negative_and_finite(self.name, "beta", beta)
        if alpha == beta == 0:
            raise ValueError(f"{self.name}: alpha or beta must be positive, got 0 and 0")
        if not -math.inf < log_zero < 0:
            raise ValueError(f"{self.name}: log_zero must be negative and finite, got {log_zero}")
        self.alpha, self.beta, self.log_zero = float(alpha), float(beta), float(log_zero)

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        surprise = F.cross_entropy(logits, labels, reduction="none")
        reverse = self.beta * self.log_zero * (torch.exp(-surprise) - 1)
        # Without cross-entropy a label that is ruled out has a finite loss.
        return self.alpha * surprise + reverse if self.alpha else reverse

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, log_zero={self.log_zero}, {super().extra_repr()}"


class BootstrappingLoss(ClassificationLoss):
    r"""Cross-entropy with a label that is mixed with the model's own prediction.

    .. math:: \ell = -\sum_c \bigl(\beta\, t_c + (1 - \beta)\, z_c\bigr) \log p_c, \qquad p = \mathrm{softmax}(x)

    t is the one-hot label. In the soft mode z is the prediction p, and its gradient counts: that adds
    :math:`1 - \beta` times the entropy of the prediction. In the hard mode z is 1 for the most probable class. At
    :math:`\beta = 1` either is cross-entropy.

    Args:
        beta: :math:`\beta` in (0, 1], the share of the label. The paper's is the default: 0.95 soft, 0.8 hard.
        mode: ``"soft"`` or ``"hard"``.
        weight: weight per class, ``[C]``.
        ignore_index: label that contributes neither loss nor gradient.
        reduction: ``"none"``, ``"mean"`` (weighted) or ``"sum"``.

    Shape:
        Those of :class:`torch.nn.CrossEntropyLoss` with class indices (int64 or uint8): logits ``[C]``, ``[N, C]`` or
        ``[N, C, d...]``. float64 stays; float32, bfloat16 and float16 are computed and returned in float32.

    Raises:
        ValueError: for an option outside the values above, and when called for shapes, dtypes, devices or labels that
            do not fit. On CUDA, where looking would wait for the device, a label out of range makes the loss NaN.
        TypeError: for an option of another type, and when called with something that is not a tensor.

    Sources:
        Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping" (2015).

    Example:
        >>> criterion = lossmeta.losses.BootstrappingLoss(mode="hard")
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> round(criterion(logits, torch.tensor([0])).item(), 4)  # 0.8 times 2.1269 and 0.2 times 0.1269
        1.7269
    """

    def __init__(
        self,
        beta: float | None = None,
        mode: str = "soft",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight=weight, ignore_index=ignore_index, reduction=reduction)
        default = choice(self.name, "mode", mode, MODES)
        beta = default if beta is None else beta
        check_number(self.name, "beta", beta)
        if not 0 < beta <= 1:
            raise ValueError(f"{self.name}: beta must lie in (0, 1], got {beta}")
        self.beta, self.mode = float(beta), mode

    def of_rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        surprise = -log_p.gather(1, labels[:, None]).squeeze(1)
        if self.mode == "hard":
            own = -log_p.amax(1)
        else:
            p = log_p.exp()
            own = -(p * log_p.masked_fill(p == 0, 0)).sum(1)  # 0 log 0 = 0
        return self.beta * surprise + (1 - self.beta) * own

    def extra_repr(self) -> str:
        return f"beta={self.beta}, mode={self.mode!r}, {super().extra_repr()}"
