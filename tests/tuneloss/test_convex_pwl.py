"""Hinges: values, gradients, statistics, knots at quantiles, and the function of coefficients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lossmeta.tuneloss import ConvexPWL


def dense(knots: Tensor, x: Tensor) -> Tensor:
    """[2 X], by autograd."""
    distance = x.reshape(-1) - knots.double()[:, None]
    return torch.cat([distance, -distance]).clamp(min=0).sum(1)


@pytest.fixture
def hinges() -> ConvexPWL:
    return ConvexPWL([-0.7, -0.1, 0.3, 1.1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(hinges: ConvexPWL, dtype: torch.dtype) -> None:
    x = torch.randn(5, 31, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    value, expected = hinges.value(x), dense(hinges.knots, exact)
    assert value.dtype == dtype and value.shape == (8,) and hinges.size == 8
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    coefficients = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(coefficients.to(dtype) @ value, x)
    (slope,) = torch.autograd.grad(coefficients @ expected, exact)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-5)


def test_has_no_slope_at_its_own_knot(hinges: ConvexPWL) -> None:
    """As in the statistics, whose Gram matrix is that of these gradients."""
    x = torch.tensor([-0.1, 0.0, 5.0, 1.1], dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(hinges.value, x)
    features, gram, cross = hinges.statistics(x.detach(), torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(gram, jacobian @ jacobian.T)
    torch.testing.assert_close(cross[:, 0], jacobian.sum(1))
    torch.testing.assert_close(features, hinges.value(x).detach())
    assert jacobian[1, 0] == jacobian[5, 0] == 0


def test_is_a_feature_of_a_model(hinges: ConvexPWL) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    expected = sum(dense(hinges.knots, model[i].weight.detach()) for i in (0, 2))
    torch.testing.assert_close(hinges(model).double().detach(), expected, rtol=1e-5, atol=1e-5)
    hinges(model).sum().backward()
    assert model[0].weight.grad is not None and model[0].bias.grad is None and model[1].weight.grad is None
    named = ConvexPWL(hinges.knots, parameters=["0.bias"])
    torch.testing.assert_close(named(model).double(), dense(hinges.knots, model[0].bias).double())
    assert not hinges.uses_data


def test_second_derivatives_are_zero(hinges: ConvexPWL) -> None:
    x = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = x.square().sum() + hinges.value(x).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, torch.full((9,), 2.0))


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_knots_have_equally_many_weights_between_them(count: int) -> None:
    w = torch.randn(983, generator=torch.Generator().manual_seed(0))
    knots = ConvexPWL.at_quantiles(w.reshape(1, 983), count).knots.float()
    assert len(knots) == count and knots[0] == w.min()
    if count > 1:
        assert knots[-1] == w.max()
        between = np.histogram(w[w < w.max()].numpy(), knots.numpy())[0]
        assert np.abs(between - 982 / (count - 1)).max() <= 1


def test_knots_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    both = torch.cat([model[0].weight.detach().reshape(-1), model[1].weight.detach().reshape(-1)])
    assert torch.equal(ConvexPWL.at_quantiles(model, 5).knots, ConvexPWL.at_quantiles(both, 5).knots)
    one = ConvexPWL.at_quantiles(model, 5, parameters=["1.weight"])
    assert torch.equal(one.knots, ConvexPWL.at_quantiles(model[1].weight, 5).knots)
    assert one.parameters == ["1.weight"]


def test_equal_weights_give_one_knot() -> None:
    assert ConvexPWL.at_quantiles(torch.full((8,), 0.5)).knots.tolist() == [0.5]
    assert ConvexPWL.at_quantiles(torch.tensor([0.0] * 9 + [1.0]), 5).knots.tolist() == [0.0, 1.0]


def test_function_of_coefficients(hinges: ConvexPWL) -> None:
    coefficients = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = hinges.function(coefficients)
    x = torch.linspace(-3, 3, 100, dtype=torch.float64).requires_grad_()
    values = torch.stack([dense(hinges.knots, v) for v in x]) @ coefficients
    zero = dense(hinges.knots, torch.zeros(1, dtype=torch.float64)) @ coefficients
    torch.testing.assert_close(r.value(x), (values - zero).detach())
    torch.testing.assert_close(r.slope(x), torch.autograd.grad(values.sum(), x)[0])


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        ([], r"\[X\] with X >= 1, got \[0\]"),
        ([[1.0]], r"got \[1, 1\]"),
        ([0.0, 0.0], "strictly ascending"),
        ([1.0, 1.0 + 1e-12], "strictly ascending in float32"),
        ([1.0, 0.0], "strictly ascending"),
        ([0.0, torch.nan], "finite"),
        ([0.0, torch.inf], "finite"),
    ],
)
def test_refuses_knots(knots: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ConvexPWL: knots must .*{message}"):
        ConvexPWL(knots)


def test_refuses(hinges: ConvexPWL) -> None:
    with pytest.raises(TypeError, match="list of names"):
        ConvexPWL([0.0], parameters="weight")
    with pytest.raises(ValueError, match="parameters must be of the model, got 'none'"):
        ConvexPWL([0.0], parameters=["none"])(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"coefficients must be \[8\]"):
        hinges.function([1.0])
    with pytest.raises(ValueError, match=r"at least 0, got \[8\] with the least -1"):
        hinges.function([-1.0] + [0.0] * 7)
    with pytest.raises(ValueError, match="count must be at least 1"):
        ConvexPWL.at_quantiles(torch.zeros(3), 0)
    for bad in (torch.tensor([]), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match="finite numbers"):
            ConvexPWL.at_quantiles(bad)
    with pytest.raises(ValueError, match="two or more dimensions"):
        ConvexPWL.at_quantiles(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="a tensor or a model, got list"):
        ConvexPWL.at_quantiles([1.0])  # type: ignore[arg-type]
