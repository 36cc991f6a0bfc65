"""Metrics, statistics, models and options that are no use to a controller."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from controllers import Told, equal, made, network, run
from torch import Tensor, nn
from toy_problem import CLASSES, data, margin

from lossmeta.ala import (
    ClassCorrelation,
    DistanceMixture,
    FocalWeighting,
    LearningRate,
    LossSpace,
    Parameter,
    Policy,
    Robust,
)
from lossmeta.metrics import ErrorRate

# ---- Metrics that are no use.


def test_a_metric_that_is_not_finite() -> None:
    controller = made(metric=Told(1, float("nan"), float("inf"), 2, 3, float("-inf")))
    model = network()
    run(controller, 1, model)
    values = controller.values
    with pytest.warns(
        UserWarning, match="the metric was not finite; there is no reward and no action"
    ) as said:
        reports = [controller.step(model) for _ in range(2)]
    assert len(said) == 1 and said[0].filename == __file__
    assert controller.skipped == 2 and equal(values, controller.values)
    assert controller.learner is not None and not controller.learner.memory
    assert all(r is not None and math.isnan(r.entropy) for r in reports)
    recovered, last = run(controller, 2, model)
    assert controller.skipped == 2 and controller.windows == 5
    assert last.reward is not None and last.reward.item() == 1 and len(controller.learner.memory) == 1
    baseline = controller.learner.baseline
    (lost,) = run(controller, 1, model)
    assert lost.reward is not None and lost.reward.isnan().all()
    assert len(controller.learner.memory) == 1 and controller.learner.baseline == baseline


def test_a_metric_that_is_not_finite_at_first() -> None:
    controller = made(metric=Told(float("nan"), 1, 2))
    first, second, third = run(controller, 3)
    assert first.reward is None and second.reward is None
    assert third.reward is not None and third.reward.item() == 1 and controller.skipped == 1


def test_a_model_that_diverges_is_skipped() -> None:
    for space in (ClassCorrelation(CLASSES), DistanceMixture(), FocalWeighting(), Robust()):
        controller, model = made(space), network()
        run(controller, 2, model)
        before = controller.values
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        run(controller, 2, model)
        assert controller.skipped == 2 and equal(before, controller.values)


def test_a_metric_that_never_changes() -> None:
    controller = made(metric=Told(0.5))
    model = network()
    with pytest.warns(UserWarning, match="the metric has not changed; the reward is 0") as said:
        reports = [controller.step(model) for _ in range(4)]
    assert len(said) == 1 and said[0].filename == __file__
    assert controller.ties == 3 and controller.skipped == 0
    assert [r.reward.item() for r in reports[1:] if r is not None and r.reward is not None] == [0, 0, 0]


def test_warnings_that_are_errors_change_nothing() -> None:
    controller = made(metric=Told(0.5), seed=2)
    run(controller, 1)
    before = controller.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has not changed"):
            controller.step(network())
    assert equal(before, controller.state_dict())


def test_whatever_raises_nothing_has_changed() -> None:
    class Stop(Exception):
        pass

    where = ""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            if where == "model":
                raise Stop
            return self.inner(x)

    def metric(prediction: Tensor, target: Tensor) -> Any:
        if where == "metric":
            raise Stop
        return prediction[0] if where == "no number" else margin(prediction, target)

    class Space(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            if where == "statistics":
                raise Stop
            found = super().statistics(prediction, target, values)
            return {"q": {"none": found["q"][:0], "more": found["q"][:, [0, 0, 0]]}.get(where, found["q"])}

    controller, reference = (made(Space(), metric, window=2, evaluations=2, seed=1) for _ in range(2))
    models = [Model(), Model()]
    for step in range(12):
        for where in ("model", "metric", "statistics", "no number", "none", "more"):
            if step % 2 == 0 and where in ("statistics", "none", "more"):
                continue  # they are looked at in the end
            if step == 1 and where == "more":
                continue  # it is not known yet what there is
            before = controller.state_dict()
            with pytest.raises((Stop, ValueError)):
                controller.step(models[0])
            assert controller.steps_done == step and equal(before, controller.state_dict())
            assert all(m.training for m in models[0].modules())
        where = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.step(models[0])
            reference.step(models[1])
    assert equal(controller.state_dict(), reference.state_dict()) and controller.windows == 6


def test_validation_data_that_ends() -> None:
    x, y = data(40, 1)
    controller = made(valid=iter([(x, y)]))
    run(controller, 1)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="valid must hold at least one batch each time it is gone through"):
        controller.step(network())
    assert equal(before, controller.state_dict())


def test_statistics_of_parameters_that_share_a_policy() -> None:
    class Space(LossSpace):
        parameters = (
            Parameter("a", 0.0, 1.0, -1, 1, policy="both"),
            Parameter("b", 0.0, 1.0, -1, 1, policy="both"),
        )

        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            return {"a": torch.zeros(1, 2), "b": torch.zeros(1, 3)}

    controller = made(Space())
    before = controller.state_dict()
    with pytest.raises(ValueError, match="'both' must have equally many statistics of an entry"):
        controller.step(network())
    assert equal(before, controller.state_dict())


@pytest.mark.parametrize("size", [1e18, 1e25, 1e38])
def test_statistics_of_any_size(size: float) -> None:
    class Space(Robust):
        def statistics(self, prediction: Tensor, target: Tensor, values: Any) -> dict[str, Tensor]:
            return {"q": size * torch.randn(1, 2)}

    controller = made(Space(), Told(1, 2, 1, 1.5))
    reports = run(controller, 10)
    assert all(math.isfinite(r.entropy) for r in reports)
    assert all(p.isfinite().all() for p in controller.policy.parameters())  # type: ignore[union-attr]


def test_policies_that_do_not_fit_are_refused() -> None:
    for features in ({"q": 2}, {"class pairs": 2, "more": 1}):
        with pytest.raises(ValueError, match="policy must move class pairs, as the space asks for"):
            made(policy=Policy(features))
    controller = made(policy=Policy({"class pairs": 3}))
    before = controller.state_dict()
    with pytest.raises(ValueError, match=r"policy must see .*: 2.* of an entry, .* got one that sees .*: 3"):
        controller.step(network())
    assert equal(before, controller.state_dict())
    with pytest.raises(ValueError, match="policy must be float32 on the CPU, got float64 on cpu"):
        made(policy=Policy({"class pairs": 2}).double())
    with pytest.raises(FileNotFoundError):
        made(policy="no such file")


def test_a_frozen_policy_cannot_learn() -> None:
    policy = Policy({"class pairs": 2}).requires_grad_(False)
    with pytest.raises(ValueError, match="policy must be trainable where it learns"):
        made(policy=policy)
    controller = made(policy=policy, learn=False)
    controller.step(network())
    assert controller.windows == 1


# ---- Refused.


def nothing() -> Iterator[Any]:
    return iter(())


def test_refuses() -> None:
    for name in ("steps", "children", "window", "evaluations", "episode", "memory", "batch"):
        with pytest.raises(ValueError, match=f"Controller: {name} must be at least 1, got 0"):
            made(**{name: 0})
        for wrong in (2.0, "2", None):
            with pytest.raises(TypeError, match=f"Controller: {name} must be an int, got"):
                made(**{name: wrong})
    for options, message in (
        ({"window": 3, "evaluations": 4}, "evaluations must be at most the window's 3, got 4"),
        ({"discount": 0.0}, "discount must be positive"),
        ({"discount": 1.1}, r"discount must lie in \[0, 1\]"),
        ({"step_size": 0.0}, "step_size must be positive and finite"),
        ({"step_size": math.inf}, "step_size must be positive and finite"),
        ({"learning_rate": -1.0}, "learning_rate must be positive and finite"),
        ({"hidden": (0,)}, "hidden must be at least 1"),
        ({"history": 0}, "history must be at least 1"),
        ({"parts": ("future",)}, "parts must be among history, change, values, progress, got future"),
        ({"space": LossSpace()}, "space must have at least one parameter"),
        ({"space": Robust() * LearningRate()}, "space must not adapt the learning_rate"),
        ({"metric": []}, "metric must be one, or pairs"),
        ({"metric": [ErrorRate()]}, "metric must be one, or pairs"),
        ({"metric": [(ErrorRate(), 0.0)]}, "a metric's weight must be positive and finite"),
        (
            {"valid": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))},
            "valid must hold at least one sample",
        ),
        (
            {"rewarded_on": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))},
            "rewarded_on must hold at least one sample",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)  # type: ignore[arg-type]
    for options, message in (
        ({"space": nn.CrossEntropyLoss()}, "space must be a LossSpace, got CrossEntropyLoss"),
        ({"metric": 3}, "metric must be a metric or a function, got int"),
        ({"valid": torch.zeros(3)}, "valid must be a pair"),
        ({"rewarded_on": 3}, "rewarded_on must be a pair"),
        ({"policy": 3}, "policy must be a Policy or a path, got int"),
        ({"seed": 1.5}, "seed must be an int, got float"),
        ({"discount": "much"}, None),
        ({"step_size": "much"}, None),
        ({"learning_rate": "much"}, None),
        ({"hidden": 8}, None),
        ({"history": 2.5}, None),
        ({"parts": 3}, None),
    ):
        with pytest.raises(TypeError, match=message):
            made(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid must hold at least one batch"):
        made(valid=nothing()).step(network())
    for wrong in (3, None, "model", [3], F.relu):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            made().step(wrong)
