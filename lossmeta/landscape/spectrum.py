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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Output
from lossmeta._checks import check_at_least_one, check_positive_and_finite
from lossmeta.landscape._hessian import Hessian
from lossmeta.landscape._krylov import Krylov
from lossmeta.landscape._objective import Weights

ROUNDING = 32  # machine epsilons that products of a Hessian may be off, relative to its largest magnitude
TOGETHER = 5  # probes of the trace that share the graph of a gradient
LEAST_PROBES = 10  # before the trace may stop


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
    hessian = Hessian(where, model, loss_fn, data, output)
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
    hessian = Hessian(where, model, loss_fn, data, output)
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
