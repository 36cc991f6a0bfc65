"""The losses that take class indices alone: where they are cross-entropy, what they leave out and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta import _checks
from lossmeta.losses import LossNetwork, LossWeighting, TransitionLoss

F64 = torch.float64
SHAPE: dict[str, Any] = {"residual": "cross_entropy"}
KINDS: dict[str, Callable[..., Any]] = {
    "transition": lambda c, **o: TransitionLoss(c, **o),
    "transition, shape": lambda c, **o: TransitionLoss(
        c, shape=LossNetwork(5, dtype=o.get("dtype"), **SHAPE), **o
    ),
    "transition, normalized shape": lambda c, **o: TransitionLoss(
        c, shape=LossNetwork(5, dtype=o.get("dtype"), **SHAPE), normalize_slope=True, **o
    ),
    "weighting": lambda c, **o: LossWeighting(7, **o),
    "weighting, as it is": lambda c, **o: LossWeighting(7, normalize_weights=False, **o),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, classes: int = 3, **options: Any) -> Any:
    """A loss whose values are not those that it starts with."""
    loss = KINDS[kind](classes, **options)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return loss


def as_cross_entropy(kind: str, classes: int, **options: Any) -> tuple[nn.Module, float]:
    """The loss where it is cross-entropy, but for a factor."""
    loss = KINDS[kind](classes, dtype=F64, **options)
    if isinstance(loss, TransitionLoss):
        with torch.no_grad():
            loss.transition_logits.copy_(-1000 * (1 - torch.eye(classes)))
    return loss, 0.5 if kind == "weighting, as it is" else 1.0


@EACH
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(5,), (1, 2), (7, 5), (4, 3, 2), (3, 2, 1, 3)])
def test_is_cross_entropy_at_a_limit(kind: str, reduction: str, shape: tuple[int, ...]) -> None:
    classes = shape[min(len(shape) - 1, 1)]
    loss, factor = as_cross_entropy(kind, classes, reduction=reduction, ignore_index=1)
    logits = 5 * torch.randn(shape, dtype=F64)
    labels = torch.randint(classes, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    labels.reshape(-1)[0] = 0
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = loss(ours, labels)
    expected = factor * F.cross_entropy(theirs, labels, reduction=reduction, ignore_index=1)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(loss(logits.transpose(0, -1).contiguous().transpose(0, -1), labels), value)
    assert torch.equal(loss(logits, labels.to(torch.uint8)), value)


@EACH
def test_a_batch_of_nothing(kind: str) -> None:
    logits, labels = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert made(kind, reduction="none")(logits, labels).shape == (0,)
    assert made(kind)(logits, labels).isnan(), "as cross-entropy"
    total = made(kind, reduction="sum")(torch.randn(2, 3, requires_grad=True), torch.tensor([-100, -100]))
    assert total == 0
    loss = made(kind, reduction="sum")
    loss(torch.randn(2, 3, requires_grad=True), torch.tensor([-100, -100])).backward()
    assert not any(p.grad.any() for p in loss.parameters())


@EACH
def test_ignored_samples_leave_no_trace(kind: str) -> None:
    loss = made(kind, ignore_index=7, dtype=F64)
    logits, labels = torch.randn(5, 3, dtype=F64), torch.tensor([0, 7, 2, 1, 7])
    broken = logits.clone()
    broken[1] = torch.nan
    broken.requires_grad_()
    kept = labels != 7
    fewer = logits[kept].requires_grad_()
    results = []
    for x, y in ((broken, labels), (fewer, labels[kept])):
        value = loss(x, y)
        results.append((value, torch.autograd.grad(value, (x, *loss.parameters()))))
    (value, (in_broken, *ours)), (expected, (in_fewer, *theirs)) = results
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(in_broken[kept], in_fewer, rtol=1e-11, atol=1e-14)
    assert torch.equal(in_broken[~kept], torch.zeros(2, 3, dtype=F64))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@EACH
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients(kind: str, reduction: str) -> None:
    """Of weights, and of factors that make slopes alike, the gradient in the prediction is not the loss's."""
    loss = made(kind, reduction=reduction, dtype=F64)
    logits, labels = torch.randn(4, 3, 2, dtype=F64, requires_grad=True), torch.randint(3, (4, 2))
    names = [name for name, _ in loss.named_parameters()]

    def called(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, values, strict=True)), (x, labels))

    assert torch.autograd.gradcheck(lambda *v: called(logits.detach(), *v), tuple(loss.parameters()))
    if kind in ("transition", "transition, shape"):
        assert torch.autograd.gradcheck(called, (logits, *loss.parameters()))

    def slope(*values: Tensor) -> Tensor:
        value = called(logits, *values).sum()
        return torch.autograd.grad(value, logits, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, tuple(loss.parameters()))


