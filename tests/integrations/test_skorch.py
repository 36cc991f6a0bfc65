"""Nets of skorch whose criterion is a loss of lossmeta."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam

skorch = pytest.importorskip("skorch", reason="needs skorch")

from sklearn.base import clone  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from skorch.callbacks import EarlyStopping, EpochScoring, GradientNormClipping, LRScheduler  # noqa: E402

from lossmeta.adalfl import OnlineLearner  # noqa: E402
from lossmeta.integrations.skorch import OnlineClassifier, OnlineRegressor  # noqa: E402
from lossmeta.losses import LossNetwork, ParametricCrossEntropy, TaylorLoss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:AdaLFL. the first step")

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(48, 6)).astype("float32")
Y = RANDOM.integers(3, size=48)


class Model(nn.Module):
    def __init__(self, width: int = 8, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, outputs))

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Network(LossNetwork):
    def __init__(self, hidden: int = 8, **options: Any) -> None:
        torch.manual_seed(1)
        super().__init__(hidden, **options)


def classifier(**options: Any) -> OnlineClassifier:
    defaults: Any = {
        **({} if "criterion" in options else {"criterion": Network, "criterion__residual": "cross_entropy"}),
        "meta_lr": 1e-2,
        "optimizer__momentum": 0.9,
        "lr": 0.1,
        "batch_size": 8,
        "max_epochs": 3,
        "train_split": None,
        "verbose": 0,
    }
    return OnlineClassifier(Model, **{**defaults, **options})


def by_hand(epochs: int = 3, **options: Any) -> tuple[Model, nn.Module]:
    model, loss = Model(), Network(residual="cross_entropy")
    one = OnlineLearner(
        model,
        SGD(model.parameters(), 0.1, momentum=0.9),
        loss,
        F.cross_entropy,
        meta_optimizer=Adam(loss.parameters(), lr=1e-2),
        **options,
    )
    for _ in range(epochs):
        for i in range(0, 48, 8):
            one.step((torch.tensor(X[i : i + 8]), torch.tensor(Y[i : i + 8])))
    return model, loss


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_trains_as_a_loop_does() -> None:
    net = classifier().fit(X, Y)
    model, loss = by_hand()
    assert net.learner_.steps == 18
    assert equal(net.module_, model)
    assert equal(net.criterion_, loss)
    assert not equal(net.module_, Model())
    owned = {p for group in net.optimizer_.param_groups for p in group["params"]}
    assert owned == set(net.module_.parameters())


def test_options_reach_the_learner() -> None:
    net = classifier(learner__clip_norm=0.05, learner__meta_every=2).fit(X, Y)
    model, loss = by_hand(clip_norm=0.05, meta_every=2)
    assert equal(net.module_, model)
    assert equal(net.criterion_, loss)
    net.set_params(learner__meta_every=3)
    assert net.learner_.meta_every == 3


@pytest.mark.parametrize(
    ("options", "nonlinearity"),
    [
        ({}, lambda f: f.softmax(1)),
        ({"criterion": TaylorLoss}, lambda f: f.softmax(1)),
        ({"criterion": ParametricCrossEntropy, "criterion__num_classes": 3}, lambda f: f.softmax(1)),
        ({"predict_nonlinearity": None}, lambda f: f),
        ({"criterion": nn.CrossEntropyLoss}, lambda f: f.softmax(1)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*were drawn")
def test_probabilities(options: Any, nonlinearity: Any) -> None:
    net = classifier(**options).fit(X, Y)
    expected = nonlinearity(net.module_(torch.tensor(X))).detach().numpy()
    np.testing.assert_allclose(net.predict_proba(X), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(net.predict(X), expected.argmax(1))


def test_a_loss_without_parameters_to_learn_is_minimised() -> None:
    net = OnlineClassifier(
        Model,
        criterion=ParametricCrossEntropy(3),
        lr=0.1,
        batch_size=48,
        max_epochs=1,
        train_split=None,
        verbose=0,
    ).fit(X, Y)
    assert net.learner_ is None
    model = Model()
    optimizer = SGD(model.parameters(), 0.1)
    ParametricCrossEntropy(3)(model(torch.tensor(X)), torch.tensor(Y)).backward()
    optimizer.step()
    assert equal(net.module_, model)


def test_several_labels() -> None:
    several = RANDOM.integers(2, size=(48, 3)).astype("float32")
    net = classifier(
        criterion__link="sigmoid",
        criterion__residual="binary_cross_entropy",
        task_loss=F.binary_cross_entropy_with_logits,
        max_epochs=30,
    ).fit(X, several)
    probabilities = net.predict_proba(X)
    np.testing.assert_allclose(
        probabilities, net.module_(torch.tensor(X)).sigmoid().detach().numpy(), rtol=1e-5
    )
    np.testing.assert_array_equal(net.predict(X), probabilities > 0.5)
    assert (net.predict(X) == several).mean() > 0.6


def test_regression() -> None:
    target = (X @ RANDOM.normal(size=(6, 1))).astype("float32")
    net = OnlineRegressor(
        Model,
        module__outputs=1,
        criterion=Network,
        criterion__link="identity",
        criterion__residual="squared_error",
        lr=0.05,
        max_epochs=60,
        batch_size=16,
        verbose=0,
    ).fit(X, target)
    assert net.score(X, target) > 0.5
    assert net.learner_.skipped == 0


# ---- What sklearn and skorch do with a net.


def test_clone_and_search() -> None:
    net = classifier(learner__meta_every=2)
    assert clone(net).get_params()["learner__meta_every"] == 2
    search = GridSearchCV(
        net, {"meta_lr": [1e-4, 1e-2], "lr": [0.1], "learner__meta_every": [1, 2]}, cv=2, scoring="accuracy"
    )
    search.fit(X, Y)
    assert search.best_estimator_.learner_.meta_every == search.best_params_["learner__meta_every"]


def test_goes_on_after_pickling() -> None:
    whole = classifier().fit(X, Y)
    whole.partial_fit(X, Y)
    half = classifier().fit(X, Y)
    other = pickle.loads(pickle.dumps(half))
    assert half.learner_ is not None
    assert other.learner_.steps == 18
    other.partial_fit(X, Y)
    assert equal(other.module_, whole.module_)
    assert equal(other.criterion_, whole.criterion_)


def test_parameters_are_saved(tmp_path: Path) -> None:
    whole = classifier().fit(X, Y)
    names = {f"f_{name}": str(tmp_path / name) for name in ("params", "optimizer", "criterion", "learner")}
    whole.save_params(**names)
    other = classifier().initialize()
    other.load_params(**names)
    assert other.learner_.steps == 18
    for net in (whole, other):
        net.partial_fit(X, Y)
    assert equal(other.module_, whole.module_)
    assert equal(other.criterion_, whole.criterion_)


def test_validation_is_by_the_task_loss() -> None:
    net = classifier(train_split=skorch.dataset.ValidSplit(4), max_epochs=2).fit(X, Y)
    _, valid = net.get_split_datasets(X, Y)
    x, y = (torch.tensor(np.stack(t)) for t in zip(*(valid[i] for i in range(len(valid))), strict=True))
    expected = F.cross_entropy(net.module_(x), y).item()
    assert net.history[-1, "valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_callbacks() -> None:
    net = classifier(
        train_split=skorch.dataset.ValidSplit(4),
        callbacks=[
            EpochScoring("accuracy", on_train=True, name="train_acc"),
            LRScheduler("StepLR", step_size=1, gamma=0.5),
            EarlyStopping(patience=2),
        ],
    ).fit(X, Y)
    assert net.optimizer_.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert 0 <= net.history[-1, "train_acc"] <= 1


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, a: Any, b: Any) -> Any:
            return self.model(torch.cat([a, b], 1))

    net = classifier()
    net.set_params(module=Two)
    net.fit({"a": X[:, :2], "b": X[:, 2:]}, Y)
    assert equal(net.module_.model, by_hand()[0])


# ---- What is refused.


def test_refuses_what_cannot_be_right() -> None:
    with pytest.raises(ValueError, match=r"callbacks must not wait for gradients.*'clip'; to clip them"):
        classifier(callbacks=[("clip", GradientNormClipping(1.0))]).fit(X, Y)

    class Penalised(OnlineClassifier):
        def get_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().get_loss(*args, **kwargs)

    options = {"criterion": Network, "criterion__residual": "cross_entropy", "verbose": 0}
    with pytest.raises(
        ValueError, match="steps do not call get_loss, got one of Penalised; override train_step"
    ):
        Penalised(Model, **options).fit(X, Y)
    with pytest.raises(ValueError, match="keep_gradients must be False"):
        classifier(learner__keep_gradients=True).fit(X, Y)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        classifier(learner__nonsense=1).fit(X, Y)
    with pytest.raises(ValueError, match="X must be a dict where fit has further parameters"):
        classifier().fit(X, Y, sample_weight=np.ones(48))


def test_example_runs(run_example: Callable[[str], str]) -> None:
    printed = run_example("skorch_online_loss.py")
    assert float(printed.split("190 steps: ")[1].split()[0]) > 0.85
