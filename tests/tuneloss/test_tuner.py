"""TuneLoss by ask and tell: its region, its state, what it is told, and what it finds."""

from __future__ import annotations

import copy
import json
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lossmeta.tuneloss import (
    L1,
    DropoutLoss,
    Measurement,
    SquaredL2,
    TunedLoss,
    TuneLoss,
    UniformLabelLoss,
    measure,
)
from lossmeta.tuneloss._box import Array, Box

BOUNDS = {"a": (0.01, 10.0), "b": (0.0, 1.0)}
GROUPS = {"a": (0.01, 10.0), "b": (np.full(3, 0.1), np.full(3, 10.0))}


class Bowl:
    """An error that is quadratic in the entries, with what a measurement would say of it."""

    def __init__(self, aim: Any, curvature: Any) -> None:
        self.aim, self.curvature = np.asarray(aim, float), np.asarray(curvature, float)

    def __call__(self, entries: Array) -> Measurement:
        d = entries - self.aim
        k = len(d)
        return Measurement(
            float(1 + d @ self.curvature @ d / 2),
            features=np.ones(1 + k),
            slope=self.curvature @ d,
            curvature=self.curvature,
        )


def run(tuner: TuneLoss, bowl: Bowl, count: int) -> list[Array]:
    asked = []
    for _ in range(count):
        values = tuner.ask()
        asked.append(tuner.box.entries(values))
        tuner.tell(values, bowl(asked[-1]))
    return asked


def test_a_quadratic_is_solved_as_soon_as_the_region_holds_its_least_point() -> None:
    tuner = TuneLoss(BOUNDS)
    assert tuner.ask() == pytest.approx({"a": np.sqrt(0.1), "b": 0.5})
    assert tuner.best is None
    asked = run(tuner, Bowl([0.9, 0.3], [[2.0, 0.3], [0.3, 1.0]]), 3)
    np.testing.assert_allclose(asked[1], [0.9, 0.3], rtol=1e-6)
    assert tuner.best is not None and tuner.best.measurement.error == pytest.approx(1)
    # A far one takes steps as long as the region lets it.
    tuner = TuneLoss(BOUNDS, start={"a": 0.02, "b": 0.5})
    asked = run(tuner, Bowl([9.0, 0.5], np.eye(2)), 3)
    units = [tuner.box.unit(e)[0] for e in asked]
    assert units[1] - units[0] == pytest.approx(0.35) and units[2] - units[1] == pytest.approx(0.35 * 1.5)


def test_asking_twice_is_asking_once() -> None:
    tuner = TuneLoss(GROUPS)
    for _ in range(3):
        a, b = tuner.ask(), tuner.ask()
        assert a["a"] == b["a"] and np.array_equal(a["b"], b["b"]) and a["b"].dtype == np.float64
        a["b"][:] = 7  # what is given away is a copy
        assert np.array_equal(tuner.ask()["b"], b["b"])
        tuner.tell(b, Bowl([1, 2, 3, 4], np.eye(4))(tuner.box.entries(b)))


def test_region() -> None:
    tuner = TuneLoss(BOUNDS)
    box = tuner.box
    slope = Measurement(1.0, slope=np.array([-1.0, 0.0]), curvature=np.zeros((2, 2)))

    def at(u: float, error: float) -> None:
        tuner.tell(
            box.named(box.at(np.array([u, 0.5]))),
            Measurement(error, slope=slope.slope, curvature=slope.curvature),
        )

    at(0.5, 1.0)
    assert tuner.radius == 0.35
    at(0.7, 0.9)
    assert tuner.radius == pytest.approx(0.525)
    at(0.9, 0.95)  # worse by a step of 0.2
    assert tuner.radius == pytest.approx(0.05)
    assert box.unit(box.entries(tuner.ask()))[0] == pytest.approx(0.75)
    at(0.75, 0.9)  # no better either
    assert tuner.radius == pytest.approx(0.0125)
    at(0.1, 2.0)  # outside of the region: says nothing of it
    assert tuner.radius == pytest.approx(0.0125)
    at(0.7, 0.9)  # the same once more
    assert tuner.radius == pytest.approx(0.0125)
    at(0.71, float("nan"))
    assert tuner.radius == 0.003 and tuner.failed == 1
    at(0.0, 0.5)  # better, from outside of the region
    assert tuner.radius == 0.003 and tuner.best is not None and tuner.best.values["a"] == 0.01
    tuner.radius = 0.9
    at(0.3, 0.4)
    assert tuner.radius == 1.0


