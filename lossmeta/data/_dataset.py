"""What every reader returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, on the CPU, as its files have it: nothing is standardised or augmented.

    Attributes:
        name: as given to :func:`lossmeta.data.load`.
        train: inputs and targets. Images are uint8 ``[N, C, H, W]`` from 0 to 255, other inputs float32 ``[N, D]``;
            labels are int64 ``[N]``, targets of a regression float32 ``[N, 1]``.
        test: the same for the official test split, or None where the data set has none.
        classes: number of classes, or None for regression.
    """

    name: str
    train: Split
    test: Split | None
    classes: int | None
