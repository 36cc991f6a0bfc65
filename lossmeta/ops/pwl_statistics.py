"""Statistics of piecewise-linear regularisers (TuneLoss, Eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype

_REFERENCE_BLOCK = 8192  # parameters whose Jacobian the reference holds at a time


def pwl_statistics(theta: Tensor, gradients: Tensor | None, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Values and Jacobian products of the piecewise-linear features of TuneLoss (Eq. 4), in one pass.

    .. math:: \phi_k = \sum_{p=1}^{P} \max(0, \theta_p - a_k), \qquad
              \phi_{X+k} = \sum_{p=1}^{P} \max(0, a_k - \theta_p), \qquad k = 1, \dots, X

    Non-negative combinations of these are the convex regularisers :math:`\sum_p r(\theta_p)` whose slope
    changes at the knots. With :math:`J_{pm} = \partial \phi_m / \partial \theta_p` (0 where
    :math:`\theta_p = a_k`) and the rows of ``gradients`` as the columns of :math:`G`, TuneLoss needs of the
    Jacobian only :math:`J^\top J` and :math:`J^\top G`. Both follow from counts and sums between the knots:
    the cost is :math:`O(P (\log X + R))`.

    Args:
        theta: the parameters, ``[P]``; float32, float64, bfloat16 or float16.
        gradients: R gradients with respect to ``theta``, ``[R, P]``, of its dtype; or ``None`` for R = 0.
        knots: :math:`a`, ``[X]``, finite and strictly increasing; any floating-point dtype. They are rounded
            to the precision in which ``theta`` is read: float64 for float64, else float32.

    Returns:
        ``(features [2X], gram [2X, 2X], cross [2X, R])``, all summed and returned in float64: :math:`\phi`,
        :math:`J^\top J` and :math:`J^\top G`, the features in the order above. They are statistics: computed
        without gradient, the results do not require grad.

        A NaN in ``theta`` makes every feature NaN; having no slope, it leaves ``gram`` and ``cross`` to the
        other parameters. Infinite parameters count as beyond all knots. A gradient that is not finite reaches
        only those rows of ``cross`` whose features have a slope at its parameter.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and on the CPU for knots that are not finite or not
            strictly increasing. On a GPU they are not looked at; the results are then meaningless.
        TypeError: for something that is not a tensor.

    Source:
        Streeter, *Learning Effective Loss Functions Efficiently*, 2019, section 1.2 and algorithm LearnLoss.

    Example:
        >>> theta = torch.tensor([-1.0, 0.0, 2.0])
        >>> features, gram, cross = pwl_statistics(theta, None, torch.tensor([0.0, 1.0]))
        >>> features
        tensor([2., 1., 1., 3.], dtype=torch.float64)
    """
    results: tuple[Tensor, Tensor, Tensor] = _operator(theta, gradients, knots)
    return results


@torch.no_grad()
def _reference(theta: Tensor, gradients: Tensor | None, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(theta.dtype)
    theta, knots = theta.to(dtype).double(), knots.to(dtype).double()[:, None]
    rows = theta.new_empty(0, theta.shape[0]) if gradients is None else gradients.double()
    size, count = 2 * knots.shape[0], rows.shape[0]
    features, gram, cross = theta.new_zeros(size), theta.new_zeros(size, size), theta.new_zeros(size, count)
    for start in range(0, theta.shape[0], _REFERENCE_BLOCK):
        part = slice(start, start + _REFERENCE_BLOCK)
        distance = theta[part] - knots
        distance = torch.cat([distance, -distance])
        jacobian = (distance > 0).double()
        features = features + distance.clamp(min=0).sum(1)
        cross = cross + torch.where(distance[:, None] > 0, rows[:, part], 0.0).sum(2)
        signs = torch.ones_like(features)
        signs[size // 2 :] = -1
        jacobian = jacobian * signs[:, None]
        gram = gram + jacobian @ jacobian.T
    if size:
        cross = torch.cat([cross[: size // 2], -cross[size // 2 :]])
    return features, gram, cross


def _fake(theta: Tensor, gradients: Tensor | None, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = 2 * knots.shape[0]
    count = 0 if gradients is None else gradients.shape[0]
    features, gram, cross = (
        theta.new_empty(shape, dtype=torch.float64) for shape in ((size,), (size, size), (size, count))
    )
    return features, gram, cross


_operator = Operator("pwl_statistics", reference=_reference, fake=_fake, num_tensors=3, num_outputs=3)
