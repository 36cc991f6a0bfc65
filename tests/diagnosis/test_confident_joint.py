"""The confident joint: by hand, against cleanlab's figures, under permutations, and on synthetic noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lossmeta.diagnosis import confident_joint


def waves(size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Probabilities and labels without random numbers, so that any library sees the same."""
    i, j = np.arange(size)[:, None], np.arange(classes)[None]
    true = (7 * np.arange(size) // 3) % classes
    wrong = (np.arange(size) * 5) % 11 < 4
    labels = np.where(wrong, (true + 1 + np.arange(size) % (classes - 1)) % classes, true)
    odds = np.exp(2 * np.sin(1.7 * i + 2.3 * (j + 1) ** 2) + 3.0 * (j == true[:, None]))
    return torch.from_numpy(odds / odds.sum(1, keepdims=True)), torch.from_numpy(labels)


def noisy(
    size: int, classes: int, share: float, *, pairs: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sharp probabilities of the true class, labels, and which of them are wrong."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.arange(size) % classes
    step = 1 if pairs else torch.randint(1, classes, (size,), generator=generator)
    labels = torch.where(torch.rand(size, generator=generator) < share, (true + step) % classes, true)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    logits += 8 * torch.nn.functional.one_hot(true, classes)
    return logits.softmax(1), labels, labels != true


# ---- By hand.


def test_by_hand() -> None:
    # Thresholds: class 0 (.9 + .8 + .1) / 3 = .6; class 1 (.8 + .7 + .9) / 3 = .8. Row 2 counts as class 1, the last
    # but one (.3, .7) and the fourth (.2, .8 rounds to the threshold) : only the latter counts, for class 1.
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])
    found = confident_joint(p, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(
        found.thresholds, torch.tensor([0.6, 0.8], dtype=torch.float64), atol=1e-7, rtol=0
    )
    # Counts, rows true: class 0: 2 with label 0; class 1: 1 with label 0, 2 with label 1. Label 1 is scaled by 3/2.
    joint = torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(found.joint, joint)
    torch.testing.assert_close(found.transition, torch.tensor([[1, 0], [1 / 4, 3 / 4]], dtype=torch.float64))
    assert found.share == pytest.approx(1 / 6)
    assert found.confident == 5
    assert found.suspects.tolist() == [2] and found.suggested.tolist() == [1]


def test_the_interval_is_wilsons_for_as_many_samples_as_the_counts_are_worth() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.1, 0.9]])
    found = confident_joint(p, torch.tensor([0, 0, 0, 1, 1, 1]))
    count = 1 / (0.5**2 / 3 + 0.5**2 / 2)
    z, share = 1.959963984540054, 1 / 6
    for bound in found.interval:  # they solve |s - b| = z sqrt(b (1 - b) / n)
        assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / count))
    assert found.interval[0] < share < found.interval[1]


def test_three_classes_by_hand() -> None:
    p = torch.tensor(
        [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]],
        dtype=torch.float64,
    )
    found = confident_joint(p, torch.tensor([0, 0, 1, 1, 2]))
    torch.testing.assert_close(found.thresholds, torch.tensor([0.7, 0.5, 0.6], dtype=torch.float64))
    joint = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.float64) / 5
    torch.testing.assert_close(found.joint, joint)
    assert found.confident == 4  # the second row is below all thresholds
    assert found.suspects.tolist() == [3] and found.suggested.tolist() == [2]
    assert found.concentration == 1 and found.spread == "unknown"


def test_suspects_come_by_self_confidence() -> None:
    p, labels, _ = noisy(500, 4, 0.3)
    found = confident_joint(p, labels)
    own = p[found.suspects, labels[found.suspects]]
    assert len(own) > 50 and bool((own.diff() >= 0).all())
    assert bool((found.suggested != labels[found.suspects]).all())


# ---- Against cleanlab 2.9.0, whose figures for the same probabilities these are.


def test_small_figures_of_cleanlab() -> None:
    p, labels = waves(60, 3)
    found = confident_joint(p, labels)
    thresholds = [0.63975787, 0.53330241, 0.57495095]
    torch.testing.assert_close(found.thresholds, torch.tensor(thresholds).double(), atol=1e-7, rtol=0)
    given_by_true = torch.tensor([[10, 3, 1], [5, 14, 4], [5, 3, 15]]).double()  # compute_confident_joint
    scaled = given_by_true * (labels.bincount() / given_by_true.sum(1))[:, None] / 60
    torch.testing.assert_close(found.joint, scaled.T)
    first = [
        0,
        22,
        33,
        44,
        20,
        42,
        18,
        5,
        55,
        9,
        29,
        40,
    ]  # find_label_issues, confident_learning, self_confidence
    assert found.suspects.tolist()[:12] == first and len(found.suspects) == 21


