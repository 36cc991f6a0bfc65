"""Softmax regressions trained by AdaGrad, as in TuneLoss's paper."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta._checks import check_at_least_one, check_positive
from lossmeta.recipes._softmax_regression import KEPT, Coefficients, SoftmaxRegression, starting_weights
from lossmeta.recipes._softmax_regression_loss import penalties


@torch.no_grad()
def adagrad(
    problem: SoftmaxRegression,
    coefficients: Coefficients,
    start: Tensor | None = None,
    *,
    epochs: int = 30,
    batch: int = 1,
    rate: float = 0.1,
    shuffle: int = 0,
) -> Tensor:
    """Weights [B, C, D] that AdaGrad finds: the mean of what it had after each epoch of the later half.

    A sample has its inputs dropped with probability dropout / (1 + dropout), and its log loss counts 1 + dropout times;
    uniform labels are those of the sample as it is. The order of the samples and the dropped inputs depend on
    ``shuffle`` and on the repetition's seed alone: losses of a repetition, and further runs, see the same ones. Squared
    gradients start at 0.1. The slope of l1 is the sign.

    Args:
        problem: R repetitions; its masks are not looked at.
        coefficients: of B = R V losses.
        start: weights [B, C, D]; zeros by default.
        epochs: over all of the samples.
        batch: samples of a step; the last of an epoch may have less.
        rate: learning rate.
        shuffle: of the order.

    Raises:
        ValueError: for a start of another shape or one that is not finite, and options out of range.
    """
    for name, number in (("epochs", epochs), ("batch", batch)):
        check_at_least_one("adagrad", name, number)
    check_positive("adagrad", "rate", rate)
    weights = starting_weights(problem, coefficients, start)
    steps = _Steps(problem, coefficients, weights, rate)
    orders, drops = ([np.random.default_rng([s, shuffle, seed]) for seed in problem.seeds] for s in (1, 2))
    mean, first = torch.zeros_like(weights), epochs // 2
    for epoch in range(epochs):
        steps.epoch(orders, drops, batch)
        if epoch >= first:
            mean += (weights - mean) / (epoch - first + 1)
    return mean.flatten(0, 1)


class _Steps:
    """Steps of AdaGrad, of R V losses at once."""

    def __init__(
        self, problem: SoftmaxRegression, coefficients: Coefficients, weights: Tensor, rate: float
    ) -> None:
        self.problem, self.rate = problem, rate
        shape = weights.shape
        l1, l2 = penalties(problem, coefficients)
        # [R, V C, D] all: what is of one repetition is one matrix product.
        self.weights = weights.view(shape[0], -1, shape[3])
        self.l1, self.twice_l2 = (s.expand(shape).reshape(self.weights.shape) for s in (l1, 2 * l2))
        self.squares = torch.full_like(self.weights, 0.1)
        self.buffer, self.gradient = torch.empty_like(self.weights), torch.empty_like(self.weights)
        self.uniform, self.dropout = (
            c.to(weights).view(shape[:2]) for c in (coefficients.uniform, coefficients.dropout)
        )
        self.copies = 2 if bool((self.dropout > 0).any()) else 1

    def epoch(self, orders: list[np.random.Generator], drops: list[np.random.Generator], batch: int) -> None:
        n, device = self.problem.count, self.problem.inputs.device
        order = torch.from_numpy(np.stack([g.permutation(n) for g in orders])).to(device)
        chance = torch.from_numpy(np.stack([g.random(n) for g in drops])).to(device)
        chunk = batch * max(1, 64 // batch)  # what is prepared at once
        for first in range(0, n, chunk):
            rows = order[:, first : first + chunk]
            batches = torch.arange(first, first + rows.shape[1], device=device) // batch
            sizes = (n - batches * batch).clamp(max=batch)
            inputs = self._inputs(rows, drops)
            slope, constant = self._slopes(rows, chance[:, first : first + chunk], sizes)
            for i in range(0, rows.shape[1], batch):
                self._step(*(x[i : i + batch] for x in (inputs, slope, constant)))

    def _inputs(self, rows: Tensor, drops: list[np.random.Generator]) -> Tensor:
        """[s, R, 2, D] of s samples a repetition, as they are and with inputs dropped; without dropout [s, R, 1, D]."""
        repetition = torch.arange(len(rows), device=rows.device)
        plain = self.problem.inputs[repetition, rows.T]
        if self.copies == 1:
            return plain[:, :, None]
        width = plain.shape[-1]
        bits = [np.frombuffer(g.bytes(-(-len(plain) * width // 8)), np.uint8) for g in drops]
        kept = np.stack([np.unpackbits(b, count=len(plain) * width).reshape(-1, width) for b in bits], 1)
        kept[..., -1] = 1
        dropped = plain * torch.from_numpy(kept).to(plain)
        dropped[..., :-1] /= KEPT
        return torch.stack([plain, dropped], 2)

    def _slopes(self, rows: Tensor, chance: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """With what probabilities are multiplied [s, R, copies, V, 1], and what is added [s, R, copies, V, C]."""
        classes = self.problem.classes
        repetition = torch.arange(len(rows), device=rows.device)
        labels = F.one_hot(self.problem.labels[repetition, rows.T], classes)[:, :, None]
        drop = chance.T[..., None] < self.dropout / (1 + self.dropout)
        whole = (1 + self.dropout).expand_as(drop)
        uniform = self.uniform.expand_as(drop)
        of_label, of_uniform = [torch.where(drop, 0, whole)], [uniform]
        if self.copies == 2:
            of_label.append(torch.where(drop, whole, 0))
            of_uniform.append(torch.zeros_like(uniform))
        share = 1 / sizes.to(whole)[:, None, None, None, None]
        label, alike = (
            torch.stack(of_label, 2)[..., None] * share,
            torch.stack(of_uniform, 2)[..., None] * share,
        )
        return label + alike, -(label * labels[:, :, None] + alike / classes)

    def _step(self, inputs: Tensor, slope: Tensor, constant: Tensor) -> None:
        """Inputs [b, R, copies, D], of a batch."""
        b, repetitions, copies, width = inputs.shape
        rows = inputs.movedim(0, 2).reshape(repetitions, copies * b, width)
        outputs = torch.bmm(rows, self.weights.mT).view(repetitions, copies, b, -1, self.problem.classes)
        slopes = torch.addcmul(constant.movedim(0, 2), slope.movedim(0, 2), outputs.softmax(-1))
        torch.mul(self.weights, self.twice_l2, out=self.buffer)
        torch.baddbmm(self.buffer, slopes.reshape(repetitions, copies * b, -1).mT, rows, out=self.gradient)
        self.gradient.addcmul_(torch.sign(self.weights, out=self.buffer), self.l1)
        self.squares.addcmul_(self.gradient, self.gradient)
        self.weights.addcdiv_(self.gradient, torch.sqrt(self.squares, out=self.buffer), value=-self.rate)
