"""What the spaces tell a policy, against independent formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ala import (
    ClassCorrelation,
    ContrastiveShape,
    DistanceMixture,
    FocalWeighting,
    LogitAdjustment,
    LossSpace,
    Robust,
    Smoothing,
)
from lossmeta.ala.space import Coordinates


def drawn(space: LossSpace, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Values somewhere between the bounds."""
    c = Coordinates(space)
    share = torch.rand(c.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {name: v.to(dtype) for name, v in c.values(c.low + (c.high - c.low) * (0.2 + 0.6 * share)).items()}


def batch(n: int = 12, classes: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, classes, generator=generator, dtype=dtype), torch.arange(n) % 3


def confusion(logits: list[list[float]], labels: list[int], classes: int) -> list[list[float]]:
    """Eq. 7 sample by sample; NaN of classes without one."""
    sums, counts = [[0.0] * classes for _ in range(classes)], [0] * classes
    for x, y in zip(logits, labels, strict=True):
        if y == -100:
            continue
        norm = math.log(math.fsum(math.exp(v) for v in x))
        counts[y] += 1
        for j in range(classes):
            sums[y][j] += norm - x[j]
    return [[s / n if n else math.nan for s in row] for row, n in zip(sums, counts, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spatial", [False, True])
def test_the_confusions_of_pairs(dtype: torch.dtype, spatial: bool) -> None:
    space = ClassCorrelation(4)
    logits, labels = batch(dtype=dtype)
    labels[5] = -100
    expected = confusion(logits.double().tolist(), labels.tolist(), 4)
    if spatial:
        logits, labels = logits.view(2, 6, 4).movedim(2, 1), labels.view(2, 6)
    found = space.statistics(logits, labels, drawn(space))
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(
        found["pairs"].double(),
        torch.tensor([[expected[i][j], expected[j][i]] for i, j in pairs], dtype=torch.float64),
        rtol=1e-5, atol=1e-6, equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(
        found["diagonal"].double(),
        torch.tensor([[expected[i][i]] * 2 for i in range(4)], dtype=torch.float64),
        rtol=1e-5, atol=1e-6, equal_nan=True,
    )  # fmt: skip
    assert found["diagonal"][3].isnan().all() and not found["diagonal"][:3].isnan().any()
    # The pairs are in the order in which the matrix takes them.
    v = drawn(space)
    phi = space.matrix(v["diagonal"], v["pairs"])
    assert [phi[i, j].item() for i, j in pairs] == v["pairs"].tolist()


@pytest.mark.parametrize(
    "space",
    [
        Robust(),
        Smoothing(),
        LogitAdjustment(torch.tensor([5, 3, 2, 1])),
        LogitAdjustment(torch.tensor([5, 3, 2, 1])) * Robust() * Smoothing(),
        DistanceMixture(),
        FocalWeighting(),
        ContrastiveShape(),
    ],
)
def test_by_default_derivative_and_loss(space: LossSpace) -> None:
    """By central differences of the loss."""
    prediction, target = batch()
    values, h = drawn(space), 1e-6
    if "hardness" in values:  # by which negatives weigh, constants to the derivative
        values["hardness"] = torch.zeros_like(values["hardness"])
    found = space.statistics(prediction, target, values)
    assert list(found) == [p.name for p in space.parameters]
    loss = float(space(prediction, target, values))
    for p in space.parameters:
        assert found[p.name].shape == (p.count, 2)
        assert not found[p.name].requires_grad
        for i in range(p.count):
            at = []
            for sign in (1, -1):
                moved = {name: v.clone() for name, v in values.items()}
                moved[p.name].view(-1)[i] += sign * h
                at.append(float(space(prediction, target, moved)))
            slope, kept = found[p.name][i].tolist()
            assert slope == pytest.approx((at[0] - at[1]) / (2 * h), rel=1e-4, abs=1e-6)
            assert kept == pytest.approx(loss, rel=1e-6)
    assert not any(v.requires_grad for v in values.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_functions_of_the_distance(seed: int) -> None:
    """Over all triplets, one by one; they are the derivatives, whatever the weights are."""
    space = DistanceMixture()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 3
    increasing: list[Any] = [
        lambda d: d**2,
        lambda d: d**2.5,
        lambda d: d**1.5,
        lambda d: 0.5 * (math.exp(0.6 * d * d) - 1),
        lambda d: 0.5 * (math.exp(0.6 * d) - 1),
    ]
    decreasing: list[Any] = [
        lambda d: 0.5 / d,
        lambda d: 0.2 / d,
        lambda d: 0.1 / d**2,
        lambda d: math.log(1 / d),
        lambda d: math.log(1 / d**2),
    ]
    terms: list[list[float]] = [[] for _ in range(10)]
    for a in range(9):
        for p in range(9):
            for n in range(9):
                if a != p and y[a] == y[p] and y[a] != y[n]:
                    near, far = float((x[a] - x[p]).norm()), float((x[a] - x[n]).norm())
                    for i in range(5):
                        terms[i].append(increasing[i](near))
                        terms[i + 5].append(decreasing[i](far))
    expected = torch.tensor([math.fsum(t) / len(t) for t in terms], dtype=torch.float64)
    values = drawn(space, seed)
    found = space.statistics(x, y, values)["phi"]
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found[:, 1], (values["phi"] @ expected).expand(10), rtol=1e-8, atol=1e-8)


def test_the_bounds_of_the_papers_parameters() -> None:
    (mixture,), (focal,) = DistanceMixture().parameters, FocalWeighting(offset=0.5).parameters
    assert (mixture.size, mixture.low, mixture.high, mixture.scale) == (10, 0.0, 1.0, 0.1)
    assert mixture.defaults == (1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0)
    assert (focal.size, focal.low, focal.high) == (2, 0.1, 10.0) and focal.scale == pytest.approx(0.1)
    assert focal.defaults == (1.0, 1.0)


def test_a_product_takes_what_each_space_says() -> None:
    """And differentiates the loss of the product in what none says."""
    space = LogitAdjustment(torch.tensor([5, 3, 2, 1])) * ClassCorrelation(4) * Smoothing()
    prediction, target = batch()
    values = drawn(space)
    found = space.statistics(prediction, target, values)
    own = ClassCorrelation(4).statistics(prediction, target, values)
    for name in ("diagonal", "pairs"):
        torch.testing.assert_close(found[name], own[name], equal_nan=True)
    leaf = values["margin"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(space(prediction, target, {**values, "margin": leaf}), leaf)
    torch.testing.assert_close(found["margin"][:, 0], slope)
    assert found["tau"].shape == (1, 2) and found["smoothing"].shape == (1, 2)


def test_a_loss_that_does_not_see_a_parameter() -> None:
    class Blind(LossSpace):
        parameters = Robust.parameters

        def loss(self, prediction: Tensor, target: Tensor, values: Any) -> Tensor:
            return prediction.square().mean()

    prediction, target = batch()
    found = Blind().statistics(prediction, target, drawn(Blind()))["q"]
    assert found.tolist() == [[0.0, pytest.approx(float(prediction.square().mean()))]]


def test_statistics_are_seen_without_gradients_recorded() -> None:
    prediction, target = batch()
    space = Robust()
    expected = space.statistics(prediction, target, drawn(space))["q"]
    with torch.no_grad():
        assert torch.equal(space.statistics(prediction, target, drawn(space))["q"], expected)
    leaf = prediction.clone().requires_grad_()
    assert torch.equal(space.statistics(leaf, target, drawn(space))["q"], expected) and leaf.grad is None
