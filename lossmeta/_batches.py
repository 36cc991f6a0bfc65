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


Output = Callable[[Any], Tensor] | str | int | None
"""What of a model's output is the prediction."""


def prediction_of(where: str, output: Any, pick: Output = None) -> Tensor:
    """The prediction in what a model returned.

    Args:
        where: who asks, for the error.
        output: of the model.
        pick: a function of it, a key or the name of an attribute, or a position. ``None`` takes a tensor as it is, else
            what is called ``logits``, else the only tensor of a mapping or a sequence.
    """
    found: Any
    if callable(pick):
        found = pick(output)
    elif isinstance(pick, str) and not isinstance(output, Mapping):
        found = getattr(output, pick, None)
    elif pick is not None:
        try:
            found = output[pick]
        except (KeyError, IndexError, TypeError):
            found = None
    else:
        found = output if isinstance(output, Tensor) else _common_prediction(output)
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        f"{where}: the model must return a tensor, or output must say what of {_described(output)} is the prediction "
        f"(a key, a position, or a function), got output={pick!r}"
    )


def _common_prediction(output: Any) -> Any:
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, (list, tuple)):
        tensors = [v for v in values if isinstance(v, Tensor)]
        return tensors[0] if len(tensors) == 1 else None
    return None


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(repr, output))}"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def samples(target: Any) -> int:
    """How many samples a target is for."""
    return int(target.shape[0]) if isinstance(target, Tensor) and target.dim() else 1


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


def checked_batches(where: str, name: str, batches: Any) -> list[Batch]:
    """One batch, or several in a list."""
    if isinstance(batches, list) and all(isinstance(b, Sequence) and not isinstance(b, str) for b in batches):
        if not batches:
            raise ValueError(f"{where}: {name} must hold at least one batch, got none")
        return [checked(where, f"a batch of {name}", b) for b in batches]
    return [checked(where, name, batches)]


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
