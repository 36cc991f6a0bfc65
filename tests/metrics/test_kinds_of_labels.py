"""Classes, yes or no, several labels; ignored ones, weights, every dtype: as scikit-learn and torchmetrics say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lossmeta.metrics import AveragePrecision, ErrorRate

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def sklearn_precision(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> float:
    metrics = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    found = []
    for s, y in zip(scores.T, labels.T, strict=True):
        if y.any():
            found.append(metrics.average_precision_score(y, s, sample_weight=weight))
    return float(np.mean(found)) if found else float("nan")


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    c=st.integers(1, 4),
    weighted=st.booleans(),
    ties=st.booleans(),
)
def test_average_precision_of_several_labels(seed: int, n: int, c: int, weighted: bool, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, c, generator=generator, dtype=torch.float64)
    scores = (scores * 4).round() / 4 if ties else scores
    labels = torch.randint(2, (n, c), generator=generator)
    weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
    metric = AveragePrecision()
    for rows in torch.arange(n).split(7):
        metric.update(scores[rows], labels[rows], None if weight is None else weight[rows])
    assert metric.compute().item() == pytest.approx(
        sklearn_precision(scores, labels, weight), rel=1e-12, nan_ok=True
    )


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), c=st.integers(1, 4), weighted=st.booleans())
def test_average_precision_of_classes_with_ignored_ones_and_weights(
    seed: int, n: int, c: int, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, c, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, c, (n,), generator=generator)
    weight = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 if weighted else None
    metric = AveragePrecision(ignore_index=-1)
    metric.update(scores, labels, weight)
    counts = labels >= 0
    expected = sklearn_precision(
        scores[counts],
        torch.nn.functional.one_hot(labels[counts], c),
        None if weight is None else weight[counts],
    )
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", [ErrorRate, AveragePrecision])
def test_labels_of_every_integer_dtype(kind: Any, dtype: torch.dtype) -> None:
    scores, labels = torch.randn(20, 5), torch.randint(5, (20,))
    assert kind()(scores, labels.to(dtype)) == kind()(scores, labels)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float32])
def test_yes_and_no_of_every_dtype(dtype: torch.dtype) -> None:
    scores, labels = torch.randn(20, 3), torch.randint(2, (20, 3))
    for metric in (ErrorRate(threshold=0.0), AveragePrecision()):
        assert metric(scores, labels.to(dtype)) == metric(scores, labels)


@pytest.mark.parametrize("shape", [(20,), (20, 1), (20, 4), (20, 4, 2)])
def test_error_rate_of_yes_and_no(shape: tuple[int, ...]) -> None:
    scores, labels = torch.randn(shape), torch.randint(2, shape)
    labels[3] = -100
    metric = ErrorRate(threshold=0.5)
    metric.update(scores.sigmoid(), labels)
    counts = labels != -100
    expected = ((scores > 0) != labels)[counts].double().mean()
    torch.testing.assert_close(metric.compute(), expected)
    assert ErrorRate(threshold=0.0)(scores, labels) == metric.compute()


def test_as_torchmetrics() -> None:
    theirs = pytest.importorskip(
        "torchmetrics.functional.classification", reason="compared with torchmetrics"
    )
    scores, labels = torch.rand(50, 4), torch.randint(2, (50, 4))
    labels[::7] = -1
    ours = ErrorRate(threshold=0.5, ignore_index=-1)(scores, labels)
    # Their macro average is over labels; with as many ignored in each it is ours.
    accuracy = theirs.multilabel_accuracy(scores, labels, 4, average="macro", ignore_index=-1)
    torch.testing.assert_close(ours.float(), 1 - accuracy)
    precision = theirs.multilabel_average_precision(scores, labels, 4, ignore_index=-1)
    torch.testing.assert_close(AveragePrecision(ignore_index=-1)(scores, labels).float(), precision)
    classes = torch.randint(4, (50,))
    accuracy = theirs.multiclass_accuracy(scores, classes, 4, average="micro")
    torch.testing.assert_close(ErrorRate()(scores, classes).float(), 1 - accuracy)


def test_weights_count_as_repetitions() -> None:
    scores, labels, weight = torch.randn(12, 3), torch.randint(3, (12,)), torch.randint(0, 4, (12,))
    for kind in (ErrorRate, AveragePrecision):
        repeated = kind()(scores.repeat_interleave(weight, 0), labels.repeat_interleave(weight))
        torch.testing.assert_close(kind()(scores, labels, weight.double()), repeated)


@pytest.mark.parametrize("kind", [ErrorRate, AveragePrecision])
def test_a_call_returns_the_batch_and_adds_it(kind: Any) -> None:
    metric, whole = kind(), kind()
    for _ in range(3):
        scores, labels = torch.randn(9, 3), torch.randint(3, (9,))
        alone = kind()
        alone.update(scores, labels)
        whole.update(scores, labels)
        assert metric(scores, labels) == alone.compute()
    assert metric.compute() == whole.compute()


def test_a_nan_is_never_right() -> None:
    scores = torch.full((10, 3), torch.nan)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        ErrorRate().update(scores, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match="scores must not be NaN"):
        ErrorRate(threshold=0.0).update(scores, torch.zeros(10, 3))
    ignored = torch.full((10,), -100)
    ignored[0], scores[0] = 1, torch.tensor([0.0, 1.0, 0.0])
    assert ErrorRate()(scores, ignored) == 0
    assert AveragePrecision()(scores, ignored) == 1
