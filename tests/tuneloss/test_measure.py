"""What a trained model says of its loss."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lossmeta.tuneloss import (
    L1,
    DropoutLoss,
    Measurement,
    SquaredL2,
    TunedLoss,
    UniformLabelLoss,
    measure,
)

Pair = tuple[Tensor, Tensor]
VALUES = {"l1": 0.3, "uniform": 0.05, "dropout": 0.5, "l2": 0.3}


def tuned(n: int, by: str = "all") -> TunedLoss:
    return TunedLoss(
        F.cross_entropy,
        {
            "l1": L1(1 / n, smoothing=0.02),
            "uniform": UniformLabelLoss(),
            "dropout": DropoutLoss(),
            "l2": SquaredL2(1 / n, by=by),
        },
    )


def some(n: int, dtype: torch.dtype = torch.float64) -> Pair:
    return torch.randn(n, 6, dtype=dtype), torch.randint(3, (n,))


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Linear(6, 3, dtype=dtype)


def fit(model: nn.Module, loss: TunedLoss, data: Pair, steps: int = 2000) -> None:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=1e-8,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, *data)
        value.backward()
        return value

    optimizer.step(closure)
    model.zero_grad()


# ---- Against retraining.


@pytest.fixture(scope="module")
def digits() -> tuple[Pair, Pair]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:200]
    inputs, labels = torch.from_numpy(x[order] / 4), torch.from_numpy(y[order])
    inputs = inputs - inputs[:100].mean(0)
    return (inputs[:100], labels[:100]), (inputs[100:], labels[100:])


@pytest.fixture(scope="module")
def trained(digits: tuple[Pair, Pair]) -> nn.Module:
    model = nn.Linear(64, 10, dtype=torch.float64)
    loss = tuned(100)
    loss.set(VALUES)
    fit(model, loss, digits[0])
    fit(model, loss, digits[0])
    return model


@pytest.fixture(scope="module")
def retrained(digits: tuple[Pair, Pair], trained: nn.Module) -> list[float]:
    """Slopes by central differences of the validation error, each from two models trained to the end."""
    train, valid = digits
    slopes = []
    for name, value in VALUES.items():
        errors = []
        for sign in (1, -1):
            model, loss = copy.deepcopy(trained), tuned(100)
            loss.set({**VALUES, name: value + sign * 0.01 * value})
            fit(model, loss, train)
            errors.append(F.cross_entropy(model(valid[0]), valid[1]).item())
        slopes.append((errors[0] - errors[1]) / (0.02 * value))
    return slopes


@pytest.fixture(scope="module")
def solved(digits: tuple[Pair, Pair], trained: nn.Module) -> Measurement:
    return measure(trained, tuned(100), VALUES, *digits, metric="full", iterations=150, damping=0.0)


@pytest.mark.parametrize("metric", ["full", "hyper"])
def test_slope_is_that_of_the_retrained_model(
    metric: str, digits: tuple[Pair, Pair], trained: nn.Module, solved: Measurement, retrained: list[float]
) -> None:
    found = solved
    if metric != "full":
        found = measure(trained, tuned(100), VALUES, *digits, metric=metric, iterations=150, damping=0.0)
    np.testing.assert_allclose(found.slope, retrained, rtol=1e-3, atol=1e-5)


def test_few_iterations_are_near(digits: tuple[Pair, Pair], trained: nn.Module, solved: Measurement) -> None:
    exact = solved.slope
    for count in (5, 10):
        near = measure(trained, tuned(100), VALUES, *digits, iterations=count).slope
        assert exact is not None and near is not None
        cosine = near @ exact / np.linalg.norm(near) / np.linalg.norm(exact)
        assert cosine > 0.98 and 0.7 < np.linalg.norm(near) / np.linalg.norm(exact) < 1.4


# ---- Against dense algebra.


def dense(model: nn.Module, loss: TunedLoss, values: Any, train: Pair, valid: Pair) -> dict[str, Any]:
    """Everything by differentiating entry by entry."""
    weights = list(model.parameters())

    def flat(value: Tensor, create: bool = False) -> Tensor:
        found = torch.autograd.grad(value, weights, create_graph=create, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(found, weights, strict=True)
            ]
        )

    def hessian(value: Tensor) -> Tensor:
        return torch.stack([flat(g) for g in flat(value, True)])

    task, terms = loss.terms(model, *train)
    rows = [v for name in values for v in terms[name].reshape(-1)]
    error = loss.task_loss(model(valid[0]), valid[1])
    loss.set(values)
    return {
        "error": error.item(),
        "features": np.array([task.item(), *(v.item() for v in rows)]),
        "task": flat(task),
        "j": torch.stack([flat(v) for v in rows]),
        "g": flat(error),
        "h": hessian(loss(model, *train)),
        "hv": hessian(error),
    }


VECTOR = {"l1": 0.3, "uniform": 0.05, "dropout": 0.5, "l2": np.linspace(0.1, 1, 6)}


def test_full_and_hyper() -> None:
    model, train, valid, loss = linear(), some(40), some(30), tuned(40, "input")
    d = dense(model, loss, VECTOR, train, valid)
    r = torch.linalg.solve(d["h"], d["j"].T).T
    full = measure(model, loss, VECTOR, train, valid, metric="full", iterations=200, damping=0.0)
    assert full.error == pytest.approx(d["error"]) and full.names == tuple(VECTOR)
    np.testing.assert_allclose(full.features, d["features"])
    np.testing.assert_allclose(full.slope, -(r @ d["g"]), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(full.curvature, r @ d["hv"] @ r.T, rtol=1e-6, atol=1e-9)
    hyper = measure(model, loss, VECTOR, train, valid, metric="hyper", iterations=200, damping=0.0)
    np.testing.assert_allclose(hyper.slope, full.slope, rtol=1e-6, atol=1e-9)
    diagonal = measure(model, loss, VECTOR, train, valid, metric="diagonal", damping=0.0)
    assert hyper.curvature is not None and diagonal.slope is not None
    np.testing.assert_array_equal(hyper.curvature, diagonal.curvature)
    d_inverse = 1 / d["h"].diagonal()
    expected = ((d["j"] * d_inverse) @ d["j"].T).numpy()
    assert 0.5 < np.trace(hyper.curvature) / np.trace(expected) < 2
    near = -(d["j"] * d_inverse) @ d["g"]
    assert float(np.corrcoef(near, diagonal.slope)[0, 1]) > 0.9


def test_gram() -> None:
    model, train, valid, loss = linear(), some(20), some(10), tuned(20, "input")
    d = dense(model, loss, VECTOR, train, valid)
    rows = torch.cat([d["task"][None], d["j"], d["g"][None]])
    found = measure(model, loss, VECTOR, train, valid, metric="gram")
    np.testing.assert_allclose(found.gram, rows @ rows.T, rtol=1e-10, atol=1e-12)
    assert found.slope is None and found.curvature is None and found.features is not None


def test_damping_is_a_share_of_the_diagonal() -> None:
    model, train, valid, loss = linear(), some(40), some(30), tuned(40)
    d = dense(model, loss, VALUES, train, valid)
    found = measure(model, loss, VALUES, train, valid, iterations=100, damping=2.0)

    # How large D's mean is comes from random probes; the slope says what was added.
    def slope(shift: float) -> np.ndarray[Any, Any]:
        return -(torch.linalg.solve(d["h"] + shift * torch.eye(21), d["j"].T).T @ d["g"]).numpy()

    mean = d["h"].diagonal().mean().item()
    shifts = mean * np.linspace(1, 4, 3001)
    gap, best = min((float(np.abs(slope(s) - found.slope).max()), s) for s in shifts)
    assert gap < 1e-3 * np.abs(found.slope).max() and best == pytest.approx(2 * mean, rel=0.5)  # type: ignore[arg-type]


def test_auto() -> None:
    train, valid = some(20), some(10)
    few = measure(linear(), tuned(20), VALUES, train, valid)
    full = measure(linear(), tuned(20), VALUES, train, valid, metric="full")
    assert few.curvature is not None and full.curvature is not None
    model = nn.Linear(30, 3, dtype=torch.float64)
    train, valid = [(torch.randn(n, 30, dtype=torch.float64), torch.randint(3, (n,))) for n in (20, 10)]
    values = {**VALUES, "l2": np.full(30, 0.3)}
    many = [
        measure(model, tuned(20, "input"), values, train, valid, metric=m) for m in ("auto", "hyper", "full")
    ]
    assert np.array_equal(many[0].curvature, many[1].curvature)  # type: ignore[arg-type]
    assert not np.array_equal(many[0].curvature, many[2].curvature)  # type: ignore[arg-type]


# ---- Data.


@pytest.mark.parametrize("metric", ["full", "hyper", "gram"])
def test_batches_are_weighted_by_their_sizes(metric: str) -> None:
    model, (x, y), (xv, yv), loss = linear(), some(23), some(17), tuned(23, "tensor")
    loss.features["dropout"] = UniformLabelLoss()  # whose masks would not be the same
    values = {**VALUES, "l2": np.array([0.3])}
    options: Any = {"metric": metric, "iterations": 100, "damping": 0.0}
    whole = measure(model, loss, values, (x, y), (xv, yv), **options)
    parts = [(x[:10], y[:10]), (x[10:11], y[10:11]), (x[11:], y[11:])]
    loader: Any = DataLoader(TensorDataset(xv, yv), batch_size=5, shuffle=True)
    streamed = measure(model, loss, values, parts, loader, **options)
    assert streamed.error == pytest.approx(whole.error)
    np.testing.assert_allclose(streamed.features, whole.features)
    for name in ("slope", "gram"):
        if getattr(whole, name) is not None:
            np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-5, atol=1e-9)
    if metric == "full":
        np.testing.assert_allclose(streamed.curvature, whole.curvature, rtol=1e-5, atol=1e-9)


def test_random_features_are_the_same_in_every_pass() -> None:
    """Else the product is no symmetric matrix, and conjugate gradients end elsewhere."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, inputs: Tensor) -> Tensor:
            scale = 1 + 0.5 * torch.rand(1) + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
            return self.linear(inputs) * scale

    model, loss = Noisy(), tuned(20)
    loss.features["dropout"] = DropoutLoss(seed=None)
    data = [some(12), some(8)]
    torch.manual_seed(1)
    a = measure(model, loss, VALUES, data, data[::-1], iterations=40)
    b = measure(model, loss, VALUES, data, data[::-1], iterations=80)
    np.testing.assert_allclose(a.slope, b.slope, rtol=1e-6)


