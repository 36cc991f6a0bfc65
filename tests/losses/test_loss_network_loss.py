from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta import _checks
from lossmeta.losses import LossNetwork


def formula(loss: LossNetwork, y: Tensor, f: Tensor) -> Tensor:
    """The network as modules of PyTorch would compute it, in float64, averaged over the outputs."""

    def activation(x: Tensor) -> Tensor:
        if loss.activation == "relu":
            return x.relu()
        return (1 - loss.leak) * F.softplus(x, beta=loss.smoothness, threshold=40) + loss.leak * x

    x = torch.stack([y, f], -1).double()
    x = activation(F.linear(x, loss.input_weight.double()))
    x = activation(F.linear(x, loss.hidden_weight.double()))
    x = F.linear(x, loss.output_weight.double()).squeeze(-1)
    return (F.softplus(x) if loss.output == "softplus" else x).mean(1)


def made(**options: Any) -> LossNetwork:
    torch.manual_seed(1)
    return LossNetwork(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"leak": 0.1, "smoothness": 5.0},
        {"hidden": 7},
        {"activation": "relu", "output": "softplus"},
        {"exact": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (4, 3, 2), (500, 20)], ids=str)
def test_is_the_network(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    loss = made(reduction="none", **options)
    logits, labels = torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:]))
    rows = [
        t.movedim(1, -1).reshape(-1, shape[1]) for t in (F.one_hot(labels, shape[1]).movedim(-1, 1), logits)
    ]
    expected = formula(loss, rows[0], rows[1].double().softmax(1)).reshape(labels.shape)
    torch.testing.assert_close(loss(logits, labels).double(), expected, rtol=1e-5, atol=1e-5)
    soft = torch.rand(shape)
    expected = formula(loss, soft.movedim(1, -1).reshape(-1, shape[1]), rows[1].double().softmax(1))
    torch.testing.assert_close(
        loss(logits, soft).double(), expected.reshape(labels.shape), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 3), (5, 2, 2)], ids=str)
def test_regression_compares_raw_values(shape: tuple[int, ...]) -> None:
    loss = made(link="identity")
    pred, target = torch.randn(shape), torch.randn(shape)
    expected = formula(loss, target.reshape(shape[0], -1), pred.reshape(shape[0], -1)).mean()
    torch.testing.assert_close(loss(pred, target).double(), expected, rtol=1e-5, atol=1e-5)


def test_weight_ignore_index_and_smoothing() -> None:
    torch.manual_seed(0)
    weight, labels, logits = torch.tensor([1.0, 3.0]), torch.tensor([0, 1, 1, 7]), torch.randn(4, 2)
    each = made(reduction="none")(logits, labels.clamp(max=1)) * torch.tensor([1.0, 3.0, 3.0, 0.0])
    options: dict[str, Any] = {"weight": weight, "ignore_index": 7}
    torch.testing.assert_close(made(reduction="none", **options)(logits, labels), each)
    torch.testing.assert_close(made(reduction="sum", **options)(logits, labels), each.sum())
    torch.testing.assert_close(made(reduction="mean", **options)(logits, labels), each.sum() / 7)
    smooth = 0.8 * F.one_hot(labels[:3], 2) + 0.1
    torch.testing.assert_close(made(label_smoothing=0.2)(logits[:3], labels[:3]), made()(logits[:3], smooth))


def test_ignored_label_may_be_a_class() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4), torch.arange(9) % 4
    kept = labels != 2
    logits[2] = torch.nan
    results = [made(ignore_index=2)(logits, labels), made()(logits[kept], labels[kept])]
    torch.testing.assert_close(results[0], results[1])
    loss = made(ignore_index=2)
    loss(logits, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())


def test_weights_are_kaiming_normal_parameters() -> None:
    loss = made(hidden=400)
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {
        "input_weight": (400, 2),
        "hidden_weight": (400, 400),
        "output_weight": (1, 400),
    }
    for weight in loss.parameters():
        assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.15)
    assert list(loss.state_dict()) == [name for name, _ in loss.named_parameters()]
    before = loss.hidden_weight.detach().clone()
    loss.reset_parameters()
    assert not torch.equal(before, loss.hidden_weight)


def test_trains_the_network_and_what_it_judges() -> None:
    loss = made()
    logits = torch.randn(6, 4, requires_grad=True)
    loss(logits, torch.randint(4, (6,))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*loss.parameters(), logits))


# ---- The network on top of a task loss.

