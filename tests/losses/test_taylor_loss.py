from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from lossmeta.losses import TaylorLoss


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def formula(loss: TaylorLoss, y: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """The polynomial term by term, in float64."""
    a, (c0, c1) = loss.coefficients.double(), loss.center.double()
    y, f = y.double() - c1, f.double() - c0
    if loss.order == 2:
        terms = [a[0] * y, a[1] * y * y / 2, a[2] * f * y]
    else:
        terms = [
            a[0] * y,
            a[1] * y**2 / 2,
            a[2] * y**3 / 6,
            a[3] * f * y,
            a[4] * f * y**2 / 2,
            a[5] * f**2 * y / 2,
        ]
    return sum(terms).mean(1)


def made(order: int = 3, **options) -> TaylorLoss:
    torch.manual_seed(1)
    loss = TaylorLoss(order, **options)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(1000)
    return loss


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (4, 3, 2), (0, 3)])
def test_is_the_polynomial(order: int, shape: tuple[int, ...]) -> None:
    loss = made(order, reduction="none")
    logits, labels = torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:]))
    dense = F.one_hot(labels, shape[1]).movedim(-1, 1)
    rows = [t.movedim(1, -1).reshape(-1, shape[1]) for t in (dense, logits.double().softmax(1))]
    expected = formula(loss, *rows).reshape(labels.shape)
    torch.testing.assert_close(loss(logits, labels).double(), expected, rtol=1e-5, atol=1e-5)
    soft = torch.rand(shape)
    rows[0] = soft.movedim(1, -1).reshape(-1, shape[1])
    expected = formula(loss, *rows).reshape(labels.shape)
    torch.testing.assert_close(loss(logits, soft).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 3), (5, 2, 2), (0, 2)])
def test_regression_compares_raw_values(shape: tuple[int, ...]) -> None:
    loss = made(link="identity", reduction="none")
    pred, target = torch.randn(shape), torch.randn(shape)
    columns = -1 if pred.numel() else 1
    expected = formula(loss, target.reshape(len(target), columns), pred.reshape(len(pred), columns))
    torch.testing.assert_close(loss(pred, target).double(), expected, rtol=1e-5, atol=1e-5)
    loss.reduction = "sum"
    torch.testing.assert_close(loss(pred, target).double(), expected.sum(), rtol=1e-5, atol=1e-5)


def test_weight_ignore_index_and_smoothing() -> None:
    weight, labels, logits = torch.tensor([1.0, 3.0]), torch.tensor([0, 1, 1, 7]), torch.randn(4, 2)
    each = made(reduction="none")(logits, labels.clamp(max=1))
    options = {"weight": weight, "ignore_index": 7}
    expected = each * torch.tensor([1.0, 3.0, 3.0, 0.0])
    torch.testing.assert_close(made(reduction="none", **options)(logits, labels), expected)
    torch.testing.assert_close(made(reduction="sum", **options)(logits, labels), expected.sum())
    torch.testing.assert_close(made(reduction="mean", **options)(logits, labels), expected.sum() / 7)
    for smoothing in (0.0, 0.1):
        loss, broken = made(ignore_index=7, label_smoothing=smoothing), logits.clone().requires_grad_()
        with torch.no_grad():
            broken[3] = torch.nan
        loss(broken, labels).backward()
        assert torch.equal(broken.grad[3], torch.zeros(2))
        assert not loss.coefficients.grad.isnan().any()
    smooth = 0.8 * F.one_hot(labels[:3], 2) + 0.1
    torch.testing.assert_close(made(label_smoothing=0.2)(logits[:3], labels[:3]), made()(logits[:3], smooth))
    torch.testing.assert_close(
        made(weight=weight)(logits[:3], smooth),
        (made(reduction="none")(logits[:3], smooth) * (smooth @ weight)).sum() / (smooth @ weight).sum(),
    )


def test_one_sample_without_batch() -> None:
    logits = torch.randn(3)
    for reduction in ("none", "mean"):
        loss = made(reduction=reduction)
        torch.testing.assert_close(
            loss(logits, torch.tensor(1)), loss(logits[None], torch.tensor([1])).reshape(())
        )


def test_parameters_start_small_and_learn() -> None:
    torch.manual_seed(0)
    for order, count in ((2, 3), (3, 6)):
        loss = TaylorLoss(order, dtype=torch.float64)
        assert {n: p.shape for n, p in loss.named_parameters()} == {"coefficients": (count,), "center": (2,)}
        assert all(0 < p.abs().max() < 0.005 for p in loss.parameters())
        logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(4, (5,))
        loss(logits, labels).backward()
        assert all(p.grad.abs().min() > 0 for p in (*loss.parameters(), logits))
        names = [n for n, _ in loss.named_parameters()]
        assert torch.autograd.gradgradcheck(
            lambda x, *v, m=loss, n=names, y=labels: torch.func.functional_call(
                m, dict(zip(n, v, strict=True)), (x, y)
            ),
            (logits, *loss.parameters()),
        )


def test_half_precision_is_accumulated_in_float32() -> None:
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = made()(logits, torch.tensor([0, 1, 2, 0]))
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_compiles() -> None:
    torch._dynamo.reset()
    loss, logits, labels = made(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(logits, labels), loss(logits, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "TaylorLoss: order must be 2 or 3, got 4"),
        ({"link": "log"}, "TaylorLoss: link must be one of 'softmax', 'sigmoid', 'identity', got 'log'"),
        ({"reduction": "max"}, "TaylorLoss: reduction must be one of 'none', 'mean', 'sum', got 'max'"),
        ({"label_smoothing": -1.0}, "TaylorLoss: label_smoothing must lie in [0, 1], got -1.0"),
        (
            {"link": "identity", "label_smoothing": 0.1},
            "TaylorLoss: weight, ignore_index and label_smoothing are for link='softmax' and link='sigmoid', "
            "got link='identity'",
        ),
    ],
)
def test_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        TaylorLoss(**options)


@pytest.mark.parametrize(
    ("options", "pred", "target", "message"),
    [
        ({}, (3, 2), torch.tensor([0, 1]), "class indices must be [3] for logits [3, 2], got [2]"),
        ({}, (3, 2), torch.ones(3, 4), "probabilities must be [3, 2] for logits [3, 2], got [3, 4]"),
        ({}, (3, 2), torch.tensor([0, 2, 1]), "labels must lie in [0, 2), got 2 at index 1"),
        ({"weight": torch.ones(3)}, (1, 2), torch.tensor([0]), "weight must be [2], got [3]"),
        (
            {"link": "identity"},
            (3, 1),
            torch.ones(3),
            "pred and target must both be [N] or [N, d...], got [3, 1] and [3]",
        ),
    ],
)
def test_refuses_bad_tensors(
    options: dict, pred: tuple[int, ...], target: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=exactly(f"TaylorLoss: {message}")):
        TaylorLoss(**options)(torch.zeros(pred), target)
