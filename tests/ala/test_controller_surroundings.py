"""Models, modes, random numbers, defaults of PyTorch and processes around a controller."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_processes
from controllers import Margin, Told, equal, made, network, restless, run
from torch import Tensor, nn
from toy_problem import CLASSES, data

from lossmeta.ala import (
    ClassCorrelation,
    DistanceMixture,
    FocalWeighting,
    LossSpace,
    Policy,
    Robust,
)


def test_modes_and_buffers_stay() -> None:
    model = network()
    model[0].eval()  # type: ignore[index]
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    run(made(), 4, model)
    assert equal(dict(state), dict(model.state_dict())) and modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["alone", "loader", "policy", "path", "noisy model"])
def test_global_random_numbers_stay(how: str, tmp_path: Path) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            random.random()
            np.random.rand()  # noqa: NPY002
            return super().forward(x) + torch.randn(CLASSES)

    options: dict[str, Any] = {}
    if how == "loader":
        options["valid"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(40, 1)), 7)
    model = Noisy(4, CLASSES) if how == "noisy model" else network()
    policy = Policy({"class pairs": 2})
    policy.save(tmp_path / "p")
    options |= {"policy": {"policy": policy}, "path": {"policy": tmp_path / "p"}}.get(how, {})
    start = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    run(made(**options), 5, model)
    assert torch.equal(start[0], torch.get_rng_state()) and start[1] == random.getstate()
    assert (start[2] == np.random.get_state()[1]).all()  # type: ignore[index] # noqa: NPY002


def test_the_random_numbers_of_gpus_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(seed: int) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refused)
    run(made(), 2, nn.Linear(4, CLASSES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("space", [ClassCorrelation(CLASSES), Robust(), DistanceMixture(), FocalWeighting()])
def test_models_of_other_dtypes(space: LossSpace, dtype: torch.dtype) -> None:
    x, y = data(40, 1)
    controller = made(space, valid=(x.to(dtype), y))
    model = network().to(dtype)
    run(controller, 4, model)
    assert controller.windows == 4 and controller.skipped == 0
    loss = controller(model(x.to(dtype)), y)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["correlation", "mixture", "focal", "robust"])
def test_other_defaults_of_pytorch(kind: str, tmp_path: Path) -> None:
    spaces = {
        "correlation": lambda: ClassCorrelation(CLASSES),
        "mixture": DistanceMixture,
        "focal": FocalWeighting,
    }
    model, valid, found = network(), data(40, 1), []
    Policy({"class pairs" if kind == "correlation" else "q" if kind == "robust" else "phi": 2}).save(
        tmp_path / "p"
    )
    try:
        for other in (False, True):
            if other:
                torch.set_default_device("meta")
                torch.set_default_dtype(torch.float64)
            controller = made(spaces.get(kind, Robust)(), Margin(), valid, policy=tmp_path / "p", seed=3)
            run(controller, 6, model)
            state = controller.state_dict()
            # The count of Adam's steps is of the default dtype.
            found.append([state["learner"]["policy"], *(v for k, v in state.items() if k != "learner")])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert equal(*found)


def test_inference_mode_and_autocast() -> None:
    plain = restless(seed=1)
    model = network()
    run(plain, 6, model)
    controller = restless(seed=1)
    with torch.inference_mode():
        run(controller, 6, model)
    assert equal(plain.state_dict(), controller.state_dict())
    x, y = data(8)
    controller(model(x), y).backward()
    controller = made(seed=1, metric=Told(1, 2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        reports = run(controller, 3, model)
    assert all(r.entropy <= math.log(3) for r in reports)


# ---- Several processes.

PROCESS = """
from torch import nn
from lossmeta.ala import ClassCorrelation, Controller

torch.manual_seed(rank)
valid = torch.randn(20, 4), torch.randint(3, (20,))
def margin(prediction, target):
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()
controller = Controller(ClassCorrelation(3), margin, valid, steps=30, window=3, evaluations=1, seed=rank)
model, found = nn.Linear(4, 3), []
for _ in range(30):
    controller.step(model)
    found.append(controller.values)
torch.save([found, controller.paths], f"{folder}/{rank}.pt")
"""


def test_two_processes_have_the_values_of_the_first(tmp_path: Path) -> None:
    two_processes.run(PROCESS, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(first, second) and first[0][-1]["pairs"].any()
