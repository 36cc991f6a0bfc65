"""L-Softmax: a softmax that asks for a larger angle between a sample and the class it belongs to."""

from __future__ import annotations

from torch import Tensor

FIRST, GROWTH, POWER = 1000.0, 0.6, 45.0


def large_margin_logits(features: Tensor, weight: Tensor, labels: Tensor, ease: float) -> Tensor:
    r"""Logits whose entry of the label is harder to raise, for a margin m of 2.

    With the angle :math:`\theta` between a sample's features x and its class's weights w

    .. math:: \frac{\lambda \|w\| \|x\| \cos\theta + \|w\| \|x\| \psi(\theta)}{1 + \lambda}, \qquad
              \psi(\theta) = (-1)^k \cos 2\theta - 2k, \quad k = [\theta > \pi / 2]

    takes the place of :math:`w^\top x` (Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks",
    2016). There is no bias.

    Args:
        features: of the last linear layer, ``[N, D]``.
        weight: of that layer, ``[C, D]``.
        labels: ``[N]``.
        ease: :math:`\lambda`; the plain logits where it is large.
    """
    logits = features @ weight.T
    plain = logits.gather(1, labels[:, None])[:, 0]
    size = features.norm(dim=1) * weight[labels].norm(dim=1)
    cosine = plain / size.clamp_min(1e-12)
    # cos 2t = 2 cos^2 t - 1
    double = 2 * cosine**2 - 1
    hard = size * double.where(cosine >= 0, -double - 2)
    target = (ease * plain + hard) / (1 + ease)
    return logits.scatter(1, labels[:, None], target[:, None])


def ease(share: float, least: float = 0.0) -> float:
    r"""By the share s of the training done: :math:`\lambda = 1000 (1 + 0.6 s)^{-45}`, 1 after a quarter of it.

    The authors' course for CIFAR-10 (``base`` 1000, ``gamma`` 2e-5, ``power`` 45 over 30,000 steps).

    Args:
        share: s.
        least: below which it does not fall; the authors have such a floor for training that does not converge.
    """
    return max(least, FIRST * (1 + GROWTH * share) ** -POWER)
