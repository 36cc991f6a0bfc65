r"""The spectrum of the Hessian of a loss at a model's weights, from products of the Hessian with vectors.

The Hessian is that of the mean loss over the samples given, with respect to the P trainable parameters, in evaluation
mode. Where the loss has kinks, as with ReLU, it is the Hessian of the smooth piece that the weights lie in: what the
kinks add to the curvature is left out.

Memory, beside that of a training step with its graph kept: vectors of P numbers, float64 where a parameter is, else
float32. Each function says how many.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossmeta import plot
from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one, check_positive_and_finite
from lossmeta._model_state import RandomState, Watch
from lossmeta.landscape._krylov import Krylov
from lossmeta.landscape._objective import Objective, Weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 32  # machine epsilons that products of a Hessian may be off, relative to its largest magnitude
TOGETHER = 5  # probes of the trace that share the graph of a gradient
LEAST_PROBES = 10  # before the trace may stop
LEAST_POINTS = 10
WIDTH = 1 / 200  # of a spectrum, in its broadening
REACH = 5.0  # widths that a density goes beyond the outermost nodes


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    r"""What :func:`hessian_eigenvalues` found.

    Attributes:
        values: ``[count]``, float64 on the CPU, descending.
        vectors: of each value, a tensor per trainable parameter by its name, of its shape, dtype and device. Over all
            parameters together the Euclidean length is 1; the sign means nothing.
        residuals: ``[count]``, float64, :math:`|H v - \lambda v|` of each pair, measured by a product of its own. An
            eigenvalue lies within it around the value.
        products: Hessian-vector products, those of the residuals included.
    """

    values: Tensor
    vectors: list[Weights]
    residuals: Tensor
    products: int


@dataclass(frozen=True)
class Estimate:
    """What :func:`hessian_trace` found.

    Attributes:
        value: the mean over the probes.
        interval: a confidence interval of the trace, Student's t over the probes; infinite for a single one.
        probes: how many there were.
    """

    value: float
    interval: tuple[float, float]
    probes: int


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


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    *,
    count: int = 5,
    tolerance: float = 1e-6,
    max_steps: int | None = None,
    seed: int = 0,
    output: Output = None,
) -> Eigenpairs:
    r"""The eigenvalues of largest magnitude of the Hessian of the mean loss, and their eigenvectors.

    By block Lanczos with blocks of ``count`` vectors, full reorthogonalisation and thick restarts. From a block of that
    size an eigenvalue is found as often as it occurs. Negative eigenvalues are among those found where their magnitude
    is.

    The Hessian is that in evaluation mode, of the smooth piece of the loss that the weights lie in: kinks, as those of
    ReLU, add nothing to it. A basis of at most 8 ``count`` + 40 vectors of P numbers is kept, and about 4 ``count``
    more come and go.

    Args:
        model: any module; its parameters with ``requires_grad`` count, tied ones once. Its mode, buffers and gradients
            are afterwards as before, and so are random numbers.
        loss_fn: ``loss_fn(prediction, target) -> []``, the mean over the samples of a batch; where the batches are
            mappings, ``loss_fn(output, batch)``; ``None`` takes the ``loss`` of the output, as transformers give it.
        data: a pair (inputs, target), or batches, which are read once and kept: pairs, or mappings that the model takes
            as keyword arguments.
        count: of eigenvalues; at most P.
        tolerance: what all residuals are to fall to, relative to the largest magnitude. Rounding of the products leaves
            3e-7 to 3e-6 in float32, where no residual below 4e-6 is warned of. A GPU takes TF32 for convolutions, which
            leaves far more, unless ``torch.backends.cudnn.allow_tf32`` is switched off.
        max_steps: Hessian-vector products at most, ``count`` more for the residuals aside; at least ``count``. Without
            it 300 + 60 ``count``.
        seed: of the first block. The same seed gives the same bits on the same machine.
        output: what of the model's output is the prediction: a function of it, a key or the name of an attribute, or a
            position.

    Returns:
        The pairs, by descending value.

    Raises:
        TypeError: for data that are neither a pair nor batches.
        ValueError: for options out of range, ``count`` above P, a model without trainable parameters, no data, a loss
            or a Hessian that is not finite at the model's weights, and a loss without a gradient.

    Warns:
        RuntimeWarning: where residuals stay above ``tolerance``; it names them.

    Sources:
        Golub and Underwood, "The block Lanczos method for computing eigenvalues" (1977); Wu and Simon, "Thick-restart
        Lanczos method for large symmetric eigenvalue problems" (2000); Pearlmutter, "Fast exact multiplication by the
        Hessian" (1994).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> found = lossmeta.landscape.hessian_eigenvalues(model, torch.nn.functional.mse_loss, data, count=2)
        >>> [round(value, 4) for value in found.values.tolist()]
        [4.0, 1.0]
    """
    where = "hessian_eigenvalues"
    check_at_least_one(where, "count", count)
    check_positive_and_finite(where, "tolerance", tolerance)
    if max_steps is not None and max_steps < count:
        raise ValueError(f"{where}: max_steps must be at least count, {count}, got {max_steps}")
    hessian = _Hessian(where, model, loss_fn, data, output)
    if count > hessian.size:
        raise ValueError(
            f"{where}: count must be at most the number of trainable parameters, {hessian.size}, got {count}"
        )
    steps = 300 + 60 * count if max_steps is None else max_steps
    with hessian.opened():
        krylov = Krylov(hessian.products, min(hessian.size, 8 * count + 40), hessian.normal(count, seed))
        while True:
            krylov.step()
            values, vectors = krylov.ritz()
            order = values.abs().argsort(descending=True, stable=True)
            values, vectors = values[order], vectors[:, order]
            # Half of the tolerance is left to rounding, which the recurrence does not see.
            reached = krylov.residuals(vectors[:, :count]) <= tolerance / 2 * values[0].abs()
            if bool(reached.all()) or hessian.used + len(krylov.next) > steps:
                break
            if krylov.size + len(krylov.next) > len(krylov.rows):
                kept = 2 * count + 10
                krylov.restart(values[:kept], vectors[:, :kept])
        found = krylov.rotated(vectors[:, :count])
        del krylov
        found /= torch.linalg.vector_norm(found, dim=1, keepdim=True)
        moved = hessian.products(found)
    rayleigh = _sums(found * moved)
    residuals = _sums((moved - rayleigh.to(found)[:, None] * found).square()).sqrt()
    largest = float(rayleigh.abs().max())
    rounding = ROUNDING * torch.finfo(hessian.dtype).eps
    if bool((residuals > max(tolerance, rounding) * largest).any()):
        reached_by = ", ".join(f"{r / largest:.1e}" for r in residuals.tolist())
        warnings.warn(
            f"{where}: residuals must fall to {tolerance:g} of the largest magnitude, got {reached_by} after "
            f"{hessian.used} products; raise max_steps or tolerance, or take the model in float64",
            RuntimeWarning,
            stacklevel=2,
        )
    order = rayleigh.argsort(descending=True, stable=True)
    pairs = [hessian.parts(found[i]) for i in order.tolist()]
    return Eigenpairs(rayleigh[order], pairs, residuals[order], hessian.used)


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    data: Any,
    *,
    probes: int = 100,
    tolerance: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    output: Output = None,
) -> Estimate:
    r"""The trace of the Hessian of the mean loss, by Hutchinson's estimator.

    It is the mean of :math:`z^\top H z` over probes z of random signs, whose variance is
    :math:`2 \sum_{i \ne j} H_{ij}^2`. The Hessian is that of :func:`hessian_eigenvalues`; about twenty vectors of P
    numbers are held.

    Args:
        model: see :func:`hessian_eigenvalues`.
        loss_fn: see :func:`hessian_eigenvalues`.
        data: see :func:`hessian_eigenvalues`.
        probes: Hessian-vector products, at most.
        tolerance: the half of the interval, relative to the magnitude of the value, at which it ends; looked at after
            every five probes from the tenth on. ``None`` takes all probes.
        confidence: that the interval covers the trace; a little less where it ends early.
        seed: of the signs. The same seed gives the same bits on the same machine.
        output: see :func:`hessian_eigenvalues`.

    Raises:
        TypeError: for data that are neither a pair nor batches.
        ValueError: for options out of range, a model without trainable parameters, no data, a loss or a Hessian that is
            not finite at the model's weights, and a loss without a gradient.

    Warns:
        RuntimeWarning: where the interval stays wider than ``tolerance``.

    Sources:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines"
        (1990).

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
        >>> found = lossmeta.landscape.hessian_trace(model, torch.nn.functional.mse_loss, data)
        >>> round(found.value, 4)
        5.0
    """
    where = "hessian_trace"
    check_at_least_one(where, "probes", probes)
    if tolerance is not None:
        check_positive_and_finite(where, "tolerance", tolerance)
    if not 0 < confidence < 1:
        raise ValueError(f"{where}: confidence must lie in (0, 1), got {confidence}")
    hessian = _Hessian(where, model, loss_fn, data, output)
    generator = torch.Generator("cpu").manual_seed(seed)
    found: list[float] = []
    with hessian.opened():
        while len(found) < probes:
            signs = hessian.signs(min(TOGETHER, probes - len(found)), generator)
            found += _sums(signs * hessian.products(signs)).tolist()
            value, half = _mean(found, confidence)
            narrow = tolerance is None or half <= tolerance * abs(value)
            if tolerance is not None and narrow and len(found) >= LEAST_PROBES:
                break
    if not narrow:
        warnings.warn(
            f"{where}: the interval must narrow to {tolerance:g} of the value on either side, got {half:.3g} around "
            f"{value:.3g} after {probes} probes; raise probes or tolerance",
            RuntimeWarning,
            stacklevel=2,
        )
    return Estimate(value, (value - half, value + half), len(found))


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
    hessian = _Hessian(where, model, loss_fn, data, output)
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


def _mean(found: list[float], confidence: float) -> tuple[float, float]:
    """And half of its confidence interval, by Student's t."""
    if len(found) < 2:
        return found[0], math.inf
    from scipy.special import stdtrit

    error = statistics.stdev(found) / math.sqrt(len(found))
    return statistics.fmean(found), error * float(stdtrit(len(found) - 1, (1 + confidence) / 2))