def test_models_that_exist_already() -> None:
    """Told before anything is asked, the best one is where the search starts."""
    tuner = TuneLoss(BOUNDS)
    bowl = Bowl([2.0, 0.9], np.eye(2))
    for values in ({"a": 0.05, "b": 0.1}, {"b": 0.6, "a": 1.0}, {"a": 1.0, "b": 0.2}):
        tuner.tell(values, bowl(tuner.box.entries(values)))
    assert tuner.best is not None and tuner.best.values == {"a": 1.0, "b": 0.6}
    step = np.abs(tuner.box.unit(tuner.box.entries(tuner.ask())) - tuner.box.unit(np.array([1.0, 0.6]))).max()
    assert 0 < step <= tuner.radius + 1e-9


def test_failures_never_become_best() -> None:
    tuner = TuneLoss(GROUPS)
    seen = []
    for error in (
        float("nan"),
        Measurement(float("inf")),
        float("-inf"),
        Measurement(0.1, slope=np.full(4, np.nan)),
    ):
        values = tuner.ask()
        assert all(not np.array_equal(values["b"], s) for s in seen)  # somewhere else
        assert len(set(tuner.box.unit(tuner.box.entries(values))[1:].round(9))) == 1
        seen.append(values["b"])
        tuner.tell(values, error)
    assert tuner.best is None and tuner.failed == 4 and tuner.trials == []
    values = tuner.ask()
    tuner.tell(values, Bowl([1, 2, 3, 4], np.eye(4))(tuner.box.entries(values)))
    assert tuner.best is not None
    # A failed step counts as one: half as far is asked next.
    far = tuner.ask()
    tuner.tell(far, float("nan"))
    near = tuner.ask()
    start = tuner.box.unit(tuner.box.entries(values))
    steps = [np.abs(tuner.box.unit(tuner.box.entries(v)) - start).max() for v in (far, near)]
    assert steps[1] == pytest.approx(steps[0] / 4)


def test_window() -> None:
    tuner = TuneLoss(BOUNDS, window=2)
    bowl = Bowl([1.0, 0.5], np.eye(2))
    for a in (1.0, 3.0, 4.0):
        tuner.tell({"a": a, "b": 0.5}, bowl(np.array([a, 0.5])))
    assert tuner.best is not None and tuner.best.values["a"] == 1.0  # of all
    assert [t.values["a"] for t in tuner.trials] == [3.0, 4.0]
    assert tuner.ask()["a"] < 3


# ---- Resumption.


def test_resumes_to_the_same_bits() -> None:
    bowl = Bowl([0.9, 3, 4, 1], np.diag([1.0, 2, 3, 4]) + 0.2)
    whole = TuneLoss(GROUPS)
    expected = run(whole, bowl, 8)
    tuner = TuneLoss(GROUPS)
    found = []
    for i in range(8):
        values = tuner.ask()
        state = (
            json.loads(json.dumps(tuner.state_dict(), default=lambda a: a.tolist()))
            if i % 2
            else tuner.state_dict()
        )
        state = copy.deepcopy(state)
        tuner = TuneLoss(GROUPS)  # killed while the model trains
        tuner.load_state_dict(state)
        assert tuner.ask()["a"] == values["a"]
        found.append(tuner.box.entries(values))
        tuner.tell(values, bowl(found[-1]) if i != 3 else float("nan"))
        if i == 3:
            tuner = TuneLoss(GROUPS)
            tuner.load_state_dict(state)
            tuner.tell(values, bowl(found[-1]))
    np.testing.assert_array_equal(found, expected)
    assert tuner.state_dict()["radius"] == whole.state_dict()["radius"]
    assert tuner.best is not None and whole.best is not None
    assert tuner.best.measurement.error == whole.best.measurement.error


def test_state_is_plain() -> None:
    tuner = TuneLoss(GROUPS)
    run(tuner, Bowl([0.9, 3, 4, 1], np.eye(4)), 2)
    tuner.tell(tuner.ask(), float("nan"))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for v in value:
                check(v)
        else:
            assert value is None or isinstance(value, (bool, int, float, str, np.ndarray)), value

    check(tuner.state_dict())
    again = TuneLoss(GROUPS)
    again.load_state_dict(tuner.state_dict())
    assert again.failed == 1 and len(again.trials) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("trials"), "state must be what state_dict gave, got one without 'trials'"),
        (lambda s: s.update(method="paper"), "state must be of the same bounds and method"),
        (lambda s: s["upper"].__setitem__(0, 3.0), "state must be of the same bounds and method"),
        (lambda s: s.update(names={"b": 3, "a": None}), "state must be of the same bounds and method"),
        (lambda s: s.update(radius=7.0), r"radius of the state must lie in \[0.003, 1\], got 7.0"),
        (lambda s: s["trials"][0]["measurement"].pop("slope"), "measurement must have slope and curvature"),
        (lambda s: s["trials"][0]["measurement"].update(more=1), "state must be what state_dict gave"),
        (lambda s: s["trials"][0]["values"].update(a=99.0), "value of 'a' must lie in"),
    ],
)
def test_states_that_are_refused_change_nothing(change: Any, message: str) -> None:
    tuner, other = TuneLoss(GROUPS), TuneLoss(GROUPS)
    run(tuner, Bowl([0.9, 3, 4, 1], np.eye(4)), 2)
    run(other, Bowl([1.9, 1, 4, 1], np.eye(4)), 1)
    state, before = copy.deepcopy(tuner.state_dict()), other.ask()
    change(state)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert len(other.trials) == 1 and np.array_equal(other.ask()["b"], before["b"])


