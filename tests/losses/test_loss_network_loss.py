from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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


def test_representation() -> None:
    assert repr(LossNetwork(link="identity")) == (
        "LossNetwork(hidden=40, leak=0.01, smoothness=10.0, activation='smooth_leaky_relu', output='linear', "
        "exact=False, link='identity', reduction='mean')"
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
        ({"link": "log"}, "LossNetwork: link must be one of 'softmax', 'identity', got 'log'"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LossNetwork(**options)
