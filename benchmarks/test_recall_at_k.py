"""Recall@{1, 10, 100} of many embeddings, against the neighbours of a block of samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lossmeta.metrics import recall_at_k

KS, ROWS, CLASSES = (1, 10, 100), 512, 200


def of_neighbours(nearest: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    x = normalize(x, dim=1)
    found = []
    for begin in range(0, len(x), ROWS):
        neighbours = nearest(x[begin : begin + ROWS], x)
        rows = torch.arange(begin, begin + len(neighbours), device=x.device)[:, None]
        same = (y[neighbours] == y[rows]) & (neighbours != rows)
        found.append(same.cumsum(1) > 0)
    hits = torch.cat(found)
    return [hits[:, k].double().mean() for k in KS]


def cdist(x: Tensor, y: Tensor) -> list[Tensor]:
    return of_neighbours(lambda a, b: torch.cdist(a, b).topk(KS[-1] + 1, largest=False).indices, x, y)


def products(x: Tensor, y: Tensor) -> list[Tensor]:
    return of_neighbours(lambda a, b: (a @ b.T).topk(KS[-1] + 1).indices, x, y)


def ours(x: Tensor, y: Tensor) -> Tensor:
    return recall_at_k(x, y, KS)


CANDIDATES = {"cdist and topk": cdist, "products and topk": products, "lossmeta": ours}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.by_device("n", {"cpu": [5000], "cuda": [20_000], "dry": [300]})
def test_recall(candidate: str, n: int, device: Any, measure: Any) -> None:
    def make() -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (n,))
        return torch.randn(n, 128) + 0.3 * torch.randn(CLASSES, 128)[y], y

    measure(
        CANDIDATES[candidate],
        make,
        operator="recall_at_k",
        size=f"{n}×128, {CLASSES} classes",
        candidate=candidate,
        bytes_moved=4 * n * 128,
        no_graph="the sizes of the classes are read",
        peak_bytes=device.peak_memory(lambda: partial(CANDIDATES[candidate], *make())),
    )