@EACH
def test_half_precision_is_accumulated_in_float32(kind: str) -> None:
    loss = made(kind)
    for dtype in (torch.bfloat16, torch.float16):
        logits, labels = torch.randn(6, 3, dtype=dtype, requires_grad=True), torch.randint(3, (6,))
        value = loss(logits, labels)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(logits.float(), labels))
        value.backward()
        assert logits.grad is not None and logits.grad.dtype == dtype
    half = made(kind).bfloat16()
    value = half(torch.randn(6, 3), labels)
    value.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in half.parameters())


@EACH
def test_autocast_does_not_round(kind: str) -> None:
    loss = made(kind, 40)
    logits, labels = torch.randn(16, 40, requires_grad=True), torch.randint(40, (16,))
    expected = loss(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(logits, labels)
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(v, (logits, *loss.parameters())) for v in (actual, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


@EACH
def test_transforms(kind: str) -> None:
    loss = made(kind, 4, dtype=F64)
    logits, labels = torch.randn(3, 6, 4, dtype=F64), torch.randint(4, (3, 6))
    labels[1, 2] = -100
    names = dict(loss.named_parameters())

    def called(x: Tensor, y: Tensor, values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(loss, values, (x, y))

    ours = torch.vmap(torch.func.grad_and_value(called, (0, 2)), (0, 0, None))(logits, labels, names)
    for i, (x, y) in enumerate(zip(logits, labels, strict=True)):
        x = x.clone().requires_grad_()
        value = loss(x, y)
        in_pred, *in_values = torch.autograd.grad(value, (x, *names.values()))
        torch.testing.assert_close(ours[1][i], value)
        torch.testing.assert_close(ours[0][0][i], in_pred)
        torch.testing.assert_close([g[i] for g in ours[0][1].values()], in_values)


@EACH
def test_a_bad_label_that_cannot_be_looked_at_is_nan(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; its gradient is 0."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    loss = made(kind, ignore_index=-7, reduction="none")
    logits = torch.randn(4, 3, requires_grad=True)
    rows = loss(logits, torch.tensor([0, 3, -7, 1]))
    assert rows.isnan().tolist() == [False, True, False, False]
    assert rows[2] == 0
    gradient, *others = torch.autograd.grad(rows.sum(), (logits, *loss.parameters()))
    assert gradient.any(1).tolist() == [True, False, False, True]
    assert all(g.isfinite().all() for g in (gradient, *others))


@EACH
@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        (np.zeros((2, 3)), torch.zeros(2), "pred must be a tensor, got ndarray"),
        (torch.zeros(2, 3), [0, 1], "target must be a tensor, got list"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            "pred must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            "target must be class indices (int64 or uint8), got float32; class indices are int64: target.long()",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3, dtype=torch.int64),
            "target must be [2] for pred [2, 3], got [3]",
        ),
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2, dtype=torch.int64),
            "target must be [2, 4] for pred [2, 3, 4], got [2]",
        ),
        (
            torch.zeros(()),
            torch.zeros((), dtype=torch.int64),
            "pred must be [C], [N, C] or [N, C, d...] with C at least 1, got []",
        ),
        (torch.zeros(3, 3), torch.tensor([0, 1, 3]), "labels must lie in [0, 3), got 3 at index 2"),
        (torch.zeros(2, 3), torch.tensor([-1, 1]), "labels must lie in [0, 3), got -1 at index 0"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int64, device="meta"),
            "target and pred must be on the same device, got meta and cpu; move one with .to()",
        ),
    ],
)
def test_refuses_bad_tensors(kind: str, pred: Any, target: Any, message: str) -> None:
    loss = made(kind)
    error = TypeError if "must be a tensor" in message else ValueError
    with pytest.raises(error, match=f"^{type(loss).__name__}: {re.escape(message)}$"):
        loss(pred, target)


