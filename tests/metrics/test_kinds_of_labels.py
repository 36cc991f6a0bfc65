"""Classes, yes or no, several labels; ignored ones, weights, every dtype: as scikit-learn and torchmetrics say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lossmeta import _checks
from lossmeta.metrics import AveragePrecision, ErrorRate, _metric, average_precision, error_rate

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


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), c=st.integers(2, 4), weighted=st.booleans())
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


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    threshold=st.sampled_from([0.0, 0.3, 0.5]),
    ties=st.booleans(),
)
def test_one_column_of_scores_is_yes_or_no(seed: int, n: int, threshold: float, ties: bool) -> None:
    """Scores [N, 1] with labels [N] mean what [N] with [N] and [N, 1] with [N, 1] mean, not a single class."""
    theirs = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    scores = (scores * 4).round() / 4 if ties else scores
    labels = torch.randint(2, (n,), generator=generator)
    labels[0] = 1
    precision = theirs.average_precision_score(labels, scores)
    error = theirs.zero_one_loss(labels, scores > threshold)
    forms = [(scores, labels), (scores[:, None], labels), (scores[:, None], labels[:, None])]
    for batch in forms:
        assert AveragePrecision()(*batch).item() == pytest.approx(precision, rel=1e-12)
        assert ErrorRate(threshold=threshold)(*batch).item() == pytest.approx(error, rel=1e-12)
    mixed = AveragePrecision()
    for batch in forms:
        mixed.update(*batch)
    assert mixed.compute().item() == pytest.approx(
        theirs.average_precision_score(labels.repeat(3), scores.repeat(3)), rel=1e-12
    )
    with pytest.raises(ValueError, match=r"^ErrorRate: yes-or-no labels need a threshold"):
        ErrorRate()(scores[:, None], labels)


def test_an_ignored_label_does_not_wrap_around() -> None:
    """-100 is 156 as uint8."""
    scores, labels = torch.rand(2, 2), torch.tensor([[156, 0], [1, 0]], dtype=torch.uint8)
    for metric in (ErrorRate(threshold=0.5), AveragePrecision()):
        with pytest.raises(ValueError, match=r"must be 0 or 1, got 156 at index 0$"):
            metric(scores, labels)


def test_no_columns_give_nan() -> None:
    scores, labels = torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int64)
    assert AveragePrecision()(scores, labels).isnan()
    assert ErrorRate(threshold=0.0)(scores, labels).isnan()


@pytest.mark.parametrize(
    ("bad", "ignore_index"),
    [
        (bad, ignore_index)
        for bad in (0.7, -1.0, 1.5, torch.nan, torch.inf, 2.0)
        for ignore_index in (-100, -1, 2)
        if bad != ignore_index
    ],
)
@pytest.mark.parametrize("look", [True, False])
def test_soft_labels_are_never_taken_for_yes_or_no(
    bad: float, ignore_index: int, look: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not look:
        for module in (_checks, _metric, average_precision, error_rate):
            monkeypatch.setattr(module, "may_look", lambda tensor: False)
    scores, labels = torch.rand(4, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, bad], [1.0, 0.0]])
    precision = AveragePrecision(ignore_index=ignore_index)
    with pytest.raises(ValueError, match=r"^AveragePrecision: labels .* index 5$"):
        precision(scores, labels)
    error = ErrorRate(ignore_index=ignore_index, threshold=0.5)
    if look:
        with pytest.raises(ValueError, match=r"^ErrorRate: labels .* index 5$"):
            error(scores, labels)
    else:
        assert error(scores, labels).isnan()


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("look", [True, False])
def test_weights_are_finite_and_not_negative(bad: float, look: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not look:
        for module in (_checks, _metric, average_precision, error_rate):
            monkeypatch.setattr(module, "may_look", lambda tensor: False)
    scores, labels, weight = torch.rand(4, 3), torch.tensor([0, 1, 2, 0]), torch.ones(4)
    weight[2] = bad
    message = r"^{}: weight must be finite and not negative, got .* at index 2$"
    with pytest.raises(ValueError, match=message.format("AveragePrecision")):
        AveragePrecision()(scores, labels, weight)
    if look:
        with pytest.raises(ValueError, match=message.format("ErrorRate")):
            ErrorRate()(scores, labels, weight)
    else:
        assert ErrorRate()(scores, labels, weight).isnan()


def test_weights_are_numbers() -> None:
    batch = torch.rand(2, 3), torch.tensor([0, 1])
    for dtype in (torch.int32, torch.float16, torch.bool):
        assert ErrorRate()(*batch, torch.ones(2, dtype=dtype)) == ErrorRate()(*batch)
    with pytest.raises(ValueError, match=r"^ErrorRate: weight must be real, got complex64$"):
        ErrorRate()(*batch, torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": torch.nan}, ValueError, "threshold must be finite, got nan"),
        ({"threshold": torch.inf}, ValueError, "threshold must be finite, got inf"),
        ({"threshold": "0"}, TypeError, "threshold must be a number, got str"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type, message: str) -> None:
    kinds = [ErrorRate, AveragePrecision] if "ignore_index" in options else [ErrorRate]
    for kind in kinds:
        with pytest.raises(error, match=f"^{kind.__name__}: {message}$"):
            kind(**options)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), c=st.integers(2, 4), ignored=st.booleans())
def test_error_rate_of_several_labels_is_hamming_distance(seed: int, n: int, c: int, ignored: bool) -> None:
    theirs = pytest.importorskip(
        "torchmetrics.functional.classification", reason="compared with torchmetrics"
    )
    sklearn = pytest.importorskip("sklearn.metrics", reason="compared with scikit-learn")
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(n, c, generator=generator), torch.randint(2, (n, c), generator=generator)
    if not ignored:
        expected = sklearn.hamming_loss(labels, logits > 0)
    else:
        labels[torch.rand(n, c, generator=generator) < 0.2] = -1
        expected = theirs.multilabel_hamming_distance(
            logits.sigmoid(), labels, c, average="micro", ignore_index=-1
        ).item()
        if not (labels >= 0).any():
            expected = torch.nan
    for actual in (
        ErrorRate(threshold=0.0, ignore_index=-1)(logits, labels),
        ErrorRate(threshold=0.5, ignore_index=-1)(logits.sigmoid(), labels),
    ):
        assert actual.item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_weights_are_kept_in_step_with_samples() -> None:
    """Also where states were joined from elsewhere."""
    metric = AveragePrecision()
    metric.load_state_dict(
        {"scores": [torch.rand(3, 2)], "labels": [torch.tensor([0, 1, 0])], "weights": [torch.ones(2)]}
    )
    with pytest.raises(
        ValueError, match=r"^AveragePrecision: all batches must have a weight, or none, got both$"
    ):
        metric.compute()
