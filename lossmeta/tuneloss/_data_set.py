"""Data that are gone through more than once: a batch, or batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lossmeta._batches import Batch, checked, checked_batches


class DataSet:
    """A batch, or batches that start again where they end.

    Args:
        where: who asks, for errors.
        name: of the argument, for errors.
        data: the same; a DataLoader's own random generators are brought back after each pass.
        shared: whether somebody else runs through it meanwhile, which persistent workers do not bear.

    Attributes:
        length: number of batches; ``None`` of a single batch, and where it is not known.

    Raises:
        TypeError: for something else.
        ValueError: for an iterator, no batches, an empty one, and workers that would be taken from somebody else.
    """

    def __init__(self, where: str, name: str, data: Any, *, shared: bool) -> None:
        self.where, self.name = where, name
        self.data: Iterable[Any]
        if isinstance(data, (tuple, list)):
            self.data = checked_batches(where, name, data)
            several = isinstance(data, list) and isinstance(data[0], Sequence)
            self.length = len(data) if several else None
            return
        if isinstance(data, Iterator):
            raise ValueError(
                f"{where}: {name} must start again where it ends, got an iterator; give a batch, a list or a DataLoader"
            )
        if not isinstance(data, Iterable) or isinstance(data, (Tensor, str, Mapping)):
            raise TypeError(
                f"{where}: {name} must be a batch (inputs, target) or batches, got {type(data).__name__}"
            )
        if shared and getattr(data, "persistent_workers", False):
            raise ValueError(
                f"{where}: {name} must not have persistent workers, which do one pass at a time, got a DataLoader with "
                "them; give another loader of the same data"
            )
        self.data = data
        try:
            self.length = len(data)  # type: ignore[arg-type]
        except TypeError:
            self.length = None
        if self.length == 0:
            raise self._empty()

    def _empty(self) -> ValueError:
        return ValueError(
            f"{self.where}: {self.name} must hold at least one batch each time it is gone through, got none"
        )

    def __iter__(self) -> Iterator[Batch]:
        count = 0
        with _generators_kept(self.data):
            for batch in self.data:
                count += 1
                yield checked(self.where, f"a batch of {self.name}", batch)
        if not count:
            raise self._empty()


@contextmanager
def _generators_kept(data: Iterable[Any]) -> Iterator[None]:
    """Random generators that a DataLoader or its samplers own."""
    owners = (
        [data, *(getattr(data, n, None) for n in ("sampler", "batch_sampler"))]
        if isinstance(data, DataLoader)
        else []
    )
    found = {id(g): g for g in (getattr(o, "generator", None) for o in owners)}.values()
    kept = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)
