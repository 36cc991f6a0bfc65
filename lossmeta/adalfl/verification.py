"""Whether the passes of a step were one function, and the back-end's u is the one that belongs to the training pass.

Everything behind a meta-gradient assumes both. A model that draws random numbers out of reach, or keeps state there,
breaks the first; a backward pass that is not the derivative of the forward pass, such as a straight-through estimator,
the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INTERVAL = 100
"""Steps from one check to the next: on average it costs less than a hundredth of a step."""

FIRST_PROBES, LATER_PROBES = 4, 1
# Of the prediction's norm: kernels that add in another order differ by less.
SAME = {torch.bfloat16: 5e-2}
# Of u's norm. Finite differences are off by far less, what is compared here by much more. A single probe tells less.
AGREES = {FIRST_PROBES: 0.1, LATER_PROBES: 0.3}


class BackendError(RuntimeError):
    """The meta-gradient cannot be computed this way for this model; the step was not taken."""


@dataclass
class Probes:
    """Random directions s in output space, with <s, J w> from the backward pass.

    Attributes:
        directions: of elements 1 and -1.
        products: one number per direction.
        prediction: of the repeated training pass, detached.
    """

    directions: list[Tensor]
    products: list[float]
    prediction: Tensor


def random_signs(like: Tensor, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (count, *like.shape), generator=generator, device="cpu") * 2 - 1
    return list(signs.to(like.device, like.dtype))


def probe(
    prediction: Tensor, parameters: Sequence[Tensor], w: Sequence[Tensor], count: int, seed: int
) -> Probes:
    """One backward pass per direction: <s, J w> = <J' s, w>."""
    directions = random_signs(prediction, count, seed)
    products = []
    for i, s in enumerate(directions):
        gradients = torch.autograd.grad(
            prediction, parameters, s, retain_graph=i + 1 < count, allow_unused=True
        )
        products.append(_dot(gradients, w))
    return Probes(directions, products, prediction.detach())


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True) if x is not None)


def why_not_replayed(first: Tensor, second: Tensor) -> str | None:
    """What is wrong if a repeated training pass does not give the same prediction."""
    if first.shape != second.shape:
        return f"a repeated training pass gave a prediction of shape {list(second.shape)} after {list(first.shape)}"
    difference = float((first.double() - second.double()).norm() / first.double().norm().clamp_min(1e-30))
    if difference <= SAME.get(first.dtype, 1e-3):
        return None
    return (
        f"a repeated training pass gave another prediction, off by {difference:.1g} of it: the model draws random "
        "numbers or keeps state where they cannot be replayed"
    )


def why_not_agreeing(u: Tensor, probes: Probes) -> str | None:
    """What is wrong if u is not J w, by the root mean square of <s, u - J w> over the directions s."""
    found = [_dot([s], [u]) for s in probes.directions]
    count = len(found)
    off = math.sqrt(sum((a - b) ** 2 for a, b in zip(found, probes.products, strict=True)) / count)
    if not math.isfinite(off):  # the step is left out for that
        return None
    size = max(float(u.double().norm()), math.sqrt(sum(b**2 for b in probes.products) / count))
    if off <= AGREES[count] * size:
        return None
    return (
        f"the derivative of the forward pass and the backward pass disagree, by {off / max(size, 1e-30):.1g}: the "
        "model's backward pass is another function's, as that of a straight-through estimator, or it computes in "
        "bfloat16 of its own accord"
    )


def why_not_differentiable(
    u: Tensor | None, s: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]
) -> str | None:
    """What is wrong if <u, s> is not <w, J' s>, although both come from the backward pass.

    ``gradients`` are pairs of J' s and w.
    """
    product = _dot([g for g, _ in gradients], [w for _, w in gradients])
    along = size = 0.0
    if u is not None:
        along, size = _dot([u], [s]), float(u.double().norm() * s.double().norm())
    if not math.isfinite(product) or abs(along - product) <= 1e-2 * max(size, abs(product)):
        return None
    return "the model's backward pass cannot be differentiated, though it does not say so"
