"""The isotonic regression is the best convex regulariser; bins, windows and states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lossmeta.tuneloss import ConvexRegularizer
from lossmeta.tuneloss.convex_regularizer import BINS, _bins, _edges

Model = tuple[Tensor, Tensor, Tensor]


def model(n: int, seed: int, scale: float = 1.0) -> Model:
    generator = torch.Generator().manual_seed(seed)
    w, g = torch.randn(2, n, generator=generator)
    return scale * w, g, g + 0.3 * w - 0.2 * w**2 + 0.5 * torch.randn(n, generator=generator)


def fitted(*models: Model, window: int = 5, least_at_zero: bool = False) -> Any:
    regularizer = ConvexRegularizer(window, least_at_zero=least_at_zero)
    for w, train, valid in models:
        regularizer.observe([w], [train], [valid])
    (found,) = regularizer.fit()
    return found


def best_slopes(weights: Tensor, target: Tensor, least_at_zero: bool = False) -> np.ndarray[Any, Any]:
    """By the quadratic program over all non-decreasing slopes, those of equal weights being equal."""
    cvxpy = pytest.importorskip("cvxpy")
    distinct, at = np.unique(weights.double().numpy(), return_inverse=True)
    slope = cvxpy.Variable(len(distinct))
    constraints = [slope[1:] >= slope[:-1]] if len(distinct) > 1 else []
    if least_at_zero:
        constraints += [slope[i] <= 0 if w < 0 else slope[i] >= 0 for i, w in enumerate(distinct)]
    cost = cvxpy.sum_squares(slope[at] - target.double().numpy())
    cvxpy.Problem(cvxpy.Minimize(cost), constraints).solve(solver="CLARABEL")
    found: np.ndarray[Any, Any] = slope.value[at]
    return found


@pytest.mark.parametrize("n", [1, 2, 7, 60])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("least_at_zero", [False, True])
def test_is_the_best_of_all_convex_functions(n: int, scale: float, least_at_zero: bool) -> None:
    """Where weights have bins of their own, up to the program's accuracy."""
    w, train, valid = model(n, n, scale)
    w = w.sign() * scale * 1.01 ** torch.arange(n).flip(0)
    assert len(np.unique(_bins(w))) == n
    w[n // 2] = w[0]  # equal ones have one slope
    expected = best_slopes(w, valid - train, least_at_zero)
    found = fitted((w, train, valid), least_at_zero=least_at_zero)
    np.testing.assert_allclose(found.slope(w), expected, atol=1e-6)
    if least_at_zero:
        points = torch.linspace(-3 * scale, 3 * scale, 99)
        assert found.value(points).min() == 0 and found.slope(torch.zeros(1)) == 0


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], [-3.0, -2.0], [0.0, -0.0], [0.0, 2.0, -2.0]])
def test_least_at_zero_where_weights_are_on_one_side(weights: list[float]) -> None:
    """Weights that are 0 stay where they are, whatever their gradients."""
    w = torch.tensor(weights)
    target = 0.5 * w + (w == 0).float()
    found = fitted((w, torch.zeros(len(w)), target), least_at_zero=True)
    torch.testing.assert_close(found.slope(w), (0.5 * w).double())
    # Where nothing says otherwise a weight is let alone.
    assert (found.slope(torch.tensor([-9.0, 9.0])).abs().min() > 0) == (w.min() < 0 < w.max())
    opposite = fitted((w, torch.zeros(len(w)), -w), least_at_zero=True)
    assert opposite.slope(torch.linspace(-5, 5, 11)).abs().max() == 0


def test_is_the_best_over_the_window() -> None:
    models = [model(40, seed, scale) for seed, scale in enumerate((5.0, 1.0, 2.0, 0.1))]
    w, train, valid = (torch.cat(parts) for parts in zip(*models[-3:], strict=True))
    found = fitted(*models, window=3)
    np.testing.assert_allclose(found.slope(w), best_slopes(w, valid - train), atol=2e-2)
    assert not torch.equal(found.slope(w), fitted(*models, window=4).slope(w))


def test_bins_cost_next_to_nothing() -> None:
    """Against the regression over 20,000 weights themselves: the cost by less than 1e-4 of what it explains."""
    isotonic = pytest.importorskip("sklearn.isotonic").isotonic_regression
    w, train, valid = model(20_000, 0)
    order = w.argsort()
    target = (valid - train).double()[order].numpy()
    exact = isotonic(target)
    binned = fitted((w, train, valid)).slope(w[order]).numpy()
    costs = [((s - target) ** 2).mean() for s in (exact, binned, np.full_like(target, target.mean()))]
    assert costs[0] <= costs[1] < costs[0] + 1e-4 * (costs[2] - costs[0]) + 1e-3
    # What little the exact fit wins it wins on noise.
    true = (0.3 * w - 0.2 * w**2).double()[order].numpy()
    monotone = isotonic(true)
    assert np.mean((binned - monotone) ** 2) < np.mean((exact - monotone) ** 2) + 1e-4


