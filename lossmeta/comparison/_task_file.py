"""Tasks as files: to read one, and to begin one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lossmeta.comparison._compare import digest
from lossmeta.comparison._parts import TaskError
from lossmeta.comparison._task import BATCH_SIZE, EPOCHS, OwnTask, default_optimizer

TEMPLATE = '''\
"""A task for `lossmeta compare`: change it to your own. As it is: scikit-learn's digits with 20 % wrong labels."""

import torch
from sklearn.datasets import load_digits
from torch import nn

EPOCHS = 40  # of every training
BATCH_SIZE = 64


def model():
    """A new model. Its weights are drawn from torch's random numbers: every method starts from the same ones."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data():
    """Training, validation and test samples: each a pair of tensors, a Dataset or a DataLoader.

    It is called once for each seed. torch's random numbers are others then, so that torch.randperm draws another split.
    Validation samples should be like those that count, and are best labelled with care: they tell methods what helps.
    """
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, validation, test = torch.randperm(len(labels)).split([900, 200, 697])
    given = labels[train].clone()
    wrong = torch.rand(len(given)) < 0.2
    given[wrong] = (given[wrong] + torch.randint(1, 10, given.shape)[wrong]) % 10
    return {
        "train": (inputs[train], given),
        "validation": (inputs[validation], labels[validation]),
        "test": (inputs[test], labels[test]),
    }


def optimizer(parameters):
    """Of a model's parameters. Its learning rate is tuned, from a tenth of this to ten times as much."""
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9)


# What is to be low or high on the test samples. Without it: the share of wrong predictions.
# metric = lossmeta.metrics.BalancedErrorRate()
# Or a function; then say which direction is better:
# HIGHER_IS_BETTER = True
# def metric(predictions, targets):
#     return (predictions.argmax(1) == targets).float().mean().item()

# What training lowers. Without it: cross-entropy, or squared error where targets are floating.
# def task_loss(predictions, targets):
#     return torch.nn.functional.cross_entropy(predictions, targets)
'''


def load(path: Path) -> OwnTask:
    """The task that a file describes; the file is run.

    Raises:
        TaskError: for a file that cannot be read, is not Python, raises, or lacks a function.
    """
    if not path.exists():
        raise TaskError(f"{path}: there is no such file; `lossmeta new {path}` writes one to begin with")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path} could not be read ({error.strerror}); give a Python file") from error
    module = _run(path, source)
    found = vars(module)
    return OwnTask(
        where=str(path),
        name=path.stem,
        model=_function(path, found, "model", "a new torch.nn.Module"),
        data=_function(path, found, "data", "the train, validation and test parts"),
        metric=found.get("metric"),
        higher_is_better=found.get("HIGHER_IS_BETTER"),
        task_loss=found.get("task_loss"),
        optimizer=found.get("optimizer", default_optimizer),
        epochs=found.get("EPOCHS", EPOCHS),
        batch_size=found.get("BATCH_SIZE", BATCH_SIZE),
        fingerprint=digest(source),
    )


def write_new(path: Path) -> None:
    """Writes a task to begin with.

    Raises:
        FileExistsError: where there is a file already.
        OSError: where it cannot be written.
    """
    with path.open("x", encoding="utf-8") as file:
        file.write(TEMPLATE)


def _run(path: Path, source: bytes) -> ModuleType:
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        text = error.msg if isinstance(error, SyntaxError) else error
        raise TaskError(f"{path}{line} is not Python: {text}") from error
    name = f"lossmeta_task_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a DataLoader's workers look it up by its name
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as of a script: what lies beside it can be imported
        sys.path.insert(0, folder)
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(
            f"{path}{_line(error, path)} raised {type(error).__name__} when it was run: {error}; `python {path}` shows "
            "where"
        ) from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """The last line of the file that led to an error."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = f", line {trace.tb_lineno},"
        trace = trace.tb_next
    return found


def _function(path: Path, found: dict[str, Any], name: str, what: str) -> Callable[[], Any]:
    function = found.get(name)
    if callable(function):
        return function  # type: ignore[no-any-return]
    got = "none" if function is None else type(function).__name__
    raise TaskError(f"{path} must have a function {name}() that returns {what}, got {got}; add it")