SHAPES = pytest.mark.parametrize("shape", [(5,), (7, 5), (4, 3, 2), (600, 20)], ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def targets(shape: tuple[int, ...], probabilities: bool) -> Tensor:
    if probabilities:
        return torch.rand(shape).softmax(0 if len(shape) == 1 else 1)
    classes = shape[0] if len(shape) == 1 else shape[1]
    labels = torch.randint(classes, (() if len(shape) == 1 else (shape[0], *shape[2:])))
    if labels.dim():
        labels[0] = -1
    return labels


@SHAPES
@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_starts_as_cross_entropy(
    shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float, probabilities: bool
) -> None:
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": -1, "label_smoothing": smoothing}
    options["weight"] = torch.rand(shape[0 if len(shape) == 1 else 1]) + 0.5 if weighted else None
    loss = made(residual="cross_entropy", **options)
    logits, target = torch.randn(shape, requires_grad=True), targets(shape, probabilities)
    actual, expected = loss(logits, target), F.cross_entropy(logits, target, **options)
    assert torch.equal(actual, expected)
    upstream = torch.rand(actual.shape)
    gradients = [torch.autograd.grad(value, logits, upstream)[0] for value in (actual, expected)]
    assert torch.equal(*gradients)
    # Later it is the sum of the two losses.
    network = made(**options)
    network.load_state_dict(loss.state_dict())
    with torch.no_grad():
        for module in (loss, network):
            module.output_weight.fill_(0.1)
    assert torch.equal(loss(logits, target), expected + network(logits, target))


@REDUCTIONS
@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 3), (5, 2, 2), (0, 3)], ids=str)
def test_starts_as_squared_error(shape: tuple[int, ...], reduction: str) -> None:
    loss = made(residual="squared_error", link="identity", reduction=reduction)
    pred, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    actual = loss(pred, target)
    each = F.mse_loss(pred, target, reduction="none").reshape(shape[0], -1 if shape[0] else 3).mean(1)
    expected = {"none": each, "mean": F.mse_loss(pred, target), "sum": each.sum()}[reduction]
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=0)
    upstream = torch.rand(actual.shape)
    gradients = [torch.autograd.grad(value, pred, upstream)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("output", ["linear", "softplus"])
@pytest.mark.parametrize("activation", ["smooth_leaky_relu", "relu"])
@pytest.mark.parametrize("shape", [(6, 4), (600, 20)], ids=str)  # by the network and by its table
def test_learns_from_the_task_loss_on(shape: tuple[int, int], activation: str, output: str) -> None:
    loss = made(residual="cross_entropy", output=output, activation=activation)
    logits, labels = torch.randn(shape, requires_grad=True), torch.randint(shape[1], shape[:1])
    (slope,) = torch.autograd.grad(loss(logits, labels), logits, create_graph=True)
    task_slope = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(slope, task_slope, rtol=1e-6, atol=0)
    first, second, third = torch.autograd.grad(slope, tuple(loss.parameters()), torch.randn(shape))
    assert not first.any()
    assert not second.any()
    assert third.count_nonzero() > 30  # a unit of the ReLU network may be dead


def test_a_label_that_cannot_be_looked_at_never_reaches_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would end the CUDA context. The network's operator, which looks here, is taken out."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    loss = made(residual="cross_entropy", reduction="none")
    monkeypatch.setattr(loss, "outputwise", lambda pred, target: pred.new_zeros(len(pred)))
    logits, labels = torch.randn(4, 3), torch.tensor([0, 3, -100, 1])
    kept = torch.tensor([0, -100, -100, 1])
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits, kept, reduction="none"))


def test_half_precision_is_accumulated() -> None:
    loss = made(residual="cross_entropy")
    logits, labels = torch.randn(6, 4, dtype=torch.bfloat16), torch.randint(4, (6,))
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits.float(), labels))


def test_representation() -> None:
    assert repr(LossNetwork(link="identity")) == (
        "LossNetwork(hidden=40, leak=0.01, smoothness=10.0, activation='smooth_leaky_relu', output='linear', "
        "residual=None, exact=False, link='identity', reduction='mean')"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "LossNetwork: hidden must be at least 1, got 0"),
        ({"leak": 5}, "LossNetwork: leak must lie in [0, 1], got 5"),
        ({"leak": float("nan")}, "LossNetwork: leak must lie in [0, 1], got nan"),
        ({"smoothness": -1}, "LossNetwork: smoothness must be positive and finite, got -1"),
        ({"smoothness": float("inf")}, "LossNetwork: smoothness must be positive and finite, got inf"),
        (
            {"activation": "tanh"},
            "LossNetwork: activation must be one of 'smooth_leaky_relu', 'relu', got 'tanh'",
        ),
        ({"output": "exp"}, "LossNetwork: output must be one of 'linear', 'softplus', got 'exp'"),
        (
            {"residual": "l1"},
            "LossNetwork: residual must be one of 'cross_entropy', 'squared_error', got 'l1'",
        ),
        (
            {"residual": "cross_entropy", "link": "identity"},
            "LossNetwork: residual='cross_entropy' is for link='softmax', got link='identity'",
        ),
        (
            {"residual": "squared_error"},
            "LossNetwork: residual='squared_error' is for link='identity', got link='softmax'",
        ),
        ({"link": "log"}, "LossNetwork: link must be one of 'softmax', 'identity', got 'log'"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LossNetwork(**options)
