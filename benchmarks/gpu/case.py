"""A case of the sweep: an operator, its inputs, what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FLOAT32 = (torch.float32,)
HALF = (torch.bfloat16, torch.float16)
USUAL = (*FLOAT32, *HALF)
ALL = (torch.float64, *USUAL)

# Relative; two orders in which to add 10^6 numbers differ by less.
FLOAT64_FLOOR = 1e-11


class Draw:
    """Fresh random inputs on a device. Sizes are those of a GPU; the device says how large they are there."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str, size: Callable[[int], int]) -> None:
        self.dtype = dtype
        self.device = device
        self.size = size
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def wide(self) -> torch.dtype:
        """In which operators accumulate."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """``shape`` is as it is: :meth:`size` has been applied."""
        drawn = torch.randn(shape, dtype=self.wide, device=self.device, generator=self.generator)
        return drawn.mul_(scale).to(dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.rand(shape, dtype=self.wide, device=self.device, generator=self.generator)
        return drawn.to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def labels(self, classes: int, *shape: int, skew: float = 0.0) -> Tensor:
        """Class indices, a share ``skew`` of which is the middle one."""
        labels = self.integers(classes, *shape)
        return labels.where(self.uniform(*shape, dtype=torch.float32) >= skew, classes // 2)


@dataclass(frozen=True)
class Case:
    """Inputs of an operator, and how it and PyTorch compute with them.

    Attributes:
        operator, name: what it is called in the record.
        make: the inputs, by name, in the order in which the functions take them; those that require a gradient are
            differentiated.
        ours: the operator.
        theirs: PyTorch's composition, in float64 for float64 inputs and in float32 for all others. (A composition in
            half precision would be a lax judge: sums of thousands of numbers are off by percents.)
        outputs: names of the outputs.
        pulled: those with an incoming gradient; None for all.
        dtypes: of the inputs.
        large: run after all others.
        floors: by result, the relative error that the documentation states.
        precision: in which the operator adds, where that is not the accumulation dtype of its inputs.
        by_row: inputs that have a row for each row of the outputs, where the comparison goes by rows.
        chunk: rows that are compared at once, where all of them are.
        pick: the rows that alone are compared, of so many.
        own_bits: False where PyTorch's matrix products are part of it, which may be others on another stream.
        checks: False where there is no memory for a side stream and a graph.
        gibibytes: of memory that it takes.
    """

    operator: str
    name: str
    make: Callable[[Draw], dict[str, Tensor]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    outputs: Sequence[str]
    pulled: Sequence[str] | None = None
    dtypes: Sequence[torch.dtype] = USUAL
    large: bool = False
    floors: Callable[[torch.dtype], Mapping[str, float]] = field(default=lambda dtype: {})
    precision: torch.dtype | None = None
    by_row: Sequence[str] = ()
    chunk: Callable[[Mapping[str, Tensor]], int] | None = None
    pick: Callable[[int, int], Tensor] | None = None
    own_bits: bool = True
    checks: bool = True
    gibibytes: float = 0.0

    def precision_for(self, dtype: torch.dtype) -> torch.dtype:
        return self.precision or (torch.float64 if dtype == torch.float64 else torch.float32)

    def all_floors(self, dtype: torch.dtype, names: Sequence[str]) -> dict[str, float]:
        exact = FLOAT64_FLOOR if self.precision_for(dtype) == torch.float64 else 0.0
        stated = self.floors(dtype)
        return {name: max(exact, stated.get(name, 0.0)) for name in names}


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element further in memory: contiguous, but not aligned."""
    storage = tensor.new_empty(tensor.numel() + 1)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)


def misaligned(case: Case) -> Case:
    """The case with all its inputs :func:`shifted`."""

    def make(draw: Draw) -> dict[str, Tensor]:
        return {name: shifted(t) for name, t in case.make(draw).items()}

    return replace(case, name=f"{case.name}, misaligned", make=make)
