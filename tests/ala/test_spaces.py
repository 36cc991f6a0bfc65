"""The spaces against independent formulas, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.ala import (
    ClassCorrelation,
    ContrastiveShape,
    LearningRate,
    LogitAdjustment,
    LossSpace,
    ModuleSpace,
    Parameter,
    Robust,
    Smoothing,
)
from lossmeta.ala.space import Coordinates
from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss, ParametricCrossEntropy

COUNTS = torch.tensor([50, 30, 15, 5, 0])
C = len(COUNTS)


def defaults(space: LossSpace) -> dict[str, Tensor]:
    c = Coordinates(space)
    return c.values(torch.zeros(c.size, dtype=torch.float64))


def drawn(space: LossSpace, seed: int, children: int = 3) -> dict[str, Tensor]:
    c = Coordinates(space)
    u = 2 * torch.randn(children, c.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return c.values(c.clip(u))


def logits(n: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return 3 * torch.randn(n, C, generator=generator, dtype=dtype), torch.randint(
        C, (n,), generator=generator
    )


CLASSIFIERS: list[LossSpace] = [
    Robust(),
    LogitAdjustment(COUNTS),
    Smoothing(),
    LearningRate(),
    LogitAdjustment(COUNTS) * Robust(),
    LogitAdjustment(COUNTS) * Robust() * Smoothing() * LearningRate(),
]


@pytest.mark.parametrize("space", CLASSIFIERS)
def test_the_default_is_the_cross_entropy(space: LossSpace) -> None:
    x, y = logits()
    y[2] = -100
    torch.testing.assert_close(space(x, y, defaults(space)), F.cross_entropy(x, y))
    image, labels = x.view(3, 3, C).transpose(1, 2), y.view(3, 3)
    torch.testing.assert_close(space(image, labels, defaults(space)), F.cross_entropy(image, labels))


def test_formulas() -> None:
    """Each written out, sample by sample."""
    x, y = logits()
    q, tau, margin, epsilon = 0.6, 1.3, torch.linspace(-1, 1, C, dtype=torch.float64), 0.1
    prior = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.001], dtype=torch.float64)
    total = 0.0
    for row, label in zip(x, y.tolist(), strict=True):
        moved = [float(row[c]) + tau * math.log(prior[c]) + float(margin[c]) for c in range(C)]
        top = max(moved)
        norm = top + math.log(sum(math.exp(m - top) for m in moved))
        p = math.exp(moved[label] - norm)
        uniform = sum(norm - m for m in moved) / C
        total += (1 - p**q) / q + epsilon * (uniform - (norm - moved[label]))
    space = LogitAdjustment(COUNTS) * Robust() * Smoothing()
    values = {
        k: torch.tensor(v, dtype=torch.float64) for k, v in {"q": q, "tau": tau, "smoothing": epsilon}.items()
    }
    assert float(space(x, y, {**values, "margin": margin})) == pytest.approx(total / len(x), rel=1e-6)


@pytest.mark.parametrize("space", CLASSIFIERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_children_in_one_pass(space: LossSpace, dtype: torch.dtype) -> None:
    """The losses and slopes are those of each child alone, by autograd in float64."""
    x = torch.stack([logits(9, torch.float64)[0] + k for k in range(3)]).to(dtype)
    y = logits()[1]
    y[4] = -100
    values = drawn(space, 1)
    if dtype != torch.float64:
        values = {k: v.float() for k, v in values.items()}
    losses, slopes = space.of_children(x, y, values)
    assert slopes.dtype == dtype
    for i in range(3):
        leaf = x[i].double().requires_grad_()
        loss = space(leaf, y, {k: v[i].double() for k, v in values.items()})
        loss.backward()
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(losses[i].double(), loss.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(slopes[i].double(), leaf.grad, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("q", [0.0, 1e-20, 1e-6, 1.0])
def test_extreme_exponents_and_logits(q: float) -> None:
    """Where p^q has no digits left, and where p is 0."""
    x, y = torch.tensor([[80.0, -80.0], [0.0, 0.0]]), torch.tensor([1, 0])
    values = {"q": torch.tensor([q])}
    losses, slopes = Robust().of_children(x[None], y, values)
    surprise = torch.tensor([160.0, math.log(2)], dtype=torch.float64)
    expected = (-torch.expm1(-q * surprise) / q if q else surprise).mean()
    assert float(losses) == pytest.approx(float(expected), rel=1e-5)
    assert slopes.isfinite().all()
    assert float(Robust()(x, y, {"q": torch.tensor(q)})) == pytest.approx(float(expected), rel=1e-5)


def test_probabilities_as_targets() -> None:
    x, _ = logits()
    target = torch.softmax(torch.randn_like(x), 1)
    space = Robust() * Smoothing()
    torch.testing.assert_close(space(x, target, defaults(space)), F.cross_entropy(x, target))
    stacked, values = torch.stack([x, x]), {k: v[:2] for k, v in drawn(space, 0).items()}
    losses, _ = space.of_children(stacked, target, values)
    torch.testing.assert_close(losses[1], space(x, target, {k: v[1] for k, v in values.items()}))


def test_class_correlation_is_the_papers() -> None:
    space = ClassCorrelation(C)
    x, y = logits()
    torch.testing.assert_close(space(x, y, defaults(space)), ParametricCrossEntropy(C).double()(x, y))
    values = {k: v[0] for k, v in drawn(space, 3).items()}
    phi = space.matrix(values["diagonal"], values["pairs"])
    assert torch.equal(phi, phi.T) and (phi.diagonal() >= 0.1).all() and phi.abs().max() <= 2
    assert phi[0, 3] == values["pairs"][2] and phi[1, 2] == values["pairs"][4]
    expected = -torch.sigmoid((phi[y] * torch.log_softmax(x, 1)).sum(1)).mean()
    torch.testing.assert_close(space(x, y, values), expected)


def test_contrastive_shape_in_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    t, m, h, pull = 0.2, 0.1, 0.8, 0.3
    values = dict(
        zip(["log_temperature", "margin", "hardness", "pull"], [math.log(t), m, h, pull], strict=True)
    )
    e = F.normalize(x, dim=1)
    s = (e @ e.T).tolist()
    total = away = 0.0
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j and y[i] == y[j]]
    for i, j in pairs:
        negatives = [s[i][k] / t for k in range(8) if y[k] != y[i]]
        raw = [math.exp(h / 4 * (n - max(negatives))) for n in negatives]
        against = sum(len(raw) * r / sum(raw) * math.exp(n) for r, n in zip(raw, negatives, strict=True))
        own = math.exp((s[i][j] - m) / t)
        total += -math.log(own / (own + against))
        away += 1 - s[i][j]
    expected = total / len(pairs) * 3 * t + pull * away / len(pairs)
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    assert float(ContrastiveShape()(x, y, given)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("module", [DistanceMixtureLoss(), FocalWeightedLoss()])
def test_any_modules_tensors(module: nn.Module) -> None:
    space = ModuleSpace(module, {"phi": (-1.0, 2.0)})
    x, y = F.normalize(torch.randn(3, 8, 4), dim=2), torch.arange(8) // 2
    torch.testing.assert_close(space(x[0], y, defaults(space)), module(x[0], y).double(), check_dtype=False)
    values = {k: v.float() for k, v in drawn(space, 2).items()}
    losses, slopes = space.of_children(x, y, values)
    for i in range(3):
        leaf = x[i].clone().requires_grad_()
        loss = space(leaf, y, {k: v[i] for k, v in values.items()})
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach())
        torch.testing.assert_close(slopes[i], leaf.grad)


class Temperature(LossSpace):
    """A user's own."""

    parameters = (Parameter("sharpness", default=0.0, scale=0.3, low=-2.0, high=2.0),)

    def transform(self, prediction: Tensor, target: Tensor, values: Any) -> Tensor:
        return prediction * values["sharpness"].exp()


