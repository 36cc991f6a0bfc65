"""Labels drawn anew: their distribution, what is learned of the flips, and what is left as it is."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from small_problems import equal, values
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta.adalfl import CleanLearner, Relabelling, clean_learner
from lossmeta.losses import LossNetwork, TransitionLoss


def believe(one: Relabelling, rows: list[list[float]]) -> None:
    """What it has seen, by class and label."""
    one._seen = torch.tensor(rows).T.contiguous()
    one._of_class, one._concentration = one._seen.sum(0), one.concentration


def posterior(p: Tensor, t: Tensor, y: int) -> Tensor:
    """By Bayes' rule, in float64."""
    joint = p.double() * t.double()[:, y]
    return joint / joint.sum()


def test_draws_have_the_probabilities_of_the_classes() -> None:
    one = Relabelling(4, 1.0, seed=3)
    believe(one, [[7.0, 1, 1, 1], [2, 6, 1, 1], [0, 0, 5, 5], [1, 1, 1, 7]])
    logits, count = torch.tensor([0.3, -0.2, 0.5, 0.1]), 40_000
    for y in range(4):
        found = one.draw(logits.expand(count, 4), torch.full((count,), y))
        expected = posterior(logits.softmax(0), one.transition, y)
        shares = found.labels.bincount(minlength=4) / count
        error = (expected * (1 - expected) / count).sqrt()
        assert ((shares - expected).abs() <= 4.5 * error + 1e-9).all()
        torch.testing.assert_close(found.classes.double(), expected.expand(count, 4), rtol=1e-5, atol=1e-7)


def reference(one: Relabelling, wrong: float, recent: float, steps: int) -> float:
    """The share of the docstring, in plain numbers."""
    t = one.transition.double()
    classes = len(t)
    total = concentrated = 0.0
    for k in range(classes):
        off = [float(t[k, j]) for j in range(classes) if j != k]
        shares = [o / sum(off) for o in off if o > 0]
        entropy = -sum(o * math.log(o) for o in shares) / math.log(classes - 1)
        total, concentrated = total + sum(off), concentrated + sum(off) * (1 - entropy)
    most = max(concentrated / total, 10 * (1 - recent / wrong), 1 - steps / 400)
    return one.least + (1 - one.least) * min(most, 1.0)


@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("recent", "steps"), [(0.4, 0), (0.4, 100), (0.4, 1000), (0.38, 1000), (0.1, 1000), (0.9, 1000)]
)
def test_the_share_is_the_formula(least: float, recent: float, steps: int) -> None:
    one = Relabelling(4, least)
    believe(one, [[60.0, 30, 5, 5], [10, 60, 20, 10], [15, 10, 60, 15], [0, 40, 0, 60]])
    one._wrong, one._recent, one._steps = 0.4 * one._seen.sum(), torch.tensor(recent), steps
    expected = reference(one, 0.4, recent, steps)
    assert float(one.share) == pytest.approx(expected, abs=1e-5)
    known = torch.zeros(60_000, dtype=torch.int64)
    sure = 90 * torch.eye(4)[1].expand(60_000, 4)  # whatever is drawn becomes class 1
    drawn = (one.draw(sure, known).labels == 1).double().mean()
    assert float(drawn) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.7, 0.1, 0.1, 0.1], [0.2, 0.4, 0.2, 0.2], [0, 0, 1, 0], [0.1, 0.1, 0.1, 0.7]], 0.0),
        ([[0.7, 0.3, 0, 0], [0, 0.7, 0.3, 0], [0, 0, 0.7, 0.3], [0.3, 0, 0, 0.7]], 1.0),
        ([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 0.0),
        ([[0.7, 0.3], [0.1, 0.9]], 1.0),
        ([[1.0]], 1.0),
    ],
)
def test_wrong_labels_are_spread_or_concentrated(rows: list[list[float]], expected: float) -> None:
    one = Relabelling(len(rows))
    believe(one, [[100 * value for value in row] for row in rows])
    before = one.transition
    assert float(one.concentration) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(one.transition, before)
    assert 0.5 <= float(one.share) <= 1


def test_a_model_that_learns_by_heart_is_noticed() -> None:
    """The share falls where the wrong labels seem spread and stay as many, and rises where they seem to vanish."""
    generator = torch.Generator().manual_seed(0)
    one = Relabelling(5, seed=1)

    def go(steps: int, by_heart: float) -> None:
        for _ in range(steps):
            y = torch.randint(5, (64,), generator=generator)
            redrawn = torch.rand(64, generator=generator) < 0.4
            labels = torch.where(redrawn, torch.randint(5, (64,), generator=generator), y)
            known = torch.rand(64, generator=generator) < by_heart
            one.learn(one.draw(8 * torch.eye(5)[torch.where(known, labels, y)], labels))

    go(500, 0.0)
    assert float(one.share) < 0.6
    go(150, 0.5)
    assert float(one.share) > 0.9


