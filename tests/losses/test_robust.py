from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from lossmeta.losses import BootstrappingLoss, GeneralizedCrossEntropy, SymmetricCrossEntropy


@pytest.mark.parametrize("q", [1e-40, 1e-12, 1e-3, 0.1, 0.5, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_generalized_cancels_nowhere(q: float, reduction: str) -> None:
    """From undecided to wrong beyond doubt, each sample's value and gradient in float32 are those in float64."""
    x = torch.stack([torch.linspace(-60, 0, 31), torch.zeros(31)], 1)
    y = torch.zeros(1, dtype=torch.int64)
    criterion = GeneralizedCrossEntropy(q, reduction=reduction)
    for row in x:
        z = row[None].clone().requires_grad_()
        value = criterion(z, y)
        (slope,) = torch.autograd.grad(value, z)
        s = math.log1p(math.exp(-row[0].double().item()))
        exact = s if q < 1e-30 else -math.expm1(-q * s) / q
        assert value.item() == pytest.approx(exact, rel=2e-6, abs=0)
        assert slope[0, 0].item() == pytest.approx(-math.exp(-q * s) * (1 - math.exp(-s)), rel=1e-5, abs=0)


def test_generalized_weighs_the_gradient_of_cross_entropy() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (5,))
    ours = torch.autograd.grad(GeneralizedCrossEntropy(0.3, reduction="sum")(x, y), x)[0]
    theirs = torch.autograd.grad(F.cross_entropy(x, y, reduction="sum"), x)[0]
    p = x.detach().softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(ours, p**0.3 * theirs)


def test_symmetric_without_cross_entropy_is_bounded() -> None:
    x = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    loss = SymmetricCrossEntropy(0, 2, -3)(x, torch.tensor([1]))
    assert loss.item() == 6
    assert not torch.autograd.grad(loss, x)[0].isnan().any()


def test_symmetric_loses_no_small_gradient() -> None:
    """That of the reverse is p (1 - p) beta A, and p is small where the model contradicts the label."""
    for size in (0.0, 5.0, 20.0, 60.0):
        x = torch.tensor([[-size, 0.0]], requires_grad=True)
        (slope,) = torch.autograd.grad(SymmetricCrossEntropy(0, 1, -1)(x, torch.tensor([0])), x)
        p = 1 / (1 + math.exp(size))
        assert slope[0, 0].item() == pytest.approx(-p * (1 - p), rel=1e-5, abs=0)


def test_of_beta_and_log_zero_the_product_counts() -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    torch.testing.assert_close(SymmetricCrossEntropy(1, 3, -4)(x, y), SymmetricCrossEntropy(1, 2, -6)(x, y))


def test_soft_bootstrapping_lowers_the_entropy_too() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (5,))
    entropy = torch.distributions.Categorical(logits=x).entropy().mean()
    expected = 0.6 * F.cross_entropy(x, y) + 0.4 * entropy
    loss = BootstrappingLoss(0.6)(x, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_hard_bootstrapping_takes_the_prediction_for_a_label() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (5,))
    expected = 0.8 * F.cross_entropy(x, y) + 0.2 * F.cross_entropy(x, x.argmax(1))
    loss = BootstrappingLoss(mode="hard")(x, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_defaults() -> None:
    assert GeneralizedCrossEntropy().q == 0.7
    assert (SymmetricCrossEntropy().alpha, SymmetricCrossEntropy().beta) == (0.1, 1)
    assert [BootstrappingLoss(mode=mode).beta for mode in ("soft", "hard")] == [0.95, 0.8]


def test_representations() -> None:
    shared = "weighted=False, ignore_index=-100, reduction='mean')"
    assert repr(GeneralizedCrossEntropy()) == f"GeneralizedCrossEntropy(q=0.7, {shared}"
    assert (
        repr(SymmetricCrossEntropy()) == f"SymmetricCrossEntropy(alpha=0.1, beta=1.0, log_zero=-4.0, {shared}"
    )
    assert repr(BootstrappingLoss()) == f"BootstrappingLoss(beta=0.95, mode='soft', {shared}"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: GeneralizedCrossEntropy(0),
            ValueError,
            "GeneralizedCrossEntropy: q must lie in (0, 1], got 0; torch.nn.CrossEntropyLoss is its limit at 0",
        ),
        (
            lambda: GeneralizedCrossEntropy(1.5),
            ValueError,
            "GeneralizedCrossEntropy: q must lie in (0, 1], got 1.5",
        ),
        (
            lambda: GeneralizedCrossEntropy(math.nan),
            ValueError,
            "GeneralizedCrossEntropy: q must lie in (0, 1], got nan",
        ),
        (
            lambda: GeneralizedCrossEntropy("0.7"),
            TypeError,
            "GeneralizedCrossEntropy: q must be a number, got str",
        ),
        (
            lambda: GeneralizedCrossEntropy(torch.tensor(0.7)),
            TypeError,
            "GeneralizedCrossEntropy: q must be a number, got Tensor",
        ),
        (
            lambda: SymmetricCrossEntropy(-1),
            ValueError,
            "SymmetricCrossEntropy: alpha must be at least 0 and finite, got -1",
        ),
        (
            lambda: SymmetricCrossEntropy(beta=math.nan),
            ValueError,
            "SymmetricCrossEntropy: beta must be at least 0 and finite, got nan",
        ),
        (
            lambda: SymmetricCrossEntropy(0, 0),
            ValueError,
            "SymmetricCrossEntropy: alpha or beta must be positive, got 0 and 0",
        ),
        (
            lambda: SymmetricCrossEntropy(log_zero=0),
            ValueError,
            "SymmetricCrossEntropy: log_zero must be negative and finite, got 0",
        ),
        (
            lambda: SymmetricCrossEntropy(log_zero=-math.inf),
            ValueError,
            "SymmetricCrossEntropy: log_zero must be negative and finite, got -inf",
        ),
        (
            lambda: SymmetricCrossEntropy(None),
            TypeError,
            "SymmetricCrossEntropy: alpha must be a number, got NoneType",
        ),
        (lambda: BootstrappingLoss(0), ValueError, "BootstrappingLoss: beta must lie in (0, 1], got 0"),
        (
            lambda: BootstrappingLoss(math.nan),
            ValueError,
            "BootstrappingLoss: beta must lie in (0, 1], got nan",
        ),
        (lambda: BootstrappingLoss(True), TypeError, "BootstrappingLoss: beta must be a number, got bool"),
        (
            lambda: BootstrappingLoss(mode="firm"),
            ValueError,
            "BootstrappingLoss: mode must be one of 'soft', 'hard', got 'firm'",
        ),
    ],
)
def test_refuses_bad_options(make, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        make()