def test_a_space_of_the_users_own_joins_others() -> None:
    space = Temperature() * Robust()
    x, y = logits()
    values = {k: v[:1].float() for k, v in drawn(space, 0).items()}
    losses, slopes = space.of_children(x[None].float(), y, values)
    leaf = (x.float() * values["sharpness"].exp()).requires_grad_()
    expected = Robust()(leaf, y, {"q": values["q"][0]})
    expected.backward()
    torch.testing.assert_close(losses[0], expected.detach())
    torch.testing.assert_close(slopes[0], leaf.grad * values["sharpness"].exp())
    assert space.jitter == 0.3


def test_coordinates() -> None:
    space = LogitAdjustment(COUNTS) * Robust()
    c = Coordinates(space)
    assert c.size == 7
    far = c.values(c.clip(torch.full((7,), 1e9, dtype=torch.float64)))
    assert far["tau"] == 3 and (far["margin"] == 8).all() and far["q"] == 1
    assert c.values(c.clip(torch.full((7,), -1e9, dtype=torch.float64)))["tau"] == -1
    u = c.moved(torch.zeros(7, dtype=torch.float64), {"q": 0.6, "margin": torch.arange(5.0)})
    values = c.values(u)
    assert values["q"].item() == pytest.approx(0.6) and values["margin"].tolist() == pytest.approx(
        [0, 1, 2, 3, 4]
    )
    assert values["tau"] == 0
    assert (c.values(c.moved(u, {"margin": 2.0}))["margin"] == 2).all()
    for bad, message in (
        ({"p": 1.0}, "must have a parameter 'p', its own are tau, margin, q"),
        ({"q": 1.5}, r"q must lie in \[0.0, 1.0\], got 1.5"),
        ({"q": float("nan")}, r"q must lie in \[0.0, 1.0\], got nan"),
        ({"margin": torch.zeros(4)}, r"margin must be \[5\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            c.moved(u, bad)


def test_refuses() -> None:
    adjustment, shape = LogitAdjustment(COUNTS), ContrastiveShape()
    for make, message in (
        (lambda: Parameter("a", 2.0, 1.0, 0.0, 1.0), "low <= default <= high must hold for 'a'"),
        (lambda: Parameter("a", 0.0, 0.0, 0.0, 1.0), "scale must be positive"),
        (lambda: Parameter("a", 0.0, 1.0, 0.0, math.inf), "all finite"),
        (lambda: Parameter("a", 0.0, 1.0, 0.0, 1.0, 0), "size must be at least 1"),
        (lambda: Parameter("a", (0.0, 1.0), 1.0, 0.0, 1.0, 3), "a number or of size 3"),
        (lambda: Robust() * Robust(), "a name of its own, got q, q"),
        (
            lambda: Robust() * ContrastiveShape(),
            "one space at most must have a loss, got Robust, ContrastiveShape",
        ),
        (lambda: LogitAdjustment(torch.zeros(3)), "one above 0"),
        (lambda: LogitAdjustment(torch.tensor([1.0, -1.0])), "not negative"),
        (lambda: LogitAdjustment(torch.ones(2, 2)), r"counts must be \[C\]"),
        (
            lambda: ModuleSpace(nn.Linear(2, 2), {"phi": (0.0, 1.0)}),
            "must have a tensor 'phi', got weight, bias",
        ),
        (
            lambda: adjustment(torch.zeros(2, 3), torch.tensor([0, 1]), defaults(adjustment)),
            r"logits must be \[N, 5\]",
        ),
        (
            lambda: shape(torch.zeros(2, 3), torch.zeros(3), defaults(shape)),
            r"\[N, D\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError):
        Robust() * 2  # type: ignore[operator]


def test_a_part_of_a_subclass_is_not_passed_by() -> None:
    """By what its base knows of the whole loss, alone and in a product, for one model and for many."""

    class Doubled(Robust):
        def loss(self, prediction: Tensor, target: Tensor, values: Any) -> Tensor:
            return 2 * super().loss(prediction, target, values)

    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    values = {"q": torch.tensor(0.4), "smoothing": torch.tensor(0.0)}
    expected = 2 * Robust()(logits, labels, values)
    torch.testing.assert_close(Doubled()(logits, labels, values), expected)
    torch.testing.assert_close((Doubled() * Smoothing())(logits, labels, values), expected)
    stacked = {name: v[None] for name, v in values.items()}
    for space in (Doubled(), Doubled() * Smoothing()):
        torch.testing.assert_close(space.of_children(logits[None], labels, stacked)[0][0], expected)


def test_shares_are_as_good_as_counts() -> None:
    """Only their ratios count, also of rare classes; one without samples counts as a tenth of the least."""
    counts = torch.tensor([900, 90, 10])
    expected = (counts / 1000).double().log()
    for given in (counts, counts.double() / 1000, counts.double() * 7):
        torch.testing.assert_close(LogitAdjustment(given).log_prior, expected)
    none = torch.tensor([900, 100, 0])
    assert LogitAdjustment(none).log_prior[2] == pytest.approx(math.log(0.1 / 1000))
    assert LogitAdjustment(none.double() / 1000).log_prior[2] == pytest.approx(math.log(0.1 * 0.1))
