"""Tasks that cannot be compared: every message names the file and what to do, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_task import write
from typer.testing import CliRunner

from lossmeta.cli import app

TRAIN = '"train": (x[:24], y[:24])'
VALIDATION = '"validation": (x[24:36], y[24:36])'
TEST = '"test": (x[36:], y[36:])'
MODEL = "nn.Linear(4, 3)"


def refused(path: Path, *options: str) -> str:
    folder = path.parent / "run"
    result = CliRunner().invoke(
        app, ["compare", str(path), "--output", str(folder), "--seeds", "1", *options]
    )
    assert result.exit_code == 2, result.output
    assert not folder.exists()
    text = " ".join(result.output.split())
    assert text.startswith(f"lossmeta compare: {path}")
    return text


def test_no_file(tmp_path: Path) -> None:
    path = tmp_path / "none.py"
    assert f"there is no such file; `lossmeta new {path}` writes one" in refused(path)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "task.py").mkdir()
    assert "could not be read (Is a directory); give a Python file" in refused(tmp_path / "task.py")


@pytest.mark.parametrize(
    "content", [b"def model(:\n", b"\0\1\2", b"\xff\xfe\x00", b"# Notes\nthis is no code"]
)
def test_not_python(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "task.py"
    path.write_bytes(content)
    assert "is not Python: " in refused(path)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("import no_such_module\n", "line 20, raised ModuleNotFoundError when it was run: No module named"),
        ("1 / 0\n", "line 20, raised ZeroDivisionError when it was run: division by zero; `python "),
        ("raise SystemExit(3)\n", "line 20, raised SystemExit when it was run: 3"),
    ],
)
def test_raises_when_it_is_run(tmp_path: Path, more: str, expected: str) -> None:
    assert expected in refused(write(tmp_path, more=more))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # Functions.
        (
            "def model",
            "def modell",
            "must have a function model() that returns a new torch.nn.Module, got none",
        ),
        (
            "def data",
            "def date",
            "must have a function data() that returns the train, validation and test parts",
        ),
        ("def data():", "data = 3\ndef other():", "must have a function data()"),
        ("x = torch.randn(60, 4)", "x = torch.randn(60, 4) @ 3", "data() raised TypeError"),
        (MODEL, "nn.Linear(4)", "model() raised TypeError"),
        (MODEL, "torch.zeros(3)", "model() must return a torch.nn.Module, got Tensor"),
        (
            MODEL,
            "ONE\n\nONE = nn.Linear(4, 3)",
            "model() must make a new model each time, got the same one twice",
        ),
        (MODEL, "nn.Softmax(1)", "model() must have weights to train, got none"),
        (
            "torch.optim.SGD(parameters, lr=0.1, momentum=0.9)",
            "0.1",
            "must return a torch.optim.Optimizer, got float",
        ),
        ("EPOCHS = 2", "EPOCHS = 0", "EPOCHS must be an integer of at least 1, got 0"),
        ("BATCH_SIZE = 8", "BATCH_SIZE = 8.0", "BATCH_SIZE must be an integer of at least 1, got 8.0"),
        # Data.
        (f"{VALIDATION}, ", "", "train, validation, test, got train, test; add validation"),
        (
            f"{{{TRAIN}, {VALIDATION}, {TEST}}}",
            "(x, y)",
            "got 2; hold some samples out of training for validation",
        ),
        (
            f"{{{TRAIN}, {VALIDATION}, {TEST}}}",
            "x",
            "a dict or a tuple of train, validation, test, got Tensor",
        ),
        (
            VALIDATION,
            '"validation": (x[:0], y[:0])',
            "validation of data() must hold at least one sample, got none",
        ),
        (
            VALIDATION,
            '"validation": []',
            "validation of data() must be a pair of tensors, a Dataset or a DataLoader",
        ),
        (VALIDATION, '"validation": (x[24:36], y[24:35])', "as many targets as inputs, got 11 and 12"),
        (
            VALIDATION,
            '"validation": (x[24:36, :3], y[24:36])',
            "the inputs of validation must be like those of train",
        ),
        (
            VALIDATION,
            '"validation": (x[24:36], y[24:36].float())',
            "the targets of validation must be like those",
        ),
        (
            TRAIN,
            '"train": (x[:24].numpy(), y[:24])',
            "must be a tensor, got ndarray; torch.as_tensor makes one",
        ),
        (
            TRAIN,
            '"train": (x[:24], y[:24] + 1)',
            "the labels of train must lie in [0, 3), the outputs of model()",
        ),
        (TEST, '"test": (x[36:], y[36:] + 7)', "the labels of test must lie in [0, 3)"),
        # Loaders.
        (
            TRAIN,
            '"train": torch.utils.data.DataLoader(x[:24])',
            "must be a pair (inputs, targets), got Tensor",
        ),
        (
            TRAIN,
            '"train": torch.utils.data.DataLoader([{"x": a} for a in x[:24]])',
            "a batch of train of data() must be a pair (inputs, targets), got dict",
        ),
        (
            TRAIN,
            '"train": torch.utils.data.DataLoader([(a, a, b) for a, b in zip(x, y)])',
            "a batch of train of data() must be a pair (inputs, targets), got list of 3",
        ),
        (
            TRAIN,
            '"train": torch.utils.data.DataLoader([(a, "cat") for a in x])',
            "the targets of a batch of train of data() must be a tensor, got ",
        ),
        (
            TRAIN,
            '"train": torch.utils.data.DataLoader([(x[0], y[0]), (x[0, :2], y[0])], batch_size=2)',
            "train of data() could not be gone through: RuntimeError",
        ),
        (
            TRAIN,
            '"train": torch.utils.data.DataLoader([(x[0], y[0]), (x[0, :2], y[0])])',
            "train of data() must give batches of one shape",
        ),
        (TRAIN, '"train": torch.utils.data.DataLoader([])', "train of data() must hold at least one sample"),
        # Outputs.
        (MODEL, "nn.Linear(5, 3)", "must take the inputs of data(), [8, 4], it raised RuntimeError"),
        (
            MODEL,
            "nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))",
            "must be [N, C] or [N, C, d...] for classes [N]",
        ),
        (
            "argmax(1)",
            "sum(1)",
            "must have the shape of floating targets, got outputs [8, 3] for targets [8]",
        ),
    ],
)
def test_a_task_that_does_not_fit(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert expected in refused(write(tmp_path, (old, new)))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("metric = 3\n", "metric must be a function, got int"),
        (
            "def metric(p, y): return 1.0\n",
            "the direction of metric must be known, got None; set HIGHER_IS_BETTER",
        ),
        (
            "HIGHER_IS_BETTER = True\ndef metric(p): return 1.0\n",
            "metric must take predictions and targets and give a number, it raised TypeError",
        ),
        ("HIGHER_IS_BETTER = True\ndef metric(p, y): return p.nope\n", "it raised AttributeError"),
        ("HIGHER_IS_BETTER = True\ndef metric(p, y): return float('nan')\n", "must give a finite number"),
        ("def task_loss(p, y): return 1.0\n", "task_loss must give one number as a tensor"),
        ("def task_loss(p, y): return p.sum(1)\n", "can be differentiated, got a tensor [8]"),
        ("def task_loss(p): return p.sum()\n", "task_loss() raised TypeError"),
    ],
)
def test_a_metric_or_loss_that_does_not_fit(tmp_path: Path, more: str, expected: str) -> None:
    assert expected in refused(write(tmp_path, more=more))


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(write(tmp_path)), "--device", "nowhere"])
    assert result.exit_code == 2 and "device nowhere cannot be used" in result.output


def test_plain_training_that_fails_ends_the_run(tmp_path: Path) -> None:
    path = write(
        tmp_path, more="def task_loss(p, y):\n    assert len(p) != 7\n    return p.square().mean()\n"
    )
    path.write_text(
        path.read_text(encoding="utf-8").replace("BATCH_SIZE = 8", "BATCH_SIZE = 7"), encoding="utf-8"
    )
    result = CliRunner().invoke(app, ["compare", str(path), "--output", str(tmp_path / "run")])
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert "lossmeta compare: tiny, plain, own rate, seed 10000: AssertionError" in text
