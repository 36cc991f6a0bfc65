"""A loss network on top of a task loss, and of its slope: the meta-gradient holds the derivative of the factor too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_problems import LossOfEager, batches, problem, relative_error, unrolled, unrolled_chain
from torch import Tensor

from lossmeta.adalfl import meta_gradient
from lossmeta.adalfl.unrolled import unrolled as adjoint
from lossmeta.losses import LossNetwork


class VariantOfEager(LossOfEager):
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        value = self.unscaled(pred, target)
        if not self.loss.normalize_slope:
            return value
        f = pred.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.unscaled(f, target), f, create_graph=True)
        task = (f.detach().softmax(1) - F.one_hot(target, f.shape[1])) / len(f)
        return value * task.abs().mean() / slope.abs().mean()

    def unscaled(self, pred: Tensor, target: Tensor) -> Tensor:
        network = super().forward(pred, target)
        return network if self.loss.residual is None else network + F.cross_entropy(pred, target)


VARIANTS = pytest.mark.parametrize("normalized", [True, False], ids=["normalized", "unscaled"])
RESIDUALS = pytest.mark.parametrize("residual", [None, "cross_entropy"])


def variant(residual: str | None, normalized: bool) -> LossNetwork:
    loss = LossNetwork(8, residual=residual, normalize_slope=normalized, dtype=torch.float64)
    with torch.no_grad():
        loss.output_weight.normal_()
    return loss


@VARIANTS
@RESIDUALS
@pytest.mark.parametrize(
    ("backend", "bound"), [("double_backward", 1e-10), ("jvp", 1e-10), ("finite_difference", 1e-6)]
)
def test_equals_full_unrolling(backend: str, bound: float, residual: str | None, normalized: bool) -> None:
    network, made, _ = problem("mlp", "sgd, nesterov", 3)
    loss = variant(residual, normalized)
    train, valid = batches()
    expected = unrolled(network, made, loss, train, valid, eager=VariantOfEager)
    result = meta_gradient(network, made, loss, F.cross_entropy, train, valid, backend=backend)
    assert relative_error(result.gradients, expected) < bound


@VARIANTS
def test_starts_with_the_output_layer(normalized: bool) -> None:
    network, made, _ = problem("mlp", "sgd, nesterov", 3)
    loss = LossNetwork(8, residual="cross_entropy", normalize_slope=normalized, dtype=torch.float64)
    train, valid = batches()
    expected = unrolled(network, made, loss, train, valid, eager=VariantOfEager)
    first, second, third = meta_gradient(network, made, loss, F.cross_entropy, train, valid).gradients
    assert first is not None and not first.any()
    assert second is not None and not second.any()
    assert relative_error([third], expected[2:]) < 1e-10


@VARIANTS
@RESIDUALS
def test_several_inner_steps(residual: str | None, normalized: bool) -> None:
    network, _, _ = problem("mlp", "sgd", 0)
    loss = variant(residual, normalized)
    *chain, valid = batches(4)
    expected = unrolled_chain(network, loss, chain, valid, 0.2, VariantOfEager)
    _, actual, _ = adjoint(loss, list(loss.parameters()), network, chain, valid, F.cross_entropy, 0.2)
    assert relative_error(actual, expected) < 1e-10
