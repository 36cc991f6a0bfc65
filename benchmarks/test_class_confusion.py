"""The class confusion of one validation batch, added to the statistics of those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import class_confusion

SIZES = {
    "cpu": [(10_000, 10), (10_000, 100), (10_000, 1000)],
    "cuda": [(8192, 1000), (10**6, 10), (10**4, 100), (600, 32000)],
    "dry": [(32, 20), (64, 2), (32, 10), (6, 40)],
}
COMPILED_FIRST = [
    {"size": (8192, 1000), "candidate": "compile"},
    {"size": (10**6, 10), "candidate": "compile"},
]


def indexed(logits: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
    sums.index_add_(0, labels, torch.log_softmax(logits, 1).to(sums.dtype), alpha=-1)
    counts.add_(torch.bincount(labels, minlength=len(counts)))


def multiplied(logits: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
    truth = torch.nn.functional.one_hot(labels, len(counts)).to(sums.dtype)
    sums.addmm_(truth.T, torch.log_softmax(logits, 1).to(sums.dtype), alpha=-1)
    counts.add_(torch.bincount(labels, minlength=len(counts)))


def fused(logits: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
    class_confusion(logits, labels, sums=sums, counts=counts)


CANDIDATES: dict[str, tuple[Callable[..., None], torch.dtype]] = {
    "eager": (indexed, torch.float64),
    "compile": (indexed, torch.float64),
    # Cheaper, and good enough for one batch; a long validation set stops counting in float32.
    "eager, one-hot product, float32 sums": (multiplied, torch.float32),
    "eager, float32 sums": (indexed, torch.float32),
    "compile, float32 sums": (indexed, torch.float32),
    "lossmeta": (fused, torch.float64),
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("size", SIZES)
def test_accumulate(size: tuple[int, int], candidate: str, device: Any, measure: Any) -> None:
    samples, classes = size
    function, dtype = CANDIDATES[candidate]

    def make() -> tuple[Tensor, ...]:
        logits, labels = torch.randn(size), torch.randint(classes, (samples,))
        return (
            logits,
            labels,
            torch.zeros(classes, classes, dtype=dtype),
            torch.zeros(classes, dtype=torch.int64),
        )

    measure(
        device.compile(function) if candidate.startswith("compile") else function,
        make,
        operator="class_confusion",
        size=f"{samples}×{classes}",
        candidate=candidate,
        # The logits and labels are read once, the rows of the statistics that change read and written.
        bytes_moved=4 * samples * classes + 8 * samples + 2 * 8 * (min(samples, classes) * classes + classes),
        no_graph=None if function is fused else "bincount waits for the GPU",
    )
