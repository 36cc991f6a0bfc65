"""The class confusion of one validation batch, added to the statistics of those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.ops import class_confusion

SIZES = [(10_000, 10), (10_000, 100), (10_000, 1000)]


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
    "compile": (torch.compile(indexed), torch.float64),
    # Cheaper, and good enough for one batch; a long validation set stops counting in float32.
    "eager, one-hot product, float32 sums": (multiplied, torch.float32),
    "eager, float32 sums": (indexed, torch.float32),
    "compile, float32 sums": (torch.compile(indexed), torch.float32),
    "lossmeta": (fused, torch.float64),
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_accumulate(size: tuple[int, int], candidate: str, measure: Any) -> None:
    samples, classes = size
    torch.manual_seed(0)
    logits, labels = torch.randn(size), torch.randint(classes, (samples,))
    run, dtype = CANDIDATES[candidate]
    sums, counts = torch.zeros(classes, classes, dtype=dtype), torch.zeros(classes, dtype=torch.int64)
    measure(
        lambda: run(logits, labels, sums, counts),
        operator="class_confusion",
        size=f"{samples}×{classes}",
        candidate=candidate,
        # The logits and labels are read once, the statistics read and written.
        bytes_moved=4 * samples * classes + 8 * samples + 2 * 8 * (classes * classes + classes),
    )
