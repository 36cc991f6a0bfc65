"""A controller's state goes on only in a run of the same kind: coordinates mean nothing elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lossmeta.ala import ClassCorrelation, Controller, Policy, Robust, SpaceLoss
from lossmeta.ala.space import LossSpace, Parameter

CLASSES = 3


class Bent(LossSpace):
    """One number, whose bounds, scale and default are as one wants them."""

    def __init__(self, **changed: Any) -> None:
        self.parameters = (
            Parameter("bent", **{"default": 0.0, "scale": 0.5, "low": -2.0, "high": 2.0, **changed}),
        )

    def transform(self, prediction: Tensor, target: Tensor, values: Any) -> Tensor:
        return prediction * values["bent"].exp()


def made(space: LossSpace | None = None, **options: Any) -> Controller:
    generator = torch.Generator().manual_seed(0)
    valid = torch.randn(30, 4, generator=generator), torch.randint(CLASSES, (30,), generator=generator)
    calls = iter(range(1000))
    options = {"steps": 50, "window": 2, "evaluations": 1, "children": 2, **options}
    return Controller(space or Bent(), lambda prediction, target: float(next(calls) % 7), valid, **options)


def run(controller: Controller, steps: int) -> None:
    models = [nn.Linear(4, CLASSES) for _ in controller.losses]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
    for _ in range(steps):
        controller.step(models, optimizers if controller.reward == "advantage" else None)


def flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [x for key in state for x in (key, *flat(state[key]))]
    if isinstance(state, (list, tuple)):
        return [x for part in state for x in flat(part)]
    return [state.nan_to_num(7).tolist() if isinstance(state, Tensor) else state]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.5}, "actions of a step size of 0.5, got 1.0"),
        ({"window": 3}, "windows of 3 steps, got 2"),
        ({"children": 3}, "3 children, got 2"),
        ({"reward": "advantage"}, "the reward 'advantage', got 'sign'"),
        ({"space": Bent(low=-1.0)}, r"parameters whose .*-1.0, 2.0, 0.5.*, got .*-2.0, 2.0, 0.5"),
        ({"space": Bent(high=3.0)}, r"parameters whose .*-2.0, 3.0, 0.5.*, got .*-2.0, 2.0, 0.5"),
        ({"space": Bent(scale=0.25)}, r"parameters whose .*2.0, 0.25.*, got .*2.0, 0.5"),
        ({"space": Bent(default=0.1)}, r"parameters whose .*\[0.1\].*, got .*\[0.0\]"),
        ({"space": Robust()}, r"parameters whose .*'q'.*, got .*'bent'"),
        ({"space": ClassCorrelation(CLASSES, lowest=0.0)}, r"parameters whose .*'diagonal'.*, got .*'bent'"),
    ],
)
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.filterwarnings("ignore:Controller. the metric", "ignore:Controller. all children")
def test_a_state_of_another_run_is_refused(options: dict[str, Any], message: str, steps: int) -> None:
    state_of = made()
    run(state_of, 5)
    controller = made(**options)
    run(controller, steps)
    before = flat(controller.state_dict())
    with pytest.raises(ValueError, match="Controller: the state must be of " + message):
        controller.load_state_dict(state_of.state_dict())
    assert flat(controller.state_dict()) == before
    state = dict(state_of.state_dict())
    del state["run"]
    with pytest.raises(ValueError, match=r"the state must be of .*, got None"):
        controller.load_state_dict(state)
    assert flat(controller.state_dict()) == before


def test_a_state_of_the_same_kind_is_taken() -> None:
    """Also one with another policy rate, or of more steps: they change what follows and nothing that was."""
    state_of = made()
    run(state_of, 5)
    controller = made(learning_rate=0.1, steps=500)
    controller.load_state_dict(state_of.state_dict())
    assert flat(controller.state_dict()) == flat(state_of.state_dict())


def test_a_policy_crosses_bounds_and_step_sizes() -> None:
    """What it learned is of states, which have no unit."""
    first = made()
    run(first, 5)
    assert first.policy is not None
    policy = Policy(first.policy.features)
    policy.load_state_dict(first.policy.state_dict())
    second = made(Bent(low=-1.0, scale=0.1), policy=policy, step_size=2.0)
    run(second, 5)
    assert second.windows == 2 and isinstance(second.losses[0], SpaceLoss)
