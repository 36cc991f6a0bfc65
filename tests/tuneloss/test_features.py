"""Norms of weights, and the loss with uniform labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.tuneloss import L1, SquaredL2, UniformLabelLoss


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))


def test_norms_leave_biases_and_scales_out() -> None:
    model = network()
    kernel, matrix = model[0].weight, model[3].weight
    expected = sum(float(w.detach().double().abs().sum()) for w in (kernel, matrix))
    assert L1(0.5)(model).item() == pytest.approx(0.5 * expected)
    squares = [float(w.detach().double().square().sum()) for w in (kernel, matrix)]
    assert SquaredL2(2.0)(model).item() == pytest.approx(2 * sum(squares))
    torch.testing.assert_close(
        SquaredL2(2.0, by="tensor")(model).detach(), torch.tensor([2 * s for s in squares])
    )


def test_norm_by_input() -> None:
    model = network()
    found = SquaredL2(by="input", parameters=["3.weight"])(model)
    torch.testing.assert_close(found, model[3].weight.square().sum(0))
    # Of a convolution, the channels that come in.
    found = SquaredL2(by="input", parameters=["0.weight"])(model)
    torch.testing.assert_close(found, model[0].weight.square().sum((0, 2, 3)))


def test_frozen_and_shared_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    assert L1()(model).item() == pytest.approx(model[0].weight.abs().sum().item())
    assert SquaredL2(by="tensor")(model).shape == (1,)
    # Whoever names a frozen one means it.
    named = SquaredL2(parameters=["2.weight", "1.weight", "0.bias"])(model)
    parts = (model[2].weight, model[0].weight, model[0].bias)
    assert named.item() == pytest.approx(sum(p.square().sum().item() for p in parts))
    with pytest.raises(
        ValueError, match=r"^L1: parameters must be different tensors, got 0.weight, 1.weight$"
    ):
        L1(parameters=["0.weight", "1.weight"])(model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_absolute_value_and_its_derivatives(smoothing: float) -> None:
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    w = model.weight.detach().clone()
    (g,) = torch.autograd.grad(L1(2.0, smoothing=smoothing)(model), model.weight, create_graph=True)
    root = (w * w + smoothing**2).sqrt()
    torch.testing.assert_close(g.detach(), 2 * w / root)
    (h,) = torch.autograd.grad(g.sum(), model.weight)
    torch.testing.assert_close(h, 2 * smoothing**2 / root**3)
    assert L1(2.0, smoothing=smoothing)(model).item() == pytest.approx(2 * float((root - smoothing).sum()))


def test_a_weight_of_zero_has_no_slope() -> None:
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    for feature in (L1(), L1(smoothing=1e-3), SquaredL2()):
        (g,) = torch.autograd.grad(feature(model), model.weight)
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5), (1, 1)])
def test_uniform_labels_are_the_mean_over_all_labels(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64)

    class Constant(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return logits

    target = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    found = UniformLabelLoss()(Constant(), (torch.zeros(1), target))
    every = [F.cross_entropy(logits, torch.full_like(target, c)) for c in range(shape[1])]
    torch.testing.assert_close(found, torch.stack(every).mean())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: L1(0.0), ValueError, "L1: scale must be positive and finite, got 0.0"),
        (lambda: L1(smoothing=-1.0), ValueError, "L1: smoothing must be at least 0 and finite, got -1.0"),
        (lambda: L1(parameters="weight"), TypeError, "L1: parameters must be a list of names, got 'weight'"),
        (lambda: L1(parameters=[]), ValueError, "L1: parameters must have at least one name, got none"),
        (lambda: SquaredL2(by="row"), ValueError, "SquaredL2: by must be one of 'all', 'tensor', 'input'"),
        (
            lambda: L1(parameters=["no"])(network()),
            ValueError,
            "L1: parameters must be of the model, got 'no'",
        ),
        (lambda: L1()(nn.BatchNorm1d(3)), ValueError, "must have a trainable parameter of two or more"),
        (
            lambda: SquaredL2(by="input")(network()),
            ValueError,
            "must have one weight, got 0.weight, 3.weight",
        ),
        (
            lambda: SquaredL2(by="input", parameters=["3.bias"])(network()),
            ValueError,
            r"must have a weight of two or more dimensions, got \[5\]",
        ),
        (
            lambda: UniformLabelLoss().of_predictions([torch.ones(3)], torch.ones(3)),
            ValueError,
            r"predictions must be logits \[N, C, ...\], got \[3\]",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
