"""The optimizers of timm: each has the right meta-gradient, or is refused before any step; and its mixup."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("timm", reason="needs timm")

from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers

from lossmeta.adalfl import OnlineLearner, meta_gradient
from lossmeta.losses import LossNetwork

# bnb and apex are libraries of their own; kron compiles itself.
NAMES = list_optimizers(exclude_filters=["bnb*", "fused*", "kron*"])
REFUSED = {
    "adafactor": "depends on the gradients of others",
    "adahessian": "cannot be stepped on its own",
    "adamp": "depends on the gradients of others",
    "lamb": "depends on the gradients of others",
    "lars": "depends on the gradients of others",
    "larc": "depends on the gradients of others",
    "lion": "does not depend on the size of the gradient",
    "muon": "depends on the gradients of others",
    "adamuon": "depends on the gradients of others",
    "radamlegacy": "computes in a lower precision than float64",
    "novograd": "depends on the gradients of others",
    "sgdp": "depends on the gradients of others",
}
ACCEPTED = [
    "adabelief",
    "adan",
    "adamw",
    "adopt",
    "laprop",
    "madgrad",
    "nadamw",
    "radam",
    "rmsproptf",
    "sgdw",
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=torch.float64),
            torch.randint(4, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def made(name: str) -> tuple[nn.Module, Any, LossNetwork]:
    """A model that has been trained a little."""
    net = model()
    optimizer = create_optimizer_v2(net, opt=name, lr=0.01, weight_decay=0.01)
    for x, y in batches(4):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    torch.manual_seed(2)
    loss = LossNetwork(8, residual="cross_entropy", dtype=torch.float64)
    with torch.no_grad():
        loss.output_weight.normal_()
    return net, optimizer, loss


def by_differences(net: nn.Module, optimizer: Any, loss: LossNetwork, direction: list[Tensor]) -> float:
    """Of the task loss after a step of the optimizer itself, along a direction of the loss's parameters."""
    train, valid = batches(6)[4:]
    values = []
    for h in (1e-4, -1e-4, 5e-5, -5e-5):
        other, own, moved = copy.deepcopy((net, optimizer, loss))
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(d, alpha=h)
        own.zero_grad()
        moved(other(train[0]), train[1]).backward()
        own.step()
        values.append(F.cross_entropy(other(valid[0]), valid[1]).item())
    wide, narrow = (values[0] - values[1]) / 2e-4, (values[2] - values[3]) / 1e-4
    return (4 * narrow - wide) / 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_is_right_or_refused(name: str) -> None:
    if name == "adahessian":
        net = model()
        optimizer = create_optimizer_v2(net, opt=name, lr=0.01)
        with pytest.raises(TypeError, match="optimizer must move every weight by its own gradient"):
            OnlineLearner(net, optimizer, LossNetwork(8), F.cross_entropy)
        return
    net, optimizer, loss = made(name)
    directions = [[torch.randn_like(p) for p in loss.parameters()] for _ in range(3)]
    expected = [by_differences(net, optimizer, loss, d) for d in directions]
    train, valid = batches(6)[4:]
    try:
        found = meta_gradient(net, optimizer, loss, F.cross_entropy, train, valid, backend="double_backward")
    except TypeError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "optimizer must move every weight by its own gradient" in refusal
        assert "approximate=True" in refusal
        return
    actual = [
        sum(float((g * d).sum()) for g, d in zip(found.gradients, ds, strict=True) if g is not None)
        for ds in directions
    ]
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), rtol=1e-3, atol=1e-5 * max(map(abs, expected))
    )


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    net = model()
    optimizer = create_optimizer_v2(net, opt=name, lr=0.01, weight_decay=0.01)
    loss = LossNetwork(8, residual="cross_entropy", dtype=torch.float64)
    with pytest.raises(TypeError, match=REFUSED[name]):
        OnlineLearner(net, optimizer, loss, F.cross_entropy)
    if name == "adahessian":  # its steps need what no loop but its own gives
        return
    one = OnlineLearner(net, optimizer, loss, F.cross_entropy, approximate=True)
    assert one.step(batches(1)[0]).skipped is None


@pytest.mark.parametrize("name", ACCEPTED)
def test_is_accepted(name: str) -> None:
    net = model()
    optimizer = create_optimizer_v2(net, opt=name, lr=0.01, weight_decay=0.01)
    loss = LossNetwork(8, residual="cross_entropy", dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = OnlineLearner(net, optimizer, loss, F.cross_entropy)
        for batch in batches(4):
            assert one.step(batch).skipped is None


def test_mixup() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    mix = Mixup(mixup_alpha=0.8, num_classes=4, label_smoothing=0.1)
    loss = LossNetwork(residual="cross_entropy", normalize_slope=True)
    one = OnlineLearner(net, torch.optim.SGD(net.parameters(), 0.1), loss, F.cross_entropy)
    centres = torch.randn(4, 1, 8, 8)
    clean = torch.arange(32) % 4, torch.randn(32, 1, 8, 8)
    for _ in range(60):
        x, y = mix(centres[clean[0]] + 0.1 * clean[1], clean[0])
        assert one.step((x, y)).skipped is None
    assert (net(centres).argmax(1) == torch.arange(4)).all()
