"""`lossmeta surface TASK.py CHECKPOINT` computes, keeps and draws a surface, or says what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from lossmeta.cli import app
from lossmeta.landscape import LossSurface, loss_surface

TASK = """
import torch
from beside import inputs


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def data():
    return inputs, torch.arange(20) % 3
"""
BESIDE = """
import torch

inputs = torch.linspace(-1, 1, 80).view(20, 4)
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text(BESIDE)
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path / "task.py"


def surface(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["surface", *map(str, arguments)])


def output(result: Any) -> str:
    """Without the frames and breaks of an error."""
    return " ".join(result.output.replace("│", " ").split())


def trained() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3)


def expected(model: nn.Module, **options: Any) -> LossSurface:
    data = torch.linspace(-1, 1, 80).view(20, 4), torch.arange(20) % 3
    return loss_surface(model, F.cross_entropy, data, points=5, **options)


KINDS = {
    "a.safetensors": lambda path, state: save_file(state, path),
    "a.pt": lambda path, state: torch.save(state, path),
    "nested.pt": lambda path, state: torch.save({"epoch": 3, "model_state_dict": state}, path),
    "parallel.pt": lambda path, state: torch.save({f"module.{n}": t for n, t in state.items()}, path),
}


@pytest.mark.parametrize("name", KINDS)
def test_computes_and_keeps(task: Path, name: str) -> None:
    checkpoint, out = task.parent / name, task.parent / "found.safetensors"
    KINDS[name](checkpoint, trained().state_dict())
    result = surface(task, checkpoint, "--points", 5, "--out", out, "--seed", 3, "--span", 0.5)
    assert result.exit_code == 0, result.output
    assert "5 x 5 points, the mean over 20 samples each" in result.output and str(out.name) in output(result)
    assert torch.equal(LossSurface.load(out).losses, expected(trained(), seed=3, span=0.5).losses)


OWN_LOSS = """
import torch
from types import SimpleNamespace


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(4, 3)

    def forward(self, x, labels):
        import beside_late
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(self.module(x), labels))


def model():
    torch.manual_seed(0)
    return Own()


batches = [{"x": torch.linspace(-1, 1, 80).view(20, 4), "labels": torch.arange(20) % 3}] * 2


def data():
    return DATA
"""


@pytest.mark.parametrize(
    "data",
    ["batches", "tuple(batches)", "torch.utils.data.DataLoader(batches, batch_size=None)", "iter(batches)"],
)
def test_mappings_have_the_models_own_loss(task: Path, data: str) -> None:
    """Its state dict begins with ``module.``, and it imports only when it is called."""
    (task.parent / "beside_late.py").write_text("")
    task.write_text(OWN_LOSS.replace("DATA", data))
    torch.manual_seed(0)
    linear, checkpoint = nn.Linear(4, 3), task.parent / "a.pt"
    torch.save({f"module.{n}": t for n, t in linear.state_dict().items()}, checkpoint)
    result = surface(task, checkpoint, "--points", 3)
    sys.modules.pop("beside_late", None)
    assert result.exit_code == 0, result.output
    assert "the mean over 40 samples" in output(result)


