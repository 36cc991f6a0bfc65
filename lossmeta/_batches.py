"""What a training loop hands over, refused where it is unfit before anything has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = tuple[Any, Tensor]
"""Inputs and target. Several inputs are a sequence or a mapping."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(prediction, target)``."""


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(*inputs)`` for a sequence, ``model(**inputs)`` for a mapping, else ``model(inputs)``."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


def checked(where: str, name: str, batch: Any) -> Batch:
    """A batch that is a pair and not empty. What fits within it the model and the loss know."""
    if not isinstance(batch, Sequence) or len(batch) != 2:
        got = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        raise TypeError(
            f"{where}: {name} must be a pair (inputs, target), got {got}; several inputs go into a tuple of their own"
        )
    inputs, target = batch
    if isinstance(target, Tensor) and target.numel() == 0:
        raise ValueError(f"{where}: {name} must hold at least one sample, got a target {list(target.shape)}")
    return inputs, target


def endless(where: str, name: str, batches: Iterable[Any]) -> Iterator[Batch]:
    """The batches, from the start again where they end."""
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield checked(where, f"a batch of {name}", batch)
        if not count:
            raise ValueError(f"{where}: {name} must hold at least one batch, got none")
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{where}: {name} must start again where it ends, got an iterator that ended after {count} batches; "
                "give a list or a DataLoader, or an iterator without end"
            )
