"""The task's loss under dropout and under augmentations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.tuneloss import AugmentationMixture, DropoutLoss


def batch(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randint(3, (n,))


class Recorder(nn.Module):
    """Remembers its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs)
        return self.linear(inputs)


def test_dropout_scales_what_it_keeps() -> None:
    model, feature = Recorder(), DropoutLoss(keep=0.25, masks=3)
    inputs = torch.ones(200, 4)
    value = feature(model, (inputs, torch.zeros(200, dtype=torch.int64)))
    assert len(model.seen) == 3 and not torch.equal(model.seen[0], model.seen[1])
    for seen in model.seen:
        assert set(seen.unique().tolist()) == {0.0, 4.0}
        assert (seen > 0).float().mean().item() == pytest.approx(0.25, abs=0.06)
    losses = [F.cross_entropy(model.linear(s), torch.zeros(200, dtype=torch.int64)) for s in model.seen]
    torch.testing.assert_close(value, sum(losses) / 3)


def test_fixed_masks_leave_global_random_numbers_alone() -> None:
    model, data = Recorder(), batch()
    before = torch.get_rng_state()
    first = DropoutLoss(seed=1)(model, data)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == DropoutLoss(seed=1)(model, data)
    assert not torch.equal(DropoutLoss(seed=2).variants(data[0])[0], DropoutLoss(seed=1).variants(data[0])[0])


def test_fresh_masks_are_torchs() -> None:
    data = batch(50)
    feature = DropoutLoss(seed=None)
    torch.manual_seed(3)
    first, second = feature.variants(data[0])[0], feature.variants(data[0])[0]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(feature.variants(data[0])[0], first)


def test_mixture_is_the_loss_of_every_transformation() -> None:
    model, (x, y) = nn.Linear(4, 3), batch()
    mixture = AugmentationMixture([lambda x: x.flip(1), lambda x: 2 * x])
    expected = torch.stack([F.cross_entropy(model(x.flip(1)), y), F.cross_entropy(model(2 * x), y)])
    torch.testing.assert_close(mixture(model, (x, y)), expected)
    p = mixture.probabilities([3.0, 0.0])
    assert p == [0.25, 0.75, 0.0]


def test_another_task_loss() -> None:
    model, x, y = nn.Linear(4, 2), torch.randn(5, 4), torch.randn(5, 2)
    feature = AugmentationMixture([torch.neg], task_loss=F.mse_loss)
    torch.testing.assert_close(feature(model, (x, y)), F.mse_loss(model(-x), y)[None])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DropoutLoss(1.0), ValueError, r"DropoutLoss: keep must lie in \(0, 1\), got 1.0"),
        (lambda: DropoutLoss(masks=0), ValueError, "DropoutLoss: masks must be at least 1, got 0"),
        (
            lambda: DropoutLoss()(nn.Embedding(3, 3), (torch.zeros(4, dtype=torch.int64), torch.zeros(4))),
            TypeError,
            "DropoutLoss: inputs must be floating, got torch.int64",
        ),
        (
            lambda: DropoutLoss()(nn.Linear(2, 2), ((torch.ones(2, 2),), torch.zeros(2))),
            TypeError,
            "DropoutLoss: inputs must be one tensor, got tuple",
        ),
        (lambda: DropoutLoss()(nn.Linear(2, 2), torch.ones(2)), TypeError, "must be a pair"),
        (lambda: AugmentationMixture([]), ValueError, "transforms must have at least one, got none"),
        (lambda: AugmentationMixture([3]), TypeError, "transforms must be callable, got 3"),
        (
            lambda: AugmentationMixture([torch.neg]).probabilities([-1.0]),
            ValueError,
            r"coefficients must be 1 finite numbers of at least 0, got \[-1.0\]",
        ),
        (lambda: AugmentationMixture([torch.neg]).probabilities([]), ValueError, "must be 1 finite numbers"),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
