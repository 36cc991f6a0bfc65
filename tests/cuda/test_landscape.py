"""perturb, pwl_statistics and gaussian_curvature: passes over parameters and surfaces."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, DRY, captured, check, check_operator, placed
from torch import Tensor

from lossmeta.ops import gaussian_curvature, perturb
from lossmeta.ops.gaussian_curvature import _reference as curvature
from lossmeta.ops.perturb import _operator as perturb_operator
from lossmeta.ops.pwl_statistics import _operator as statistics

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("size", [(16, 2, 4096), (17, 70, 1031), (3, 2, 100_003), (1, 1, 1)], ids=str)
def test_perturb(size: tuple[int, int, int]) -> None:
    points, count, parameters = size
    base, directions, coefficients = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((parameters,), (count, parameters), (points, count))
    )
    check_operator(perturb_operator, base, directions, coefficients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perturb_into_rows_of_a_larger_buffer(dtype: torch.dtype) -> None:
    base, directions, coefficients = placed(
        (torch.randn(1031), torch.randn(2, 1031), torch.randn(5, 2)), dtype
    )
    buffer = torch.full((7, 1040), 7.0, device=DEVICE, dtype=dtype)
    out = buffer[1:-1, 3:1034]
    replay = captured(lambda: perturb(base, directions, coefficients, out=out))
    base.add_(1)
    replay()
    torch.testing.assert_close(out, perturb(base, directions, coefficients), rtol=0, atol=0)
    out.fill_(7)
    assert (buffer == 7).all()


@pytest.mark.parametrize("knots", [1, 50, 800])
@pytest.mark.parametrize("parameters", [1, 33_003, 1_000_003])
def test_pwl_statistics(parameters: int, knots: int) -> None:
    if DRY:
        parameters = min(parameters, 3003)
    theta = torch.randn(parameters, dtype=torch.float64)
    a = torch.linspace(-2, 2, knots, dtype=torch.float64)
    theta[::3] = a[torch.randint(knots, theta[::3].shape)]  # on the knots
    check_operator(
        statistics, theta, torch.randn(3, parameters, dtype=torch.float64), a, dtypes=(torch.float64,)
    )
    # Halves are sums in float64 as well: of the same rounded values, the reference gives the same.
    rounded = [t.to(torch.bfloat16).double() for t in (theta, torch.randn(2, parameters))]
    check_operator(statistics, *rounded, a.float().double(), dtypes=(torch.float32,))


@pytest.mark.parametrize("shape", [(513, 300), (3, 3), (64, 4097)], ids=str)
def test_gaussian_curvature(shape: tuple[int, int]) -> None:
    surface = torch.randn(shape, dtype=torch.float64)

    def ours(f: Tensor) -> Tensor:
        return gaussian_curvature(f, 0.5, 2.0)

    check(ours, lambda f: curvature(f, 0.5, 2.0), surface, dtypes=(torch.float64, torch.float32))
    check(lambda f: ours(f.flatten()[1:-2].view(-1, 3)), lambda f: curvature(f.flatten()[1:-2].view(-1, 3), 0.5, 2.0),
          torch.randn(34, 3, dtype=torch.float64), dtypes=(torch.float64, torch.float32))  # fmt: skip
