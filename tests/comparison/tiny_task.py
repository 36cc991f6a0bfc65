"""A task of a few milliseconds, as a file and as functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = """\
import torch
from torch import nn

EPOCHS = 2
BATCH_SIZE = 8


def model():
    return nn.Linear(4, 3)


def data():
    x = torch.randn(60, 4)
    y = (x @ torch.eye(4)[:, :3]).argmax(1)
    return {"train": (x[:24], y[:24]), "validation": (x[24:36], y[24:36]), "test": (x[36:], y[36:])}


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
"""


def write(folder: Path, *changes: tuple[str, str], more: str = "") -> Path:
    """The file, with parts of its text replaced and more at its end."""
    text = SOURCE
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "tiny.py"
    path.write_text(text + more, encoding="utf-8")
    return path


def new_model() -> nn.Module:
    return nn.Linear(4, 3)


def draw(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4)
    return x, x[:, :3].argmax(1)


def parts() -> dict[str, Any]:
    return {"train": draw(24), "validation": draw(12), "test": draw(24)}
