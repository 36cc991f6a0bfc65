"""The three parts of the data: tensors, from whatever a user gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

PARTS = ("train", "validation", "test")
READ = 256  # samples of a Dataset that are put together at once
KINDS = "a pair of tensors, a Dataset or a DataLoader"

Part = tuple[Tensor, Tensor]


class TaskError(ValueError):
    """A task that cannot be compared; says what of it, and what to do."""


@dataclass(frozen=True)
class Parts:
    """Inputs and targets, each with samples along its first dimension.

    Attributes:
        train: to be trained on.
        validation: that methods adapt by, and by which plain training is chosen.
        test: by which all are judged.
    """

    train: Part
    validation: Part
    test: Part

    @property
    def both(self) -> Part:
        """Training and validation samples."""
        (x, y), (more_x, more_y) = self.train, self.validation
        return torch.cat([x, more_x]), torch.cat([y, more_y])

    def to(self, device: torch.device) -> Parts:
        return Parts(*((x.to(device), y.to(device)) for x, y in (self.train, self.validation, self.test)))


def parts_of(where: str, given: Any) -> Parts:
    """What ``data()`` gave, as tensors.

    Args:
        where: the file or the function, for errors.
        given: a dict of the three parts, or a tuple in their order.

    Raises:
        TaskError: for anything else, parts without samples, and inputs and targets of different lengths.
    """
    if isinstance(given, Mapping):
        known = {"valid": "validation", "val": "validation"}
        named = {known.get(str(key), str(key)): part for key, part in given.items()}
        if missing := [name for name in PARTS if name not in named]:
            raise TaskError(
                f"{where}: data() must give the parts {', '.join(PARTS)}, got {', '.join(map(str, given)) or 'none'}; "
                f"add {' and '.join(missing)}"
            )
        parts = [named[name] for name in PARTS]
    elif isinstance(given, (tuple, list)):
        if len(given) != len(PARTS):
            hint = "; hold some samples out of training for validation" if len(given) == 2 else ""
            raise TaskError(
                f"{where}: data() must give three parts, {', '.join(PARTS)}, got {len(given)}{hint}"
            )
        parts = list(given)
    else:
        raise TaskError(
            f"{where}: data() must give a dict or a tuple of {', '.join(PARTS)}, got {type(given).__name__}"
        )
    found = [_part(where, name, part) for name, part in zip(PARTS, parts, strict=True)]
    for name, (x, y) in zip(PARTS[1:], found[1:], strict=True):
        for what, one, first in (("inputs", x, found[0][0]), ("targets", y, found[0][1])):
            if one.shape[1:] != first.shape[1:] or one.dtype != first.dtype:
                raise TaskError(
                    f"{where}: the {what} of {name} must be like those of train, {_like(first)}, got {_like(one)}"
                )
    return Parts(*found)


def _part(where: str, name: str, given: Any) -> Part:
    if isinstance(given, (tuple, list)) and len(given) == 2:
        inputs, targets = _tensors(where, name, given)
    elif isinstance(given, (Dataset, DataLoader)):
        pairs = list(_pairs(where, name, given))
        if not pairs:
            raise TaskError(f"{where}: {name} of data() must hold at least one sample, got none")
        try:
            inputs, targets = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        except RuntimeError as error:
            raise TaskError(
                f"{where}: {name} of data() must give batches of one shape, got {error}"
            ) from error
    else:
        what = f" of {len(given)}" if isinstance(given, (tuple, list)) else ""
        raise TaskError(f"{where}: {name} of data() must be {KINDS}, got {type(given).__name__}{what}")
    if not inputs.dim() or not targets.dim() or len(inputs) != len(targets):
        sizes = [len(t) if t.dim() else "a single number" for t in (inputs, targets)]
        raise TaskError(
            f"{where}: {name} of data() must have as many targets as inputs, got {sizes[1]} and {sizes[0]}"
        )
    if not len(inputs):
        raise TaskError(f"{where}: {name} of data() must hold at least one sample, got none")
    if not (targets.is_floating_point() or targets.is_complex()):
        targets = targets.long()
    return inputs.detach(), targets.detach()


def _pairs(where: str, name: str, given: Dataset[Any] | DataLoader[Any]) -> Iterator[Part]:
    """Batches; a Dataset is read in its order."""
    loader = given if isinstance(given, DataLoader) else DataLoader(given, batch_size=READ)
    if loader.batch_sampler is None and not isinstance(
        loader.dataset, IterableDataset
    ):  # it gives single samples
        loader = DataLoader(loader.dataset, batch_size=READ)
    try:
        for batch in loader:
            yield _tensors(where, f"a batch of {name}", batch)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"{where}: {name} of data() could not be gone through: {type(error).__name__}: {error}"
        ) from error


def _tensors(where: str, name: str, pair: Any) -> Part:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        what = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        raise TaskError(
            f"{where}: {name} of data() must be a pair (inputs, targets), got {type(pair).__name__}{what}"
        )
    for what, value in zip(("inputs", "targets"), pair, strict=True):
        if not isinstance(value, Tensor):
            raise TaskError(
                f"{where}: the {what} of {name} of data() must be a tensor, got {type(value).__name__}; "
                "torch.as_tensor makes one of an array"
            )
    return pair[0], pair[1]


def _like(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} [N{''.join(f', {n}' for n in tensor.shape[1:])}]"
