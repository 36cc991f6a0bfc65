from __future__ import annotations

import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from sklearn.metrics import average_precision_score
from torch import Tensor

from lossmeta import _checks
from lossmeta.metrics import AveragePrecision, ErrorRate, average_precision


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def of(metric: AveragePrecision | ErrorRate, *batches: tuple[Tensor, Tensor]) -> float:
    for batch in batches:
        metric.update(*batch)
    return metric.compute().item()


def test_directions() -> None:
    assert not ErrorRate.higher_is_better
    assert AveragePrecision.higher_is_better


def test_error_rate_counts_over_batches() -> None:
    scores = torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 5], [4, 0, 0]])
    labels = torch.tensor([0, 2, 2, -100])
    assert of(ErrorRate(), (scores, labels)) == pytest.approx(1 / 3)
    assert of(ErrorRate(), (scores[:1], labels[:1]), (scores[1:], labels[1:])) == pytest.approx(1 / 3)
    assert of(ErrorRate(ignore_index=0), (scores[:3], labels[:3])) == pytest.approx(1 / 2)


def test_error_rate_of_images() -> None:
    scores, labels = torch.randn(3, 5, 4, 2), torch.randint(5, (3, 4, 2))
    assert of(ErrorRate(), (scores, labels)) == (scores.argmax(1) != labels).double().mean().item()


def test_no_samples_give_nan() -> None:
    assert ErrorRate().compute().isnan()
    assert AveragePrecision().compute().isnan()
    assert torch.tensor(
        of(AveragePrecision(), (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))
    ).isnan()