def test_larger_figures_of_cleanlab() -> None:
    p, labels = waves(1000, 10)
    found = confident_joint(p, labels)
    assert found.confident == 644 and len(found.suspects) == 644 - 384
    assert found.share == pytest.approx(0.401, abs=2e-3)  # estimate_joint, whose cells are whole samples
    first = [539, 506, 236, 269, 742, 878, 797, 821, 504, 18, 262, 852]
    assert found.suspects.tolist()[:12] == first
    label_0 = torch.tensor([39, 3, 2, 8, 2, 2, 8, 2, 2, 2]).double()
    torch.testing.assert_close(found.joint[:, 0] / found.joint[:, 0].sum(), label_0 / label_0.sum())


# ---- On noise that is known.


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_finds_the_share_of_a_sharp_model(classes: int, share: float) -> None:
    p, labels, wrong = noisy(5000, classes, share)
    found = confident_joint(p, labels)
    assert found.share == pytest.approx(float(wrong.double().mean()), abs=0.015)
    torch.testing.assert_close(found.joint.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(found.joint.sum(0), labels.bincount(minlength=classes).double() / 5000)
    torch.testing.assert_close(found.transition.sum(1), torch.ones(classes, dtype=torch.float64))
    if share:
        hits = wrong[found.suspects]
        assert float(hits.double().mean()) > 0.97 and float(hits.sum() / wrong.sum()) > 0.8


def test_finds_the_transition() -> None:
    p, labels, _ = noisy(20_000, 5, 0.3, pairs=True)
    expected = 0.7 * torch.eye(5) + 0.3 * torch.eye(5).roll(1, 1)
    torch.testing.assert_close(confident_joint(p, labels).transition, expected.double(), atol=0.03, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_tells_how_wrong_labels_spread(seed: int) -> None:
    even, labels, _ = noisy(2000, 10, 0.3, seed=seed)
    found = confident_joint(even, labels)
    assert found.spread == "even" and found.concentration < 0.3
    pairs, labels, _ = noisy(2000, 10, 0.3, pairs=True, seed=seed)
    found = confident_joint(pairs, labels)
    assert found.spread == "class to class" and found.concentration > 0.9
    few, labels, _ = noisy(60, 10, 0.1, pairs=True, seed=seed)
    assert confident_joint(few, labels).spread == "unknown"


def test_between_even_and_class_to_class_it_is_mixed() -> None:
    p, labels, wrong = noisy(20_000, 10, 0.3)
    true = torch.arange(20_000) % 10
    moved = wrong & (torch.rand(20_000) < 0.2)
    found = confident_joint(p, torch.where(moved, (true + 1) % 10, labels))
    assert found.spread == "mixed" and 0.25 < found.concentration < 0.33


def test_two_classes_compare_their_rates() -> None:
    p, labels, _ = noisy(2000, 2, 0.3)
    found = confident_joint(p, labels)
    assert found.spread == "even" and found.concentration == pytest.approx(0.5, abs=0.05)
    p, labels, _ = noisy(20_000, 2, 0.3)
    kept = (torch.arange(20_000) % 2 == 1) | (
        torch.arange(20_000) % 10 == 0
    )  # a fifth of the zeros, as often wrong
    found = confident_joint(p[kept], labels[kept])
    assert found.spread == "even" and found.concentration == pytest.approx(0.5, abs=0.1)
    true = torch.arange(20_000) % 2
    found = confident_joint(p, torch.where(true == 0, labels, true))  # zeros alone are taken for ones
    assert found.spread == "class to class" and found.concentration > 0.95


def test_the_interval_covers_where_the_model_is_right() -> None:
    """Of 40 draws with certain probabilities the interval of 95 % has the expected share in all but a few."""
    covered = 0
    for seed in range(40):
        _, labels, _ = noisy(400, 4, 0.3, seed=seed)
        certain = torch.nn.functional.one_hot(torch.arange(400) % 4, 4).double()
        low, high = confident_joint(certain, labels).interval
        covered += low <= 0.3 <= high
    assert covered >= 35


# ---- What must not matter.


def test_the_order_of_samples_does_not_matter() -> None:
    p, labels, _ = noisy(700, 6, 0.3)
    order = torch.randperm(700)
    found, again = confident_joint(p, labels), confident_joint(p[order], labels[order])
    torch.testing.assert_close(again.joint, found.joint)
    assert again.share == pytest.approx(found.share) and again.spread == found.spread
    assert torch.equal(order[again.suspects], found.suspects)


def test_the_order_of_classes_does_not_matter() -> None:
    p, labels, _ = noisy(700, 6, 0.3)
    order = torch.randperm(6)
    place = order.argsort()
    found, again = confident_joint(p, labels), confident_joint(p[:, order], place[labels])
    torch.testing.assert_close(again.joint, found.joint[order][:, order])
    assert torch.equal(order[again.suggested], found.suggested)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_numbers_hardly_matters(dtype: torch.dtype) -> None:
    p, labels, _ = noisy(2000, 6, 0.3)
    assert confident_joint(p.to(dtype), labels.int()).share == pytest.approx(
        confident_joint(p, labels).share, abs=0.02
    )


def test_rows_that_are_rounded_are_scaled() -> None:
    p, labels, _ = noisy(300, 3, 0.2)
    torch.testing.assert_close(
        confident_joint(0.995 * p, labels).thresholds, confident_joint(p, labels).thresholds
    )


def test_arrays_are_as_good_as_tensors() -> None:
    p, labels, _ = noisy(300, 3, 0.2)
    found = confident_joint(p, labels)
    for array in (p.numpy(), np.asfortranarray(p.numpy()), p.numpy()[::-1][::-1], p.numpy().astype(">f8")):
        again = confident_joint(array, labels.numpy().astype(np.uint8))
        assert torch.equal(again.joint, found.joint) and torch.equal(again.suspects, found.suspects)


# ---- The edges.


def test_equal_probabilities_say_nothing_against_a_label() -> None:
    found = confident_joint(torch.full((30, 10), 0.1), torch.arange(30) % 10)
    assert found.share == 0 and found.confident == 30 and len(found.suspects) == 0
    assert math.isnan(found.concentration)
    assert torch.equal(found.transition, torch.eye(10, dtype=torch.float64))


def test_hard_predictions_give_the_matrix_of_confusions() -> None:
    predicted = torch.tensor([0, 0, 1, 1, 2, 0])
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    found = confident_joint(torch.nn.functional.one_hot(predicted, 3).double(), labels)
    confusions = torch.zeros(3, 3, dtype=torch.float64)
    confusions.index_put_((predicted, labels), torch.ones(6).double() / 6, accumulate=True)
    torch.testing.assert_close(found.joint, confusions)


def test_a_class_that_is_never_predicted_leaves_its_samples_elsewhere() -> None:
    found = confident_joint(torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found.joint, torch.tensor([[2, 1], [0, 0]]).double() / 3)
    assert torch.equal(found.transition[1], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_a_label_whose_samples_do_not_count_is_taken_for_right() -> None:
    p = torch.tensor([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0]], dtype=torch.float64)
    found = confident_joint(p, torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(found.joint, torch.diag(torch.tensor([2.0, 1, 1])).double() / 4)
    assert found.share == 0 and found.confident == 3 and found.suspects.tolist() == []


def test_a_class_without_samples() -> None:
    p, labels, _ = noisy(300, 3, 0.0)
    wide = torch.cat([p * 0.9, p.new_full((300, 1), 0.1)], 1)
    found, narrow = confident_joint(wide, labels), confident_joint(p, labels)
    assert found.thresholds[3] == math.inf
    torch.testing.assert_close(found.joint[:3, :3], narrow.joint)
    assert float(found.joint[3].sum() + found.joint[:, 3].sum()) == 0
    assert torch.equal(found.transition[3], torch.tensor([0, 0, 0, 1.0], dtype=torch.float64))


def test_one_sample() -> None:
    found = confident_joint(torch.tensor([[0.3, 0.7]]), torch.tensor([0]))
    assert found.share == 0 and found.interval[1] > 0.7


GOOD = torch.tensor([[0.4, 0.6], [0.5, 0.5]])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (
            GOOD.log(),
            LABELS,
            r"probabilities must not be negative, got -0.916291; for logits take \.softmax\(1\)",
        ),
        (GOOD * 3, LABELS, r"probabilities must sum to 1 in every row, got a sum of 3 in row 0; for logits"),
        (GOOD * torch.nan, LABELS, r"probabilities must be finite, got nan at index 0"),
        (GOOD / 0, LABELS, r"probabilities must be finite, got inf at index 0"),
        (GOOD.long(), LABELS, r"probabilities must be floating, got int64"),
        (GOOD[0], LABELS, r"probabilities must be \[N, C\], got \[2\]"),
        (GOOD[:0], LABELS[:0], r"probabilities must have at least one sample, got \[0, 2\]"),
        (GOOD[:, :1], LABELS, r"at least 2 classes, got \[2, 1\]; for a yes-or-no model stack \[1 - p, p\]"),
        (GOOD, LABELS[:1], r"labels must be \[2\], one for each row of probabilities, got \[1\]"),
        (GOOD, LABELS[:, None], r"labels must be \[N\], got \[2, 1\]"),
        (GOOD, LABELS.float(), r"labels must be integers, got float32"),
        (GOOD, LABELS + 1, r"labels must lie in \[0, 2\), got 2 at index 1"),
        (GOOD, LABELS - 1, r"labels must not be negative, got -1 at index 0"),
        (GOOD.numpy().astype(complex), LABELS, r"probabilities must be numbers, got dtype complex128"),
    ],
)
def test_bad_input(p: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^confident_joint: .*{message}"):
        confident_joint(p, labels)


def test_bad_types() -> None:
    with pytest.raises(
        TypeError, match=r"^confident_joint: probabilities must be a tensor or a NumPy array, got list"
    ):
        confident_joint([[0.5, 0.5]], LABELS)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"^confident_joint: labels must be a tensor or a NumPy array, got list"
    ):
        confident_joint(GOOD, [0, 1])  # type: ignore[arg-type]
