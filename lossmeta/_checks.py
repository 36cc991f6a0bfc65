"""Checks that losses and metrics make themselves, where they touch a tensor before an operator does."""

from __future__ import annotations

import torch
from torch import Tensor

from lossmeta.ops import _operator

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, float64, bfloat16 or float16"


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
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and _operator._debugging)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
