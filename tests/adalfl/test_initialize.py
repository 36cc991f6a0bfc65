"""Algorithm 1 against full unrolling, and what it must refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_meta_gradient import LossOfEager, batches, cnn, mlp, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam

from lossmeta.adalfl import initialize
from lossmeta.adalfl.initialize import _through
from lossmeta.losses import LossNetwork


def unrolled(model: nn.Module, loss: LossNetwork, chain: list[Any], valid: Any, rate: float) -> list[Tensor]:
    theta = dict(model.named_parameters())
    eager = LossOfEager(loss)
    for x, y in chain:
        value = eager(functional_call(model, theta, (x,)), y)
        g = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        theta = {name: p - rate * d for (name, p), d in zip(theta.items(), g, strict=True)}
    value = F.cross_entropy(functional_call(model, theta, (valid[0],)), valid[1])
    return list(torch.autograd.grad(value, list(loss.parameters())))


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_equals_full_unrolling(make: Any, inner_steps: int) -> None:
    model, loss = make(), LossNetwork(8, dtype=torch.float64)
    *chain, valid = batches(inner_steps + 1)
    random = torch.get_rng_state()
    expected = unrolled(copy.deepcopy(model), loss, chain, valid, 0.2)
    torch.set_rng_state(random)
    _, actual = _through(loss, list(loss.parameters()), model, chain, valid, F.cross_entropy, 0.2)
    assert relative_error(actual, expected) < 1e-10


def test_learns() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
    x = x + y[:, None, None, None]
    loss = LossNetwork(8)
    seen: list[int] = []
    history = initialize(
        loss,
        lambda: mlp().float(),
        [(x[:32], y[:32])],
        [(x[32:], y[32:])],
        steps=150,
        learning_rate=0.1,
        meta_optimizer=Adam(loss.parameters(), 1e-2),
        progress=lambda n, value: seen.append(n),
    )
    assert seen == list(range(1, 151))
    assert sum(history[-30:]) / 30 < sum(history[:30]) / 30 - 0.1


def test_a_diverging_start_leaves_the_loss_alone() -> None:
    loss = LossNetwork(8)
    before = copy.deepcopy(loss.state_dict())

    def broken() -> nn.Module:
        model = mlp().float()
        with torch.no_grad():
            model[1].weight.fill_(float("nan"))  # type: ignore[index]
        return model

    both = batches(1, torch.float32)
    (value,) = initialize(loss, broken, both, both, steps=1)
    assert value != value
    assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), before.values(), strict=True))


def test_bad_input() -> None:
    loss, both = LossNetwork(8), batches(1, torch.float32)

    def make() -> nn.Module:
        return mlp().float()

    for options in ({"steps": 0}, {"inner_steps": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            initialize(loss, make, both, both, **options)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        initialize(loss, make, both, both, learning_rate=0.0)
    with pytest.raises(ValueError, match="valid_batches must hold at least one batch, got none"):
        initialize(loss, make, both, [], steps=1)
    with pytest.raises(ValueError, match="loss must have parameters to learn, got none"):
        initialize(nn.CrossEntropyLoss(), make, both, both)
