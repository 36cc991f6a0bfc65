"""The tuned loss: its value, its parameters, and its sampled form."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.tuneloss import L1, AugmentationMixture, DropoutLoss, SquaredL2, TunedLoss, UniformLabelLoss

VALUES = {"l1": 0.3, "l2": np.array([0.1, 0.2, 0.3, 0.4]), "uniform": 0.05, "dropout": 0.5}


def features() -> dict[str, Any]:
    return {
        "l1": L1(0.1),
        "l2": SquaredL2(by="input"),
        "uniform": UniformLabelLoss(),
        "dropout": DropoutLoss(masks=2),
    }


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


class Counted(nn.Linear):
    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value(dtype: torch.dtype) -> None:
    model = Counted(4, 3, dtype=dtype)
    x, y = batch()
    x = x.to(dtype)
    loss = TunedLoss(F.cross_entropy, features(), VALUES)
    found = loss(model, x, y)
    assert found.dtype == dtype and model.calls == 3  # the uniform loss shares the task's prediction
    expected = F.cross_entropy(model(x), y)
    for name, feature in features().items():
        value = torch.as_tensor(VALUES[name], dtype=dtype)
        expected = expected + (value * feature(model, (x, y))).sum()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert model.weight.grad is not None


def test_a_feature_whose_parameter_is_zero_is_not_computed() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError

    loss = TunedLoss(F.cross_entropy, {"a": broken, "b": broken}, {"a": 0.0, "b": np.zeros(2)})
    model, (x, y) = nn.Linear(4, 3), batch()
    torch.testing.assert_close(loss(model, x, y), F.cross_entropy(model(x), y))


def test_values_are_replaced_and_saved() -> None:
    loss = TunedLoss(F.cross_entropy, features())
    model, (x, y) = nn.Linear(4, 3), batch()
    assert loss.values is None
    with pytest.raises(ValueError, match=r"^TunedLoss: values must be set"):
        loss(model, x, y)
    loss.set({name: VALUES[name] for name in reversed(VALUES)})
    first = loss(model, x, y)
    loss.set({**VALUES, "l2": 2 * VALUES["l2"]})
    assert loss(model, x, y) > first
    again = TunedLoss(F.cross_entropy, features())
    again.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert again(model, x, y) == loss(model, x, y)
    again.load_state_dict(TunedLoss(F.cross_entropy, features()).state_dict())
    assert again.values is None


def test_what_is_held_is_a_copy() -> None:
    l2 = np.ones(4)
    loss = TunedLoss(F.cross_entropy, features(), {**VALUES, "l2": l2})
    l2[:] = 7
    assert loss.values is not None and loss.values["l2"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"l1": 0.1}, ValueError, "values must be of l1, l2, uniform, dropout, got l1"),
        ([1, 2], TypeError, "values must map names to numbers or vectors, got list"),
        (
            {**VALUES, "l1": float("nan")},
            ValueError,
            "value of 'l1' must be a finite number or vector, got nan",
        ),
        ({**VALUES, "l1": np.ones((2, 2))}, ValueError, "value of 'l1' must be a finite number or vector"),
        ({**VALUES, "l1": np.ones(0)}, ValueError, "value of 'l1' must be a finite number or vector"),
    ],
)
def test_values_that_are_refused_change_nothing(values: Any, error: type[Exception], message: str) -> None:
    loss = TunedLoss(F.cross_entropy, features(), VALUES)
    with pytest.raises(error, match=message):
        loss.set(values)
    assert loss.values is not None and loss.values["l1"] == 0.3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TunedLoss(3, features()), TypeError, "task_loss must be callable, got int"),
        (
            lambda: TunedLoss(F.cross_entropy, [L1()]),
            TypeError,
            "features must map names to callables, got list",
        ),
        (lambda: TunedLoss(F.cross_entropy, {}), ValueError, "features must have at least one, got none"),
        (lambda: TunedLoss(F.cross_entropy, {"a": 1}), TypeError, "feature 'a' must be callable, got int"),
        (
            lambda: TunedLoss(F.cross_entropy, {1: L1()}),
            TypeError,
            "names of features must be strings, got 1",
        ),
    ],
)
def test_arguments_that_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_features_of_another_shape_are_refused() -> None:
    model, (x, y) = nn.Linear(4, 3), batch()
    loss = TunedLoss(F.cross_entropy, {"l2": SquaredL2(by="input")}, {"l2": 0.1})
    with pytest.raises(
        ValueError, match=r"^TunedLoss: feature 'l2' must have the shape of its value, \[\], got \[4\]"
    ):
        loss(model, x, y)
    loss = TunedLoss(F.cross_entropy, {"a": lambda model, batch: 3.0}, {"a": 0.1})
    with pytest.raises(TypeError, match="feature 'a' must give a tensor, got float"):
        loss(model, x, y)


def test_modules_among_features_move_with_the_loss() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return self.scale.sum()

    feature = Weighted()
    TunedLoss(F.cross_entropy, {"a": feature}).double()
    assert feature.scale.dtype == torch.float64


def test_output_picks_the_prediction() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return inputs, self.linear(inputs)

    model, (x, y) = Two(), batch()
    loss = TunedLoss(F.cross_entropy, {"uniform": UniformLabelLoss()}, {"uniform": 0.5}, output=1)
    logits = model.linear(x)
    torch.testing.assert_close(
        loss(model, x, y), F.cross_entropy(logits, y) - 0.5 * logits.log_softmax(1).mean()
    )


# ---- In one pass.


def test_samples_are_unbiased() -> None:
    """The mean over many draws is the loss; the masks of dropout are fresh ones, so it is compared with many masks."""
    model, (x, y) = Counted(4, 3, dtype=torch.float64), batch(5)
    x = x.double()
    parts = {
        "dropout": DropoutLoss(masks=4000),
        "uniform": UniformLabelLoss(),
        "mixture": AugmentationMixture([torch.neg, lambda x: 0.5 * x]),
        "l1": L1(),
    }
    values = {"dropout": 0.7, "uniform": 0.4, "mixture": np.array([0.5, 1.5]), "l1": 0.1}
    loss = TunedLoss(F.cross_entropy, parts, values)
    with torch.no_grad():
        expected = loss(model, x, y).item()
        model.calls = 0
        generator = torch.Generator().manual_seed(0)
        before = torch.get_rng_state()
        draws = np.array([loss.sampled(model, x, y, generator=generator).item() for _ in range(3000)])
    assert model.calls == 3000 and torch.equal(torch.get_rng_state(), before)
    assert abs(draws.mean() - expected) < 4 * draws.std() / len(draws) ** 0.5
    assert draws.std() / len(draws) ** 0.5 < 0.02 * expected


def test_how_often_dropout_is_applied() -> None:
    """With probability λ / (1 + λ), rescaled by 1 + λ, as section 4.2 has it."""
    changed = []

    class Recorder(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            changed.append((inputs != 1).any(1))
            return inputs

    x, y = torch.ones(1000, 20), torch.zeros(1000, dtype=torch.int64)
    loss = TunedLoss(F.cross_entropy, {"dropout": DropoutLoss()}, {"dropout": 3.0})
    found = loss.sampled(Recorder(), x, y, generator=torch.Generator().manual_seed(0))
    assert changed[0].float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert found.item() > 4 * 0.5 * np.log(20)


def test_sampling_is_repeated_by_its_generator() -> None:
    model, (x, y) = nn.Linear(4, 3), batch(40)
    loss = TunedLoss(F.cross_entropy, features(), VALUES)
    a, b = (loss.sampled(model, x, y, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert a == b


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        (
            DropoutLoss(task_loss=F.mse_loss),
            0.5,
            "must have the task loss of this one to be sampled, got another",
        ),
        (DropoutLoss(), -0.5, "value of 'a' must be at least 0 to be sampled, got -0.5"),
    ],
)
def test_what_cannot_be_sampled(feature: Any, value: float, message: str) -> None:
    model, (x, y) = nn.Linear(4, 3), batch()
    loss = TunedLoss(F.cross_entropy, {"a": feature}, {"a": value})
    with pytest.raises(ValueError, match=message):
        loss.sampled(model, x, y)
    with pytest.raises(TypeError, match="inputs must be one tensor, got tuple"):
        loss.sampled(model, (x,), y)  # type: ignore[arg-type]