def _sums(rows: Tensor) -> Tensor:
    """Of each row, in float64 on the CPU."""
    return rows.sum(1, dtype=torch.float64).cpu()


class _Hessian:
    """Of the mean loss at a model's weights, on vectors of all trainable parameters one after another."""

    def __init__(
        self, where: str, model: nn.Module, loss_fn: Callable[..., Tensor] | None, data: Any, output: Output
    ) -> None:
        self.objective = Objective(where, model, loss_fn, data, output=output)
        self.where, self.device = where, self.objective.device
        self.parameters = self.objective.parameters
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self.sizes)
        double = any(p.dtype == torch.float64 for p in self.parameters.values())
        self.dtype = torch.float64 if double else torch.float32
        self.used = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Products can be had; afterwards model and random numbers are as before."""
        model, device = self.objective.model, self.device
        with (
            torch.inference_mode(False),
            self.objective.quiet(),
            torch.autocast(device.type, enabled=False),
        ):
            # Of a model that draws random numbers all products are to see the same ones.
            self.start = RandomState(device, Watch(model, device), everything=True)
            self._check_loss()
            yield

    def _check_loss(self) -> None:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, share in self.objective:
            with torch.enable_grad():
                loss = self.objective.loss(batch)
            if not loss.requires_grad:
                raise ValueError(
                    f"{self.where}: loss_fn must be differentiable in the model's weights, got no gradient"
                )
            total += share * loss.detach().double()
        if not bool(total.isfinite()):
            raise ValueError(f"{self.where}: loss is not finite at the model's weights, got {float(total)}")

    def products(self, rows: Tensor) -> Tensor:
        """``[r, P]``, the Hessian times each row."""
        self.start.bring_back()
        found = self.objective.hessian_products([self.parts(row) for row in rows])
        self.used += len(rows)
        moved = torch.stack(
            [torch.cat([part.flatten().to(rows) for part in vector.values()]) for vector in found]
        )
        if not bool(moved.isfinite().all()):
            raise ValueError(
                f"{self.where}: the Hessian must be finite at the model's weights, got a product with NaN or infinity"
            )
        return moved

    def parts(self, row: Tensor) -> Weights:
        pieces = zip(self.parameters.items(), row.split(self.sizes), strict=True)
        return {name: piece.view_as(p).to(p) for (name, p), piece in pieces}

    def normal(self, count: int, seed: int) -> Tensor:
        """``[count, P]``, of the normal distribution."""
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(count, self.size, generator=generator, dtype=self.dtype, device="cpu")
        return drawn.to(self.device)

    def signs(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, P]``, of 1 and -1; the same ones for any division into counts."""
        drawn = torch.randint(0, 2, (count, self.size), generator=generator, dtype=torch.int8, device="cpu")
        return (2 * drawn - 1).to(self.device, self.dtype)