def test_other_tasks() -> None:
    x, y, xv, yv = torch.randn(30, 4), torch.randn(30, 2), torch.randn(20, 4), torch.randn(20, 2)
    model = nn.Linear(4, 2)
    loss = TunedLoss(F.mse_loss, {"l2": SquaredL2()})
    d = dense(model, loss, {"l2": 0.2}, (x, y), (xv, yv))
    found = measure(model, loss, {"l2": 0.2}, (x, y), (xv, yv), iterations=50, damping=0.0)
    expected = -(torch.linalg.solve(d["h"], d["j"].T).T @ d["g"])
    np.testing.assert_allclose(found.slope, expected, rtol=1e-3)


# ---- Models.


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    return {
        "batch norm": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
        "conv": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Dropout(0.5),
                nn.Flatten(),
                nn.Linear(16, 3),
            ),
            (1, 6, 6),
        ),
        "attention": (
            nn.Sequential(
                nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(30, 3)
            ),
            (5, 6),
        ),
    }[kind]


@pytest.mark.parametrize("kind", ["batch norm", "conv", "attention"])
@pytest.mark.parametrize("metric", ["full", "hyper", "diagonal", "gram"])
def test_deep_models_are_as_before(kind: str, metric: str) -> None:
    model, shape = network(kind)
    train, valid = [(torch.randn(n, *shape), torch.randint(3, (n,))) for n in (12, 8)]
    model[0].train()
    model[-1].eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    loss = tuned(12)
    loss.set({**VALUES, "l1": 0.7})
    with torch.no_grad():
        found = measure(model, loss, VALUES, train, valid, metric=metric, damping=1e-3)
    assert found.finite
    if metric == "full":
        assert found.curvature is not None and np.linalg.eigvalsh(found.curvature)[0] > -1e-6
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [m.training for m in model.modules()] == modes
    grads = [p.grad for p in model.parameters()]
    assert torch.equal(grads[0], torch.ones_like(grads[0])) and all(g is None for g in grads[1:])  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index] # noqa: NPY002
    assert loss.values is not None and loss.values["l1"] == 0.7
    again = measure(model, loss, VALUES, train, valid, metric=metric, damping=1e-3)
    for name, value in found.state_dict().items():
        assert np.array_equal(value, getattr(again, name)), name


