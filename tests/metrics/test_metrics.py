from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from sklearn.metrics import average_precision_score
from torch import Tensor

from lossmeta.metrics import AveragePrecision, ErrorRate


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


@pytest.mark.parametrize(
    ("metric", "batches", "message"),
    [
        (
            ErrorRate,
            [(torch.zeros(3, 2), torch.zeros(2))],
            "ErrorRate: labels must have the shape of scores [N, C, d...] without C, "
            "got [2] for scores [3, 2]",
        ),
        (
            AveragePrecision,
            [(torch.zeros(3, 2), torch.zeros(3, 2))],
            "AveragePrecision: scores must be [N] or [N, C] and labels [N], got [3, 2] and [3, 2]",
        ),
        (
            AveragePrecision,
            [(torch.zeros(1, 2), torch.zeros(1)), (torch.zeros(1), torch.zeros(1))],
            "AveragePrecision: scores must stay [N, 2], got [N]",
        ),
        (
            AveragePrecision,
            [(torch.tensor([torch.nan]), torch.zeros(1))],
            "AveragePrecision: scores must not be NaN",
        ),
        (
            AveragePrecision,
            [(torch.zeros(2, 3), torch.tensor([0, 3]))],
            "AveragePrecision: labels must lie in [0, 3), got a range of [0, 3]",
        ),
    ],
)
def test_refuses_bad_input(metric: type, batches: list, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        of(metric(), *batches)
