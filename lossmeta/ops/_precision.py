"""The precision that operators compute in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast from rounding the products inside ``function``, whose first argument is a tensor."""

    @functools.wraps(function)
    def wrapped(tensor: Tensor, *args: Any) -> Any:
        device = tensor.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(tensor, *args)
        with torch.autocast(device, enabled=False):
            return function(tensor, *args)

    return wrapped
