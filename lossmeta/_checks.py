"""How every floor refuses an argument: TypeError for a type, ValueError for a value, shape, dtype or device.

A message names who refuses, the argument, what was expected and what came.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, float64, bfloat16 or float16"
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

# ---- Options.


def choice(name: str, argument: str, value: str, choices: Mapping[str, T]) -> T:
    """What stands for an option that is given by name."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    names = ", ".join(map(repr, choices))
    kind = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name}: {argument} must be one of {names}, got {value!r}")


def check_number(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}")


def check_at_least_one(name: str, argument: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {number}")


def check_positive(name: str, argument: str, number: float) -> None:
    if not number > 0:
        raise ValueError(f"{name}: {argument} must be positive, got {number}")


def check_positive_and_finite(name: str, argument: str, number: float) -> None:
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: {argument} must be positive and finite, got {number}")


def check_not_negative_and_finite(name: str, argument: str, number: float) -> None:
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: {argument} must be at least 0 and finite, got {number}")


def check_fraction(name: str, argument: str, number: float) -> None:
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: {argument} must lie in [0, 1], got {number}")


# ---- Tensors.


def check_tensors(name: str, **arguments: Any) -> None:
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")


def check_float(name: str, **arguments: Tensor) -> None:
    for argument, tensor in arguments.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {argument} must be {FLOAT_NAMES}, got {dtype_name(tensor)}")


def check_int64(name: str, **arguments: Tensor) -> None:
    for argument, tensor in arguments.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}: {argument} must be int64, got {dtype_name(tensor)}")


def check_same_device(name: str, **arguments: Tensor) -> None:
    """All of them on the device of the last."""
    reference, expected = list(arguments.items())[-1]
    for argument, tensor in arguments.items():
        if tensor.device != expected.device:
            raise ValueError(
                f"{name}: {argument} and {reference} must be on the same device, "
                f"got {tensor.device} and {expected.device}; move one with .to()"
            )


def check_scalar(name: str, argument: str, value: Tensor, hint: str = "") -> None:
    if value.dim():
        raise ValueError(f"{name}: {argument} must reduce to a scalar{hint}, got {list(value.shape)}")


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---- Values, where they may be looked at.


def outside(name: str, argument: str, indices: Tensor, size: int, ignore_index: int | None = None) -> Tensor:
    """Which indices are neither in [0, size) nor ignored: an error, where they may be looked at."""
    bad = (indices < 0) | (indices >= size)
    if ignore_index is not None:
        bad &= indices != ignore_index
    if may_look(indices):
        refuse(name, f"{argument} must lie in [0, {size})", indices, bad)
    return bad


def refuse(name: str, expected: str, values: Tensor, bad: Tensor) -> None:
    """Names the first bad value, if there is one."""
    if bad.any():
        first = int(bad.flatten().nonzero()[0])
        raise ValueError(f"{name}: {expected}, got {values.flatten()[first].item()} at index {first}")


def may_look(tensor: Tensor) -> bool:
    """Whether values can be read: on a GPU it would wait for the device, and a traced tensor has none."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and debugging)


debugging = os.environ.get("LOSSMETA_DEBUG", "") not in ("", "0")


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Checks on a GPU what would otherwise be left unlooked at, such as labels out of range.

    The arguments are copied to the CPU, which synchronises, and the CPU operator raises what it finds. The environment
    variable ``LOSSMETA_DEBUG=1`` does the same for a whole program.

    Example:
        >>> with lossmeta.ops.debug():
        ...     loss = lossmeta.ops.parametric_cross_entropy(torch.ones(1, 3), torch.tensor([0]), torch.eye(3))
    """
    global debugging
    before, debugging = debugging, enabled
    try:
        yield
    finally:
        debugging = before