def test_the_model_evaluates() -> None:
    model, shape = network("conv")
    train, valid = [(torch.randn(n, *shape), torch.randint(3, (n,))) for n in (12, 8)]
    found = measure(model, tuned(12), VALUES, train, valid)
    assert model.training
    model.eval()
    assert found.error == pytest.approx(F.cross_entropy(model(valid[0]), valid[1]).item(), rel=1e-6)
    assert found.features is not None
    assert found.features[0] == pytest.approx(F.cross_entropy(model(train[0]), train[1]).item(), rel=1e-6)


def test_as_before_when_something_raises() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()
            self.calls = 0
            self.fails_at = 10**9
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            torch.rand(1)
            if self.calls > self.fails_at:
                raise KeyboardInterrupt
            return self.linear(inputs)

    train, valid = [some(6), some(6)], [some(5), some(5)]
    model, loss = Failing(), tuned(12)
    expected = measure(model, loss, VALUES, train, valid, iterations=3)
    assert model.calls == 0 and model.seen == 0  # plain attributes and buffers come back
    for fails_at in (0, 1, 3, 6, 9, 13, 18, 23):
        model.fails_at = fails_at
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            measure(model, loss, VALUES, train, valid, iterations=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.seen == 0 and model.calls == 0 and model.training
        assert all(p.grad is None for p in model.parameters())
    model.fails_at = 10**9
    again = measure(model, loss, VALUES, train, valid, iterations=3)
    np.testing.assert_array_equal(again.slope, expected.slope)


def test_frozen_and_shared_parameters() -> None:
    """As if the frozen layer were part of the data, and the shared weight one parameter."""
    train, valid = some(30), some(20)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    values = {"l2": 0.3}
    loss = TunedLoss(F.cross_entropy, {"l2": SquaredL2()})
    found = measure(model, loss, values, train, valid)
    with torch.no_grad():
        inside = [(model[1](model[0](x)), y) for x, y in (train, valid)]
    alone = measure(model[2], loss, values, *inside)
    np.testing.assert_allclose(found.slope, alone.slope, rtol=1e-12)
    np.testing.assert_allclose(found.curvature, alone.curvature, rtol=1e-12)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.b(self.a(inputs).tanh())

    tied = Tied()
    d = dense(tied, loss, values, train, valid)
    exact = measure(tied, loss, values, train, valid, iterations=300, damping=1e-8, hessian="exact")
    if (torch.linalg.eigvalsh(d["h"]) > 0).all():
        expected = -(torch.linalg.solve(d["h"], d["j"].T).T @ d["g"])
        np.testing.assert_allclose(exact.slope, expected, rtol=1e-3)
    np.testing.assert_allclose(exact.features, d["features"])


def test_a_parameter_that_is_not_used() -> None:
    model = linear()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    train, valid = some(30), some(20)
    found = measure(model, tuned(30), VALUES, train, valid)
    bare = nn.Linear(6, 3, dtype=torch.float64)
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if n != "unused"})
    assert found.finite and found.error == measure(bare, tuned(30), VALUES, train, valid).error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, train, valid = linear(), some(40), some(30)
    expected = measure(model, tuned(40), VALUES, train, valid, iterations=5)
    model.to(dtype)
    train, valid = [(x.to(dtype), y) for x, y in (train, valid)]
    found = measure(model, tuned(40), VALUES, train, valid, iterations=5)
    assert found.slope is not None and found.slope.dtype == np.float64
    np.testing.assert_allclose(found.slope, expected.slope, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.curvature, expected.curvature, rtol=1e-3, atol=1e-4)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("metric", ["full", "hyper", "gram"])