def test_draws_and_goes_on(task: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, kept = task.with_suffix(".png"), task.with_suffix(".surface.safetensors")
    result = surface(task, "--points", 5, "--output", picture)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 5000
    torch.manual_seed(0)
    assert torch.equal(LossSurface.load(kept).losses, expected(nn.Linear(4, 3)).losses)
    found = LossSurface.load(kept)
    task.write_text(TASK.replace("20) % 3", "20) % 3 * 1"))
    assert surface(task, "--points", 5).exit_code == 0
    assert torch.equal(LossSurface.load(kept).losses, found.losses)
    result = surface(task, "--points", 7)
    assert result.exit_code == 1 and "must hold the same surface, got one that differs in axes" in output(
        result
    )


def test_a_loss_of_its_own_and_batches(task: Path) -> None:
    more = "\n\ndef loss(prediction, target):\n    return prediction.square().mean()\n"
    task.write_text(
        TASK.replace("return inputs, torch.arange(20) % 3", "return [(inputs, torch.zeros(20))] * 2") + more
    )
    result = surface(task, "--points", 3, "--refine", 0.1)
    assert result.exit_code == 0 and "the mean over 40 samples" in result.output
    own = """
import torch
from types import SimpleNamespace


class Own(torch.nn.Linear):
    def forward(self, x):
        return SimpleNamespace(loss=super().forward(x).square().mean())


def model():
    return Own(4, 3)


def data():
    return [{"x": torch.ones(7, 4)}]
"""
    task.write_text(own)
    result = surface(task, "--points", 3, "--out", task.with_suffix(".own"))
    assert result.exit_code == 0 and "the mean over 7 samples" in result.output, result.output


WRONG = {
    "no data": (TASK.replace("def data", "def dat"), "must define model() and data(), got no data()"),
    "neither": ("x = 1", "got no model() and no data()"),
    "syntax": ("def model(:", "could not be run: SyntaxError"),
    "import": (
        "import nowhere_at_all",
        "ModuleNotFoundError: No module named 'nowhere_at_all', task.py line 1",
    ),
    "model fails": (TASK.replace("Linear(4, 3)", "Linear(4)"), "model() of"),
    "data fails": (
        TASK.replace("20) % 3", "20) % nothing"),
        "NameError: name 'nothing' is not defined",
    ),
    "no module": (TASK.replace("torch.nn.Linear(4, 3)", "3"), "must return a torch.nn.Module, got int"),
    "no function": (TASK + "\nloss = 3", "must be a function, got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_task_that_cannot_be_used(task: Path, name: str) -> None:
    text, message = WRONG[name]
    task.write_text(text)
    result = surface(task)
    assert result.exit_code == 2 and message in output(result) and "Traceback" not in result.output, (
        result.output
    )


def test_a_surface_that_cannot_be_computed(task: Path) -> None:
    task.write_text(TASK.replace("torch.arange(20) % 3", "torch.arange(19) % 3"))
    result = surface(task, "--points", 3)
    assert result.exit_code == 1 and "lossmeta surface: ValueError" in output(result), result.output
    task.write_text(TASK)
    result = surface(task, "--span", 0)
    assert result.exit_code == 1 and "span must lead from a smaller to a larger" in output(result)


class Custom:
    pass


def test_a_checkpoint_that_does_not_fit(task: Path) -> None:
    state = trained().state_dict()
    cases: list[tuple[Any, str]] = [
        ({"weight": state["weight"]}, "must fit model(), got bias missing"),
        ({**state, "more": state["bias"]}, "got more not in the model"),
        ({**state, "bias": torch.zeros(4)}, "got bias [4] for [3] of another shape"),
        ({f"a{i}": state["bias"] for i in range(5)}, "a0, a1, a2 and 2 more not in the model"),
        ({}, "got one without tensors"),
        (
            state["bias"],
            "must hold a state dict, itself or as state_dict, model_state_dict, model, got a Tensor",
        ),
        ({**state, "epoch": 3}, "got one that also holds epoch"),
        (Custom(), "got one that cannot be read as such"),
    ]
    checkpoint = task.parent / "a.pt"
    for found, message in cases:
        torch.save(found, checkpoint)
        result = surface(task, checkpoint)
        assert result.exit_code == 2 and message in output(result), result.output
    for name in ("a.pt", "a.safetensors"):
        (task.parent / name).write_text("nothing")
        result = surface(task, task.parent / name)
        assert result.exit_code == 2 and "cannot be read" in output(result), result.output


def test_files_that_are_not_there(task: Path) -> None:
    for arguments in ((task.parent / "b.py",), (task, task.parent / "b.pt")):
        result = surface(*arguments)
        assert result.exit_code == 2 and "no such file" in output(result)
    result = surface(task.parent / "a.safetensors", task.parent / "b.pt")
    assert result.exit_code == 2 and "expected a Python file, .py, where there is a checkpoint" in output(
        result
    )
