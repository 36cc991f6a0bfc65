"""Metrics of hits, predictions and labels per class, against scikit-learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score
from torch import Tensor

from lossmeta.metrics import BalancedErrorRate, ErrorRate, MacroF1, Metric, WorstClassRecall

CLASSES = 5


def worst_recall(labels: list[int], predictions: list[int]) -> float:
    each = recall_score(labels, predictions, average=None, labels=sorted(set(labels)), zero_division=0)
    return float(each.min())


REFERENCES: dict[str, tuple[Any, Any]] = {
    "worst": (WorstClassRecall, worst_recall),
    "balanced": (BalancedErrorRate, lambda y, p: 1 - balanced_accuracy_score(y, p)),
    "f1": (MacroF1, lambda y, p: f1_score(y, p, average="macro", labels=sorted({*y, *p}))),
}
COUNTING = [kind(CLASSES) for kind, _ in REFERENCES.values()]


def batch(seed: int, n: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=generator), torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("n", [1, 3, 7, 400])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_against_scikit_learn(name: str, n: int) -> None:
    """Also where classes have no label, or no prediction."""
    kind, reference = REFERENCES[name]
    for seed in range(5):
        scores, labels = batch(seed, n)
        expected = reference(labels.tolist(), scores.argmax(1).tolist())
        metric = kind(CLASSES)
        for part in (slice(0, n // 2), slice(n // 2, n)):
            metric.update(scores[part], labels[part])
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_ignored_labels_weights_and_dimensions(name: str) -> None:
    kind, _ = REFERENCES[name]
    scores, labels = batch(0, 60)
    metric, plain = kind(CLASSES), kind(CLASSES)
    weight = torch.ones(60)
    weight[40:] = 0
    metric.update(scores, labels, weight)
    plain.update(scores[:40], labels[:40])
    assert torch.equal(metric.compute(), plain.compute())
    metric.reset()
    metric.update(
        scores.view(6, 10, CLASSES).transpose(1, 2), labels.view(6, 10).where(torch.arange(10) < 9, -100)
    )
    plain.reset()
    kept = torch.arange(60) % 10 < 9
    plain.update(scores[kept], labels[kept])
    assert torch.equal(metric.compute(), plain.compute())


@pytest.mark.parametrize("metric", [*COUNTING, ErrorRate()])
def test_of_several_models_at_once(metric: Metric) -> None:
    labels = batch(0, 50)[1]
    labels[3] = -100
    scores = torch.stack([batch(k, 50)[0] for k in range(4)])
    before = copy.deepcopy(metric.state_dict())
    together = metric.each(scores, labels)
    assert torch.equal(together, Metric.each(metric, scores, labels))
    assert together.dtype == torch.float64 and together.shape == (4,)
    after = metric.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_is_nan_and_a_state_is_kept(name: str) -> None:
    metric = REFERENCES[name][0](CLASSES)
    assert metric.compute().isnan() and metric.compute().dtype == torch.float64
    metric.update(*batch(0, 30))
    other = REFERENCES[name][0](CLASSES)
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.compute(), metric.compute())
    with pytest.raises(ValueError, match=r"counts must be \[3, 4\], got \[3, 5\]"):
        REFERENCES[name][0](4).load_state_dict(metric.state_dict())


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), r"scores must be \[N, 5\].* got \[2, 4\]"),
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64), r"got \[2, 5\] and \[3\]"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), r"labels must lie in \[0, 5\), got 5 at index 1"),
        (torch.zeros(2, 5), torch.zeros(2), "labels must be integers"),
        (torch.full((2, 5), torch.nan), torch.tensor([0, 1]), "scores must not be NaN"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]), "scores must be floating"),
    ],
)
def test_refuses(scores: Tensor, labels: Tensor, message: str) -> None:
    metric = WorstClassRecall(CLASSES)
    for call in (lambda: metric.update(scores, labels), lambda: metric.each(scores[None], labels)):
        with pytest.raises(ValueError, match=message):
            call()
    assert metric.compute().isnan()
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        WorstClassRecall(0)
