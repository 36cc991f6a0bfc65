"""Points around a point in parameter space."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype


def perturb(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    r"""Parameter vectors displaced along given directions, in one pass over memory.

    .. math:: \theta_b = \theta + \sum_{k=1}^{K} c_{bk}\, \delta_k

    Those are the points of a loss surface or of a line search, each to be loaded into a model.

    Args:
        base: :math:`\theta`, ``[P]``; float32, float64, bfloat16 or float16 (summed in float32, rounded
            once).
        directions: :math:`\delta`, ``[K, P]``, of the dtype of ``base``.
        coefficients: :math:`c`, ``[B, K]``, of any floating-point dtype.
        out: ``[B, P]``, of the dtype and device of ``base``, with contiguous rows: written in place and
            returned. It must not share memory with the inputs.

    Returns:
        The points, ``[B, P]``, of the dtype of ``base``. They are computed without gradient: the result does
        not require grad, whatever the inputs do.

    Raises:
        ValueError: for shapes, dtypes, devices or strides that do not fit, and for an ``out`` that requires grad while
            gradients are recorded, or overlaps an input.
        TypeError: for something that is not a tensor.

    Source:
        Li et al., *Visualizing the Loss Landscape of Neural Nets*, 2018, whose surfaces ALA analyses.

    Example:
        >>> base, directions = torch.zeros(1000), torch.randn(2, 1000)
        >>> points = perturb(base, directions, torch.tensor([[0.0, 0.0], [0.5, -0.5]]))
        >>> points.shape
        torch.Size([2, 1000])
    """
    if out is None:
        points: Tensor = _operator(base, directions, coefficients)
        return points
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("perturb: out must not require grad while gradients are recorded, got one that does")
    _operator_out(base, directions, coefficients, out)
    torch.autograd.graph.increment_version(out)
    return out


@torch.no_grad()
def _reference(base: Tensor, directions: Tensor, coefficients: Tensor) -> Tensor:
    dtype = accumulation_dtype(base.dtype)
    points = base.to(dtype) + coefficients.to(dtype) @ directions.to(dtype)
    return points.to(base.dtype)


def _fake(base: Tensor, directions: Tensor, coefficients: Tensor) -> Tensor:
    return base.new_empty((coefficients.shape[0], base.shape[0]))


@torch.no_grad()
def _reference_out(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor) -> None:
    out.copy_(_reference(base, directions, coefficients))


def _fake_out(base: Tensor, directions: Tensor, coefficients: Tensor, out: Tensor) -> None:
    return None


_operator = Operator("perturb", reference=_reference, fake=_fake, num_tensors=3)
_operator_out = Operator("perturb_out", reference=_reference_out, fake=_fake_out, num_tensors=4)