@EACH
def test_refuses_bad_options(kind: str) -> None:
    name = type(made(kind)).__name__
    with pytest.raises(
        ValueError, match=f"^{name}: reduction must be one of 'none', 'mean', 'sum', got 'max'$"
    ):
        made(kind, reduction="max")
    with pytest.raises(
        ValueError, match=r" must be on the same device, got meta and cpu; move one with .to\(\)$"
    ):
        KINDS[kind](3).to("meta")(torch.zeros(2, 3), torch.tensor([0, 1]))


# ---- Without autograd.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "shape" not in kind])
def test_mixed_derivative_is_autograd_s(kind: str) -> None:
    loss = made(kind, 5, dtype=F64)
    pred, labels = 3 * torch.randn(9, 5, dtype=F64), torch.randint(5, (9,))
    labels[3] = -100
    pred[3] = torch.nan
    u = torch.randn_like(pred)
    u[3] = torch.nan  # what a model that gave NaN gives
    result = loss.with_mixed_derivative(pred, labels)
    assert result is not None
    value, slope, mixed = result
    assert not value.requires_grad and not slope.requires_grad
    f = pred.clone().requires_grad_()
    expected = loss(f, labels)
    (expected_slope,) = torch.autograd.grad(expected, f, create_graph=True)
    gradients = torch.autograd.grad(expected_slope, list(loss.parameters()), u.nan_to_num())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, expected_slope.detach(), rtol=1e-12, atol=1e-12)
    for _ in range(2):  # it may be asked again
        for ours, theirs in zip(mixed(u), gradients, strict=True):
            assert theirs.any()
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    if kind.startswith("transition"):
        torch.testing.assert_close(mixed(u)[0].sum(1), torch.zeros(5, dtype=F64), rtol=0, atol=1e-14)


class OtherTransition(TransitionLoss):
    pass


class OtherWeighting(LossWeighting):
    pass


@pytest.mark.parametrize("kind", ["transition", "weighting"])
def test_mixed_derivative_is_left_to_autograd(kind: str) -> None:
    pred, labels = torch.randn(4, 3), torch.randint(3, (4,))
    loss = made(kind)
    assert loss.with_mixed_derivative(pred, labels) is not None
    assert loss.with_mixed_derivative(pred[:, :, None], labels[:, None]) is None
    assert loss.with_mixed_derivative(pred.double(), labels) is None
    assert loss.bfloat16().with_mixed_derivative(pred.bfloat16(), labels) is None
    assert made(kind, reduction="sum").with_mixed_derivative(pred, labels) is None
    assert made(kind).requires_grad_(False).with_mixed_derivative(pred, labels) is None
    other = OtherTransition(3) if kind == "transition" else OtherWeighting()
    assert other.with_mixed_derivative(pred, labels) is None
    loss = made(kind)
    loss.register_forward_hook(lambda *_: None)
    assert loss.with_mixed_derivative(pred, labels) is None
    assert TransitionLoss(3, shape=LossNetwork(**SHAPE)).with_mixed_derivative(pred, labels) is None
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 5 at index 1$"):
        made(kind).with_mixed_derivative(pred, torch.tensor([0, 5, 1, 6]))
