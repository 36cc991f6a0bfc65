"""Schedules: what holds at which step, files, and a run under what a population or a controller found."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lossmeta.ala import Controller, LearningRate, LogitAdjustment, Population, Robust, Schedule, Smoothing
from lossmeta.metrics import ErrorRate


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def two() -> Schedule:
    space = Robust() * LogitAdjustment(torch.tensor([5, 3, 1]))
    return Schedule(space, [2, 5], {"q": [0.2, 0.9], "margin": [[1.0, 0.0, -1.0], [0.5, 0.5, 0.5]]})


def test_what_holds_when() -> None:
    schedule = two()
    seen = []
    for _ in range(8):
        seen.append((schedule.values["q"].item(), schedule.values["margin"].tolist()))
        schedule.step()
    before, first, second = (0.0, [0.0] * 3), (0.2, [1.0, 0.0, -1.0]), (0.9, [0.5] * 3)
    expected = [before] * 2 + [first] * 3 + [second] * 3
    for (q, margin), (q0, margin0) in zip(seen, expected, strict=True):
        assert q == pytest.approx(q0) and margin == pytest.approx(margin0)
    schedule.restart()
    assert schedule.steps_done == 0 and schedule.values["q"].item() == 0


def test_the_loss_is_the_spaces() -> None:
    schedule = two()
    for _ in range(3):
        schedule.step()
    logits, labels = torch.randn(7, 3), torch.randint(3, (7,))
    values = {name: v.float() for name, v in schedule.values.items()}
    assert schedule(logits, labels) == schedule.space(logits, labels, values)


@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.01)])
def test_scales_steps(make: Any) -> None:
    """By the factor of the learning rate; the optimizer's own rate and state stay."""
    space = Robust() * LearningRate()
    schedule = Schedule(space, [0, 1], {"learning_rate": [0.0, -0.7], "q": [0.3, 0.3]})
    ours, plain = network(), network()
    optimizers: list[Optimizer] = [make(m.parameters()) for m in (ours, plain)]
    x, y = data(16)
    for step in range(3):
        start = [p.detach().clone() for p in ours.parameters()]
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            schedule(model(x), y).backward()
            schedule.step(optimizer) if model is ours else optimizer.step()
        factor = 1.0 if step == 0 else torch.tensor(-0.7).exp()
        for p, q, s in zip(ours.parameters(), plain.parameters(), start, strict=True):
            torch.testing.assert_close(p.detach(), s + factor * (q.detach() - s), rtol=1e-6, atol=1e-7)
        plain.load_state_dict(ours.state_dict())
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    with pytest.raises(ValueError, match="optimizer must be given"):
        schedule.step()


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.safetensors"
    schedule = two()
    schedule.record = {"by": "hand"}
    schedule.save(path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["lossmeta schedule"])
    assert header["record"] == {"by": "hand"} and header["format"] == 1
    again = Schedule.load(path, two().space)
    assert again.steps == [2, 5] and again.record == {"by": "hand"}
    for a, b in zip(again.path, schedule.path, strict=True):
        assert torch.equal(a, b)
    schedule.record = {"by": object()}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="record must be JSON"):
        schedule.save(path)
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    space = two().space
    with pytest.raises(FileNotFoundError):
        Schedule.load(path, space)
    two().save(path)
    with pytest.raises(ValueError, match=r"must hold the parameters \{'smoothing': None\}"):
        Schedule.load(path, Smoothing())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Schedule.load(path, space)
    save_file({"steps": torch.tensor([0])}, path)
    with pytest.raises(ValueError, match="without its header"):
        Schedule.load(path, space)
    parameters = {"q": None, "tau": None, "margin": 3}
    for description, message in (
        ({"format": 2, "parameters": parameters, "record": {}}, "must have format 1, got 2"),
        ({"format": 1, "parameters": parameters, "record": {}}, "values"),
        ({"format": 1, "record": {}}, "must hold the parameters"),
    ):
        save_file({"steps": torch.tensor([0])}, path, {"lossmeta schedule": json.dumps(description)})
        with pytest.raises(ValueError, match=message):
            Schedule.load(path, space)
    values = {
        "values.q": torch.tensor([2.0]),
        "values.tau": torch.zeros(1),
        "values.margin": torch.zeros(1, 3),
    }
    description = {"format": 1, "parameters": parameters, "record": {}}
    save_file({"steps": torch.tensor([0]), **values}, path, {"lossmeta schedule": json.dumps(description)})
    with pytest.raises(ValueError, match=r"q must lie in \[0.0, 1.0\]"):
        Schedule.load(path, space)


