"""Products with second derivatives of a loss over a data set: Gauss-Newton through predictions, exact elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Batch, samples
from lossmeta.tuneloss._box import Values
from lossmeta.tuneloss.features import PredictionFeature, uses_data
from lossmeta.tuneloss.loss import TunedLoss

Replay = Callable[[], None]
SCALE_PROBES = 8  # in the space of predictions, where they cost little


class Weights:
    """The trainable parameters of a model as one vector, float64 where one of them is, else float32."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [p for p in model.parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.tensors]
        self.size = sum(self.sizes)
        double = any(p.dtype == torch.float64 for p in self.tensors)
        self.dtype = torch.float64 if double else torch.float32
        self.device = self.tensors[0].device if self.tensors else torch.device("cpu")

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """[n]; nothing stands for zeros."""
        return torch.cat(
            [
                torch.zeros(size, dtype=self.dtype, device=self.device)
                if part is None
                else part.reshape(-1).to(self.device, self.dtype)
                for part, size in zip(parts, self.sizes, strict=True)
            ]
        )

    def parts(self, vector: Tensor) -> list[Tensor]:
        return [
            v.view_as(p).to(p.device, p.dtype)
            for v, p in zip(vector.split(self.sizes), self.tensors, strict=True)
        ]

    def gradient(self, value: Tensor, *, create_graph: bool = False) -> list[Tensor | None]:
        """Of a number; the graph is kept."""
        if not value.requires_grad:
            return [None] * len(self.tensors)
        return list(
            torch.autograd.grad(
                value, self.tensors, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
        )


class Data:
    """Batches that are run through again and again, with the same random numbers in every pass.

    Attributes:
        single: the only batch, or ``None`` where there may be several.
    """

    def __init__(self, batches: Iterable[Batch], replay: Replay) -> None:
        self.batches, self.replay = batches, replay
        self.single = batches[0] if isinstance(batches, list) and len(batches) == 1 else None

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Batches and how many samples each has."""
        self.replay()
        for batch in self.batches:
            self.replay()
            yield batch, samples(batch[1])


class Linearised:
    """Predictions around the weights: J v, Jᵀ w, and S u with the second derivative S of a number of them."""

    def __init__(
        self, weights: Weights, outputs: list[Tensor], number: Callable[[list[Tensor]], Tensor]
    ) -> None:
        self.weights = weights
        self.outputs = [f for f in outputs if f.requires_grad]
        self.leaves = [f.detach().requires_grad_(f.requires_grad) for f in outputs]
        self.moving = [leaf for leaf in self.leaves if leaf.requires_grad]
        value = number(self.leaves)
        self.slopes: list[Tensor | None] = [None] * len(self.moving)
        if value.requires_grad:
            found = torch.autograd.grad(value, self.moving, create_graph=True, allow_unused=True)
            self.slopes = list(found)
        self.duals = [torch.zeros_like(f, requires_grad=True) for f in self.outputs]
        self.pulled: list[Tensor | None] = [None] * len(weights.tensors)
        if self.outputs:
            found = torch.autograd.grad(
                self.outputs, weights.tensors, self.duals, create_graph=True, allow_unused=True
            )
            self.pulled = list(found)

    def push(self, vector: Tensor) -> list[Tensor]:
        """J v."""
        return _transposed(self.pulled, self.duals, self.weights.parts(vector))

    def curve(self, moved: Sequence[Tensor]) -> list[Tensor]:
        """S u."""
        return _transposed(self.slopes, self.moving, moved)

    def pull(self, moved: Sequence[Tensor]) -> Tensor:
        """Jᵀ w."""
        if not self.outputs:
            return self.weights.flat([None] * len(self.weights.tensors))
        found = torch.autograd.grad(
            self.outputs, self.weights.tensors, list(moved), retain_graph=True, allow_unused=True
        )
        return self.weights.flat(found)


def _transposed(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The transposed derivative of outputs that may be absent or constant, times vectors."""
    pairs = [(f, v) for f, v in zip(outputs, vectors, strict=True) if f is not None and f.requires_grad]
    if not pairs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(
        [f for f, _ in pairs], list(inputs), [v for _, v in pairs], retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


class _Part:
    """What a batch, or the weights alone, add to the Hessian."""

    def __init__(self, weights: Weights, linear: Linearised | None, rest: Tensor | None) -> None:
        self.weights, self.linear = weights, linear
        self.rest = weights.gradient(rest, create_graph=True) if rest is not None else None

    def products(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for i, row in enumerate(rows):
            if self.linear is not None:
                out[i] += self.linear.pull(self.linear.curve(self.linear.push(row)))
            if self.rest is not None:
                out[i] += self.rest_product(row)
        return out

    def rest_product(self, row: Tensor) -> Tensor:
        assert self.rest is not None
        return self.weights.flat(_transposed(self.rest, self.weights.tensors, self.weights.parts(row)))

    def diagonal(self, probes: int, generator: torch.Generator) -> Tensor:
        """An unbiased estimate from random signs; exact for a part whose Hessian is diagonal."""
        total = torch.zeros(self.weights.size, dtype=self.weights.dtype, device=self.weights.device)
        if self.linear is not None and self.linear.outputs:
            # E[(Jᵀ a ξ) ∘ (Jᵀ S ξ / a)] = diag(Jᵀ S J) for any a of other probes; near diag(S)^½ both
            # factors are alike.
            rough = [torch.zeros_like(f) for f in self.linear.outputs]
            for _ in range(SCALE_PROBES):
                xi = [_signs(f, generator) for f in self.linear.outputs]
                for r, x, s in zip(rough, xi, self.linear.curve(xi), strict=True):
                    r += (x * s).abs() / SCALE_PROBES
            a = [(r + 1e-8 * r.max() + torch.finfo(r.dtype).tiny).sqrt() for r in rough]
            for _ in range(probes):
                xi = [_signs(f, generator) for f in self.linear.outputs]
                left = self.linear.pull([s * t for s, t in zip(xi, a, strict=True)])
                right = self.linear.pull(self.linear.curve([s / t for s, t in zip(xi, a, strict=True)]))
                total += left * right / probes
        if self.rest is not None and any(g is not None and g.requires_grad for g in self.rest):
            for _ in range(probes):
                sign = _signs(total, generator)
                total += sign * self.rest_product(sign) / probes
        return total


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device="cpu")
    return (2 * bits - 1).to(like.device, like.dtype)


class TrainingHessian:
    """The Hessian of a tuned loss on the training data.

    Args:
        exact: whether the second derivative of the predictions counts, too.
    """

    def __init__(
        self, loss: TunedLoss, model: nn.Module, values: Values, data: Data, weights: Weights, *, exact: bool
    ) -> None:
        self.loss, self.model, self.values, self.data, self.weights = loss, model, values, data, weights
        self.exact = exact
        # Where a parameter is zero, so is its part.
        self.names = [n for n, v in values.items() if bool((torch.as_tensor(v, device="cpu") != 0).any())]
        data.replay()
        alone = [n for n in self.names if not uses_data(loss.features[n])]
        self.alone = None
        if alone:
            nothing: Any = None
            found = {n: loss.features[n](model, nothing) for n in alone}
            zero = torch.zeros((), dtype=weights.dtype, device=weights.device)
            self.alone = _Part(weights, None, loss.total(zero, found, values))
        self.kept: _Part | None = None

    def _part(self, batch: Batch) -> _Part:
        """Of a batch; that of the only one is kept."""
        if self.kept is not None:
            return self.kept
        inputs, target = batch
        loss, values = self.loss, self.values
        names = [n for n in self.names if uses_data(loss.features[n])]
        ours = [n for n in names if isinstance(loss.features[n], PredictionFeature)]
        outputs, places = loss.predictions(self.model, inputs, ours)
        found = {n: loss.features[n](self.model, batch) for n in names if n not in ours}

        def number(predictions: list[Tensor]) -> Tensor:
            return loss.total(*loss.of_predictions(predictions, places, target), values)

        rest = loss.total(torch.zeros_like(outputs[0].sum()), found, values) if found else None
        if self.exact:
            whole = number(outputs)
            part = _Part(self.weights, None, whole if rest is None else whole + rest)
        else:
            part = _Part(self.weights, Linearised(self.weights, outputs, number), rest)
        if self.data.single is not None:
            self.kept = part
        return part

    def products(self, rows: Tensor) -> Tensor:
        """[r, n] times the Hessian."""
        total, count = torch.zeros_like(rows), 0
        for batch, size in self.data:
            total += size * self._part(batch).products(rows)
            count += size
        total /= count
        return total if self.alone is None else total + self.alone.products(rows)

    def diagonal(self, probes: int = 16) -> Tensor:
        """[n], an estimate that is positive: at least a hundredth of its mean."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        total, count = torch.zeros(self.weights.size, dtype=self.weights.dtype, device=self.weights.device), 0
        for batch, size in self.data:
            total += size * self._part(batch).diagonal(probes, generator)
            count += size
        total /= count
        if self.alone is not None:
            total += self.alone.diagonal(probes, generator)
        floor = 0.01 * total.abs().mean()
        return total.clamp(min=floor if floor > 0 else 1.0)


class NegativeCurvature(Exception):
    """The matrix is not positive definite."""


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], rows: Tensor, preconditioner: Tensor, iterations: int
) -> Tensor:
    """Solves A x = b for every row b of [r, n], all in step.

    Args:
        product: A times rows; symmetric and positive definite.
        rows: [r, n].
        preconditioner: [n], near the diagonal of A.
        iterations: at most; those rows end sooner of which nothing but rounding is left.

    Raises:
        NegativeCurvature: where a direction shows that A is not positive definite.
    """
    x, residual = torch.zeros_like(rows), rows.clone()
    z = residual / preconditioner
    direction, rz = z, (residual * z).sum(1)
    least = torch.finfo(rows.dtype).eps ** 2 * rz
    for _ in range(iterations):
        going = rz > least
        if not bool(going.any()):
            break
        moved = product(direction)
        curvature = (direction * moved).sum(1)
        if bool((going & ~(curvature > 0)).any()):
            raise NegativeCurvature
        length = torch.where(going, rz / torch.where(going, curvature, 1.0), 0.0)
        x = x + length[:, None] * direction
        residual = residual - length[:, None] * moved
        z = residual / preconditioner
        new = (residual * z).sum(1)
        direction = z + torch.where(going, new / torch.where(going, rz, 1.0), 0.0)[:, None] * direction
        rz = torch.where(going, new, 0.0)
    return x