def test_flips_are_learned_from_a_model_that_knows_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.8, 0.1], [0.0, 0.3, 0.7]])
    one = Relabelling(3)
    for _ in range(300):
        y = torch.randint(3, (64,), generator=generator)
        labels = truth[y].multinomial(1, generator=generator).squeeze(1)
        one.learn(one.draw(12 * torch.eye(3)[y], labels))
    torch.testing.assert_close(one.transition, truth, rtol=0, atol=0.03)
    torch.testing.assert_close(one.transition.sum(1), torch.ones(3))


def test_one_learned_batch_is_the_formula() -> None:
    one = Relabelling(3)
    start = 20 * (0.5 * torch.eye(3) + 0.5 / 3).double()
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    t, expected = one.transition, start.clone()
    for f, y in zip(logits, labels.tolist(), strict=True):
        expected[:, y] += posterior(f.double().softmax(0), t, y)
    drawn = one.draw(logits, labels)
    assert torch.equal(one.transition, t)
    one.learn(drawn)
    torch.testing.assert_close(one._seen.T.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_places_ignored_labels_and_dtypes(dtype: torch.dtype) -> None:
    """A class in every place; what does not count and what is no class is left as it is, and teaches nothing."""
    one = Relabelling(3, 1.0, ignore_index=2)
    labels = torch.randint(2, (4, 5, 6)).to(dtype)
    labels[0, :, 0], labels[1, :, 1] = 2, 200
    logits = 60 * nn.functional.one_hot(torch.randint(2, (4, 5, 6)), 3).movedim(-1, 1).float()
    found = one.draw(logits, labels)
    assert found.labels.dtype == dtype and found.labels.shape == labels.shape
    kept = labels >= 2
    assert torch.equal(found.labels[kept], labels[kept])
    assert torch.equal(found.labels[~kept].long(), logits.argmax(1)[~kept])
    assert float(found.classes.sum()) == pytest.approx(int((~kept).sum()), rel=1e-5)


def test_autocast_rounds_nothing() -> None:
    logits, labels = torch.randn(40, 3), torch.randint(3, (40,))
    plain = Relabelling(3).draw(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = Relabelling(3).draw(logits, labels)
    assert torch.equal(cast.classes, plain.classes) and torch.equal(cast.labels, plain.labels)


def test_impossible_labels_and_models_that_are_not_finite() -> None:
    one = Relabelling(2, 1.0)
    believe(one, [[1.0, 0.0], [0.0, 1.0]])
    sure = torch.tensor([[0.0, -torch.inf]])
    assert one.draw(sure, torch.tensor([1])).labels.tolist() == [0]  # what the model says
    before = one.transition
    bad = one.draw(torch.tensor([[torch.nan, 0.0]]), torch.tensor([1]))
    assert 0 <= int(bad.labels) < 2
    one.learn(bad)
    assert torch.equal(one.transition, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_classes": 3, "least": 1.5}, "least must"),
        ({"num_classes": 3, "least": float("nan")}, "least must"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("Relabelling: ") + message):
        Relabelling(**options)


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (torch.ones(4, 6), torch.zeros(4).long(), ValueError, "logits must have 3 classes"),
        (torch.ones(4, 3), torch.zeros(5).long(), ValueError, r"target must be \[4\]"),
        (torch.ones(4, 3), torch.zeros(4), ValueError, "target must be class indices"),
        (torch.ones(4, 3).long(), torch.zeros(4).long(), ValueError, "logits must be"),
        (torch.ones(4, 3), [0, 1, 2, 0], TypeError, "target must be a tensor"),
    ],
)
def test_bad_batches(logits: Any, labels: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"Relabelling: {message}"):
        Relabelling(3).draw(logits, labels)


def test_a_state_is_copied() -> None:
    one, two = Relabelling(3), Relabelling(3, seed=9)
    one.learn(one.draw(torch.randn(8, 3), torch.randint(3, (8,))))
    state = one.state_dict()
    kept = copy.deepcopy(state)
    two.load_state_dict(state)
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))
    first, second = one.draw(logits, labels), two.draw(logits, labels)
    assert all(map(torch.equal, first, second))
    two.learn(second)
    assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(v)) for k, v in kept.items())


# ---- In CleanLearner.


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def made(**options: Any) -> CleanLearner:
    torch.manual_seed(0)
    model = WithDropout()
    clean = torch.randn(30, 6), torch.arange(30) % 3
    return CleanLearner(model, SGD(model.parameters(), 0.05, momentum=0.9), clean, **options)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6), torch.randint(3, (count,))


