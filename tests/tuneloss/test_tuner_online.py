"""TuneLoss in one training: a round is an epoch, and the last round says where to go from it."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lossmeta.tuneloss import L1, DropoutLoss, Measurement, SquaredL2, TunedLoss, TuneLoss, measure
from lossmeta.tuneloss._box import Box

Pair = tuple[Tensor, Tensor]
BOX = {"l1": (0.01, 10.0), "l2": (0.01, 10.0), "dropout": (0.0, 1.0)}


def digits() -> list[Pair]:
    """100 to train, 200 to validate, and others; as many junk pixels, those of another digit, invite to overfit."""
    x, y = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    order = random.permutation(len(y))
    x, y = x[order] / 4, y[order]
    x = np.concatenate([x, x[random.permutation(len(y))]], 1)
    inputs, labels = torch.tensor(x - x[:100].mean(0), dtype=torch.float32), torch.from_numpy(y)
    return [(inputs[s], labels[s]) for s in (slice(0, 100), slice(100, 300), slice(300, None))]


class Training:
    """One training, which a state resumes."""

    def __init__(self, start: dict[str, Any] | None = None) -> None:
        self.train, self.valid, self.test = digits()
        self.model = nn.Linear(128, 10)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.optimizer = torch.optim.Adagrad(self.model.parameters(), lr=0.2)
        self.generator = torch.Generator().manual_seed(0)
        features = {"l1": L1(0.01, smoothing=3e-3), "l2": SquaredL2(0.01), "dropout": DropoutLoss()}
        self.loss = TunedLoss(F.cross_entropy, features)
        self.tuner = TuneLoss(BOX, window=1, start=start)

    def epoch(self, values: dict[str, Any]) -> None:
        self.loss.set(values)
        for rows in torch.randperm(100, generator=self.generator).split(25):
            x, y = self.train[0][rows], self.train[1][rows]
            self.optimizer.zero_grad()
            self.loss.sampled(self.model, x, y, generator=self.generator).backward()
            self.optimizer.step()

    def round(self) -> dict[str, Any]:
        values = self.tuner.ask()
        self.epoch(values)
        self.tuner.tell(values, measure(self.model, self.loss, values, self.train, self.valid))
        return values

    def tested(self) -> float:
        with torch.no_grad():
            return F.cross_entropy(self.model(self.test[0]), self.test[1]).item()

    def state(self) -> dict[str, Any]:
        tuner = json.loads(json.dumps(self.tuner.state_dict(), default=lambda a: a.tolist()))
        whole = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.generator.get_state(),
        }
        return {**copy.deepcopy(whole), "tuner": tuner}

    def resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["random"])
        self.tuner.load_state_dict(state["tuner"])


@pytest.mark.parametrize("end", [0, 1])
def test_one_run_finds_its_way_from_a_corner(end: int) -> None:
    """From where the model overfits, and from where it hardly fits, against the training that stays there."""
    epochs = 20
    start = {name: bounds[end] for name, bounds in BOX.items()}
    stays, online = Training(start), Training(start)
    asked = []
    for _ in range(epochs):
        stays.epoch(start)
        asked.append(online.round())
    assert online.tested() < stays.tested() - 0.05, (online.tested(), stays.tested())
    box = Box.of("test", BOX)
    unit = np.array([box.unit(box.entries(values)) for values in asked])
    np.testing.assert_allclose(unit[0], end)
    steps = np.abs(np.diff(unit, axis=0)).max(1)
    assert steps.max() > 0.1 and (steps > 1e-4).sum() > epochs / 2
    assert online.tuner.best is not None and len(online.tuner.trials) == 1


def test_resumes_to_the_same_bits() -> None:
    whole, first, second = Training(), Training(), Training()
    expected = [whole.round() for _ in range(5)]
    found = [first.round() for _ in range(2)]
    second.resume(first.state())
    found += [second.round() for _ in range(3)]
    assert found == expected
    assert torch.equal(second.model.weight, whole.model.weight)


def test_a_window_of_one_goes_on_from_the_last_round() -> None:
    """However much worse it was than those before; they were of another model."""
    tuner = TuneLoss({"a": (0.0, 1.0)}, window=1, start={"a": 0.5})
    up, down = (Measurement(0.0, slope=np.array([s]), curvature=np.zeros((1, 1))) for s in (-1.0, 1.0))

    def told(error: float, like: Measurement) -> float:
        values = tuner.ask()
        tuner.tell(values, Measurement(error, slope=like.slope, curvature=like.curvature))
        return float(values["a"])

    assert told(1.0, up) == 0.5
    assert told(2.0, down) == 0.85
    # A quarter of the step that failed, from where that one led to.
    assert tuner.ask()["a"] == 0.85 - 0.35 / 4
    assert tuner.best is not None and tuner.best.values["a"] == 0.5
    told(1.5, down)  # better than the round before
    assert abs(tuner.radius - 1.5 * 0.35 / 4) < 1e-12
