"""The record of curvature over a training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossmeta.landscape import CurvatureTracker, loss_surface, random_directions

torch.manual_seed(0)
SAMPLES = torch.randn(20, 4), torch.randint(3, (20,))


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def train(one: nn.Module, tracker: CurvatureTracker, epochs: range) -> None:
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    for epoch in epochs:
        optimizer.zero_grad()
        F.cross_entropy(one(SAMPLES[0]), SAMPLES[1]).backward()
        optimizer.step()
        tracker.record(one, epoch)


def test_records_are_surfaces_of_that_epoch() -> None:
    one, tracker = model(), CurvatureTracker(F.cross_entropy, SAMPLES, every=3, points=5, span=0.3, seed=7)
    train(one, tracker, range(7))
    assert tracker.epochs == [0, 3, 6]
    last = loss_surface(
        one, F.cross_entropy, SAMPLES, directions=random_directions(one, seed=7), span=0.3, points=5
    )
    assert torch.equal(tracker.surfaces[-1].losses, last.losses)
    assert tracker.nonconvexity[-1] == last.nonconvexity()
    assert tracker.mean_absolute_curvature[-1] == last.mean_absolute_curvature()
    assert tracker.nonconvexity[0] != tracker.nonconvexity[-1]


def test_looking_does_not_change_the_training() -> None:
    watched, alone = model(), model()
    train(watched, CurvatureTracker(F.cross_entropy, SAMPLES, points=3), range(3))
    train(alone, CurvatureTracker(F.cross_entropy, SAMPLES, every=10**6, points=3), range(1, 4))
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


def test_goes_on_from_its_state() -> None:
    one, tracker = model(), CurvatureTracker(F.cross_entropy, SAMPLES, points=3)
    train(one, tracker, range(2))
    other = CurvatureTracker(F.cross_entropy, SAMPLES, points=3)
    other.load_state_dict(tracker.state_dict())
    assert other.epochs == [0, 1] and other.nonconvexity == tracker.nonconvexity
    train(one, other, range(2, 3))
    assert len(tracker.epochs) == 2 and len(other.epochs) == 3


def test_the_samples_are_those_of_the_first_reading() -> None:
    (x, y), one = SAMPLES, model()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True, drop_last=True
    )
    tracker = CurvatureTracker(F.cross_entropy, loader, points=3)
    for epoch in range(3):
        tracker.record(one, epoch)
    assert len(set(tracker.nonconvexity)) == 1


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="CurvatureTracker: every must be at least 1, got 0"):
        CurvatureTracker(F.cross_entropy, SAMPLES, every=0)
    with pytest.raises(ValueError, match="CurvatureTracker: points must be at least 3, got 2"):
        CurvatureTracker(F.cross_entropy, SAMPLES, points=2)
