"""The memory bandwidth that the other benchmarks are held against: a copy that no cache holds."""

from __future__ import annotations

from typing import Any

import torch

MIB = 256


def test_copy(measure: Any) -> None:
    source = torch.ones(MIB * 2**18)
    target = torch.zeros_like(source)
    measure(
        lambda: target.copy_(source),
        operator="copy",
        size=f"{MIB} MiB",
        candidate="eager",
        bytes_moved=2 * source.nbytes,
    )
