"""Many multinomial logistic regressions on fixed features as one batched model: the setting of TuneLoss's paper.

The training loss is, for weights W [C, D] of n samples,

    log loss + l1 |W|_1 / n + sum_g l2_g |W_g|_2^2 / n + uniform * (log loss of uniform labels) + dropout * (log loss
    of samples with inputs dropped).

A batch has B = R V problems: V losses for each of R data sets of one size, those of a data set side by side. All
that is of one data set is one matrix product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._batches import Batch

NAMES = ("l1", "l2", "uniform", "dropout")
KEPT = 0.5  # of the inputs of a sample with dropout


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Those of B losses beside the log loss, whose own is 1.

    Attributes:
        l1: [B].
        l2: [B, G]; feature j of d is in group floor(j G / d), so that G = 1 is one for all and G = d one for each.
        uniform: [B].
        dropout: [B].
    """

    l1: Tensor
    l2: Tensor
    uniform: Tensor
    dropout: Tensor

    @classmethod
    def of(cls, values: Sequence[Mapping[str, Any]]) -> Coefficients:
        """From what B tuners ask for: a mapping with ``l1``, ``l2`` (a number or a vector), ``uniform``, ``dropout``.

        Raises:
            ValueError: for other names or another order, vectors of several lengths, and numbers that are negative or
                not finite.
        """
        if not values:
            raise ValueError("Coefficients: values must have at least one loss, got none")
        for mapping in values:
            if tuple(mapping) != NAMES:
                raise ValueError(
                    f"Coefficients: values must be of {', '.join(NAMES)}, in that order, got "
                    f"{', '.join(map(str, mapping)) or 'none'}"
                )
        found = []
        for name in NAMES:
            each = [np.asarray(mapping[name], dtype=np.float64) for mapping in values]
            shapes = sorted({v.shape for v in each})
            if len(shapes) > 1 or len(shapes[0]) > (name == "l2"):
                wanted = "a number or a vector of one length" if name == "l2" else "a number"
                raise ValueError(f"Coefficients: {name} must be {wanted} in all losses, got shapes {shapes}")
            table = np.stack(each)
            if not (np.isfinite(table).all() and (table >= 0).all()):
                bad = table[~(np.isfinite(table) & (table >= 0))][0]
                raise ValueError(f"Coefficients: {name} must be finite and at least 0, got {bad:g}")
            found.append(torch.from_numpy(table))
        l1, l2, uniform, dropout = found
        return cls(l1, l2.reshape(len(values), -1), uniform, dropout)

    @property
    def size(self) -> int:
        """k, the number of coefficients of a loss."""
        return 3 + self.l2.shape[1]

    def vectors(self) -> Tensor:
        """[B, k], in the order of :data:`NAMES`."""
        return torch.cat([self.l1[:, None], self.l2, self.uniform[:, None], self.dropout[:, None]], 1)


