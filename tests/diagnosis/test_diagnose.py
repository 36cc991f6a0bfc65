"""Diagnoses: every figure against a formula of its own, the doors to come in by, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import lossmeta
from lossmeta.diagnosis import confident_joint
from lossmeta.metrics import CalibrationError


def draw(size: int, classes: int = 4, *, strength: float = 6.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities of some model, and labels that it is mostly right about."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % classes
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64)
    return (logits + strength * torch.nn.functional.one_hot(labels, classes)).softmax(1), labels


def redrawn(labels: Tensor, share: float, classes: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, other, labels)


# ---- Figures.


def test_figures_are_what_they_are_called() -> None:
    p, labels = draw(800, strength=2)
    found = lossmeta.diagnose(p, labels)
    right = (p.argmax(1) == labels).double()
    assert (found.samples, found.classes) == (800, 4)
    assert found.error == pytest.approx(1 - float(right.mean()))
    assert found.error_interval[0] < found.error < found.error_interval[1]
    assert torch.equal(found.labels.joint, confident_joint(p, labels).joint)
    excess = p.max(1).values - right
    assert found.confidence.excess == pytest.approx(float(excess.mean()))
    half = 1.959963984540054 * float(excess.std()) / math.sqrt(800)
    assert found.confidence.interval == pytest.approx(
        (float(excess.mean()) - half, float(excess.mean()) + half)
    )
    metric = CalibrationError(logits=False)
    metric.update(p, labels)
    assert found.confidence.calibration_error == pytest.approx(float(metric.compute()))
    assert found.overfitting is None and found.clean is None and found.informative


def test_balance() -> None:
    labels = torch.tensor([0] * 80 + [1] * 16 + [2] * 4)
    p = torch.nn.functional.one_hot(labels, 4) * 0.8 + 0.05
    found = lossmeta.diagnose(p, labels)
    assert found.balance.counts.tolist() == [80, 16, 4, 0]
    assert found.balance.ratio == 20 and found.balance.uneven
    entropy = -(0.8 * math.log(0.8) + 0.16 * math.log(0.16) + 0.04 * math.log(0.04))
    assert found.balance.effective_classes == pytest.approx(math.exp(entropy))
    even = lossmeta.diagnose(*draw(400))
    assert (
        even.balance.ratio == 1
        and even.balance.effective_classes == pytest.approx(4)
        and not even.balance.uneven
    )


def test_counts_that_differ_by_chance_are_not_uneven() -> None:
    labels = torch.randint(20, (60,), generator=torch.Generator().manual_seed(0))
    found = lossmeta.diagnose(torch.nn.functional.one_hot(labels, 20) * 0.8 + 0.01, labels)
    assert found.balance.ratio >= 5 and not found.balance.uneven
    assert all("rare" not in r.situation for r in found.recommendations)


def test_overfitting() -> None:
    (p, labels), (q, train_labels) = draw(300, strength=1), draw(500, strength=9, seed=5)
    found = lossmeta.diagnose(p, labels, train=(q, train_labels)).overfitting
    assert found is not None
    held_out, train = -p[range(300), labels].log(), -q[range(500), train_labels].log()
    assert found.held_out_loss == pytest.approx(float(held_out.mean()))
    assert found.train_loss == pytest.approx(float(train.mean()))
    gap = float(held_out.mean() - train.mean())
    half = 1.959963984540054 * math.sqrt(float(held_out.var()) / 300 + float(train.var()) / 500)
    assert found.loss_gap == pytest.approx(gap)
    assert found.loss_interval == pytest.approx((gap - half, gap + half))
    errors = (p.argmax(1) != labels).double().mean(), (q.argmax(1) != train_labels).double().mean()
    assert found.train_error == pytest.approx(float(errors[1]))
    assert found.error_gap == pytest.approx(float(errors[0] - errors[1]))
    assert found.error_interval[0] < found.error_gap < found.error_interval[1]


def test_a_probability_of_0_has_a_finite_loss() -> None:
    p, labels = draw(100)
    p[0] = torch.nn.functional.one_hot((labels[0] + 1) % 4, 4)
    found = lossmeta.diagnose(p, labels, train=draw(50, seed=2)).overfitting
    assert found is not None and math.isfinite(found.held_out_loss)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_clean_samples_bound_the_share(share: float) -> None:
    p, true = draw(4000, strength=2)
    labels = redrawn(true, share)
    clean_p, clean_labels = draw(1000, strength=2, seed=9)
    found = lossmeta.diagnose(p, labels, clean=(clean_p, clean_labels)).clean
    assert found is not None and found.samples == 1000
    a = float((clean_p.argmax(1) == clean_labels).double().mean())
    b = float((p.argmax(1) == labels).double().mean())
    assert found.error == pytest.approx(1 - a) and found.wrong_at_least == pytest.approx(1 - b / a)
    wrong = float((labels != true).double().mean())
    assert found.interval[0] < found.wrong_at_least < found.interval[1]
    assert found.interval[0] < wrong and found.wrong_at_least > 0.7 * wrong
    half = math.log(1 - found.interval[0]) - math.log(b / a)
    expected = 1.959963984540054 * math.sqrt((1 - b) / (b * 4000) + (1 - a) / (a * 1000))
    assert half == pytest.approx(expected, rel=2e-3)


def test_clean_samples_show_that_labels_are_right_although_the_estimate_says_otherwise() -> None:
    p, labels = draw(20_000, strength=1.2)
    found = lossmeta.diagnose(p, labels, clean=draw(20_000, strength=1.2, seed=9))
    assert found.labels.share > 0.25
    assert found.clean is not None and found.clean.interval[0] < 0 < found.clean.interval[1]
    assert found.recommendations[0].use == "none" and "right" in found.recommendations[0].situation


def test_a_model_that_is_always_wrong_on_clean_samples() -> None:
    p, labels = draw(100)
    found = lossmeta.diagnose(p, labels, clean=(p, (labels + 1) % 4)).clean
    assert found is not None and found.error == 1 and math.isnan(found.wrong_at_least)
    found = lossmeta.diagnose(p, (labels + 1) % 4, clean=(p, labels)).clean
    assert found is not None and found.error == 0 and found.wrong_at_least == 1


def test_labels_by_chance_are_not_informative() -> None:
    p, labels = draw(2000)
    found = lossmeta.diagnose(p, labels[torch.randperm(2000)])
    assert not found.informative
    assert [r.use for r in found.recommendations] == ["none"]
    assert any("say nothing of the labels" in w for w in found.warnings)


@pytest.mark.parametrize("frequencies", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
def test_frequencies_alone_are_not_informative(frequencies: list[float]) -> None:
    counts = (1000 * torch.tensor(frequencies)).long()
    labels = torch.arange(4).repeat_interleave(counts)
    p = torch.tensor([frequencies]).expand(len(labels), 4)
    assert not lossmeta.diagnose(p, labels).informative
    assert lossmeta.diagnose(0.9 * p + 0.1 * torch.nn.functional.one_hot(labels, 4), labels).informative


def test_chance_rarely_looks_informative() -> None:
    found = [
        lossmeta.diagnose(
            draw(200)[0], torch.randint(4, (200,), generator=torch.Generator().manual_seed(s))
        ).informative
        for s in range(40)
    ]
    assert sum(found) <= 1


# ---- Warnings.


def test_warnings() -> None:
    p, labels = draw(2000, strength=30)
    (seen,) = lossmeta.diagnose(p, labels).warnings
    assert "an error of 0.00%" in seen and "out of fold" in seen
    p, labels = draw(10_000, strength=2)
    assert lossmeta.diagnose(p, labels).warnings == ()
    hard = torch.nn.functional.one_hot(p.argmax(1), 4).float()
    (rounded,) = lossmeta.diagnose(hard, labels).warnings
    assert "all probabilities are 0 or 1" in rounded
    (coarse,) = lossmeta.diagnose(p[:200], labels[:200]).warnings
    assert coarse.startswith("with 200 samples the error is known to ")
    keep = (labels != 2).nonzero().squeeze(1)
    missing = lossmeta.diagnose(p[keep], labels[keep]).warnings
    assert missing == ("no sample has label 2: nothing is estimated for it",)
    few = torch.cat([keep, (labels == 2).nonzero().squeeze(1)[:3]])
    assert lossmeta.diagnose(p[few], labels[few]).warnings == (
        "fewer than 10 samples have label 2: what is said of it is chance",
    )


def test_a_model_that_has_seen_the_samples_shows_by_clean_ones() -> None:
    p, true = draw(2000, strength=2)
    labels = redrawn(true, 0.3)
    seen = 0.3 * p + 0.7 * torch.nn.functional.one_hot(labels, 4)
    clean = draw(500, strength=2, seed=9)
    assert any(
        "was trained on these samples" in w for w in lossmeta.diagnose(seen, labels, clean=clean).warnings
    )
    assert lossmeta.diagnose(p, labels, clean=clean).warnings[:-1] == ()


def test_many_classes_are_named_in_short() -> None:
    labels = torch.arange(100)
    p = torch.nn.functional.one_hot(labels, 100) * 0.8 + 0.002
    few = next(w for w in lossmeta.diagnose(p, labels).warnings if w.startswith("fewer"))
    assert few == "fewer than 10 samples have label 0, 1, 2, 3, 4 and 95 others: what is said of it is chance"


# ---- Doors.


def test_a_torch_model() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), torch.randn(300, 3)
    labels = model.eval()(inputs).argmax(1)
    p = model(inputs).detach().double().softmax(1)
    model.train()
    more = torch.randn(60, 3), torch.randint(4, (60,))
    expected = lossmeta.diagnose(p, labels, train=(model.eval()(more[0]).double().softmax(1), more[1]))
    found = lossmeta.diagnose(model.train(), labels, inputs=inputs, train=more)
    assert str(found) == str(expected) and model.training


def test_an_estimator() -> None:
    p, labels = draw(300, strength=1)
    model = LogisticRegression().fit(p.numpy(), labels.numpy())
    found = lossmeta.diagnose(model, labels, inputs=p.numpy(), clean=(p.numpy()[:50], labels.numpy()[:50]))
    q = model.predict_proba(p.numpy())
    assert str(found) == str(lossmeta.diagnose(q, labels, clean=(q[:50], labels[:50])))


def test_an_estimator_that_knows_fewer_classes() -> None:
    p, labels = draw(300, strength=1)
    known = labels != 1
    model = LogisticRegression().fit(p[known].numpy(), labels[known].numpy())
    found = lossmeta.diagnose(model, labels, inputs=p.numpy())
    assert found.classes == 4 and float(found.labels.joint[1].sum()) == 0
    assert float(found.labels.joint[:, 1].sum()) == pytest.approx(0.25)


def test_it_is_the_same_again_and_leaves_random_numbers_alone() -> None:
    p, labels = draw(300, strength=1)
    before = torch.get_rng_state()
    assert str(lossmeta.diagnose(p, labels)) == str(lossmeta.diagnose(p, labels))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_given_is_left_as_it_is() -> None:
    p, labels = draw(300, strength=1)
    kept = p.clone(), labels.clone()
    lossmeta.diagnose(p.requires_grad_(), labels)
    assert torch.equal(p, kept[0]) and torch.equal(labels, kept[1])


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_defaults_of_torch_do_not_matter(request: pytest.FixtureRequest) -> None:
    p, labels = draw(300, strength=1)
    inputs, model = torch.randn(300, 2), nn.Linear(2, 4)
    expected = str(lossmeta.diagnose(p, labels, train=(p[:9], labels[:9]), clean=(p[:9], labels[:9])))
    arguments = (lambda: model, lambda *_: None, inputs, labels)
    out_of_fold = lossmeta.diagnosis.out_of_fold(*arguments)
    request.getfixturevalue("other_defaults")
    found = str(lossmeta.diagnose(p, labels, train=(p[:9], labels[:9]), clean=(p[:9], labels[:9])))
    assert found == expected
    assert torch.equal(lossmeta.diagnosis.out_of_fold(*arguments), out_of_fold)


# ---- Text.


def test_text() -> None:
    p, true = draw(3000)
    labels = redrawn(true, 0.4)
    text = str(lossmeta.diagnose(p, labels, train=draw(100, seed=3), clean=draw(200, seed=4)))
    assert text.startswith("3000 samples, 4 classes\n")
    for part in (
        "held-out error",
        "spread: even",
        "suspects",
        "by clean samples",
        "imbalance",
        " : 1, ",
        "overfitting",
    ):
        assert part in text
    assert "docs/results/quickstart.md" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 110


# ---- What is refused.

P, LABELS = draw(20)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"model_or_probabilities": nn.Linear(3, 4)},
            ValueError,
            "a model needs inputs, of samples that it has not seen",
        ),
        (
            {"inputs": torch.randn(20, 3)},
            TypeError,
            "with inputs the first argument must be a torch model or have",
        ),
        (
            {"model_or_probabilities": [[1, 0]]},
            TypeError,
            "probabilities must be a tensor or a NumPy array, got list",
        ),
        ({"train": P}, TypeError, "train must be a pair, of probabilities or inputs and labels, got tensor"),
        ({"train": (P, LABELS)}, ValueError, "train must be other samples than those held out"),
        ({"train": (P[:3], LABELS)}, ValueError, r"train labels must be \[3\]"),
        ({"train": (P[:3] * 2, LABELS[:3])}, ValueError, "train probabilities must sum to 1"),
        ({"clean": (P[:3], LABELS[:3] + 9)}, ValueError, r"clean labels must lie in \[0, 4\), got 9"),
        ({"clean": (P[:0], LABELS[:0])}, ValueError, "clean probabilities must have at least one sample"),
        ({"clean": (draw(9, 3))}, ValueError, "clean must have 4 classes too, got 3"),
        ({"labels": LABELS.float()}, ValueError, "labels must be integers, got float32"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^diagnose: {message}"):
        lossmeta.diagnose(**{"model_or_probabilities": P, "labels": LABELS, **arguments})


def test_bad_inputs_of_models() -> None:
    with pytest.raises(TypeError, match=r"^diagnose: inputs of a torch model must be a tensor, got ndarray"):
        lossmeta.diagnose(nn.Linear(3, 4), LABELS, inputs=np.zeros((20, 3)))
    with pytest.raises(ValueError, match=r"^diagnose: labels must be \[20\]"):
        lossmeta.diagnose(nn.Linear(3, 4), LABELS[:7], inputs=torch.randn(20, 3))
    with pytest.raises(ValueError, match=r"^diagnose: labels must lie in \[0, 2\), got 2"):
        lossmeta.diagnose(nn.Linear(3, 2), LABELS, inputs=torch.randn(20, 3))