def test_the_learner_trains_on_what_is_drawn_from_the_average() -> None:
    one, two = made(seed=5), made(relabel=False, seed=5)
    by_hand = Relabelling(3, seed=5)
    for _ in range(6):
        x, y = batch()
        start = torch.get_rng_state()
        one.step((x, y))
        torch.set_rng_state(start)  # of dropout
        with torch.no_grad():
            drawn = by_hand.draw(two.averaged(x), y)
        two.step((x, drawn.labels))
        by_hand.learn(drawn)
    assert equal(values(one.averaged), values(two.averaged)) and equal(values(one.loss), values(two.loss))
    assert one.relabelling is not None and two.relabelling is None
    assert torch.equal(one.relabelling.transition, by_hand.transition)


def test_the_default_draws_for_the_default_loss_alone() -> None:
    loss = LossNetwork(residual="cross_entropy", normalize_slope=True)
    for options, drawn in (
        ({}, True),
        ({"relabel": False}, False),
        ({"loss": loss}, False),
        ({"loss": TransitionLoss(3)}, False),
        ({"loss": loss, "relabel": True}, True),
    ):
        one = made(**options)
        one.step(batch())
        assert (one.relabelling is not None) == drawn


def test_several_batches_of_one_step() -> None:
    one = made()
    one.step([batch(5), batch(7)])
    assert one.relabelling is not None
    assert float(one.relabelling._seen.sum()) == pytest.approx(3 * 20 + 12, rel=1e-5)


def test_many_classes_are_drawn_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean_learner, "MOST_CLASSES", 2)
    for relabel, drawn in ((None, False), (True, True)):
        one = made(relabel=relabel)
        one.step(batch())
        one.step(batch())
        assert (one.relabelling is not None) == drawn


def test_targets_that_are_no_class_indices_are_left() -> None:
    one = made()
    x, y = batch()
    one.step((x, nn.functional.one_hot(y, 3).float()))
    assert one.relabelling is None


def test_a_step_that_fails_teaches_nothing() -> None:
    one = made()
    one.step(batch())
    assert one.relabelling is not None
    before, weights = one.relabelling.transition, values(one.averaged)
    with pytest.raises(ValueError, match=r"got 7"):
        one.step((torch.randn(4, 6), torch.tensor([0, 1, 7, 2])))
    assert torch.equal(one.relabelling.transition, before) and equal(values(one.averaged), weights)


def test_goes_on_to_the_same_bits() -> None:
    whole, half, new = made(), made(), made()
    batches = [batch() for _ in range(6)]

    def go(one: CleanLearner, some: list[Any]) -> None:
        for b in some:
            torch.manual_seed(one.learner.steps)  # of dropout
            one.step(b)

    go(whole, batches)
    go(half, batches[:4])
    new.learner._step.model.plain.load_state_dict(half.learner._step.model.plain.state_dict())
    new.learner.optimizer.load_state_dict(copy.deepcopy(half.learner.optimizer.state_dict()))
    new.load_state_dict(copy.deepcopy(half.state_dict()))
    go(new, batches[4:])
    assert equal(values(new.averaged), values(whole.averaged))
    assert whole.relabelling is not None and new.relabelling is not None
    assert torch.equal(new.relabelling.transition, whole.relabelling.transition)


def test_a_state_of_before_there_was_any() -> None:
    one = made()
    one.step(batch())
    state = copy.deepcopy(one.state_dict())
    del state["relabelling"]
    one.load_state_dict(state)
    assert one.relabelling is None
    one.step(batch())


def test_it_beats_the_given_labels_where_classes_are_taken_for_each_other() -> None:
    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    inputs, labels = inputs[order], labels[order]
    wrong = torch.where(torch.rand(900, generator=generator) < 0.4, (labels[:900] + 1) % 10, labels[:900])
    errors = {}
    for relabel in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=0.005)
        clean = inputs[900:1000], labels[900:1000]
        learner = CleanLearner(model, optimizer, clean, relabel=relabel)
        rows = torch.Generator().manual_seed(2)
        for _ in range(1000):
            chosen = torch.randint(900, (64,), generator=rows)
            learner.step((inputs[chosen], wrong[chosen]))
        predicted = learner.averaged(inputs[1000:]).argmax(1)
        errors[relabel] = float((predicted != labels[1000:]).double().mean())
    assert errors[True] < 0.75 * errors[False]
    assert learner.relabelling is not None
    learned = learner.relabelling.transition
    assert (learned.diagonal() - 0.6).abs().max() < 0.2
    assert learned[torch.arange(10), (torch.arange(10) + 1) % 10].mean() > 0.25
