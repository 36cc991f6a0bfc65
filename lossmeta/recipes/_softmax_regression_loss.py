"""The losses of softmax regressions: values, gradients and curvature, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta.recipes._softmax_regression import Coefficients, SoftmaxRegression, group_of_feature

MU = 3e-3  # |w| is sqrt(w^2 + MU^2) - MU
RIDGE = 1e-6  # of the diagonal that preconditions: a class without weight has no curvature


@dataclass(frozen=True, eq=False)
class Scales:
    """How much every part of B = R V losses counts.

    Attributes:
        sample: [R, N, V], of the log loss of every row of the inputs.
        uniform: [R, N, V], of the uniform labels, as a multiple of ``sample``.
        l1: [R, V, 1, D].
        l2: [R, V, 1, D].
    """

    sample: Tensor
    uniform: Tensor
    l1: Tensor
    l2: Tensor

    @classmethod
    def of(cls, problem: SoftmaxRegression, coefficients: Coefficients) -> Scales:
        """
        Raises:
            ValueError: for more groups than features, and dropout without masks.
        """
        if not problem.masks and bool((coefficients.dropout > 0).any()):
            raise ValueError(
                "SoftmaxRegression: dropout must be 0 without masks; make the problem with masks"
            )
        l1, l2 = penalties(problem, coefficients)
        like, n = problem.inputs, problem.count
        uniform, dropout = (
            c.to(like).reshape(problem.repetitions, 1, -1)
            for c in (coefficients.uniform, coefficients.dropout)
        )
        sample = like.new_full((*like.shape[:2], l1.shape[1]), 1 / n)
        alike = torch.zeros_like(sample)
        if problem.masks:
            sample[:, n:] = dropout / (problem.masks * n)
        alike[:, :n] = uniform
        return cls(sample, alike, l1, l2)

    def block(self, rows: Tensor, columns: Tensor) -> Scales:
        """Those of some repetitions and some losses of each."""
        return Scales(
            self.sample[rows][:, :, columns],
            self.uniform[rows][:, :, columns],
            self.l1[rows][:, columns],
            self.l2[rows][:, columns],
        )


def penalties(problem: SoftmaxRegression, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """What |w| and w^2 count [R, V, 1, D], in a loss that is a mean over samples; 0 for the bias.

    Raises:
        ValueError: for more groups than features.
    """
    width, groups = problem.width, coefficients.l2.shape[1]
    if groups > width - 1:
        raise ValueError(f"SoftmaxRegression: l2 must have at most {width - 1} groups, got {groups}")
    share = problem.inputs.new_full((width,), 1 / problem.count)
    share[-1] = 0
    l1, l2 = (
        c.to(share).reshape(problem.repetitions, -1, 1, c[0].numel())
        for c in (coefficients.l1, coefficients.l2)
    )
    return l1 * share, l2[..., group_of_feature(width, groups)] * share


class Loss:
    """B = R V losses at weights.

    Attributes:
        weights: [R, V, C, D].
        probabilities: [R, N, V, C].
        values: [R, V].
    """

    def __init__(self, problem: SoftmaxRegression, weights: Tensor, scales: Scales) -> None:
        self.problem, self.scales = problem, scales
        self.weights = weights.reshape(problem.repetitions, -1, problem.classes, problem.width)
        logs = F.log_softmax(self.through(self.weights), -1)
        self.probabilities = logs.exp()
        self.labels = problem.labels[:, :, None, None].expand(-1, -1, logs.shape[2], 1)
        # Every row's log loss: of its label, and of uniform labels.
        self.of_label, self.of_uniform = -logs.gather(-1, self.labels)[..., 0], -logs.mean(-1)
        self.magnitude = (self.weights.square() + MU * MU).sqrt()
        penalty = scales.l1 * (self.magnitude - MU) + scales.l2 * self.weights.square()
        self.values = (scales.sample * (self.of_label + scales.uniform * self.of_uniform)).sum(
            1
        ) + penalty.sum((2, 3))

    def through(self, weights: Tensor) -> Tensor:
        """[R, N, V.., C] of weights [R, V.., C, D]."""
        stacked = weights.reshape(weights.shape[0], -1, weights.shape[-1])
        outputs = self.problem.inputs @ stacked.mT
        return outputs.view(*outputs.shape[:2], *weights.shape[1:-1])

    def back(self, outputs: Tensor) -> Tensor:
        """[R, V.., C, D], the transpose."""
        stacked = outputs.reshape(*outputs.shape[:2], -1).mT @ self.problem.inputs
        return stacked.view(outputs.shape[0], *outputs.shape[2:], -1)

    def gradient(self) -> Tensor:
        """[R, V, C, D]."""
        s = self.scales
        sample = s.sample[..., None]
        slope = sample * (
            (1 + s.uniform[..., None]) * self.probabilities - s.uniform[..., None] / self.problem.classes
        )
        slope.scatter_add_(-1, self.labels, -sample)
        return self.back(slope) + s.l1 * self.weights / self.magnitude + 2 * s.l2 * self.weights

    def _penalty_curvature(self) -> Tensor:
        return self.scales.l1 * MU**2 / self.magnitude**3 + 2 * self.scales.l2

    def hessian_product(self, directions: Tensor) -> Tensor:
        """H times directions [R, V, S, C, D], S of them for every loss."""
        moved = self.through(directions)
        p = self.probabilities[:, :, :, None]
        sample = (self.scales.sample * (1 + self.scales.uniform))[..., None, None]
        curved = sample * p * (moved - (p * moved).sum(-1, keepdim=True))
        return self.back(curved) + self._penalty_curvature()[:, :, None] * directions

    def hessian_diagonal(self) -> Tensor:
        """[R, V, C, D], :data:`RIDGE` above that of H."""
        p = self.probabilities
        curved = (self.scales.sample * (1 + self.scales.uniform))[..., None] * p * (1 - p)
        stacked = curved.flatten(2).mT @ self.problem.inputs.square()
        return stacked.view_as(self.weights) + self._penalty_curvature() + RIDGE


def inner(a: Tensor, b: Tensor) -> Tensor:
    """[.., 1, 1] of [.., C, D]."""
    return (a * b).sum((-2, -1), keepdim=True)
