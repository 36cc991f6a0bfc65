"""Recall@k against sorting all distances, and against all orders of what is equally near."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lossmeta.metrics import RecallAtK, recall_at_k

BLOCK = 1 << 22


def embeddings(n: int, classes: int, seed: int = 0, d: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.5 * (y[:, None] % 3), y


def by_sorting(x: Tensor, y: Tensor, k: int, distance: str) -> float:
    """Each sample's distances to all others."""
    if distance == "cosine":
        x = x / x.norm(dim=1, keepdim=True)
    right = counted = 0
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i]
        if not any(y[j] == y[i] for j in others):
            continue
        counted += 1
        others.sort(key=lambda j: float((x[i] - x[j]).square().sum()))
        right += any(y[j] == y[i] for j in others[:k])
    return right / counted if counted else float("nan")


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("n", "classes"), [(2, 1), (7, 3), (40, 12), (70, 2), (1, 1)])
def test_against_sorting(n: int, classes: int, distance: str) -> None:
    for seed in range(3):
        x, y = embeddings(n, classes, seed)
        x = x + 100 if distance == "euclidean" else x
        found = recall_at_k(x, y, (1, 2, 5, 200), distance=distance)
        expected = [by_sorting(x, y, k, distance) for k in (1, 2, 5, 200)]
        assert found.tolist() == pytest.approx(expected, nan_ok=True)
        assert found.dtype == torch.float64


def test_many_blocks() -> None:
    x, y = embeddings(4200, 40, d=3)
    assert len(y) ** 2 > 4 * BLOCK
    similarity = normalize(x, dim=1) @ normalize(x, dim=1).T
    similarity.fill_diagonal_(-9)
    for k in (1, 10, 100):
        expected = (y[similarity.topk(k).indices] == y[:, None]).any(1).double().mean()
        assert recall_at_k(x, y, (k,)).item() == pytest.approx(float(expected))


def test_what_is_equally_near_comes_in_every_order() -> None:
    """Points of a grid, where many are."""
    x = torch.tensor([[0.0], [1.0], [1.0], [-1.0], [1.0], [-1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1, 1, 0, 2])
    # The mean is taken away: halves and quarters have no rounding.
    x = x * 7
    for k in (1, 2, 3, 4, 6):
        total, counted = 0.0, 0
        for i in range(len(y)):
            others = [j for j in range(len(y)) if j != i]
            if not any(y[j] == y[i] for j in others):
                continue
            counted += 1
            away = {j: abs(float(x[j] - x[i])) for j in others}
            orders = [
                order
                for order in itertools.permutations(others)
                if all(away[a] <= away[b] for a, b in itertools.pairwise(order))
            ]
            total += sum(any(y[j] == y[i] for j in order[:k]) for order in orders) / len(orders)
        found = recall_at_k(x, y, (k,), distance="euclidean").item()
        assert found == pytest.approx(total / counted), k


def test_a_collapse_is_chance() -> None:
    y = torch.arange(40) % 4
    found = recall_at_k(torch.ones(40, 8), y, (1, 39))
    assert found.tolist() == pytest.approx([9 / 39, 1])


def test_ignored_and_lonely_samples() -> None:
    x, y = embeddings(30, 5)
    y[3] = -100
    kept = torch.arange(30) != 3
    assert torch.equal(recall_at_k(x, y), recall_at_k(x[kept], y[kept]))
    y[5] = 77  # of no other
    assert recall_at_k(x, y).item() == pytest.approx(by_sorting(x[kept], y[kept], 1, "cosine"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_several_models(dtype: torch.dtype) -> None:
    x, y = embeddings(50, 7)
    stacked = torch.stack([x, x.flip(0), -x]).to(dtype)
    found = recall_at_k(stacked, y.to(torch.int32), (1, 3))
    assert found.shape == (3, 2)
    for one, values in zip(stacked, found, strict=True):
        assert torch.equal(recall_at_k(one.float(), y, (1, 3)), values)


def test_the_metric() -> None:
    x, y = embeddings(50, 7)
    metric = RecallAtK(3)
    assert metric.compute().isnan() and metric.higher_is_better
    for part in (slice(0, 20), slice(20, 50)):
        metric.update(x[part], y[part])
    assert metric.compute() == recall_at_k(x, y, (3,))[0]
    other = RecallAtK(3)
    other.load_state_dict(metric.state_dict())
    assert other.compute() == metric.compute()
    assert torch.equal(metric.each(torch.stack([x, -x]), y), torch.stack([metric.compute()] * 2))
    x.zero_()
    assert other.compute() == metric.compute()
    metric.reset()
    assert metric.compute().isnan()


def test_nan_is_nan_where_nobody_may_look() -> None:
    x, y = embeddings(10, 3)
    x[4, 0] = torch.nan
    assert recall_at_k(x, y).isnan().all()
    assert recall_at_k(torch.stack([x, x.nan_to_num()]), y).isnan().tolist() == [[True], [False]]
    assert recall_at_k(x[:0], y[:0]).isnan().all()


def test_refuses() -> None:
    x, y = embeddings(10, 3)
    metric = RecallAtK()
    for call, message in (
        (lambda: recall_at_k(x, y[:9]), r"got \[10, 6\] and \[9\]"),
        (lambda: recall_at_k(x[0], y), r"\[N, D\] or \[B, N, D\]"),
        (lambda: recall_at_k(x, y, (0,)), "k must be at least 1, got 0"),
        (lambda: recall_at_k(x, y, distance="manhattan"), "distance must be one of 'cosine', 'euclidean'"),
        (lambda: recall_at_k(x, y.double()), "labels must be integers, got float64"),
        (lambda: recall_at_k(x.long(), y), "scores must be floating, got int64"),
        (lambda: metric.update(x, y, torch.ones(10)), "weight must be None"),
        (lambda: metric.update(x[0], y), r"\[N, D\] and labels \[N\]"),
        (lambda: metric.update(x / 0, y), "embeddings must be finite"),
        (lambda: RecallAtK(0), "k must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    metric.update(x, y)
    with pytest.raises(ValueError, match=r"must be \[N, 6\] as before, got \[10, 5\]"):
        metric.update(x[:, :5], y)
    assert len(metric.labels) == 1