@pytest.mark.parametrize(
    ("steps", "values", "message"),
    [
        ([], {}, "steps must ascend"),
        ([3, 1], {}, "steps must ascend"),
        ([1, 1], {}, "steps must ascend"),
        ([-1, 1], {}, "steps must ascend"),
        ([0], {"q": 0.5}, "a value for each of 1 steps"),
        ([0, 1], {"q": [0.5]}, "a value for each of 2 steps"),
        ([0], {"q": [1.5]}, "must lie in"),
        ([0], {"p": [0.5]}, "must have a parameter 'p'"),
        ([0], {"q": [[0.5, 0.5]]}, r"q must be \[1\]"),
        ([0], {"q": [float("nan")]}, "must lie in"),
    ],
)
def test_bad_schedules(steps: list[int], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(Robust(), steps, values)


@pytest.mark.filterwarnings("ignore:Population. all children")
def test_of_a_population() -> None:
    """Of each window what it ended with, and after the last one the mean of the last third."""
    model = network()
    population = Population(
        model,
        SGD(model.parameters(), 0.1),
        Robust(),
        ErrorRate(),
        data(40, 1),
        window=5,
        steps=32,
        tail=0.1,
        fallback=False,
    )
    with pytest.raises(ValueError, match="a window must have ended"):
        population.schedule()
    ended: list[dict[str, Tensor]] = []
    for i in range(32):
        population.step(data(16, i))
        if population.windows > len(ended):
            ended.append(population.values)
    schedule = population.schedule()
    assert schedule.steps == [0, 5, 10, 15, 20, 25]
    for step in range(32):
        expected = ended[step // 5] if step < 25 else population.values
        for name, v in schedule.values.items():
            assert v.item() == pytest.approx(expected[name].item(), abs=1e-6)
        schedule.step(SGD([nn.Parameter(torch.zeros(1))], 0.1))


def test_of_a_population_survives_its_state() -> None:
    def made() -> Population:
        model = network()
        return Population(model, SGD(model.parameters(), 0.1), Robust(), margin, data(40, 1), window=4)

    first, second = made(), made()
    for i in range(10):
        first.step(data(16, i))
    second.load_state_dict(first.state_dict())
    for a, b in zip(first.schedule().path, second.schedule().path, strict=True):
        assert torch.equal(a, b)


def margin(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth, so that nothing ties."""
    return torch.log_softmax(prediction, 1).gather(1, target[:, None]).mean()


def test_of_a_controller() -> None:
    """The same values at the same steps, so the same weights."""
    space = LogitAdjustment(torch.tensor([5, 3, 1]))
    runs = []
    controller = Controller(space, margin, data(40, 1), steps=30, window=4, evaluations=2)
    for replay in (False, True):
        model = network()
        optimizer = SGD(model.parameters(), 0.1)
        schedule = controller.schedule() if replay else None
        for i in range(30):
            x, y = data(16, i)
            optimizer.zero_grad()
            (schedule or controller)(model(x), y).backward()
            if schedule is None:
                optimizer.step()
                controller.step(model)
            else:
                schedule.step(optimizer)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(runs[0], runs[1])
    assert not torch.equal(runs[0], torch.cat([p.detach().flatten() for p in network().parameters()]))
    unrecorded = Controller(space, margin, data(40, 1), steps=30, record=False)
    with pytest.raises(ValueError, match="record must be True"):
        unrecorded.schedule()


def test_goes_on() -> None:
    first, second = two(), two()
    for _ in range(6):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.values["q"] == first.values["q"]
    assert second(torch.eye(3), torch.arange(3)) == first(torch.eye(3), torch.arange(3))
    assert F.cross_entropy(torch.eye(3), torch.arange(3)) != first(torch.eye(3), torch.arange(3))


def test_a_move_while_the_model_trains_alone_is_part_of_it() -> None:
    model = network()
    population = Population(model, SGD(model.parameters(), 0.1), Robust(), margin, data(40, 1), window=4)
    for i in range(4):
        population.step(data(16, i))
    population.settle()
    population.step(data(16, 4))
    population.move_to(q=0.25)
    schedule = population.schedule()
    assert schedule.steps == [0, 4, 5]
    assert schedule.path[-1][0] * 0.3 == pytest.approx(0.25)
