"""Gaussian curvature of a loss surface (ALA, analysis of the loss landscape)."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta._checks import check_positive_and_finite
from lossmeta.ops._operator import Operator
from lossmeta.ops._precision import accumulation_dtype


def gaussian_curvature(surface: Tensor, dx: float, dy: float) -> Tensor:
    r"""Gaussian curvature of the graph of a sampled function, by central differences.

    .. math:: K = \frac{f_{xx} f_{yy} - f_{xy}^2}{(1 + f_x^2 + f_y^2)^2}

    ``surface[i, j]`` is :math:`f(x_i, y_j)`: x runs along the rows (dimension 0) and y along the columns, as
    with ``indexing="ij"`` in :func:`torch.meshgrid` and as in ``numpy.gradient(surface, dx, dy)``. Swapping
    the two axes (with their spacings) transposes the result. The mean over the points is the non-convexity of
    ALA's figure 4.

    Args:
        surface: ``[G, H]`` with G, H >= 3; float32, float64, bfloat16 or float16 (accumulated and returned in
            float32).
        dx: distance between neighbouring rows, positive and finite.
        dy: distance between neighbouring columns, positive and finite.

    Returns:
        The curvature at the interior points, ``[G - 2, H - 2]``: element ``[i, j]`` belongs to
        ``surface[i + 1, j + 1]``. It is a statistic: computed without gradient, the result does not require
        grad.

    Raises:
        ValueError: for a spacing that is not positive and finite, and a surface of another rank, size or dtype.
        TypeError: for a surface that is not a tensor.

    Source:
        Huang et al., *Addressing the Loss-Metric Mismatch with Adaptive Loss Alignment*, 2019.

    Example:
        >>> x = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
        >>> cap = (4 - x[:, None] ** 2 - x**2).sqrt()  # a sphere of radius 2 has curvature 1/4
        >>> round(gaussian_curvature(cap, 0.01, 0.01).mean().item(), 3)
        0.25
    """
    check_positive_and_finite("gaussian_curvature", "dx", dx)
    check_positive_and_finite("gaussian_curvature", "dy", dy)
    curvature: Tensor = _operator(surface, float(dx), float(dy))
    return curvature


@torch.no_grad()
def _reference(surface: Tensor, dx: float, dy: float) -> Tensor:
    f = surface.to(accumulation_dtype(surface.dtype))
    centre = f[1:-1, 1:-1]
    before_x, after_x, before_y, after_y = f[:-2, 1:-1], f[2:, 1:-1], f[1:-1, :-2], f[1:-1, 2:]
    fx, fy = (after_x - before_x) / (2 * dx), (after_y - before_y) / (2 * dy)
    fxx = (2 * (after_x - centre) - (after_x - before_x)) / dx**2
    fyy = (2 * (after_y - centre) - (after_y - before_y)) / dy**2
    fxy = ((f[2:, 2:] - f[2:, :-2]) - (f[:-2, 2:] - f[:-2, :-2])) / (4 * dx * dy)
    return (fxx * fyy - fxy**2) / (1 + fx**2 + fy**2) ** 2


def _fake(surface: Tensor, dx: float, dy: float) -> Tensor:
    return surface.new_empty(
        (surface.shape[0] - 2, surface.shape[1] - 2), dtype=accumulation_dtype(surface.dtype)
    )


_operator = Operator("gaussian_curvature", reference=_reference, fake=_fake, num_tensors=1)
