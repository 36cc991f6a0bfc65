"""LearnLoss on hinges: what it is given, what it recovers, windows and states."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adagrad

from lossmeta.tuneloss import ConvexPWL, ConvexPWLRegularizer, NotCertified, OnlineTuner, learn_loss
from lossmeta.tuneloss._regularizer import NotFitted


def vectors(seed: int, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in sizes]


def jacobian(hinges: ConvexPWL, w: Tensor) -> Tensor:
    """[P, 2 X]."""
    return torch.autograd.functional.jacobian(hinges.value, w.double()).T


def test_is_learn_loss_on_the_whole_jacobian() -> None:
    """Of two groups, with nothing of that size held."""
    regularizer = ConvexPWLRegularizer(4, window=3)
    gradients, jacobians, features, errors = [], [], [], []
    for seed in range(4):
        w, g, v = (vectors(3 * seed + i, 30, 20) for i in range(3))
        regularizer.observe(w, g, v, 0.3 + 0.1 * seed, 0.9 - 0.1 * seed)
        blocks = [jacobian(h, x) for h, x in zip(regularizer.features, w, strict=True)]
        jacobians.append(torch.column_stack([torch.cat(g).double(), torch.block_diag(*blocks)]).numpy())
        gradients.append(torch.cat(v).double().numpy())
        hinges = [h.value(x.double()).numpy() for h, x in zip(regularizer.features, w, strict=True)]
        features.append(np.concatenate([[0.3 + 0.1 * seed], *hinges]))
        errors.append(0.9 - 0.1 * seed)
    size = 1 + sum(h.size for h in regularizer.features)
    lower, upper = np.zeros(size), np.full(size, np.inf)
    lower[0] = upper[0] = 1
    expected = learn_loss(
        errors[1:], np.stack(features[1:]), lower, upper, gradients=gradients[1:], jacobians=jacobians[1:]
    )
    points = torch.linspace(-3, 3, 50)
    at = 1
    for h, r in zip(regularizer.features, regularizer.fit(), strict=True):
        own = h.function(np.maximum(expected.values[at : at + h.size], 0))
        torch.testing.assert_close(r.slope(points), own.slope(points), rtol=1e-4, atol=1e-6)
        at += h.size


def test_recovers_a_regulariser_of_its_own_kind() -> None:
    """Where the validation error is the training loss and such a regulariser (Theorem 4)."""
    first = vectors(0, 40)
    regularizer = ConvexPWLRegularizer(5)
    regularizer.observe(first, vectors(1, 40), vectors(2, 40), 1.0, 2.0)
    (hinges,) = regularizer.features
    regularizer._models.clear()
    true = hinges.function([0.0, 0.0, 0.1, 0.0, 0.3, 0.2, 0.05, 0.0, 0.0, 0.0])
    for seed in range(3):
        w, g = (x.double() for x in vectors(10 + seed, 40, 40))
        loss = 0.5 + 0.1 * seed
        error = loss + (hinges.value(w).numpy() @ np.array([0, 0, 0.1, 0, 0.3, 0.2, 0.05, 0, 0, 0])).item()
        regularizer.observe([w], [g], [g + true.slope(w)], loss, error)
    (found,) = regularizer.fit()
    torch.testing.assert_close(found.slopes, true.slopes, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.knots, ConvexPWL.at_quantiles(first[0], 5).knots)


def test_goes_on_from_a_state_to_the_same_bits() -> None:
    whole, first, second = (ConvexPWLRegularizer(3, window=2) for _ in range(3))
    for seed in range(5):
        model = *([x] for x in vectors(seed, 20, 20, 20)), 0.1 * seed, 1.0
        whole.observe(*model)
        if seed == 3:
            second.load_state_dict(first.state_dict())
        (first if seed < 3 else second).observe(*model)
    (one,), (other,) = whole.fit(), second.fit()
    assert torch.equal(one.knots, other.knots) and torch.equal(one.slopes, other.slopes)
    for options in ({"count": 4, "window": 2}, {"count": 3, "window": None}):
        with pytest.raises(ValueError, match=r"^ConvexPWLRegularizer: the state must be of"):
            ConvexPWLRegularizer(**options).load_state_dict(whole.state_dict())


def test_equal_weights_and_one_knot() -> None:
    w = torch.full((9,), 0.25)
    regularizer = ConvexPWLRegularizer()
    regularizer.observe([w], [torch.zeros(9)], [torch.ones(9)], 0.5, 0.6)
    regularizer.observe([w + 1], [torch.zeros(9)], [torch.ones(9)], 0.5, 9.6)
    (r,) = regularizer.fit()
    assert r.knots.tolist() == [0.25] and r.slopes[1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2)], [torch.zeros(3)], [torch.zeros(2)], 0.0, 0.0), r"must be \[P\]"),
        (([torch.tensor([0.0, torch.nan])], [torch.zeros(2)], [torch.zeros(2)], 0.0, 0.0), "finite"),
        (([torch.zeros(2)], [torch.zeros(2)], [torch.zeros(2)], np.nan, 0.0), "losses must be finite"),
        (([torch.zeros(2)] * 2, [torch.zeros(2)] * 2, [torch.zeros(2)] * 2, 0.0, 0.0), "1 groups as before"),
    ],
)
def test_refuses(arguments: Any, message: str) -> None:
    regularizer = ConvexPWLRegularizer(2)
    with pytest.raises(ValueError, match="a model must be observed"):
        regularizer.fit()
    regularizer.observe(*([x] for x in vectors(0, 5, 5, 5)), 0.5, 0.6)
    with pytest.raises(ValueError, match=f"^ConvexPWLRegularizer: .*{message}"):
        regularizer.observe(*arguments)
    assert len(regularizer.state_dict()["models"]) == 1
    for options in ({"count": 0}, {"window": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            ConvexPWLRegularizer(**options)


def test_says_so_where_no_answer_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise NotCertified("learn_loss: none")

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["lossmeta.tuneloss.learn_loss"], "learn_loss", fails)
    regularizer = ConvexPWLRegularizer(2)
    regularizer.observe(*([x] for x in vectors(0, 5, 5, 5)), 0.5, 0.6)
    with pytest.raises(NotFitted, match=r"^learn_loss: none$"):
        regularizer.fit()


def test_trains_in_a_loop() -> None:
    """As the paper has it: one regulariser of all weights, AdaGrad, from the first rise on."""
    generator = torch.Generator().manual_seed(0)

    def data(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 30, generator=generator)
        return x, (x[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0).long()

    train, valid, test = data(60), data(300), data(2000)
    ends = []
    for tuned in (False, True):
        model = nn.Linear(30, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = Adagrad(model.parameters(), lr=0.3)
        regularizer = ConvexPWLRegularizer(10, window=5)
        tuner = OnlineTuner(model, train, valid, regularizer=regularizer, by="all", every=6)
        for _ in range(30):
            for x, y in zip(train[0].split(10), train[1].split(10), strict=True):
                loss = F.cross_entropy(model(x), y) + (tuner.penalty() if tuned else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if tuned:
                    tuner.step()
        assert tuner.on == tuned
        ends.append(F.cross_entropy(model(test[0]), test[1]).item())
    assert ends[1] < 0.85 * ends[0]
