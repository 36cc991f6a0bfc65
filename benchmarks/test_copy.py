"""The memory bandwidth that the other benchmarks are held against: a copy that no cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

MIB = {"cpu": [256], "cuda": [2048], "dry": [1]}


@pytest.mark.by_device("mib", MIB)
def test_copy(mib: int, measure: Any) -> None:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.ones(mib * 2**18)
        return torch.zeros_like(source), source

    measure(
        torch.Tensor.copy_,
        make,
        operator="copy",
        size=f"{mib} MiB",
        candidate="eager",
        bytes_moved=2 * mib * 2**20,
    )
