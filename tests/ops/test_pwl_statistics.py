from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from contract import assert_close, check_compiles, check_opcheck, check_strides, check_threads
from hypothesis import given
from torch import Tensor

from lossmeta.ops import pwl_statistics
from lossmeta.ops.pwl_statistics import _operator, _reference

# (P, R): one; partial and several vectors; several blocks; several chunks; up to three groups of gradients.
SIZES = [(1, 0), (5, 1), (17, 2), (131, 3), (513, 6), (1031, 7), (33_003, 2), (0, 2)]
KNOTS = {
    "one": [0.25],
    "two": [-0.5, 0.5],
    "uniform": torch.linspace(-2, 2, 50).tolist(),
    "clustered": [-1.0, *(0.5 + 1e-6 * k for k in range(13)), 3.0],
    "logarithmic": [s * 2.0**e for s, es in ((-1, range(5, -30, -1)), (1, range(-30, 6))) for e in es],
    "many": torch.linspace(-3, 3, 1001).tolist(),
    "outside": [5.0, 6.0, 7.0],
    "extreme": [-3e38, -1e-38, 0.0, 1e-38, 3e38],
}


def formula(theta: Tensor, gradients: Tensor | None, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with the dense Jacobian."""
    theta, knots = theta.double()[:, None], knots.double()
    features = torch.cat([(theta - knots).relu().sum(0), (knots - theta).relu().sum(0)])
    jacobian = torch.cat([(theta > knots).double(), -(theta < knots).double()], 1)
    rows = jacobian.new_empty(0, len(theta)) if gradients is None else gradients.double()
    return features, jacobian.T @ jacobian, jacobian.T @ rows.T


def inputs(
    parameters: int, count: int, knots: list[float], dtype: torch.dtype = torch.float64
) -> tuple[Any, ...]:
    theta = torch.randn(parameters, dtype=dtype)
    if parameters > 1:
        theta[::3] = torch.tensor(knots, dtype=dtype)[
            torch.randint(len(knots), (len(theta[::3]),))
        ]  # on the knots
    return theta, torch.randn(count, parameters, dtype=dtype), torch.tensor(knots, dtype=dtype)


def close(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], theta: Tensor, gradients: Tensor | None
) -> None:
    """Sums agree to float64 rounding, the Gram matrix, which counts, exactly."""
    scale = theta.double().abs().sum().item() + len(theta)
    assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-14 * scale)
    assert torch.equal(actual[1], expected[1])
    assert_close(actual[2], expected[2], rtol=1e-12, atol=1e-14 * (1 + scale))


@pytest.mark.parametrize("knots", KNOTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_formula(size: tuple[int, int], knots: str) -> None:
    if knots == "many" and size[0] > 2000:
        size = (2000, size[1])
    for dtype in (torch.float64, torch.float32):
        theta, gradients, a = inputs(*size, KNOTS[knots], dtype)
        if dtype == torch.float32 and not (a[1:] > a[:-1]).all():
            continue
        expected = formula(theta, gradients, a)
        close(_reference(theta, gradients, a), expected, theta, gradients)
        close(pwl_statistics(theta, gradients, a), expected, theta, gradients)


def test_jacobian_is_that_of_autograd() -> None:
    theta, gradients, knots = inputs(40, 2, KNOTS["two"])
    leaf = theta.clone().requires_grad_()
    values = [(leaf - a).relu().sum() for a in knots] + [(a - leaf).relu().sum() for a in knots]
    jacobian = torch.stack([torch.autograd.grad(v, leaf)[0] for v in values])
    features, gram, cross = pwl_statistics(theta, gradients, knots)
    assert_close(features, torch.stack(values).detach())
    assert torch.equal(gram, jacobian @ jacobian.T)
    assert_close(cross, jacobian @ gradients.T)


def test_signs_and_order() -> None:
    theta = torch.tensor([-1.0, 0.0, 2.0])
    features, gram, cross = pwl_statistics(
        theta, torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([0.0, 1.0])
    )
    assert features.tolist() == [2, 1, 1, 3]
    assert gram.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 2]]
    assert cross.tolist() == [[100], [100], [-1], [-11]]
    # Between two knots both a feature above the lower and one below the upper have a slope.
    _, gram, _ = pwl_statistics(torch.tensor([0.5, 0.6, 0.0, 1.0]), None, torch.tensor([0.0, 1.0]))
    assert gram[0, 3].item() == gram[3, 0].item() == -2
    assert gram[1, 2].item() == gram[2, 1].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    theta = (8 * torch.randn(301)).round().div(8).to(dtype)
    gradients = torch.randn(2, 301).to(dtype)
    knots = torch.linspace(-2, 2, 9, dtype=torch.float64)
    results = pwl_statistics(theta, gradients, knots)
    assert all(r.dtype == torch.float64 for r in results)
    close(results, formula(theta, gradients, knots), theta, gradients)
    assert all(map(torch.equal, pwl_statistics(theta, gradients, knots.to(torch.bfloat16)), results))


def test_sums_in_float64() -> None:
    """A million equal float32 steps: float32 sums would be off in the third digit."""
    theta = torch.full((1_000_000,), 0.1)
    features, _, cross = pwl_statistics(theta, theta[None], torch.tensor([0.0]))
    exact = theta[0].double() * 1_000_000
    assert_close(features[0], exact, rtol=1e-13, atol=0)
    assert_close(cross[0, 0], exact, rtol=1e-13, atol=0)


def test_no_gradients_is_none() -> None:
    theta, gradients, knots = inputs(131, 2, KNOTS["uniform"])
    with_gradients, without = pwl_statistics(theta, gradients, knots), pwl_statistics(theta, None, knots)
    assert torch.equal(with_gradients[0], without[0])
    assert torch.equal(with_gradients[1], without[1])
    assert without[2].shape == pwl_statistics(theta, gradients[:0], knots)[2].shape == (100, 0)


def test_no_knots() -> None:
    features, gram, cross = pwl_statistics(torch.randn(5), torch.randn(2, 5), torch.empty(0))
    assert features.shape == (0,)
    assert gram.shape == (0, 0)
    assert cross.shape == (0, 2)


def test_not_finite() -> None:
    theta, gradients, knots = inputs(131, 2, KNOTS["two"])
    theta[7], theta[50] = torch.inf, -torch.inf
    expected = formula(theta, gradients, knots)
    results = pwl_statistics(theta, gradients, knots)
    assert_close(results, expected)
    assert results[0].tolist() == [torch.inf] * 4
    without = pwl_statistics(theta[torch.arange(131) != 50], None, knots)[0]
    assert without[:2].isinf().all()
    assert without[2:].isfinite().all()
    # NaN has no slope.
    theta[9] = torch.nan
    results, others = pwl_statistics(theta, gradients, knots), torch.arange(131) != 9
    assert results[0].isnan().all()
    assert_close(results[1:], pwl_statistics(theta[others], gradients[:, others], knots)[1:])
    for ours, reference in zip(results, _reference(theta, gradients, knots), strict=True):
        assert_close(ours, reference)
    # A gradient reaches only the features with a slope.
    theta[:3], gradients[0, 1] = torch.tensor([0.0, 1.0, 0.0]), torch.nan
    cross = pwl_statistics(theta, gradients, knots)[2]
    assert cross.isnan().tolist() == [[True, False], [True, False], [False, False], [False, False]]
    assert_close(cross, _reference(theta, gradients, knots)[2])


def test_contract() -> None:
    theta, gradients, knots = inputs(131, 3, KNOTS["uniform"], torch.float32)
    check_opcheck(_operator, theta, gradients, knots)
    check_opcheck(_operator, theta, None, knots)
    check_compiles(pwl_statistics, theta, gradients, knots)
    check_compiles(lambda t, a: pwl_statistics(t, None, a), theta, knots)
    check_strides(pwl_statistics, theta, gradients, knots)
    check_strides(lambda t, a: pwl_statistics(t, t.expand(2, -1), a), theta, knots)
    check_threads(pwl_statistics, *inputs(200_003, 3, KNOTS["uniform"], torch.float32))
    check_threads(pwl_statistics, *inputs(100_003, 2, KNOTS["many"], torch.float64))


def test_no_gradient() -> None:
    theta, gradients, knots = (t.requires_grad_() for t in inputs(131, 3, KNOTS["two"]))
    assert not any(r.requires_grad for r in pwl_statistics(theta, gradients, knots))
    compiled = torch.compile(pwl_statistics, fullgraph=True)
    assert not any(r.requires_grad for r in compiled(theta, gradients, knots))


def test_transforms() -> None:
    theta, gradients, knots = inputs(31, 2, KNOTS["two"])
    batch = torch.stack([theta, 2 * theta])
    actual = torch.func.vmap(lambda t: pwl_statistics(t, gradients, knots))(batch)
    expected = [formula(t, gradients, knots) for t in batch]
    for a, e in zip(actual, zip(*expected, strict=True), strict=True):
        assert_close(a, torch.stack(e))
    # Forward-mode runs the reference: right, not silently zero.
    tangent = torch.randn(31, dtype=torch.float64)
    free = torch.randn(31, dtype=torch.float64)
    _, (slope, _, _) = torch.func.jvp(lambda t: pwl_statistics(t, None, knots), (free,), (tangent,))
    assert_close(slope, formula(free, tangent[None], knots)[2][:, 0])


def bad(**changes: Any) -> tuple[Any, ...]:
    good = {"theta": torch.zeros(4), "gradients": torch.zeros(2, 4), "knots": torch.tensor([0.0, 1.0, 2.0])}
    return tuple({**good, **changes}.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(theta=torch.zeros(2, 2)), "theta must be [P], got [2, 2]"),
        (
            bad(theta=torch.zeros(4, dtype=torch.int32)),
            "theta must be float32, float64, bfloat16 or float16, got int32",
        ),
        (bad(gradients=torch.zeros(4)), "gradients must be [R, 4], got [4]"),
        (bad(gradients=torch.zeros(2, 3)), "gradients must be [R, 4], got [2, 3]"),
        (
            bad(gradients=torch.zeros(2, 4).double()),
            "gradients must have the dtype of theta, float32, got float64",
        ),
        (bad(knots=torch.zeros(1, 1)), "knots must be [X], got [1, 1]"),
        (bad(knots=torch.tensor([0, 1])), "knots must be float32, float64, bfloat16 or float16, got int64"),
        (
            bad(knots=torch.tensor([0.0, 2.0, 1.0])),
            "knots must rise strictly in the precision of theta, got 1 at index 2 after 2",
        ),
        (
            bad(knots=torch.tensor([0.5, 0.5])),
            "knots must rise strictly in the precision of theta, got 0.5 at index 1 after 0.5",
        ),
        (
            bad(knots=torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)),
            "knots must rise strictly in the precision of theta, got 1 at index 1 after 1",
        ),
        (
            bad(knots=torch.tensor([0.0, torch.inf])),
            "knots must be finite in the precision of theta, got inf at index 1",
        ),
        (
            bad(knots=torch.tensor([torch.nan, 1.0])),
            "knots must be finite in the precision of theta, got nan at index 0",
        ),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=r"^pwl_statistics: ") as error:
        pwl_statistics(*arguments)
    assert str(error.value).startswith(f"pwl_statistics: {message}")


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=40, unique=True),
    st.integers(0, 1500),
    st.integers(0, 8),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.integers(0, 2**32),
)
def test_property(knots: list[float], parameters: int, count: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    theta, gradients, a = inputs(parameters, count, sorted(knots))
    theta = torch.where(torch.rand(parameters) < 0.5, theta, scale * theta)
    close(pwl_statistics(theta, gradients, a), _reference(theta, gradients, a), theta, gradients)
