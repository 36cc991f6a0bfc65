"""The learned function: values and slopes, the penalty's gradient, rounding, and drawings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.tuneloss import PiecewiseLinear


def some(count: int, seed: int = 0) -> PiecewiseLinear:
    generator = torch.Generator().manual_seed(seed)
    knots = torch.randn(count, generator=generator, dtype=torch.float64).sort().values
    slopes = torch.randn(count + 1, generator=generator, dtype=torch.float64).sort().values
    return PiecewiseLinear(knots, slopes)


def by_hand(r: PiecewiseLinear, x: Tensor) -> Tensor:
    """The integral of the slope from 0, by autograd-friendly hinges."""

    def raw(x: Tensor) -> Tensor:
        return r.slopes[0] * x + ((x[..., None] - r.knots).clamp(min=0) * r.slopes.diff()).sum(-1)

    return raw(x) - raw(torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_values_and_slopes(count: int) -> None:
    r = some(count, count)
    x = torch.linspace(-4, 4, 333, dtype=torch.float64).reshape(3, 111).requires_grad_()
    expected = by_hand(r, x)
    torch.testing.assert_close(r.value(x), expected.detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(r.slope(x), gradient, rtol=1e-12, atol=1e-12)
    assert r.value(torch.zeros(1)).item() == 0
    middle = (r.slopes[1:] + r.slopes[:-1]) / 2
    torch.testing.assert_close(r.slope(r.knots), middle)


@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_penalty_and_gradient(count: int, dtype: torch.dtype) -> None:
    r = some(count, count)
    x = torch.linspace(-3, 3, 301).reshape(7, 43).to(dtype)
    weights = x.clone().requires_grad_()
    penalty = r.penalty(weights)
    assert penalty.shape == () and penalty.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    (gradient,) = torch.autograd.grad(3 * penalty, weights)
    exact = x.double().requires_grad_()
    expected = by_hand(r, exact).sum()
    (slope,) = torch.autograd.grad(3 * expected, exact)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(penalty.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance)


def test_knots_that_rounding_joins() -> None:
    r = PiecewiseLinear(
        torch.tensor([1.0, 1.0 + 1e-12, 2.0], dtype=torch.float64), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    )
    knots, slopes = r.placed(torch.device("cpu"), torch.float32)
    assert knots.tolist() == [1.0, 2.0] and slopes.tolist() == [-1.0, 1.0, 2.0]
    knots, slopes = r.placed(torch.device("cpu"), torch.float64)
    assert len(knots) == 3 and len(slopes) == 4


@pytest.mark.parametrize(
    ("knots", "slopes", "error", "message"),
    [
        ([0.0], [1.0], ValueError, r"\[X\] and slopes \[X \+ 1\], got \[1\] and \[1\]"),
        ([[0.0]], [1.0, 2.0], ValueError, r"\[X\]"),
        ([1.0, 0.0], [0.0, 1.0, 2.0], ValueError, "ascend"),
        ([0.0, 0.0], [0.0, 1.0, 2.0], ValueError, "ascend"),
        ([0.0], [2.0, 1.0], ValueError, "ascend"),
        ([torch.nan], [2.0, 1.0], ValueError, "finite"),
        ([0.0], [1.0, torch.inf], ValueError, "finite"),
    ],
)
def test_refuses(knots: Any, slopes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^PiecewiseLinear: .*{message}"):
        PiecewiseLinear(torch.tensor(knots), torch.tensor(slopes))


def test_refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="knots must be a tensor, got list"):
        PiecewiseLinear([0.0], torch.zeros(2))  # type: ignore[arg-type]


def test_plot() -> None:
    pytest.importorskip("matplotlib")
    r = some(5)
    figure = r.plot(-2.0, 2.0)
    left, right = figure.axes
    x, y = (torch.as_tensor(v) for v in left.lines[0].get_data())
    torch.testing.assert_close(y, r.value(x))
    (stairs,) = right.patches
    inside = (r.knots > -2) & (r.knots < 2)
    assert len(stairs.get_data().values) == int(inside.sum()) + 1
    for ends in ((1.0, 1.0), (2.0, 1.0), (0.0, torch.inf)):
        with pytest.raises(ValueError, match="lowest, highest"):
            r.plot(*ends)
