"""What a user moves, states and resumption, schedules and policies of a controller."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from controllers import equal, made, network, restless, run, trained
from torch import nn
from torch.optim import Adam
from toy_problem import CLASSES

from lossmeta.ala import (
    ClassCorrelation,
    Controller,
    LogitAdjustment,
    Policy,
    Robust,
)


def test_the_values_can_be_moved() -> None:
    controller = made(Robust(), window=4, evaluations=1, step_size=0.25)
    model = network()
    run(controller, 2, model)
    controller.losses[0].move_to(q=0.6)
    run(controller, 2, model)
    assert abs(controller.values["q"].item() - 0.6) == pytest.approx(0.075) or controller.values["q"] == 0.6
    before = controller.state_dict()
    for wrong in ({"q": 1.2}, {"q": float("nan")}, {"p": 0.5}, {"q": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="SpaceLoss: "):
            controller.losses[0].move_to(**wrong)
    assert equal(before, controller.state_dict())


def test_the_schedule_says_what_held_when() -> None:
    controller = made(window=3, evaluations=1, children=2)
    with pytest.raises(ValueError, match="a window must have ended before there is a schedule"):
        controller.schedule()
    models, held = [network(0), network(1)], []
    for _ in range(10):
        held.append(controller.losses[1].values)
        run(controller, 1, models)
    schedule = controller.schedule(1)
    for values in held:
        for name, v in schedule.values.items():
            torch.testing.assert_close(v, values[name], rtol=1e-6, atol=1e-6)
        schedule.step()
    with pytest.raises(ValueError, match="record must be True"):
        made(record=False).schedule()


def resumable() -> tuple[nn.Module, Adam, Controller]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    )
    controller = made(
        LogitAdjustment(torch.tensor([30, 10, 3])) * Robust(), window=5, evaluations=3, episode=2
    )
    return model, Adam(model.parameters(), 0.02), controller


@pytest.mark.parametrize("killed_at", [0, 3, 5, 12, 15, 20, 33])
def test_a_killed_run_resumes_to_the_same_bits(killed_at: int) -> None:
    model, optimizer, controller = resumable()
    torch.manual_seed(7)
    file = io.BytesIO()
    trained(controller, model, optimizer, range(killed_at))
    torch.save(
        (model.state_dict(), optimizer.state_dict(), controller.state_dict(), torch.get_rng_state()), file
    )
    trained(controller, model, optimizer, range(killed_at, 40))

    other, other_optimizer, resumed = resumable()
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    other_optimizer.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    torch.set_rng_state(states[3])
    trained(resumed, other, other_optimizer, range(killed_at, 40))
    assert equal(dict(model.state_dict()), dict(other.state_dict()))
    assert equal(controller.state_dict(), resumed.state_dict()) and resumed.windows == 8


@pytest.mark.parametrize("at", [0, 7, 10])
@pytest.mark.parametrize("episode", [1, 3])
def test_a_state_is_a_snapshot(at: int, episode: int) -> None:
    """Nothing that follows changes it, so that one can go back to it, also twice."""
    controller = restless(window=2, evaluations=2, episode=episode, children=2)
    models = [network(0), network(1)]
    run(controller, at, models)
    state = controller.state_dict()
    kept = copy.deepcopy(state)
    run(controller, 9, models)
    assert equal(state, kept)
    end = controller.state_dict()
    for _ in range(2):
        controller.load_state_dict(state)
        assert equal(controller.state_dict(), kept)
        run(controller, 9, models)
        assert equal(state, kept) and equal(controller.state_dict(), end)


@pytest.mark.parametrize("at", [1, 4])
def test_a_state_holds_the_policy_that_was_given(at: int, tmp_path: Path) -> None:
    """Whatever has become of it, or of its file."""
    policy = Policy({"class pairs": 2})
    policy.save(tmp_path / "p")
    controller = restless(window=2, policy=policy)
    model = network()
    run(controller, at, model)
    state = controller.state_dict()
    run(controller, 12, model)
    Policy({"class pairs": 2}).save(tmp_path / "p")
    resumed = restless(window=2, policy=tmp_path / "p")
    resumed.load_state_dict(state)
    run(resumed, 12, model)
    assert equal(controller.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"space": ClassCorrelation(4)},
        {"space": Robust()},
        {"children": 2},
        {"hidden": (8,)},
        {"hidden": (32, 32, 32)},
        {"history": 3},
        {"parts": ("history",)},
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_states_of_others_are_refused(other: dict[str, Any], steps: int) -> None:
    state_of = restless()
    run(state_of, 3)
    controller = made(valid=(torch.randn(9, 4), torch.randint(3, (9,))), **other)
    run(controller, steps, [nn.Linear(4, 4 if "space" in other else 3) for _ in controller.losses])
    before = controller.state_dict()
    with pytest.raises(ValueError, match="Controller: the state must be of"):
        controller.load_state_dict(state_of.state_dict())
    assert equal(before, controller.state_dict())


def test_the_state_of_other_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="windows of 3 steps, got 1"):
        made(window=3).load_state_dict(made().state_dict())


# ---- Transfer.


def test_a_policy_of_three_classes_drives_ten(tmp_path: Path) -> None:
    first = restless()
    with pytest.raises(ValueError, match="a window of 1 steps must have ended, got 0 steps"):
        first.save_policy(tmp_path / "p")
    run(first, 20)
    first.save_policy(tmp_path / "p")
    ten = (torch.randn(60, 4), torch.randint(10, (60,)))
    second = made(ClassCorrelation(10), valid=ten, policy=tmp_path / "p", learn=False)
    run(second, 5, nn.Linear(4, 10))
    assert second.values["pairs"].any() and second.policy is not None and first.policy is not None
    assert equal(dict(second.policy.state_dict()), dict(first.policy.state_dict()))
    record = second.policy.record
    assert record["metric"] == ["metric"] and record["steps_done"] == 20 and record["step_size"] == 1.0