class SoftmaxRegression:
    """The training data of R repetitions, and their losses.

    Args:
        inputs: [R, n, d], or [n, d] for one repetition. An input that is 1 for all samples is put behind them: the
            bias, which no penalty and no dropout touches.
        labels: int64 [R, n] or [n].
        classes: C.
        masks: M, how many fixed masks of dropout every sample has in the exact loss; 0 where dropout is never asked
            for.
        seeds: one per repetition, of the masks; by default 0 to R - 1.
        dtype: float64 or float32, of the computation.

    Attributes:
        inputs: [R, (1 + M) n, D], D = d + 1: the samples, and M times those with half of the inputs dropped, the others
            doubled.
        labels: [R, (1 + M) n].
        count: n.

    Raises:
        ValueError: for shapes that do not fit, labels outside of [0, C), inputs that are not finite and options out of
            range.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        classes: int,
        masks: int = 2,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"SoftmaxRegression: dtype must be float64 or float32, got {dtype}")
        if masks < 0:
            raise ValueError(f"SoftmaxRegression: masks must be at least 0, got {masks}")
        samples, labels = checked(inputs, labels, classes)
        repetitions = len(samples)
        self.seeds = list(range(repetitions)) if seeds is None else list(seeds)
        if len(self.seeds) != repetitions:
            raise ValueError(
                f"SoftmaxRegression: seeds must be one for each of {repetitions} repetitions, got {len(self.seeds)}"
            )
        samples = with_bias(samples.to(dtype))
        self.classes, self.masks, self.count = classes, masks, samples.shape[1]
        self.repetitions, self.width = repetitions, samples.shape[2]
        copies = [samples]
        generators = [np.random.default_rng([0, seed]) for seed in self.seeds]
        for _ in range(masks):
            kept = np.stack([g.random((self.count, self.width)) < KEPT for g in generators])
            kept[:, :, -1] = True
            dropped = samples * torch.from_numpy(kept).to(samples)
            dropped[..., :-1] /= KEPT
            copies.append(dropped)
        self.inputs = torch.cat(copies, 1) if masks else samples
        self.labels = labels.repeat(1, 1 + masks)

    def rows(self, kept: Tensor) -> SoftmaxRegression:
        """The same of the repetitions that a mask [R] keeps."""
        part = copy(self)
        part.inputs, part.labels = self.inputs[kept], self.labels[kept]
        part.seeds = [seed for seed, k in zip(self.seeds, kept.tolist(), strict=True) if k]
        part.repetitions = len(part.inputs)
        return part


def starting_weights(problem: SoftmaxRegression, coefficients: Coefficients, start: Tensor | None) -> Tensor:
    """A copy [R, V, C, D] of weights [B, C, D], or zeros."""
    shape = (len(coefficients.l1), problem.classes, problem.width)
    if shape[0] % problem.repetitions:
        raise ValueError(
            f"SoftmaxRegression: coefficients must be of a multiple of {problem.repetitions} repetitions, got "
            f"{shape[0]}"
        )
    if start is None:
        start = problem.inputs.new_zeros(shape)
    if start.shape != shape:
        raise ValueError(f"SoftmaxRegression: start must have shape {list(shape)}, got {list(start.shape)}")
    if not start.isfinite().all():
        raise ValueError("SoftmaxRegression: start must be finite, got NaN or infinity")
    start = start.to(problem.inputs).clone()
    return start.reshape(problem.repetitions, -1, *shape[1:])


def evaluate(weights: Tensor, data: Batch) -> tuple[Tensor, Tensor]:
    """Log loss [B] and share of errors [B] of weights [B, C, D].

    The data are inputs [R, m, d] and labels [R, m], or [m, d] and [m].
    """
    inputs, labels = checked(*data, weights.shape[1])
    outputs = outputs_of(weights, with_bias(inputs.to(weights)))
    labels = labels[:, :, None].expand(outputs.shape[:3])
    losses = -F.log_softmax(outputs, -1).gather(-1, labels[..., None])[..., 0]
    wrong = (outputs.argmax(-1) != labels).to(losses)
    return losses.mean(1).flatten(), wrong.mean(1).flatten()


def outputs_of(weights: Tensor, inputs: Tensor) -> Tensor:
    """Logits [R, m, V, C] of weights [B, C, D] for inputs [R, m, D]."""
    if len(weights) % len(inputs):
        raise ValueError(
            f"SoftmaxRegression: weights must be of a multiple of {len(inputs)} repetitions, got {len(weights)}"
        )
    outputs = inputs @ weights.reshape(len(inputs), -1, weights.shape[-1]).mT
    return outputs.view(*outputs.shape[:2], -1, weights.shape[1])


def with_bias(inputs: Tensor) -> Tensor:
    """Inputs [.., d] with a 1 behind them."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)


def group_of_feature(width: int, groups: int) -> Tensor:
    """[D] indices; the bias is in the last group, for which nothing is asked."""
    features = torch.arange(width, device="cpu") * groups // (width - 1)
    return features.clamp(max=groups - 1)


def checked(inputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Inputs [R, n, d] and labels [R, n] of data with or without repetitions."""
    name = "SoftmaxRegression"
    if inputs.dim() == 2 and labels.dim() == 1:
        inputs, labels = inputs[None], labels[None]
    if inputs.dim() != 3 or labels.shape != inputs.shape[:2] or 0 in inputs.shape:
        raise ValueError(
            f"{name}: inputs must be [R, n, d] and labels [R, n], got {list(inputs.shape)} and {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels must be int64, got {labels.dtype}")
    if not inputs.isfinite().all():
        raise ValueError(f"{name}: inputs must be finite, got NaN or infinity")
    if classes < 2 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{name}: labels must lie in [0, {classes}) of at least 2 classes, got [{labels.min()}, {labels.max()}]"
        )
    return inputs, labels
