"""Top-k and calibration errors against scikit-learn, loops, and all orders of what is tied."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from lossmeta.metrics import CalibrationError, ErrorRate, Metric, TopKErrorRate

CLASSES = 6
KINDS = [lambda: TopKErrorRate(2), CalibrationError, lambda: CalibrationError(4)]


def batch(seed: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, CLASSES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def of(metric: Metric, scores: Tensor, labels: Tensor, *weight: Tensor) -> float:
    metric.reset()
    metric.update(scores, labels, *weight)
    return metric.compute().item()


@pytest.mark.parametrize("k", [1, 2, 5, 6, 9])
def test_top_k_is_that_of_scikit_learn(k: int) -> None:
    for n in (1, 2, 50):
        scores, labels = batch(n, n)
        expected = 0.0
        if k < CLASSES:
            expected = 1 - top_k_accuracy_score(labels, scores.numpy(), k=k, labels=range(CLASSES))
        assert of(TopKErrorRate(k), scores, labels) == pytest.approx(expected)
    assert of(TopKErrorRate(1), scores, labels) == of(ErrorRate(), scores, labels)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_come_in_every_order(k: int) -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0]])
    labels = torch.tensor([1, 3, 2])
    total = 0.0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        orders = [
            order
            for order in itertools.permutations(range(4))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order))
        ]
        total += sum(label not in order[:k] for order in orders) / len(orders)
    assert of(TopKErrorRate(k), scores, labels) == pytest.approx(total / 3)


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("logits", [True, False])
def test_calibration_in_loops(bins: int, logits: bool) -> None:
    scores, labels = batch(1, 80)
    p = torch.softmax(scores.double(), 1)
    filled: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(p.tolist(), labels.tolist(), strict=True):
        confidence = max(row)
        filled[max(0, math.ceil(confidence * bins) - 1)].append((confidence, row.index(confidence) == label))
    expected = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in filled) / 80
    found = of(CalibrationError(bins, logits=logits), scores if logits else p, labels)
    assert found == pytest.approx(expected)


def test_edges_of_the_bins() -> None:
    """A confidence on an edge belongs to the bin below, 1 to the last."""
    metric = CalibrationError(2, logits=False)
    metric.update(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.6, 0.4]]), torch.tensor([0, 0, 1, 1]))
    assert metric.sums.tolist() == [[1, 3], [1, 2], [0.5, pytest.approx(2.6)]]


@pytest.mark.parametrize("make", KINDS)
def test_parts_weights_ignored_labels_and_dimensions(make: Any) -> None:
    scores, labels = batch(0, 60)
    metric = make()
    whole = of(metric, scores, labels)
    metric.reset()
    for part in (slice(0, 7), slice(7, 60)):
        metric.update(scores[part], labels[part])
    assert metric.compute().item() == pytest.approx(whole)
    weight = (torch.arange(60) < 40).float()
    assert of(metric, scores, labels, weight) == pytest.approx(of(metric, scores[:40], labels[:40]))
    ignored = labels.where(weight > 0, -100)
    assert of(metric, scores, ignored) == pytest.approx(of(metric, scores[:40], labels[:40]))
    image = scores.view(6, 10, CLASSES).transpose(1, 2)
    assert of(metric, image, labels.view(6, 10)) == pytest.approx(whole)
    other = make()
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.compute(), metric.compute())
    assert make().compute().isnan() and not metric.higher_is_better


@pytest.mark.parametrize("make", KINDS)
def test_of_several_models_at_once(make: Any) -> None:
    labels = batch(0, 50)[1]
    labels[3] = -100
    scores = torch.stack([batch(k, 50)[0] for k in range(4)])
    metric = make()
    assert torch.equal(metric.each(scores, labels), Metric.each(metric, scores, labels))
    assert metric.compute().isnan()


@pytest.mark.parametrize("make", KINDS)
def test_refuses(make: Any) -> None:
    metric = make()
    labels = torch.tensor([0, 1])
    for scores, given, message in (
        (torch.zeros(2, 4), torch.tensor([0, 4]), r"labels must lie in \[0, 4\), got 4 at index 1"),
        (torch.zeros(2), labels, "scores must be"),
        (torch.zeros(2, 4), labels[:1], r"got \[2, 4\] and \[1\]"),
        (torch.full((2, 4), torch.nan), labels, "scores must not be NaN"),
        (torch.zeros(2, 4), labels.float(), "labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(scores, given)
    assert metric.compute().isnan()


def test_refuses_options() -> None:
    for make, message in (
        (lambda: TopKErrorRate(0), "k must be at least 1, got 0"),
        (lambda: CalibrationError(0), "bins must be at least 1, got 0"),
        (lambda: of(CalibrationError(logits=False), torch.tensor([[1.2, 0.0]]), torch.tensor([0])), "lie in"),
        (
            lambda: CalibrationError(3).load_state_dict(CalibrationError(4).state_dict()),
            r"sums must be \[3, 3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