def test_weights_lie_in_their_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.cat(
        [
            torch.randn(5000, generator=generator) * torch.logspace(-42, 38, 5000),
            torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 1e38, -1e-45]),
        ]
    )
    at, x = _bins(w), w.double().numpy()
    assert at.min() >= 0 and at.max() < BINS
    assert (_edges(at) <= x).all() and (x <= _edges(at + 1)).all()
    normal = np.abs(x) > 1e-37
    assert ((_edges(at + 1) - _edges(at))[normal] < 0.0079 * np.abs(x)[normal]).all()
    order = np.argsort(x, kind="stable")
    assert (np.diff(at[order]) >= 0).all()
    assert _bins(torch.tensor([0.0])) == _bins(torch.tensor([-0.0]))


@pytest.mark.parametrize("edge", [0.5, -0.5, 1.0, 0.0])
def test_a_weight_on_the_edge_of_a_bin_has_the_slope_of_its_own(edge: float) -> None:
    """Many weights start at a round number, and a knot beside them must not touch them."""
    inward = torch.tensor(edge)
    for _ in range(2):  # the knot is one number beside the edge
        inward = torch.nextafter(inward, torch.tensor(0.0 if edge else -1.0))
    w = torch.tensor([edge, inward]).repeat(10)
    target = torch.where(w == w.max(), 1.0, -1.0)
    found = fitted((w, torch.zeros(20), target))
    np.testing.assert_array_equal(found.slope(w), target)
    knots, slopes = found.placed(w.device, w.dtype)
    assert knots.dtype == torch.float32 and len(slopes) == 2


def test_all_weights_equal_give_a_line() -> None:
    w = torch.full((9,), 0.25)
    found = fitted((w, torch.zeros(9), torch.arange(9.0)))
    assert found.knots.shape == (0,) and found.slopes.tolist() == [4.0]
    assert found.penalty(w).item() == pytest.approx(9)


def test_double_precision_and_half() -> None:
    w, train, valid = model(30, 3)
    single = fitted((w, train, valid))
    double = fitted((w.double(), train.double(), valid.double()))
    np.testing.assert_allclose(double.slope(w), single.slope(w), atol=1e-6)
    half = fitted((w.bfloat16(), train.bfloat16(), valid.bfloat16()))
    assert half.slope(w).isfinite().all()


def test_groups_have_regularisers_of_their_own() -> None:
    a, b = model(30, 0), model(20, 1, 3.0)
    regularizer = ConvexRegularizer()
    regularizer.observe(*([x, y] for x, y in zip(a, b, strict=True)))
    for r, m in zip(regularizer.fit(), (a, b), strict=True):
        alone = fitted(m, least_at_zero=True)
        assert torch.equal(r.slopes, alone.slopes) and torch.equal(r.knots, alone.knots)


def test_goes_on_from_a_state_to_the_same_bits() -> None:
    models = [model(50, seed) for seed in range(7)]
    whole, first, second = (ConvexRegularizer(3) for _ in range(3))
    for i, m in enumerate(models):
        whole.observe(*([t] for t in m))
        if i == 4:
            second.load_state_dict(first.state_dict())
        (first if i < 4 else second).observe(*([t] for t in m))
    kept = first.state_dict()
    (one,), (other,) = whole.fit(), second.fit()
    assert torch.equal(one.knots, other.knots) and torch.equal(one.slopes, other.slopes)
    assert all(
        torch.equal(x, y)
        for x, y in zip(kept["models"][0][0], first.state_dict()["models"][0][0], strict=True)
    )
    with pytest.raises(ValueError, match=r"^ConvexRegularizer: the state must be of window 5, got 3"):
        ConvexRegularizer().load_state_dict(whole.state_dict())
    with pytest.raises(
        ValueError, match=r"^ConvexRegularizer: the state must be of least_at_zero False, got True"
    ):
        ConvexRegularizer(3, least_at_zero=False).load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.zeros(2)], [torch.zeros(3)], [torch.zeros(2)]), ValueError, r"must be \[P\]"),
        (([torch.zeros(2, 2)], [torch.zeros(2, 2)], [torch.zeros(2, 2)]), ValueError, r"must be \[P\]"),
        (([torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]), ValueError, "P >= 1"),
        (([], [], []), ValueError, "one at least"),
        (([torch.zeros(2)], [torch.zeros(2)], []), ValueError, "the same groups"),
        (([torch.zeros(2)], [torch.tensor([0.0, torch.nan])], [torch.zeros(2)]), ValueError, "finite"),
        (([torch.tensor([0.0, torch.inf])], [torch.zeros(2)], [torch.zeros(2)]), ValueError, "finite"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), TypeError, "lists of tensors"),
        (([1.0], [1.0], [1.0]), TypeError, "lists of tensors"),
    ],
)
def test_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    regularizer = ConvexRegularizer()
    with pytest.raises(error, match=f"^ConvexRegularizer: .*{message}"):
        regularizer.observe(*arguments)
    with pytest.raises(ValueError, match="a model must be observed"):
        regularizer.fit()


def test_refuses_windows_and_other_groups() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ConvexRegularizer(0)
    regularizer = ConvexRegularizer()
    regularizer.observe(*([t] for t in model(5, 0)))
    with pytest.raises(ValueError, match="1 groups as before, got 2"):
        regularizer.observe(*([t, t] for t in model(5, 0)))
