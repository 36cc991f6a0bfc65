"""The density of the eigenvalues of a loss's Hessian; :mod:`lossmeta.landscape.spectrum` says which Hessian it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossmeta import plot
from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one, check_positive_and_finite
from lossmeta.landscape._hessian import Hessian
from lossmeta.landscape._krylov import Krylov

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_POINTS = 10
WIDTH = 1 / 200  # of a spectrum, in its broadening
REACH = 5.0  # widths that a density goes beyond the outermost nodes


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""What :func:`hessian_density` found: a distribution of eigenvalues, each of which has the mass 1/P.

    Attributes:
        values: ``[points]``, float64 on the CPU, ascending in equal steps; of eigenvalues.
        density: ``[points]``, float64; the mass in the step around each value, over the length of a step. It integrates
            to 1.
        nodes: ``[probes, m]``, float64, ascending; the Ritz values of each probe.
        weights: ``[probes, m]``, float64, the mass of each node; those of a probe sum to 1. Where a probe has fewer
            nodes than m, because its Krylov space ended, the last is repeated with weight 0.
        width: the standard deviation of the broadening.
        size: P, the number of trainable parameters.
    """

    values: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    size: int

    def moment(self, k: int) -> float:
        r"""An estimate of :math:`\operatorname{tr}(H^k) / P`, from nodes and weights; the width has no part in it.

        Of each probe z it is :math:`z^\top H^k z / P`, but for rounding, where :math:`k < 2m`.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> data = torch.eye(2), torch.zeros(2, 1)
            >>> found = lossmeta.landscape.hessian_density(model, torch.nn.functional.mse_loss, data)
            >>> round(found.moment(1), 6), round(found.moment(2), 6)
            (1.0, 1.0)
        """
        if k < 0:
            raise ValueError(f"SpectralDensity: k must be at least 0, got {k}")
        return float((self.weights * self.nodes**k).sum(1).mean())

    def plot(self) -> Figure:
        """Draws the density over the eigenvalues, logarithmically, down to a tenth of the peak of a single eigenvalue.

        Returns:
            A ``matplotlib.figure.Figure``: write it with its ``savefig``.

        Raises:
            ImportError: without matplotlib, which ``pip install "lossmeta[plot]"`` brings.
        """
        figure, (panel,) = plot.figure("SpectralDensity", size=(6.4, 3.6))
        panel.semilogy(self.values.tolist(), self.density.tolist())
        step = float(self.values[1] - self.values[0])
        single = 1 / (self.size * max(step, self.width * math.sqrt(2 * math.pi)))
        panel.set_ylim(single / 10, 2 * float(self.density.max()))
        panel.set_xlabel("eigenvalue")
        panel.set_ylabel("density")
        return figure


def hessian_density(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    *,
    steps: int = 80,
    probes: int = 10,
    points: int = 1024,
    width: float | None = None,
    seed: int = 0,
    output: Output = None,
) -> SpectralDensity:
    r"""The density of the eigenvalues of the Hessian of the mean loss, by stochastic Lanczos quadrature.

    Lanczos from a probe z of random signs gives a tridiagonal matrix. Its eigenvalues are nodes, and the squared first
    entries of its eigenvectors weights, of a distribution whose moments k < 2 ``steps`` are :math:`z^\top H^k z / P`.
    In expectation the mean over the probes has the moments of the eigenvalues. A normal distribution broadens it.
    A single large eigenvalue is a peak of mass 1/P, of which a probe sees between nothing and several times as much.

    The Hessian is that of :func:`hessian_eigenvalues`. A basis of ``steps`` vectors of P numbers is kept, for one probe
    at a time, and orthogonalised in full.

    Args:
        model: see :func:`hessian_eigenvalues`.
        loss_fn: see :func:`hessian_eigenvalues`.
        data: see :func:`hessian_eigenvalues`.
        steps: Hessian-vector products of each probe; P where that is less.
        probes: how many.
        points: at which the density is given; at least 10.
        width: standard deviation of the broadening. ``None`` takes 1/200 of the range of the nodes and 0.
        seed: of the probes. The same seed gives the same bits on the same machine.
        output: see :func:`hessian_eigenvalues`.

    Raises:
        TypeError: for data that are neither a pair nor batches.
        ValueError: for options out of range, a model without trainable parameters, no data, a loss or a Hessian that is
            not finite at the model's weights, and a loss without a gradient.

    Sources:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017); Ghorbani, Krishnan
        and Xiao, "An investigation into neural net optimization via Hessian eigenvalue density" (2019).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> found = lossmeta.landscape.hessian_density(model, torch.nn.functional.mse_loss, data, probes=1)
        >>> [round(node, 4) for node in found.nodes[0].tolist()]
        [1.0, 4.0]
        >>> found.plot().savefig("density.png")
    """
    where = "hessian_density"
    check_at_least_one(where, "steps", steps)
    check_at_least_one(where, "probes", probes)
    if points < LEAST_POINTS:
        raise ValueError(f"{where}: points must be at least {LEAST_POINTS}, got {points}")
    if width is not None:
        check_positive_and_finite(where, "width", width)
    hessian = Hessian(where, model, loss_fn, data, output)
    generator = torch.Generator("cpu").manual_seed(seed)
    found = []
    with hessian.opened():
        for _ in range(probes):
            krylov = Krylov(hessian.products, min(steps, hessian.size), hessian.signs(1, generator))
            while len(krylov.next) and krylov.size < len(krylov.rows):
                krylov.step()
            values, vectors = krylov.ritz()
            found.append((values, vectors[0].square()))
            del krylov
    most = max(len(values) for values, _ in found)
    nodes = torch.stack([torch.cat([n, n[-1:].expand(most - len(n))]) for n, _ in found])
    weights = torch.stack([torch.cat([w, w.new_zeros(most - len(w))]) for _, w in found])
    if width is None:
        # With 0, where most eigenvalues are: a spectrum of one value has a width, too.
        span = float(nodes.max().clamp(min=0) - nodes.min().clamp(max=0))
        width = WIDTH * (span or 1.0)
    values, density = _broadened(nodes, weights, points, width)
    return SpectralDensity(values, density, nodes, weights, width, hessian.size)


def _broadened(nodes: Tensor, weights: Tensor, points: int, width: float) -> tuple[Tensor, Tensor]:
    """Values in equal steps, and the mass of normal distributions around the nodes in each step, over its length.

    Masses, not the density at the values: they sum to 1 for widths below a step, too.
    """
    low, high = float(nodes.min()) - REACH * width, float(nodes.max()) + REACH * width
    step = (high - low) / (points - 5)  # two empty steps at either end
    values = low + step * (torch.arange(points, dtype=torch.float64, device="cpu") - 2)
    edges = torch.cat([values - step / 2, values[-1:] + step / 2])
    below = torch.zeros_like(edges)
    for node, weight in zip(nodes, weights, strict=True):
        below += torch.special.ndtr((edges[:, None] - node) / width) @ weight
    density = below.diff().clamp(min=0)
    return values, density / (density.sum() * step)
