"""The data that a loss is adapted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lossmeta._batches import Batch, checked


class Validation:
    """A batch, or batches that start again where they end.

    Args:
        where: who asks, for errors.
        valid: the data.
        name: of the argument, for errors.
    """

    def __init__(self, where: str, valid: Batch | Iterable[Batch], name: str = "valid") -> None:
        self.where, self.name, self.valid = where, name, valid
        self.is_batch = isinstance(valid, (tuple, list)) and len(valid) == 2 and isinstance(valid[1], Tensor)
        if self.is_batch:
            checked(where, name, valid)
        elif not isinstance(valid, Iterable) or isinstance(valid, Tensor):
            raise TypeError(
                f"{where}: {name} must be a pair (inputs, target) or batches, got {type(valid).__name__}"
            )

    def predicted(self, predict: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
        """Predictions ``[B, N, ...]`` and targets of all; ``predict(inputs)`` gives ``[B, n, ...]``."""
        batches: Iterable[Any] = [self.valid] if self.is_batch else self.valid  # type: ignore[assignment]
        predictions, targets = [], []
        for batch in batches:
            inputs, target = checked(self.where, f"a batch of {self.name}", batch)
            predictions.append(predict(inputs))
            targets.append(target)
        if not targets:
            raise ValueError(
                f"{self.where}: {self.name} must hold at least one batch each time it is gone through, got none; give "
                "a list or a DataLoader"
            )
        return torch.cat(predictions, 1), torch.cat(targets)
