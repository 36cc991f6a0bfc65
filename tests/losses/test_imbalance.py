from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from lossmeta.ala import LogitAdjustment
from lossmeta.losses import FocalLoss, LDAMLoss, LogitAdjustedLoss

COUNTS = torch.tensor([900, 90, 10])


def test_of_the_counts_the_ratios_count() -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    shares = COUNTS / COUNTS.sum()
    torch.testing.assert_close(LogitAdjustedLoss(COUNTS)(x, y), LogitAdjustedLoss(shares)(x, y))
    torch.testing.assert_close(
        LogitAdjustedLoss(COUNTS).log_priors, torch.tensor([0.9, 0.09, 0.01]).log(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        LDAMLoss(COUNTS)(x.tanh(), y), LDAMLoss(shares)(x.tanh(), y), rtol=1e-5, atol=1e-5
    )


def test_logits_that_know_nothing_cost_the_surprise_of_the_class() -> None:
    losses = LogitAdjustedLoss(COUNTS, reduction="none")(torch.zeros(3, 3), torch.arange(3))
    torch.testing.assert_close(losses, -torch.tensor([0.9, 0.09, 0.01]).log())


def test_the_space_with_the_same_tau_is_the_same_loss() -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    for tau in (0.0, 1.0, 2.5):
        values = {"tau": torch.tensor(tau), "margin": torch.zeros(3)}
        torch.testing.assert_close(
            LogitAdjustedLoss(COUNTS, tau)(x, y), LogitAdjustment(COUNTS)(x, y, values)
        )


def test_margins_are_those_of_the_paper() -> None:
    margins = LDAMLoss(torch.tensor([10000, 625, 16])).margins
    # n^(1/4) is 10, 5 and 2.
    torch.testing.assert_close(margins, torch.tensor([0.1, 0.2, 0.5]))


def test_a_margin_is_what_the_label_must_win_by() -> None:
    """The loss of a label ahead by its margin is that of cross-entropy without a lead."""
    criterion = LDAMLoss(torch.tensor([16, 1]), 0.5, 30)
    for label, margin in ((0, 0.25), (1, 0.5)):
        x = torch.zeros(1, 2)
        x[0, label] = margin
        assert criterion(x, torch.tensor([label])).item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float64, torch.float16])
def test_counts_of_any_type(dtype: torch.dtype) -> None:
    counts = torch.tensor([200, 20, 2], dtype=dtype)
    expected = dtype if dtype.is_floating_point else torch.float32
    assert LogitAdjustedLoss(counts).log_priors.dtype == expected
    assert LDAMLoss(counts).margins.dtype == expected
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    reference = F.cross_entropy(x.double() + torch.tensor([100.0, 10, 1]).double().log(), y).item()
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    assert LogitAdjustedLoss(counts)(x, y).item() == pytest.approx(reference, rel=tolerance)


def test_focal_is_flat_where_the_model_is_sure() -> None:
    for gamma in (0.25, 0.5, 1, 2):
        x = torch.tensor([[200.0, 0.0]], requires_grad=True)
        loss = FocalLoss(gamma)(x, torch.tensor([0]))
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].any()


def test_focal_of_a_hard_sample_is_cross_entropy() -> None:
    """The power is 1 there, to the rounding."""
    x = torch.tensor([[0.0, 90.0], [0.0, 110.0], [0.0, 1e6]], dtype=torch.float64, requires_grad=True)
    y = torch.zeros(3, dtype=torch.int64)
    ours, theirs = FocalLoss(3, reduction="sum")(x, y), F.cross_entropy(x, y, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_focal_weighs_easy_samples_less() -> None:
    """Lin et al.: at gamma = 2 a sample of p = 0.9 costs 100 times less."""
    x = torch.tensor([[math.log(9.0), 0.0]])
    y = torch.tensor([0])
    assert (F.cross_entropy(x, y) / FocalLoss()(x, y)).item() == pytest.approx(100, rel=1e-4)


def test_defaults_and_representations() -> None:
    shared = "weighted=False, ignore_index=-100, reduction='mean')"
    assert repr(LogitAdjustedLoss(COUNTS)) == f"LogitAdjustedLoss(num_classes=3, tau=1.0, {shared}"
    assert repr(LDAMLoss(COUNTS)) == f"LDAMLoss(num_classes=3, max_margin=0.5, scale=30.0, {shared}"
    assert repr(FocalLoss()) == f"FocalLoss(gamma=2.0, {shared}"


@pytest.mark.parametrize("kind", [LogitAdjustedLoss, LDAMLoss])
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([1, 2], TypeError, "counts must be a tensor, got list"),
        (torch.ones(2, 2), ValueError, "counts must be [C] with C at least 1, got [2, 2]"),
        (torch.ones(0), ValueError, "counts must be [C] with C at least 1, got [0]"),
        (
            torch.tensor([3, -1]),
            ValueError,
            "counts must be positive and finite, got -1 for class 1",
        ),
        (
            torch.tensor([3, 0]),
            ValueError,
            "counts must be positive and finite, got 0 for class 1; leave the class out or count it as 0.1",
        ),
        (
            torch.tensor([torch.nan, 1.0]),
            ValueError,
            "counts must be positive and finite, got nan for class 0",
        ),
        (
            torch.tensor([1.0, torch.inf]),
            ValueError,
            "counts must be positive and finite, got inf for class 1",
        ),
        (torch.tensor([True]), ValueError, "counts must be integers or floats, got bool"),
        (
            torch.ones(2, device="meta"),
            ValueError,
            "counts must hold values, got a tensor on the meta device",
        ),
    ],
)
def test_refuses_bad_counts(kind, counts, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'{kind.__name__}: {message}')}$"):
        kind(counts)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: LogitAdjustedLoss(COUNTS, math.nan),
            ValueError,
            "LogitAdjustedLoss: tau must be finite, got nan",
        ),
        (
            lambda: LogitAdjustedLoss(COUNTS, "1"),
            TypeError,
            "LogitAdjustedLoss: tau must be a number, got str",
        ),
        (
            lambda: LDAMLoss(COUNTS, -0.5),
            ValueError,
            "LDAMLoss: max_margin must be at least 0 and finite, got -0.5",
        ),
        (lambda: LDAMLoss(COUNTS, None), TypeError, "LDAMLoss: max_margin must be a number, got NoneType"),
        (
            lambda: LDAMLoss(COUNTS, scale=0),
            ValueError,
            "LDAMLoss: scale must be positive and finite, got 0",
        ),
        (
            lambda: LDAMLoss(COUNTS, scale=math.inf),
            ValueError,
            "LDAMLoss: scale must be positive and finite, got inf",
        ),
        (lambda: FocalLoss(-1), ValueError, "FocalLoss: gamma must be at least 0 and finite, got -1"),
        (
            lambda: FocalLoss(math.nan),
            ValueError,
            "FocalLoss: gamma must be at least 0 and finite, got nan",
        ),
        (lambda: FocalLoss([2]), TypeError, "FocalLoss: gamma must be a number, got list"),
        (
            lambda: LDAMLoss(COUNTS)(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            "LDAMLoss: logits must have 3 classes in dimension 1, as counts has, got [2, 4]",
        ),
    ],
)
def test_refuses_bad_options(make, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        make()