# ---- What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, "TuneLoss: method must be one of 'gauss_newton', 'paper', got 'newton'"),
        ({"radius": 0.0}, "TuneLoss: radius must be positive and finite, got 0.0"),
        ({"radius": 1.5}, "TuneLoss: radius must be at most 1, got 1.5"),
        ({"growth": 0.5}, "TuneLoss: growth must be at least 1 and finite, got 0.5"),
        ({"shrinkage": -1.0}, "TuneLoss: shrinkage must be at least 0 and finite, got -1.0"),
        ({"window": 0}, "TuneLoss: window must be at least 1, got 0"),
        ({"start": {"a": 1.0}}, "TuneLoss: values must be of a, b, got a"),
        ({"start": {"a": 1.0, "b": 2.0}}, r"TuneLoss: value of 'b' must lie in \[0, 1\], got 2"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneLoss(BOUNDS, **options)


GOOD: dict[str, Any] = {"error": 0.5, "slope": np.ones(2), "curvature": np.eye(2)}


@pytest.mark.parametrize(
    ("values", "measurement", "error", "message"),
    [
        ({"a": 1.0}, Measurement(**GOOD), ValueError, "values must be of a, b, got a"),
        ({"a": 1.0, "b": 2.0}, Measurement(**GOOD), ValueError, "value of 'b' must lie in"),
        (
            None,
            0.5,
            ValueError,
            "must have slope and curvature for method='gauss_newton', got one without slope and",
        ),
        (
            None,
            Measurement(0.5, slope=np.ones(2)),
            ValueError,
            "got one without curvature; measure the model with",
        ),
        (
            None,
            Measurement(**{**GOOD, "slope": np.ones(3)}),
            ValueError,
            r"slope of the measurement must have shape \[2\]",
        ),
        (
            None,
            Measurement(**GOOD, gram=np.eye(3)),
            ValueError,
            r"gram of the measurement must have shape \[4, 4\]",
        ),
        (
            None,
            Measurement(**GOOD, names=("b", "a")),
            ValueError,
            "must have the parameters a, b, in that order, got b, a",
        ),
        (None, "good", TypeError, "measurement must be a Measurement or a number, got str"),
    ],
)
def test_what_is_refused_changes_nothing(
    values: Any, measurement: Any, error: type[Exception], message: str
) -> None:
    tuner = TuneLoss(BOUNDS)
    before = tuner.ask()
    with pytest.raises(error, match=message):
        tuner.tell(values or before, measurement)
    assert tuner.trials == [] and tuner.failed == 0 and tuner.ask() == before


# ---- The paper's method.


class Learned:
    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)


def test_what_the_papers_method_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def learn_loss(errors: Any, features: Any, lower: Any, upper: Any, **options: Any) -> Learned:
        calls.append({"errors": errors, "features": features, "lower": lower, "upper": upper, **options})
        return Learned([1.0, 2.0, 0.25])

    module = types.ModuleType("lossmeta.tuneloss.learn_loss")
    module.learn_loss = learn_loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lossmeta.tuneloss.learn_loss", module)
    tuner = TuneLoss(BOUNDS, method="paper", eps=0.5, window=2)
    assert tuner.ask()["b"] == 0.5 and not calls
    grams = [np.eye(4) * (i + 1) for i in range(3)]
    for i in range(3):
        tuner.tell(tuner.ask(), Measurement(0.5 - 0.1 * i, np.array([1.0, 2.0, 3.0]) + i, grams[i]))
    assert tuner.ask() == {"a": 2.0, "b": 0.25}
    call = calls[-1]
    np.testing.assert_allclose(call["errors"], [0.4, 0.3])
    np.testing.assert_array_equal(call["features"], [[2, 3, 4], [3, 4, 5]])
    np.testing.assert_array_equal(call["lower"], [1, 0.01, 0])
    np.testing.assert_array_equal(call["upper"], [1, 10, 1])
    np.testing.assert_array_equal(call["grams"], grams[1:])
    assert call["eps"] == 0.5 and call["solver"] == "auto"
    # Without all Gram matrices there are no gradients.
    tuner.tell(tuner.ask(), Measurement(0.2, np.ones(3)))
    tuner.ask()
    assert calls[-1]["grams"] is None
    with pytest.raises(ValueError, match="must have features for method='paper', got one without features"):
        tuner.tell(tuner.ask(), 0.3)
    tuner.tell(tuner.ask(), float("nan"))
    assert tuner.failed == 1


