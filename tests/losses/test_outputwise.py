"""What LossNetwork and TaylorLoss share: targets, weights and errors are those of ``torch.nn.CrossEntropyLoss``."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta import _checks
from lossmeta.losses import LossNetwork, TaylorLoss

KINDS = pytest.mark.parametrize("kind", [LossNetwork, TaylorLoss])


def made(kind: type, **options: Any) -> LossNetwork | TaylorLoss:
    torch.manual_seed(1)
    return kind(**options)


@KINDS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_only_the_given_label_is_ignored(kind: type, smoothing: float) -> None:
    """With another ``ignore_index``, -100 is out of range, as for F.cross_entropy."""
    logits, labels = torch.randn(3, 4), torch.tensor([0, -100, 1])
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        F.cross_entropy(logits, labels, ignore_index=1)
    name = "loss_network" if kind is LossNetwork and not smoothing else kind.__name__
    with pytest.raises(ValueError, match=rf"^{name}: labels must lie in \[0, 4\), got -100 at index 1$"):
        made(kind, ignore_index=1, label_smoothing=smoothing)(logits, labels)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.complex64])
def test_class_indices_are_int64(kind: type, dtype: torch.dtype) -> None:
    message = (
        f"{kind.__name__}: target must be class indices (int64 or uint8) or probabilities "
        f"(float32, float64, bfloat16 or float16), got {str(dtype)[6:]}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        made(kind)(torch.zeros(2, 3), torch.tensor([0, 1]).to(dtype))


@KINDS
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([0.2, 1.5, 0.7, 1.0])}], ids=str
)
def test_class_indices_may_be_bytes(kind: type, options: dict[str, Any]) -> None:
    labels = torch.tensor([0, 255, 3, 1], dtype=torch.uint8)
    losses = [made(kind, ignore_index=255, **options)]
    if kind is LossNetwork:
        losses.append(made(kind, ignore_index=255, residual="cross_entropy", normalize_slope=True, **options))
    logits = torch.randn(4, 4)
    for loss in losses:
        torch.testing.assert_close(loss(logits, labels), loss(logits, labels.long()))


@KINDS
def test_probabilities_cannot_be_ignored(kind: type) -> None:
    logits = torch.randn(4, 3)
    message = (
        f"{kind.__name__}: ignore_index must be negative with probabilities, which it cannot ignore, got 0"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        made(kind, ignore_index=0)(logits, logits.softmax(1))
    made(kind, ignore_index=-1)(logits, logits.softmax(1))


@KINDS
@pytest.mark.parametrize("link", ["softmax", "identity"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_does_not_round(kind: type, link: str, reduction: str) -> None:
    weight = torch.rand(40) if link == "softmax" else None
    loss = made(kind, link=link, weight=weight, reduction=reduction)
    pred, target = torch.randn(16, 40, requires_grad=True), torch.rand(16, 40).softmax(1)
    expected = loss(pred, target)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(pred, target)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(result.sum(), pred)[0] for result in (actual, expected)]
    assert torch.equal(*gradients)


@KINDS
def test_float64_is_kept(kind: type) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "label_smoothing": 0.1}
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    smooth = 0.9 * F.one_hot(labels, 3).double() + 0.1 / 3
    expected = made(kind, dtype=torch.float64)(logits, smooth)
    torch.testing.assert_close(made(kind, **options)(logits, labels), expected, rtol=1e-13, atol=0)


@KINDS
def test_a_bad_label_that_cannot_be_looked_at_is_a_row_of_nan(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; its gradient is 0. The class next to it has weight 0, which must not hide the label."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    weight = torch.tensor([1.0, 1.0, 0.0])
    loss = made(kind, weight=weight, ignore_index=-7, label_smoothing=0.1, reduction="none")
    logits = torch.randn(4, 3, requires_grad=True)
    rows = loss(logits, torch.tensor([0, 3, -7, 1]))
    assert rows.isnan().tolist() == [False, True, False, False]
    assert rows[2] == 0
    gradient, *others = torch.autograd.grad(rows.sum(), (logits, *loss.parameters()))
    assert gradient.any(1).tolist() == [True, False, False, True]
    assert all(g.isfinite().all() for g in (gradient, *others))


def test_maps_over_batches() -> None:
    loss, logits, labels = made(TaylorLoss), torch.randn(4, 5, 3), torch.randint(3, (4, 5))
    expected = torch.stack([loss(x, y) for x, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(logits, labels), expected)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


@KINDS
@pytest.mark.parametrize(
    ("link", "pred", "target", "message"),
    [
        ("softmax", np.zeros((2, 3)), zeros(2), "pred must be a tensor, got ndarray"),
        ("softmax", zeros(2, 3), [0, 1], "target must be a tensor, got list"),
        ("identity", zeros(2), [0.0, 1.0], "target must be a tensor, got list"),
        (
            "softmax",
            zeros(2, 3, dtype=torch.int64),
            zeros(2, dtype=torch.int64),
            "pred must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            "identity",
            zeros(2),
            zeros(2, dtype=torch.int64),
            "target must be float32, float64, bfloat16 or float16, got int64",
        ),
        ("softmax", zeros(), zeros(), "pred must be [C], [N, C] or [N, C, d...] with C at least 1, got []"),
        (
            "softmax",
            zeros(3, 0),
            zeros(3, dtype=torch.int64),
            "pred must be [C], [N, C] or [N, C, d...] with C at least 1, got [3, 0]",
        ),
        (
            "softmax",
            zeros(0),
            zeros(dtype=torch.int64),
            "pred must be [C], [N, C] or [N, C, d...] with C at least 1, got [0]",
        ),
        ("softmax", zeros(3), zeros(4), "probabilities must be [3] for logits [3], got [4]"),
        ("identity", zeros(), zeros(), "pred and target must both be [N] or [N, d...], got [] and []"),
        (
            "identity",
            zeros(3, 0),
            zeros(3, 0),
            "pred must hold at least one output for each sample, got [3, 0]",
        ),
        (
            "softmax",
            zeros(2, 3),
            zeros(2, 3, device="meta"),
            "target and pred must be on the same device, got meta and cpu; move one with .to()",
        ),
        (
            "identity",
            zeros(2, device="meta"),
            zeros(2),
            "target and pred must be on the same device, got cpu and meta; move one with .to()",
        ),
    ],
)
def test_refuses_bad_tensors(kind: type, link: str, pred: Any, target: Any, message: str) -> None:
    expected = TypeError if "a tensor" in message else ValueError
    with pytest.raises(expected, match=f"^{kind.__name__}: {re.escape(message)}$"):
        made(kind, link=link)(pred, target)


@KINDS
def test_refuses_a_bad_weight(kind: type) -> None:
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: weight must be a tensor, got list$"):
        made(kind, weight=[1.0, 2.0])
    message = "weight and pred must be on the same device, got meta and cpu; move one with .to()"
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {re.escape(message)}$"):
        made(kind, weight=zeros(2, device="meta"))(zeros(3, 2), zeros(3, 2))


def test_parameters_of_the_polynomial_are_on_the_device_of_the_predictions() -> None:
    message = (
        "TaylorLoss: pred and coefficients must be on the same device, got cpu and meta; move one with .to()"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaylorLoss(device="meta")(zeros(2, 3), zeros(2, 3))