@given(
    classes=st.integers(2, 5),
    levels=st.sampled_from([2, 4, 1000]),
    samples=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_average_precision_is_that_of_scikit_learn(
    classes: int, levels: int, samples: int, dtype: torch.dtype, seed: int
) -> None:
    """Few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (samples, classes), generator=generator).to(dtype) / levels
    labels = torch.randint(classes, (samples,), generator=generator)
    expected = [
        average_precision_score((labels == c).numpy(), scores[:, c].double().numpy())
        for c in range(classes)
        if (labels == c).any()
    ]
    assert of(AveragePrecision(), (scores, labels)) == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    if (labels == 1).any():
        binary = average_precision_score((labels == 1).numpy(), scores[:, 1].double().numpy())
        actual = of(AveragePrecision(), (scores[:, 1], (labels == 1).long()))
        assert actual == pytest.approx(binary, abs=1e-12)


def test_average_precision_keeps_its_own_copy() -> None:
    metric = AveragePrecision()
    scores, labels = torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])
    metric.update(scores, labels)
    scores.zero_()
    labels.zero_()
    assert metric.compute().item() == pytest.approx(5 / 6)


@pytest.mark.parametrize("kind", [ErrorRate, AveragePrecision])
def test_reset_and_state(kind: type) -> None:
    torch.manual_seed(0)
    batches = [(torch.rand(20, 3), torch.randint(3, (20,))) for _ in range(2)]
    whole, first, resumed = kind(), kind(), kind()
    expected = of(whole, *batches)
    of(first, batches[0])
    resumed.load_state_dict(first.state_dict())
    first.reset()
    assert of(resumed, batches[1]) == expected
    assert of(first, *batches) == expected


def labels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "batch", "message"),
    [
        (
            ErrorRate,
            (torch.zeros(3, 2), labels(0, 0)),
            "labels must have the shape of scores [N, C, d...] without C, got [2] for scores [3, 2]",
        ),
        (ErrorRate, (torch.zeros(1, 0), labels(0)), "scores must have at least one class, got [1, 0]"),
        (ErrorRate, (torch.zeros(2, 2), torch.zeros(2)), "labels must be integers, got float32"),
        (ErrorRate, (torch.zeros(2, 2), labels(0, 5)), "labels must lie in [0, 2), got 5 at index 1"),
        (ErrorRate, (torch.zeros(3, 2), labels(0, -100, -1)), "labels must lie in [0, 2), got -1 at index 2"),
        (
            ErrorRate,
            (torch.zeros(2, 2, device="meta"), labels(0, 1)),
            "labels and scores must be on the same device, got cpu and meta; move one with .to()",
        ),
        (
            AveragePrecision,
            (torch.zeros(3, 2), torch.zeros(3, 3)),
            "scores must be [N] or [N, C] and labels [N] or [N, C], got [3, 2] and [3, 3]",
        ),
        (
            AveragePrecision,
            (torch.zeros(1), labels(0)),
            "scores must stay [N, 3] and labels [N], got [N] and [N]",
        ),
        (AveragePrecision, (torch.zeros(2, 3), torch.zeros(2)), "labels must be integers, got float32"),
        (
            ErrorRate,
            (torch.full((2, 2), torch.nan), labels(0, 1)),
            "scores must not be NaN; such a prediction is neither right nor wrong",
        ),
        (
            ErrorRate,
            (torch.zeros(2, 3), torch.zeros(2, 3)),
            "yes-or-no labels need a threshold, 0 for logits or 0.5 for probabilities, got none for labels [2, 3] and "
            "scores [2, 3]; or give scores [N, C] with the index of a class per sample",
        ),
        (ErrorRate, (torch.zeros(2, 3), labels(0, 1), torch.ones(3)), "weight must be [2], got [3]"),
        (
            ErrorRate,
            (torch.zeros(2, 3), labels(0, 1), torch.tensor([1.0, -1.0])),
            "weight must be finite and not negative, got -1.0 at index 1",
        ),
        (
            AveragePrecision,
            (torch.zeros(2, 3), labels(0, 1), torch.ones(2)),
            "all batches must have a weight, or none, got both",
        ),
        (
            ErrorRate,
            (torch.zeros(2, 3, dtype=torch.int64), labels(0, 1)),
            "scores must be floating, got int64",
        ),
        (AveragePrecision, (torch.full((1, 3), torch.nan), labels(0)), "scores must not be NaN"),
        (AveragePrecision, (torch.zeros(2, 3), labels(0, 3)), "labels must lie in [0, 3), got 3 at index 1"),
        (
            AveragePrecision,
            (torch.zeros(2, 3, device="meta"), labels(0, 1)),
            "labels and scores must be on the same device, got cpu and meta; move one with .to()",
        ),
        (ErrorRate, (np.zeros((1, 2)), labels(0)), "scores must be a tensor, got ndarray"),
        (AveragePrecision, (torch.zeros(1, 3), [0]), "labels must be a tensor, got list"),
    ],
)
def test_bad_input_is_refused_before_it_counts(kind: type, batch: tuple, message: str) -> None:
    torch.manual_seed(0)
    metric = kind()
    expected = of(metric, (torch.rand(9, 3), torch.randint(3, (9,))))
    with pytest.raises((TypeError, ValueError), match=exactly(f"{kind.__name__}: {message}")):
        metric.update(*batch)
    assert metric.compute().item() == expected


def test_binary_labels_are_0_and_1() -> None:
    with pytest.raises(
        ValueError,
        match=exactly("AveragePrecision: labels of the shape of scores must be 0 or 1, got 2 at index 0"),
    ):
        AveragePrecision().update(torch.zeros(1), labels(2))


def test_what_cannot_be_looked_at_is_told_with_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: an error rate of NaN from then on; average precision looks at everything when it is computed."""
    for module in (_checks, average_precision):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)
    bad, good = (torch.zeros(2, 3), labels(0, 3)), (torch.zeros(2, 3), labels(0, 1))
    assert torch.tensor(of(ErrorRate(), good, bad, good)).isnan()
    metric = ErrorRate()
    of(metric, bad)
    metric.reset()
    assert of(metric, good) == 0.5
    with pytest.raises(
        ValueError, match=exactly("AveragePrecision: labels must lie in [0, 3), got 3 at index 3")
    ):
        of(AveragePrecision(), good, bad)
    with pytest.raises(ValueError, match=exactly("AveragePrecision: scores must not be NaN")):
        of(AveragePrecision(), good, (torch.full((1, 3), torch.nan), labels(0)))
