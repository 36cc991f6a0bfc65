"""Batches of the clean data, one after another without end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lossmeta._batches import Batch, checked, endless
from lossmeta._checks import check_at_least_one, refuse

WHERE = "CleanLearner"
REMEDY = "give some samples whose labels are known to be right"


class CleanBatches:
    """A pair of tensors, shuffled anew each time it is gone through, or batches that start again where they end.

    Args:
        clean: the data.
        batch_size: of batches of a pair.
        seed: of the order of a pair.
        count_classes: of the model's prediction for some inputs and labels; ``None`` where they are no class indices.
        ignore_index: label that does not count.
    """

    def __init__(
        self,
        clean: Batch | Iterable[Batch],
        batch_size: int,
        seed: int,
        count_classes: Callable[[Any, Tensor], int | None],
        ignore_index: int = -100,
    ) -> None:
        check_at_least_one(WHERE, "batch_size", batch_size)
        self._count_classes, self.ignore_index = count_classes, ignore_index
        self.classes: int | None = None
        self._pair: Batch | None = None
        self._batches: Iterator[Batch] | None = None
        if is_pair(clean):
            inputs, labels = self._pair = checked(WHERE, "clean", clean)
            if not isinstance(inputs, Tensor) or not labels.dim() or len(inputs) != len(labels):
                raise ValueError(
                    f"{WHERE}: clean must be one tensor of inputs and as many labels, got {_size(inputs)} and "
                    f"{_size(labels)}; for other inputs give batches, in a DataLoader or a list"
                )
            self.batch_size = min(batch_size, len(labels))
            self.generator = torch.Generator().manual_seed(seed)
            self.order = torch.empty(0, dtype=torch.int64, device="cpu")
            self._warn_of_missing(self._classes_of((inputs, labels)))
        else:
            self._batches = endless(WHERE, "clean", _Watched(clean, self))

    def __next__(self) -> Batch:
        if self._batches is not None:
            return next(self._batches)
        assert self._pair is not None
        inputs, labels = self._pair
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(labels), generator=self.generator, device="cpu")
        rows, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return inputs[rows.to(inputs.device)], labels[rows.to(labels.device)]

    def state(self) -> Any:
        """Where a pair has been gone through to; ``None`` for batches, whose place is their owner's to keep."""
        return None if self._pair is None else (self.order, self.generator.get_state())

    def load(self, state: Any) -> None:
        if self._pair is not None and state is not None:
            self.order = state[0].clone()
            self.generator.set_state(state[1])

    def _classes_of(self, batch: Batch) -> set[int]:
        """Those that occur; empty where labels are no class indices. It waits for a GPU, once for each sample."""
        inputs, labels = batch
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            return set()
        if self.classes is None:
            self.classes = self._count_classes(inputs, labels)
        if self.classes is None:
            return set()
        refuse(
            WHERE,
            f"clean labels must lie in [0, {self.classes}), the model's classes",
            labels,
            ((labels < 0) | (labels >= self.classes)) & (labels != self.ignore_index),
        )
        return set(labels.unique().tolist()) - {self.ignore_index}

    def _warn_of_missing(self, seen: set[int]) -> None:
        missing = sorted(set(range(self.classes or 0)) - seen)
        if seen and missing:
            warnings.warn(
                f"{WHERE}: clean must have samples of every class, got none of {missing[:10]}"
                f"{' and others' if len(missing) > 10 else ''}: what their labels are worth is not learned",
                stacklevel=4,
            )


class _Watched:
    """Batches, whose classes are looked at the first time that they are gone through."""

    def __init__(self, batches: Iterable[Any], owner: CleanBatches) -> None:
        self.batches, self.owner, self.looked = batches, owner, False

    def __iter__(self) -> Iterator[Any]:
        seen: set[int] = set()
        for batch in self.batches:
            if not self.looked:
                seen |= self.owner._classes_of(checked(WHERE, "a batch of clean", batch))
            yield batch
        if not self.looked:
            self.looked = True
            self.owner._warn_of_missing(seen)


def is_pair(clean: Any) -> bool:
    """Whether the data is one pair of inputs and labels.

    Raises:
        ValueError: where there is none.
        TypeError: for what is neither a pair nor batches.
    """
    if clean is None:
        raise ValueError(f"{WHERE}: clean must be a pair (inputs, labels) or batches, got None; {REMEDY}")
    if isinstance(clean, Tensor) or not isinstance(clean, Iterable):
        raise TypeError(
            f"{WHERE}: clean must be a pair (inputs, labels) or batches, got {type(clean).__name__}; {REMEDY}"
        )
    return isinstance(clean, (tuple, list)) and len(clean) == 2 and isinstance(clean[1], Tensor)


def _size(value: Any) -> Any:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
