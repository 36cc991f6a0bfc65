"""Verification accuracy against trying every threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lossmeta.metrics import RecallAtK, VerificationAccuracy, verification_accuracy, verification_pairs


def by_trying(x: Tensor, y: Tensor, pairs: Tensor, folds: int, cosine: bool) -> float:
    """With thresholds between all neighbouring distances, fold by fold."""
    v = x.double().numpy()
    if cosine:
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
    d = np.array([((v[a] - v[b]) ** 2).sum() for a, b in pairs.tolist()])
    same = np.array([bool(y[a] == y[b]) for a, b in pairs.tolist()])
    fold = np.arange(len(d)) * folds // len(d)
    accuracy = []
    for f in range(folds):
        known = fold != f if folds > 1 else fold == f
        values = np.unique(d[known])
        tried = [-np.inf, *(values[:-1] + np.diff(values) / 2), np.inf]
        scores = [((d[known] <= t) == same[known]).mean() for t in tried]
        best = tried[int(np.argmax(np.round(scores, 12)))]
        accuracy.append(((d[fold == f] <= best) == same[fold == f]).mean())
    return float(np.mean(accuracy))


def drawn(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(n, 5, generator=generator, dtype=torch.float64) + y[:, None], y


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("folds", [1, 2, 7, 10])
def test_against_trying(folds: int, distance: str) -> None:
    for seed in range(5):
        x, y = drawn(30, 4, seed)
        pairs = verification_pairs(y, 53, seed=seed)
        found = verification_accuracy(x, y, pairs, folds=folds, distance=distance)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(by_trying(x, y, pairs, folds, distance == "cosine"))


def test_equal_distances_are_on_one_side() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [9.0]])
    y = torch.tensor([0, 0, 1, 1, 2])
    pairs = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]])  # 1, 1, 1 and 36, the second of another class
    assert verification_accuracy(x, y, pairs, folds=1, distance="euclidean").item() == 0.75
    collapsed = torch.zeros(5, 1)
    assert verification_accuracy(collapsed, y, pairs, folds=1, distance="euclidean").item() == 0.5


def test_several_models_and_batches() -> None:
    x, y = drawn(40, 5, 0)
    pairs = verification_pairs(y, 60)
    both = torch.stack([x, x.flip(0)]).float()
    each = verification_accuracy(both, y, pairs)
    assert [v.item() for v in each] == [verification_accuracy(b, y, pairs).item() for b in both]
    metric = VerificationAccuracy(pairs)
    for rows in (slice(0, 7), slice(7, 40)):
        metric.update(both[0, rows], y[rows])
    assert metric.compute() == each[0]
    assert torch.equal(metric.each(both, y), each)
    other = VerificationAccuracy(pairs)
    other.load_state_dict(metric.state_dict())
    assert other.compute() == each[0]
    metric.reset()
    assert metric.compute().isnan()


def test_pairs() -> None:
    y = torch.tensor([3, 3, 3, 5, 5, 9])
    pairs = verification_pairs(y, 200, seed=1)
    same = y[pairs[:, 0]] == y[pairs[:, 1]]
    assert same[::2].all() and not same[1::2].any()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert set(pairs[::2].flatten().tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(pairs, verification_pairs(y, 200, seed=1))


def test_what_is_not_finite() -> None:
    x, y = drawn(10, 2, 0)
    pairs = verification_pairs(y, 20)
    x[int(pairs[0, 0])] = torch.nan
    assert verification_accuracy(x, y, pairs).isnan()
    with pytest.raises(ValueError, match="embeddings must be finite"):
        VerificationAccuracy(pairs).update(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": torch.tensor([[0, 10]])}, r"rows in \[0, 10\)"),
        ({"pairs": torch.tensor([[0, -1]])}, r"rows in \[0, 10\)"),
        ({"pairs": torch.zeros(3, dtype=torch.int64)}, r"must be \[P, 2\]"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.int64)}, "P at least 1"),
        ({"pairs": torch.zeros(4, 2)}, "int64"),
        ({"folds": 0}, "folds must be at least 1"),
        ({"folds": 21}, "at most the 20 pairs"),
        ({"distance": "manhattan"}, "distance"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    x, y = drawn(10, 2, 0)
    given = {"pairs": verification_pairs(y, 20), "folds": 1, **options}
    with pytest.raises(ValueError, match=message):
        verification_accuracy(x, y, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [[0, 1, 2], [4, 4, 4], []])
def test_no_pairs_to_draw(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="two classes, one of them twice"):
        verification_pairs(torch.tensor(labels, dtype=torch.int64), 4)


def test_ignored_samples_are_in_no_pair() -> None:
    y = torch.tensor([-100, 0, 0, -100, 1, 1, -100])
    pairs = verification_pairs(y, 60)
    assert set(pairs.flatten().tolist()) == {1, 2, 4, 5}
    assert (y[pairs[::2, 0]] == y[pairs[::2, 1]]).all() and (y[pairs[1::2, 0]] != y[pairs[1::2, 1]]).all()


def test_it_does_not_join_over_processes() -> None:
    assert RecallAtK().joined and not VerificationAccuracy(torch.tensor([[0, 1]]), folds=1).joined
