from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from contract import (
    assert_close,
    check_compiles,
    check_gradients,
    check_half,
    check_opcheck,
    check_strides,
    check_threads,
    check_transforms,
)
from hypothesis import given
from torch import Tensor

from lossmeta.ops import pwl_penalty
from lossmeta.ops.pwl_penalty import _operator, _operator_, _reference, with_slope

# One; partial and several vectors; a block; several chunks; none.
SIZES = [1, 5, 17, 131, 513, 1031, 40_003, 0]
KNOTS: dict[str, list[float]] = {
    "none": [],
    "zero": [0.0],
    "one": [0.25],
    "negative": [-0.25],
    "two": [-0.5, 0.5],
    "uniform": torch.linspace(-2, 2, 50).tolist(),
    "clustered": [-1.0, *(0.5 + 1e-6 * k for k in range(13)), 3.0],
    "logarithmic": [*(-(2.0**e) for e in range(5, -30, -1)), 0.0, *(2.0**e for e in range(-30, 6))],
    "equal": [-1.0, -1.0, -1.0, 0.0, 0.0, 2.0, 2.0],
    "many": torch.linspace(-3, 3, 1001).tolist(),
    "outside": [5.0, 6.0, 7.0],
    "extreme": [-3e30, -1e-38, 0.0, 1e-38, 3e30],
    "subnormal": [-1e-40, 0.0, 1e-44, 1e-40],
}


