"""A Python file that says of which model, data and loss a surface is, and a checkpoint for the model."""

from __future__ import annotations

import itertools
import pickle
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FUNCTIONS = ("model", "data")
NESTED = ("state_dict", "model_state_dict", "model")
"""Under which names a training keeps a state dict among others."""


class TaskError(Exception):
    """What is wrong with a task or a checkpoint."""


@dataclass
class SurfaceTask:
    """What a file defines.

    Attributes:
        model: that ``model()`` returned.
        data: that ``data()`` returned.
        loss: that is named ``loss``; else cross-entropy, or for batches that are mappings the model's own.
    """

    model: nn.Module
    data: Any
    loss: Callable[..., Tensor] | None


def read_task(path: Path) -> SurfaceTask:
    """Runs a file, and its ``model()`` and ``data()``.

    Raises:
        TaskError: where there is no such file, or it cannot be run or lacks something.
    """
    if not path.is_file():
        raise TaskError(f"no such file: {path}")
    beside = str(path.parent.absolute())
    if beside not in sys.path:  # for good, as with `python TASK.py`: a model may import when it is called
        sys.path.insert(0, beside)
    defined = _run(f"{path} could not be run", lambda: runpy.run_path(str(path), run_name="lossmeta_task"))
    missing = [f"{name}()" for name in FUNCTIONS if not callable(defined.get(name))]
    if missing:
        raise TaskError(f"{path} must define model() and data(), got no {' and no '.join(missing)}")
    model = _run(f"model() of {path} failed", defined["model"])
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() of {path} must return a torch.nn.Module, got {type(model).__name__}")
    data = _run(f"data() of {path} failed", defined["data"])
    loss = defined.get("loss")
    if loss is None:
        first, data = _run(f"data() of {path} failed", lambda: _first(data))
        loss = None if isinstance(first, Mapping) else nn.functional.cross_entropy
    elif not callable(loss):
        raise TaskError(f"loss in {path} must be a function, got {type(loss).__name__}")
    return SurfaceTask(model, data, loss)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Puts the tensors of a safetensors file, or of one that ``torch.save`` wrote, into a model.

    Raises:
        TaskError: where there is no such file, it holds something else than tensors, or they do not fit the model.
    """
    state = _state(path)
    own = model.state_dict()
    if state.keys() != own.keys() and all(name.startswith("module.") for name in state):
        # of a model in DistributedDataParallel
        state = {name.removeprefix("module."): t for name, t in state.items()}
    wrong = {
        "missing": [name for name in own if name not in state],
        "not in the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(t.shape)} for {list(own[name].shape)}"
            for name, t in state.items()
            if name in own and isinstance(own[name], Tensor) and own[name].shape != t.shape
        ],
    }
    said = [f"{_some(names)} {what}" for what, names in wrong.items() if names]
    if said:
        raise TaskError(f"{path} must fit model(), got {'; '.join(said)}")
    model.load_state_dict(state)


def _first(data: Any) -> tuple[Any, Any]:
    """The first batch, or what stands for it where the data is a pair; and the data."""
    if isinstance(data, (Mapping, Tensor)) or not isinstance(data, Iterable):
        return data, data
    if isinstance(data, tuple) and not all(isinstance(one, Mapping) for one in data):
        return data, data
    batches = iter(data)
    first = next(batches, None)
    return first, itertools.chain([first], batches) if batches is data else data


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise TaskError(f"no such file: {path}")
    found: Any
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            found = load(path.read_bytes())
        except (SafetensorError, OSError) as error:
            raise TaskError(
                f"{path} must be a safetensors file, got one that cannot be read ({error})"
            ) from error
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise TaskError(
                f"{path} must be a file of tensors that torch.save wrote, got one that cannot be read as such "
                f"({_first_line(error)}); save a state dict"
            ) from error
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        kind = (
            "one without tensors" if isinstance(found, Mapping) and not found else f"a {type(found).__name__}"
        )
        if isinstance(found, Mapping) and found:
            kind = f"one that also holds {_some([str(n) for n, t in found.items() if not isinstance(t, Tensor)])}"
        raise TaskError(f"{path} must hold a state dict, itself or as {', '.join(NESTED)}, got {kind}")
    return dict(found)


def _run(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        line = (
            ""
            if place is None
            else f", {Path(place.tb_frame.f_code.co_filename).name} line {place.tb_lineno}"
        )
        raise TaskError(f"{what}: {type(error).__name__}: {_first_line(error)}{line}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
