"""Focal weighting for metric learning (ALA, Eq. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta._checks import REDUCTIONS, choice
from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype
from lossmeta.ops.distance_mixture import distances


def focal_weighting(
    embeddings: Tensor, labels: Tensor, phi: Tensor, *, offset: float = 1.0, reduction: str = "mean"
) -> Tensor:
    r"""Soft hardest-pair loss whose temperatures :math:`\Phi` are parameters (ALA, Eq. 10).

    .. math::
        \ell = \frac{1}{\Phi_1} \log\Bigl[1 + \sum_{i^+} e^{\Phi_1 (d^+_{i^+} - \alpha)}\Bigr]
             + \frac{1}{\Phi_2} \log\Bigl[1 + \sum_{i^-} e^{-\Phi_2 (d^-_{i^-} - \alpha)}\Bigr]

    for every embedding as the anchor: :math:`d^+` are its Euclidean distances to the other embeddings of its label,
    :math:`d^-` those to the embeddings of other labels. The larger :math:`\Phi`, the more the hardest pair counts. A
    sum without pairs is 0 and so is its part of the loss. Nothing overflows; the gradient is 0 at d = 0.

    Args:
        embeddings: ``[M, D]``; float32, float64, bfloat16 or float16 (accumulated and returned in float32).
        labels: int64, ``[M]``, any values.
        phi: :math:`\Phi`, ``[2]``, positive. The paper gives no range; lossmeta's controller keeps it in [0.1, 10].
        offset: the distance :math:`\alpha` beyond which a positive, or within which a negative, weighs in.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the anchors.

    Returns:
        The loss, ``[]``, or ``[M]`` without reduction; without embeddings the mean is 0. Differentiable in
        ``embeddings`` and ``phi``; second derivatives run the reference formula. For the backward the distances, the
        log-sum-exps and the entropies of their weights are kept: M (M + 4) numbers.

    Raises:
        ValueError: for an unknown reduction, shapes, dtypes or devices that do not fit, an offset that is not finite,
            and a ``phi`` that is not positive and finite. On CUDA, where looking would wait for the device, such a
            ``phi`` makes the loss NaN and its gradients 0.
        TypeError: for something that is not a tensor.

    Example:
        >>> embeddings = torch.nn.functional.normalize(torch.randn(8, 4)).requires_grad_()
        >>> loss = focal_weighting(embeddings, torch.arange(8) // 2, torch.ones(2))
        >>> loss.backward()
    """
    how = choice("focal_weighting", "reduction", reduction, REDUCTIONS)
    return _operator(embeddings, labels, phi, offset, how)  # type: ignore[no-any-return]


def _log_one_plus(s: Tensor, pairs: Tensor) -> Tensor:
    """log(1 + sum over the pairs of e^s), rows without pairs included."""
    zeros = s.new_zeros(s.shape[0], 1)
    return torch.logsumexp(torch.cat([zeros, s.where(pairs, -torch.inf)], 1), 1)


def _reference(embeddings: Tensor, labels: Tensor, phi: Tensor, offset: float, reduction: int) -> Tensor:
    dtype = accumulation_dtype(embeddings.dtype)
    x, phi = embeddings.to(dtype), phi.to(dtype)
    same = labels[:, None] == labels
    others = ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    difference = distances(x[:, None] - x) - offset
    loss = (
        _log_one_plus(phi[0] * difference, same & others) / phi[0]
        + _log_one_plus(-phi[1] * difference, ~same) / phi[1]
    )
    loss = loss.where(((phi > 0) & phi.isfinite()).all(), torch.nan)
    if reduction == REDUCTIONS["none"]:
        return loss
    return loss.sum() if reduction == REDUCTIONS["sum"] else loss.sum() / max(x.shape[0], 1)


def _fake(
    embeddings: Tensor, labels: Tensor, phi: Tensor, offset: float, reduction: int
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(embeddings.dtype)
    count = embeddings.shape[0]
    loss = embeddings.new_empty((count,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    return loss, embeddings.new_empty(count * count + 4 * count, dtype=dtype)


_operator = Operator(
    "focal_weighting",
    reference=_reference,
    fake=_fake,
    differentiable=(0, 2),
    num_tensors=3,
)