@pytest.mark.parametrize("gradients", [True, False])
def test_the_papers_method(gradients: bool) -> None:
    """With learn_loss itself, from models of the real thing."""
    train, valid, _ = digits(0)
    loss = tuned(200)
    tuner = TuneLoss(FOUR, method="paper")
    for i in range(3):
        values = tuner.ask() if i else {"l1": 0.1, "uniform": 0.02, "dropout": 0.9, "l2": 0.05}
        tuner.box.entries(values)
        loss.set(values)
        model = nn.Linear(64, 10, dtype=torch.float64)
        fit(model, loss, train, 60)
        found = measure(model, loss, values, train, valid, metric="gram")
        tuner.tell(values, found if gradients else Measurement(found.error, found.features))
    assert tuner.best is not None and len(tuner.trials) == 3
    asked = tuner.ask()
    assert list(asked) == list(FOUR)
    again = TuneLoss(FOUR, method="paper")
    again.load_state_dict(tuner.state_dict())
    assert again.ask() == asked


# ---- What it finds.

FOUR = {"l1": (0.01, 10.0), "uniform": (0.0, 0.1), "dropout": (0.0, 1.0), "l2": (0.01, 10.0)}
Pair = tuple[Tensor, Tensor]


def tuned(n: int) -> TunedLoss:
    return TunedLoss(
        F.cross_entropy,
        {
            "l1": L1(1 / n, smoothing=3e-3),
            "uniform": UniformLabelLoss(),
            "dropout": DropoutLoss(masks=2),
            "l2": SquaredL2(1 / n),
        },
    )


def digits(seed: int) -> list[Pair]:
    """200 to train, 200 to validate, and the others."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    inputs, labels = torch.from_numpy(x[order] / 4), torch.from_numpy(y[order])
    inputs = inputs - inputs[:200].mean(0)
    return [(inputs[s], labels[s]) for s in (slice(0, 200), slice(200, 400), slice(400, None))]


def fit(model: nn.Module, loss: TunedLoss, data: Pair, steps: int = 150) -> None:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        history_size=20,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, *data)
        value.backward()
        return value

    optimizer.step(closure)


def test_three_runs_beat_random_search() -> None:
    """Digits, four parameters: three runs against the best of eight random ones."""
    train, valid, test = digits(0)
    loss, tuner = tuned(200), TuneLoss(FOUR)
    box = Box.of("X", FOUR)
    model = nn.Linear(64, 10, dtype=torch.float64)

    def errors() -> tuple[float, float]:
        found = [F.cross_entropy(model(x), y).item() for x, y in (valid, test)]
        return found[0], found[1]

    ours, random = [], []
    for _ in range(3):
        values = tuner.ask()
        loss.set(values)
        fit(model, loss, train)  # from where the last one ended
        found = measure(model, loss, values, train, valid)
        ours.append(errors())
        assert found.error == pytest.approx(ours[-1][0])
        tuner.tell(values, found)
    assert tuner.best is not None and tuner.best.measurement.error == pytest.approx(min(ours)[0])
    for point in np.random.default_rng(0).random((8, 4)):
        loss.set(box.named(box.at(point)))
        fit(model, loss, train)
        random.append(errors())
    assert min(ours)[1] < 0.27  # nats; 0.22 to 0.24 as measured
    assert min(ours)[1] < min(random)[1] - 0.02, (ours, random)


def test_hundreds_of_parameters() -> None:
    """One per input, half of which are those of another image: these are to be shrunk, the others not."""
    train, valid, test = digits(1)
    generator = torch.Generator().manual_seed(0)

    def with_junk(data: Pair) -> Pair:
        x, y = data
        return torch.cat([x, x[torch.randperm(len(x), generator=generator)]], 1), y

    train, valid, test = with_junk(train), with_junk(valid), with_junk(test)
    loss = tuned(200)
    loss.features["l2"] = SquaredL2(1 / 200, by="input")
    tuner = TuneLoss({**FOUR, "l2": (np.full(128, 0.01), np.full(128, 10.0))})
    model = nn.Linear(128, 10, dtype=torch.float64)
    errors = []
    for _ in range(3):
        values = tuner.ask()
        loss.set(values)
        fit(model, loss, train)
        found = measure(model, loss, values, train, valid)
        tuner.tell(values, found)
        errors.append((found.error, F.cross_entropy(model(test[0]), test[1]).item()))
    assert tuner.best is not None
    size = np.log(tuner.best.values["l2"])
    assert size[64:].mean() > size[:64].mean() + 0.5
    assert min(errors)[1] < errors[0][1] - 0.05  # nats, against the middle of the box
