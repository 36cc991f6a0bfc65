"""A loss of the task loss's slope: its meta-gradient holds the derivative of the factor too."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from test_initialize import unrolled as unrolled_chain
from test_meta_gradient import LossOfEager, batches, problem, relative_error, unrolled
from torch import Tensor

from lossmeta.adalfl import meta_gradient
from lossmeta.adalfl.initialize import _unrolled
from lossmeta.losses import LossNetwork


class NormalizedLossOfEager(LossOfEager):
    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        value = self.unscaled(pred, target)
        f = pred.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.unscaled(f, target), f, create_graph=True)
        task = (f.detach().softmax(1) - F.one_hot(target, f.shape[1])) / len(f)
        return value * task.abs().mean() / slope.abs().mean()

    def unscaled(self, pred: Tensor, target: Tensor) -> Tensor:
        network = super().forward(pred, target)
        return network if self.loss.residual is None else network + F.cross_entropy(pred, target)


@pytest.fixture(autouse=True)
def _normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("test_meta_gradient", "test_initialize"):
        monkeypatch.setattr(sys.modules[module], "LossOfEager", NormalizedLossOfEager)


def normalized(residual: str | None) -> LossNetwork:
    loss = LossNetwork(8, residual=residual, normalize_slope=True, dtype=torch.float64)
    with torch.no_grad():
        loss.output_weight.normal_()
    return loss


@pytest.mark.parametrize("residual", [None, "cross_entropy"])
@pytest.mark.parametrize(
    ("backend", "bound"), [("double_backward", 1e-10), ("jvp", 1e-10), ("finite_difference", 1e-6)]
)
def test_equals_full_unrolling(backend: str, bound: float, residual: str | None) -> None:
    network, made, _ = problem("mlp", "sgd, nesterov", 3)
    loss = normalized(residual)
    train, valid = batches()
    expected = unrolled(network, made, loss, train, valid, lambda g: g)
    result = meta_gradient(network, made, loss, F.cross_entropy, train, valid, backend=backend)
    assert relative_error(result.gradients, expected) < bound


@pytest.mark.parametrize("residual", [None, "cross_entropy"])
def test_several_inner_steps(residual: str | None) -> None:
    network, _, _ = problem("mlp", "sgd", 0)
    loss = normalized(residual)
    *chain, valid = batches(4)
    expected = unrolled_chain(network, loss, chain, valid, 0.2)
    _, actual, _ = _unrolled(loss, list(loss.parameters()), network, chain, valid, F.cross_entropy, 0.2)
    assert relative_error(actual, expected) < 1e-10
