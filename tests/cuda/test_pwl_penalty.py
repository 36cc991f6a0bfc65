"""pwl_penalty: a pass over the weights of a model."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, DRY, captured, check_operator, placed
from torch import Tensor

from lossmeta.ops import pwl_penalty
from lossmeta.ops.pwl_penalty import _operator, with_slope

pytestmark = pytest.mark.cuda

# None; rows of a bucket each; several knots in a bucket, and more knots than rows.
KNOTS = {
    "none": torch.empty(0),
    "two": torch.tensor([-0.5, 0.5]),
    "uniform": torch.linspace(-2, 2, 201),
    "by size": torch.cat([-torch.logspace(1, -9, 60), torch.zeros(1), torch.logspace(-9, 1, 60)]),
    "clustered": 0.5 + 1e-5 * torch.arange(13),
    "equal": torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 2.0]),
    "many": torch.linspace(-3, 3, 10_001),
}


def inputs(parameters: int, knots: str) -> tuple[Tensor, Tensor, Tensor]:
    """A penalty that rises on either side of 0: nothing cancels, which would be a lax judge or too strict a one."""
    a = KNOTS[knots].double()
    slopes = torch.randn(len(a) + 1, dtype=torch.float64).abs()
    slopes[: int((a < 0).sum())] *= -1
    return torch.randn(parameters, dtype=torch.float64), a, slopes


@pytest.mark.parametrize("knots", KNOTS)
@pytest.mark.parametrize("parameters", [1, 33_003, 1_000_003])
def test_value_and_gradient(parameters: int, knots: str) -> None:
    theta, a, s = inputs(min(parameters, 3003) if DRY else parameters, knots)
    # A weight may be rounded onto a knot: what all dtypes agree about.
    theta = theta.to(torch.bfloat16).double().requires_grad_()
    a = (
        torch.where(a == 0, a, a.bfloat16().double() * (1 + 2.0**-11))
        if knots not in ("clustered", "many")
        else a
    )
    check_operator(_operator, theta, a, s, True, dtypes=(torch.float64,))
    check_operator(_operator, theta, a.float().double(), s.float().double(), True, dtypes=(torch.float32,))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("knots", KNOTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_slopes_are_those_of_the_table(dtype: torch.dtype, knots: str, offset: int) -> None:
    """Bit for bit, on knots too; aligned and not; added and captured."""
    theta, a, s = inputs(20_005, knots)
    if len(a):
        theta[::3] = a[torch.randint(len(a), theta[::3].shape)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theta, a, s = (t.to(DEVICE) for t in (theta.to(dtype)[offset:], a.to(wide), s.to(wide)))
    x = theta.to(wide)
    below, up_to = torch.searchsorted(a, x), torch.searchsorted(a, x, right=True)
    expected = 0.5 * s[below] + 0.5 * s[up_to]
    value, slope = with_slope(theta, a, s)
    assert torch.equal(slope, expected.to(slope.dtype))
    target = torch.randn_like(theta)
    after = (target.to(wide) + expected).to(dtype)
    replay = captured(lambda: with_slope(theta, a, s, add_to=target.copy_(before))[0])
    before = target.clone()
    assert torch.equal(replay(), value)
    assert torch.equal(target, after)


def test_not_finite() -> None:
    theta, a, s = placed(inputs(5003, "uniform"), torch.float32)
    s[0] = s[-1] = 0
    theta[7], theta[600] = torch.inf, -torch.inf
    finite = theta.clone()
    finite[7], finite[600] = a[-1], a[0]
    torch.testing.assert_close(pwl_penalty(theta, a, s), pwl_penalty(finite, a, s))
    theta[9] = torch.nan
    value, slope = with_slope(theta, a, s)
    assert value.isnan()
    assert slope.isnan().nonzero().tolist() == [[9]]


@pytest.mark.skipif(DRY, reason="the CPU refuses them")
def test_a_bad_table_harms_nothing() -> None:
    theta, a, s = placed(inputs(5003, "uniform"), torch.float32)
    for bad in (a.flip(0), a.where(a < 1, torch.nan), a.where(a > 0, -torch.inf)):
        pwl_penalty(theta, bad, s)
    torch.cuda.synchronize()


@pytest.mark.skipif(DRY, reason="takes the memory of a GPU")
def test_beyond_int32() -> None:
    size = 2**31 + 1000
    theta = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    ends = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 1, size - 1], device=DEVICE)
    theta[ends] = torch.tensor([-3.0, 2.0, -1.0, 0.5, 4.0], dtype=torch.bfloat16, device=DEVICE)
    value, slope = with_slope(
        theta, *placed((torch.tensor([-2.0, 0.0, 1.0]), torch.tensor([-4.0, -1.0, 1.0, 2.0])))
    )
    assert value.item() == 6 + 3 + 1 + 0.5 + 7
    assert slope[ends].tolist() == [-4, 2, -1, 1, 2]
    assert slope.count_nonzero().item() == len(ends)