def test_default_device_and_dtype_do_not_matter(metric: str, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    model, train, valid = linear(torch.float32), some(20, torch.float32), some(10, torch.float32)
    values = {**VALUES, "l2": np.full(6, 0.3)}
    expected = measure(model, tuned(20, "input"), values, train, valid, metric=metric)
    request.getfixturevalue("elsewhere")
    found = measure(model, tuned(20, "input"), values, train, valid, metric=metric)
    for name, value in expected.state_dict().items():
        assert np.array_equal(value, getattr(found, name)), name
    loss = tuned(20, "input")
    loss.set(values)
    assert loss(model, *train).dtype == torch.float32
    assert loss.sampled(model, *train, generator=torch.Generator("cpu")).dtype == torch.float32


# ---- What goes wrong.


def test_negative_curvature_raises_damping() -> None:
    def hill(model: nn.Module, batch: Any) -> Tensor:
        return -sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]

    model, train, valid = linear(), some(20), some(10)
    loss = TunedLoss(F.cross_entropy, {"hill": hill})
    with pytest.warns(UserWarning, match=r"damping was raised from 0.01 to"):
        found = measure(model, loss, {"hill": 0.5}, train, valid)
    assert found.finite
    assert measure(model, loss, {"hill": 0.0}, train, valid).finite  # no hill, no warning