def formula(theta: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    """r by its kinks, in float64: the slope in the middle interval, and at each knot its jump outwards.

    ``abs`` has the slope 0 at 0, so that each kink has the mean of both sides at its knot.
    """
    x, a, s = theta.double()[:, None], knots.double(), slopes.double()
    middle = s[int((a < 0).sum())]
    # max(0, u) = (u + |u|) / 2, of u = x - a to the right of 0 and u = a - x to the left of it.
    distance = torch.where(a >= 0, x - a, a - x)
    ramps = (distance + distance.abs()) / 2
    return (middle * x[:, 0] + (s.diff() * ramps).sum(1)).sum()


def inputs(
    parameters: int, knots: list[float], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    theta = torch.randn(parameters, dtype=dtype)
    a = torch.tensor(knots, dtype=dtype)
    if parameters > 1 and knots:
        theta[::3] = a[torch.randint(len(knots), (len(theta[::3]),))]  # on the knots
        theta[1::7] = 0
    return theta.requires_grad_(), a, torch.randn(len(knots) + 1, dtype=dtype)


def check(
    value: Tensor, slope: Tensor, theta: Tensor, knots: Tensor, slopes: Tensor, exact: tuple[Tensor, Tensor]
) -> None:
    """To a few roundings: a slope is one of the table's, or the mean of two. The formula itself sums X jumps."""
    eps, steepest = torch.finfo(slopes.dtype).eps, slopes.double().abs().max()
    allowed = 4 * eps + 4e-16 * len(slopes)
    bound = allowed * steepest * theta.detach().double().abs().sum()
    assert_close(value.double(), exact[0], rtol=4 * eps, atol=bound.item())
    assert_close(slope.double(), exact[1], rtol=2 * eps, atol=(allowed * steepest).item())


def exact(theta: Tensor, knots: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient by autograd, in float64."""
    leaf = theta.detach().double().requires_grad_()
    value = formula(leaf, knots, slopes)
    return value.detach(), gradient_of(value, leaf)


def gradient_of(value: Tensor, theta: Tensor) -> Tensor:
    return torch.autograd.grad(value, theta)[0]


@pytest.mark.parametrize("knots", KNOTS)
@pytest.mark.parametrize("size", SIZES)
def test_formula(size: int, knots: str) -> None:
    if len(KNOTS[knots]) > 100:
        size = min(size, 2000)
    for dtype in (torch.float64, torch.float32):
        theta, a, s = inputs(size, KNOTS[knots], dtype)
        if dtype == torch.float32 and not (a[1:] >= a[:-1]).all():
            continue
        expected = exact(theta, a, s)
        for function in (pwl_penalty, lambda *t: _reference(*t, True)):
            value = function(theta, a, s)
            assert value.dtype == dtype
            check(value, gradient_of(value, theta), theta, a, s, expected)
        value, slope_too = with_slope(theta, a, s)
        assert torch.equal(value, pwl_penalty(theta, a, s))
        assert torch.equal(slope_too, gradient_of(pwl_penalty(theta, a, s), theta))
        with torch.no_grad():
            assert torch.equal(pwl_penalty(theta, a, s), value)


def test_slopes_are_those_given_bit_for_bit() -> None:
    theta, a, s = inputs(40_003, KNOTS["uniform"], torch.float32)
    below, up_to = (theta.detach()[:, None] > a).sum(1), (theta.detach()[:, None] >= a).sum(1)
    assert torch.equal(with_slope(theta, a, s)[1], 0.5 * s[below] + 0.5 * s[up_to])


def test_small_weights_between_large_knots_keep_their_digits() -> None:
    """Nothing cancels near 0, however far the knots are; nor beyond steep pieces, which hang on their knots."""
    theta = torch.logspace(-30, -3, 1000)
    value = pwl_penalty(theta, torch.tensor([-1e6, 0.003, 1e6]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = formula(theta, torch.tensor([-1e6, 0.003, 1e6]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert_close(value.double(), expected, rtol=2e-7, atol=0)
    assert_close(pwl_penalty(theta[:10], torch.tensor([1.0]), torch.tensor([2.0, 3.0])), 2 * theta[:10].sum())
    steep = 1 + torch.arange(1, 100) * 2.0**-23
    value = pwl_penalty(steep, torch.tensor([1.0]), torch.tensor([0.0, 1e6]))
    assert_close(value.double(), 1e6 * (steep.double() - 1).sum(), rtol=2e-7, atol=0)


def test_l1() -> None:
    theta = torch.randn(1000, requires_grad=True)
    with torch.no_grad():
        theta[::3] = 0
    value = pwl_penalty(theta, torch.tensor([0.0]), torch.tensor([-0.1, 0.1]))
    assert_close(value, 0.1 * theta.abs().sum())
    assert torch.equal(gradient_of(value, theta), 0.1 * theta.detach().sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    theta = (8 * torch.randn(301)).round().div(8).to(dtype).requires_grad_()
    knots, slopes = torch.linspace(-2, 2, 9, dtype=torch.float64), torch.arange(10).double() - 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = pwl_penalty(theta, knots, slopes)
    expected, slope = exact(theta, knots, slopes)
    assert value.dtype == wide
    assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert gradient_of(value, theta).dtype == dtype
    assert torch.equal(gradient_of(pwl_penalty(theta, knots, slopes), theta).double(), slope)
    kept = with_slope(theta, knots, slopes)[1]
    assert kept.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert torch.equal(pwl_penalty(theta, knots.to(torch.bfloat16), slopes.to(torch.float16)), value)


def test_small_gradients_survive_float16() -> None:
    """Below the smallest float16 a slope is kept, for a loss that is scaled."""
    theta = torch.ones(3, dtype=torch.float16, requires_grad=True)
    value = 2.0**16 * pwl_penalty(theta, torch.tensor([0.0]), torch.tensor([-1e-8, 1e-8]))
    assert_close(gradient_of(value, theta).float(), torch.full((3,), 2.0**16 * 1e-8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype: torch.dtype) -> None:
    theta, a, s = inputs(301, KNOTS["uniform"])
    theta, a = theta.detach().to(dtype).double().requires_grad_(), a.to(dtype).double()

    def composition(t: Tensor) -> Tensor:
        i = torch.searchsorted(a.to(t.dtype), t.detach())
        low, high = torch.cat([-a.new_full((1,), torch.inf), a]), torch.cat([a, a.new_full((1,), torch.inf)])
        anchor = low.maximum(high.clamp(max=0))
        at = torch.stack([formula(p[None], a, s) for p in anchor])
        return (at.to(t.dtype)[i] + s.to(t.dtype)[i] * (t - anchor.to(t.dtype)[i])).sum()

    theta = theta.detach()[~(theta.detach()[:, None] == a).any(1)].requires_grad_()
    check_half(lambda t: pwl_penalty(t, a, s), composition, dtype, theta)


def test_sums_in_float64() -> None:
    """A million equal float32 steps: float32 sums would be off in the third digit."""
    theta = torch.full((1_000_003,), 0.1)
    value = pwl_penalty(theta, torch.tensor([0.0]), torch.tensor([-1.0, 1.0]))
    assert_close(value.double(), theta[0].double() * 1_000_003, rtol=6e-8, atol=0)


@pytest.mark.parametrize("knots", ["none", "two", "clustered"])
@pytest.mark.parametrize(
    "function", [pwl_penalty, lambda *t: _reference(*t, True)], ids=["kernel", "reference"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_not_finite(dtype: torch.dtype, function: Any, knots: str) -> None:
    theta, _, _ = inputs(701, KNOTS[knots], dtype)
    a = torch.tensor(KNOTS[knots], dtype=torch.float64)
    s = torch.linspace(1, 2, len(a) + 1)
    s[0] = -1
    with torch.no_grad():
        theta[7], theta[600] = torch.inf, torch.inf if knots == "none" else -torch.inf
    value = function(theta, a, s)
    gradient = gradient_of(value, theta)
    assert value.item() == (-torch.inf if knots == "none" else torch.inf)
    assert gradient[[7, 600]].tolist() == ([-1, -1] if knots == "none" else [2, -1])
    # Where the slope is 0, what is infinite costs what the outermost knot costs, or nothing.
    s[0] = s[-1] = 0
    finite = theta.detach().clone()
    finite[7], finite[600] = (a[-1], a[0]) if len(a) else (0, 0)
    assert_close(function(theta, a, s), function(finite, a, s), rtol=1e-5, atol=1e-5)
    assert gradient_of(function(theta, a, s), theta)[[7, 600]].tolist() == [0, 0]
    with torch.no_grad():
        theta[9] = torch.nan
    value = function(theta, a, s)
    assert value.isnan()
    assert torch.equal(gradient_of(value, theta).isnan(), theta.isnan())


def test_add_to() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        theta, a, s = inputs(40_003, KNOTS["uniform"], dtype)
        value, slope = with_slope(theta, a, s)
        before = torch.randn(40_003).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        s32 = 0.5 * s.to(wide)[(theta[:, None] > a).sum(1)] + 0.5 * s.to(wide)[(theta[:, None] >= a).sum(1)]
        for target in (before.clone(), before.repeat_interleave(2)[::2]):
            version = target._version
            result, same = with_slope(theta, a, s, add_to=target)
            assert same is target
            assert target._version > version
            assert torch.equal(result, value)
            assert not result.requires_grad
            assert torch.equal(target, (before.to(wide) + s32).to(dtype))
        buffer = torch.zeros(80_006, dtype=dtype)
        with_slope(theta, a, s, add_to=buffer[::2])
        assert not buffer[1::2].any()
        assert torch.equal(buffer[::2].to(slope.dtype), slope.to(dtype).to(slope.dtype))
    theta, a, s = inputs(301, KNOTS["uniform"], torch.float32)
    with torch.no_grad():
        theta[5] = torch.nan
    target, other = torch.ones(301), torch.ones(301)
    assert with_slope(theta, a, s, add_to=target)[0].isnan()
    assert torch.equal(target.isnan(), theta.isnan())
    assert_close(torch.ops.lossmeta.pwl_penalty(theta, a, s, True)[1] + 1, target)
    _operator_.reference(other, theta, a, s)
    assert_close(other, target)


def test_add_to_is_seen_by_autograd() -> None:
    theta, a, s = inputs(37, KNOTS["two"])
    leaf, target = (
        torch.ones(37, dtype=torch.float64, requires_grad=True),
        torch.ones(37, dtype=torch.float64),
    )
    product = (leaf * target).sum()
    with_slope(theta, a, s, add_to=target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with pytest.raises(
        ValueError, match=r"^pwl_penalty: add_to must not require grad while gradients are recorded"
    ):
        with_slope(theta, a, s, add_to=leaf)
    with torch.no_grad():
        with_slope(theta, a, s, add_to=leaf)


def test_contract() -> None:
    theta, a, s = inputs(131, KNOTS["uniform"], torch.float32)
    check_opcheck(_operator, theta, a, s, True)
    check_opcheck(_operator, theta, a, s, False)
    check_opcheck(_operator, theta.detach().half().requires_grad_(), a, s, True)
    torch.library.opcheck(_operator_.op, (torch.zeros(131), theta.detach(), a, s))
    check_compiles(pwl_penalty, theta, a, s)
    check_compiles(
        lambda t, k, r: pwl_penalty(t.flatten(), k, r).exp(), theta.detach()[None].requires_grad_(), a, s
    )
    check_compiles(lambda t, k, r: with_slope(t, k, r, add_to=torch.ones_like(t)), theta.detach(), a, s)
    check_strides(pwl_penalty, theta, a, s)
    check_threads(pwl_penalty, *inputs(200_003, KNOTS["uniform"], torch.float32))
    check_threads(pwl_penalty, *inputs(100_003, KNOTS["clustered"], torch.float64))


def test_autocast() -> None:
    theta, a, s = inputs(131, KNOTS["uniform"], torch.float32)
    value, slope = with_slope(theta, a, s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pwl_penalty(theta, a, s)
    assert torch.equal(result, value)
    assert torch.equal(gradient_of(result, theta), slope)


def test_gradients() -> None:
    theta, a, s = inputs(31, KNOTS["logarithmic"])
    apart = torch.randn(31, dtype=torch.float64, requires_grad=True)
    check_gradients(lambda t: pwl_penalty(t, a, s), apart)
    check_gradients(lambda t: pwl_penalty(t, a, s).square(), apart)
    (gradient,) = torch.autograd.grad(pwl_penalty(theta, a, s), theta, create_graph=True)
    assert_close(torch.autograd.grad(gradient.sum(), theta, allow_unused=True)[0], torch.zeros_like(theta))
    value = pwl_penalty(theta, a, s)  # the kept slope serves several passes
    first = torch.autograd.grad(value, theta, retain_graph=True)[0].mul_(7)
    assert_close(torch.autograd.grad(value, theta)[0], first / 7)


def test_transforms() -> None:
    theta, a, s = inputs(31, KNOTS["uniform"])
    check_transforms(lambda t: pwl_penalty(t, a, s), lambda t: _reference(t, a, s, True), theta)
    # Each with a table of its own.
    tables = torch.stack([s, -s, s.flip(0)])
    actual = torch.func.vmap(lambda r: pwl_penalty(theta.detach(), a, r))(tables)
    assert_close(actual, torch.stack([formula(theta.detach(), a, r) for r in tables]))
    _, slopes = torch.func.vmap(lambda t: with_slope(t, a, s))(torch.stack([theta, -theta]).detach())
    assert_close(slopes[0], with_slope(theta, a, s)[1])
    # Forward-mode runs the reference, which is right in the table too.
    tangent = torch.randn_like(s)
    _, derivative = torch.func.jvp(lambda r: pwl_penalty(theta.detach(), a, r), (s,), (tangent,))
    assert_close(derivative, formula(theta.detach(), a, tangent))


def test_only_theta_is_differentiable() -> None:
    theta, a, s = inputs(31, KNOTS["two"])
    for name, arguments in (
        ("knots", (theta, a.clone().requires_grad_(), s)),
        ("slopes", (theta.detach(), a, s.clone().requires_grad_())),
    ):
        for function in (pwl_penalty, with_slope):
            with pytest.raises(
                ValueError, match=f"^pwl_penalty: {name} must not require grad while gradients are"
            ):
                function(*arguments)
            with torch.no_grad():
                function(*arguments)
    with pytest.raises(ValueError, match=r"^pwl_penalty: slopes must not require grad"):
        torch.func.grad(lambda r: pwl_penalty(theta.detach(), a, r))(s)


def bad(**changes: Any) -> tuple[Any, ...]:
    good = {
        "theta": torch.zeros(4),
        "knots": torch.tensor([0.0, 1.0, 2.0]),
        "slopes": torch.tensor([0.0, 1.0, 2.0, 3.0]),
    }
    return tuple({**good, **changes}.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(theta=torch.zeros(2, 2)), "theta must be [P], got [2, 2]"),
        (bad(theta=torch.zeros(())), "theta must be [P], got []"),
        (
            bad(theta=torch.zeros(4, dtype=torch.int32)),
            "theta must be float32, float64, bfloat16 or float16, got int32",
        ),
        (bad(knots=torch.zeros(1, 3)), "knots must be [X], got [1, 3]"),
        (bad(knots=torch.tensor([0, 1, 2])), "knots must be float32, float64, bfloat16 or float16, got int64"),
        (bad(slopes=torch.zeros(3)), "slopes must be [4], one more than knots, got [3]"),
        (bad(slopes=torch.zeros(4, 1)), "slopes must be [4], one more than knots, got [4, 1]"),
        (bad(slopes=torch.zeros(4).int()), "slopes must be float32, float64, bfloat16 or float16, got int32"),
        (bad(knots=torch.tensor([0.0, 2.0, 1.0])), "knots must be sorted, got 1 at index 2 after 2"),
        (
            bad(knots=torch.tensor([0.0, torch.inf, torch.inf])),
            "knots must be finite in the precision of theta, got inf at index 1",
        ),
        (
            bad(knots=torch.tensor([torch.nan, 1.0, 2.0])),
            "knots must be finite in the precision of theta, got nan at index 0",
        ),
        (
            bad(knots=torch.tensor([0.0, 1.0, 1e39], dtype=torch.float64)),
            "knots must be finite in the precision of theta, got inf at index 2",
        ),
        (
            bad(slopes=torch.tensor([0.0, 1.0, torch.nan, 3.0])),
            "slopes must be finite in the precision of theta, got nan at index 2",
        ),
        (bad(add_to=torch.zeros(4).double()), "add_to must have the dtype of theta, float32, got float64"),
        (bad(add_to=torch.zeros(5)), "add_to must be [4], as theta, got [5]"),
        (bad(add_to=torch.zeros(1).expand(4)), "add_to is written in place and must not be expanded"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    theta, knots, slopes, *rest = arguments
    functions = [] if rest else [pwl_penalty, with_slope]
    target = rest[0] if rest else torch.zeros(4)
    functions.append(lambda *table: with_slope(*table, add_to=target))
    for function in functions:
        with pytest.raises(ValueError, match=r"^pwl_penalty: ") as error:
            function(theta, knots, slopes)
        assert str(error.value).startswith(f"pwl_penalty: {message}")
    assert not target.any()


def test_wrong_types() -> None:
    theta, knots, slopes = bad()
    with pytest.raises(TypeError, match=r"^pwl_penalty: knots must be a tensor, got list"):
        pwl_penalty(theta, [0.0], slopes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^pwl_penalty: add_to must be a tensor, got float"):
        with_slope(theta, knots, slopes, add_to=1.0)  # type: ignore[arg-type]


def test_overlap() -> None:
    memory = torch.zeros(40)
    theta, knots, slopes = memory[:10], memory[10:13], memory[13:17]
    slopes.fill_(1)
    for name, target in (("theta", memory[9:19]), ("knots", memory[12:22]), ("slopes", memory[16:26])):
        with pytest.raises(ValueError, match=r"^pwl_penalty: add_to must not share memory with ") as error:
            with_slope(theta, knots, slopes, add_to=target)
        assert name in str(error.value)
    assert memory.sum() == 4
    with_slope(theta, knots, slopes, add_to=memory[17:27])
    assert memory.sum() == 14


@given(
    st.lists(st.floats(-100, 100), max_size=40),
    st.integers(0, 1500),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**32),
)
def test_property(knots: list[float], parameters: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    theta, a, s = inputs(parameters, sorted(knots), dtype)
    theta = torch.where(torch.rand(parameters) < 0.5, theta, scale * theta).detach().requires_grad_()
    value, ours = with_slope(theta, a, s)
    check(value, ours, theta, a, s, exact(theta, a, s))
    assert_close(ours, gradient_of(_reference(theta, a, s, True), theta), rtol=0, atol=0)