def test_a_model_that_diverged_has_an_error_alone(recwarn: pytest.WarningsRecorder) -> None:
    model = linear()
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    found = measure(model, tuned(20), VALUES, some(20), some(10))
    assert np.isnan(found.error) and found.slope is None and found.features is None and not recwarn.list


def test_gradients_that_are_not_finite_leave_the_error() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        return (model.weight * 0).sqrt().sum()  # type: ignore[operator, union-attr]

    loss = TunedLoss(F.cross_entropy, {"a": broken})
    with pytest.warns(UserWarning, match="gradients must be finite"):
        found = measure(linear(), loss, {"a": 0.1}, some(20), some(10))
    assert np.isfinite(found.error) and found.slope is None


def refused(**change: Any) -> Measurement:
    arguments: dict[str, Any] = {
        "model": linear(),
        "loss": tuned(20),
        "values": VALUES,
        "train": some(20),
        "valid": some(10),
        **change,
    }
    return measure(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": F.relu}, TypeError, "measure: model must be a torch.nn.Module, got"),
        ({"loss": F.cross_entropy}, TypeError, "measure: loss must be a TunedLoss, got function"),
        ({"values": {"l1": 0.1}}, ValueError, "values must be of l1, uniform, dropout, l2, got l1"),
        (
            {"values": {**VALUES, "l2": np.ones(2)}},
            ValueError,
            r"feature 'l2' must have the shape of its value, \[2\]",
        ),
        ({"metric": "best"}, ValueError, "measure: metric must be one of 'auto', 'full'"),
        ({"hessian": "best"}, ValueError, "measure: hessian must be one of 'gauss_newton', 'exact'"),
        ({"iterations": 0}, ValueError, "measure: iterations must be at least 1, got 0"),
        ({"damping": -1.0}, ValueError, "measure: damping must be at least 0 and finite, got -1.0"),
        ({"damping": float("nan")}, ValueError, "measure: damping must be at least 0 and finite, got nan"),
        (
            {"model": nn.Linear(6, 3).requires_grad_(False)},
            ValueError,
            "must have a trainable parameter, got none",
        ),
        ({"train": iter([some(3)])}, ValueError, "train must start again where it ends, got an iterator"),
        ({"train": []}, ValueError, "train must hold at least one batch, got none"),
        ({"train": 3}, TypeError, r"train must be a batch \(inputs, target\) or batches, got int"),
        ({"valid": (torch.ones(2),)}, TypeError, r"valid must be a pair \(inputs, target\), got tuple of 1"),
        ({"valid": some(0)}, ValueError, "valid must hold at least one sample"),
        ({"valid": range(0)}, ValueError, "valid must hold at least one batch each time"),
        ({"valid": range(2)}, TypeError, "a batch of valid must be a pair"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refused(**change)
