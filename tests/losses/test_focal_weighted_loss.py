from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta import _checks
from lossmeta.losses import FocalWeightedLoss


def formula(loss: FocalWeightedLoss, x: Tensor, positives: set, negatives: set) -> Tensor:
    """ALA Eq. 10 anchor by anchor, in float64, over sets of pairs."""
    x, (first, second) = x.double(), loss.phi.double()
    rows = []
    for anchor in range(len(x)):
        near = [(first * ((x[a] - x[p]).norm() - loss.offset)).exp() for a, p in positives if a == anchor]
        far = [(-second * ((x[a] - x[n]).norm() - loss.offset)).exp() for a, n in negatives if a == anchor]
        one = x.new_ones(())
        rows.append(sum(near, one).log() / first + sum(far, one).log() / second)
    return torch.stack(rows)


def pairs_of(labels: Tensor) -> tuple[set, set]:
    every = [(a, b) for a in range(len(labels)) for b in range(len(labels)) if a != b]
    return {p for p in every if labels[p[0]] == labels[p[1]]}, {
        p for p in every if labels[p[0]] != labels[p[1]]
    }


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 4, requires_grad=True), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])


def tuned(**options) -> FocalWeightedLoss:
    loss = FocalWeightedLoss(offset=0.7, **options)
    with torch.no_grad():
        loss.phi.copy_(torch.tensor([2.0, 0.5]))
    return loss


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_labels_mean_all_pairs(batch: tuple[Tensor, Tensor], reduction: str) -> None:
    loss = tuned(reduction=reduction)
    expected = formula(loss, batch[0], *pairs_of(batch[1]))
    expected = {"none": expected, "mean": expected.mean(), "sum": expected.sum()}[reduction]
    torch.testing.assert_close(loss(*batch).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_pairs_mined_are_all_pairs(batch: tuple[Tensor, Tensor], reduction: str) -> None:
    positives, negatives = (torch.tensor(sorted(pairs)).unbind(1) for pairs in pairs_of(batch[1]))
    loss = tuned(reduction=reduction, learnable=True)
    results = [loss(*batch), loss(batch[0], indices_tuple=(*positives, *negatives))]
    gradients = [torch.autograd.grad(r.sum(), (batch[0], loss.phi)) for r in results]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_takes_triplets_and_pairs_of_a_miner(batch: tuple[Tensor, Tensor]) -> None:
    """Pairs that several triplets share count once; a distance of 0 has gradient 0."""
    loss = tuned(reduction="none")
    triplets = tuple(torch.tensor(t) for t in ([0, 0, 2, 5, 5], [1, 1, 3, 6, 5], [2, 3, 0, 1, 1]))
    positives, negatives = {(0, 1), (2, 3), (5, 6), (5, 5)}, {(0, 2), (0, 3), (2, 0), (5, 1)}
    expected = formula(loss, batch[0].detach(), positives, negatives)
    torch.testing.assert_close(loss(*batch, triplets).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss(*batch, torch.stack(triplets, 1)), loss(*batch, triplets))
    pairs = (triplets[0][1:], triplets[1][1:], triplets[0], triplets[2])
    torch.testing.assert_close(loss(*batch, pairs), loss(*batch, triplets))
    (gradient,) = torch.autograd.grad(loss(*batch, triplets).sum(), batch[0])
    assert gradient.isfinite().all()


def test_nothing_overflows(batch: tuple[Tensor, Tensor]) -> None:
    loss = FocalWeightedLoss()
    far = 1000 * batch[0].detach()
    mined = (*(torch.tensor([i]) for i in (0, 1)), *(torch.tensor([i]) for i in (0, 2)))
    assert loss(far, indices_tuple=mined).isfinite()


def test_no_pairs_give_a_gradient_of_zero(batch: tuple[Tensor, Tensor]) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    loss = FocalWeightedLoss()(batch[0], indices_tuple=(empty,) * 4)
    (gradient,) = torch.autograd.grad(loss, batch[0])
    assert loss.item() == 0
    assert not gradient.any()


def test_half_precision_is_accumulated_in_float32(batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0].detach().bfloat16().requires_grad_()
    mined = tuple(torch.tensor([i]) for i in (0, 1, 2))
    loss = FocalWeightedLoss()(x, indices_tuple=mined)
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_phi_is_a_buffer_unless_learnable(batch: tuple[Tensor, Tensor]) -> None:
    fixed, learnable = FocalWeightedLoss(), FocalWeightedLoss(learnable=True)
    assert fixed.phi.tolist() == [1, 1]
    assert list(fixed.parameters()) == []
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == ["phi", "_extra_state"]
    learnable(*batch).backward()
    assert learnable.phi.grad is not None
    assert learnable.phi.grad.abs().min() > 0


def test_representation() -> None:
    assert repr(FocalWeightedLoss()) == "FocalWeightedLoss(offset=1.0, learnable=False, reduction='mean')"


def test_refuses_to_be_called_without_labels_and_indices(batch: tuple[Tensor, Tensor]) -> None:
    message = "FocalWeightedLoss: labels or indices_tuple must be given, got neither"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FocalWeightedLoss()(batch[0])


MINED = tuple(torch.tensor([i]) for i in (0, 1, 2))


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_refuses_a_bad_phi_in_either_form(batch: tuple[Tensor, Tensor], bad: float) -> None:
    loss = FocalWeightedLoss()
    loss.phi[1] = bad
    for arguments in ((batch[1],), (None, MINED)):
        with pytest.raises(ValueError, match=r"phi must be positive and finite, got .* at index 1$"):
            loss(batch[0], *arguments)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (
            torch.zeros(3, 2, dtype=torch.int64),
            "embeddings must be float32, float64, bfloat16 or float16, got int64",
        ),
        (torch.zeros(3), "embeddings must be [M, D], got [3]"),
        (torch.zeros(3, 2, 1), "embeddings must be [M, D], got [3, 2, 1]"),
    ],
)
def test_refuses_bad_embeddings_in_either_form(embeddings: Tensor, message: str) -> None:
    for arguments in ((torch.arange(3),), (None, MINED)):
        with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
            FocalWeightedLoss()(embeddings, *arguments)


def test_mined_phi_is_on_the_device_of_the_embeddings() -> None:
    message = "FocalWeightedLoss: phi and embeddings must be on the same device, got meta and cpu; move one with .to()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FocalWeightedLoss(device="meta")(torch.zeros(3, 2), indices_tuple=MINED)


@pytest.mark.parametrize(
    ("mined", "bad"),
    [
        ([[0, 1, 2], [3, 2, 8]], [3]),
        ([[0, 1, 2], [3, -1, 0]], [3]),
        ([[0, 1, 2], [9, 2, 0]], range(8)),
    ],
)
def test_a_bad_index_that_cannot_be_looked_at_is_an_anchor_of_nan(
    batch: tuple[Tensor, Tensor], mined: list, bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; its gradient is 0. An anchor that is out of range could be any."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    loss = FocalWeightedLoss(reduction="none", learnable=True)
    rows = loss(batch[0], indices_tuple=torch.tensor(mined))
    assert rows.isnan().nonzero().flatten().tolist() == list(bad)
    gradients = torch.autograd.grad(rows.sum(), (batch[0], loss.phi))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][3].any()
    assert FocalWeightedLoss()(batch[0][:0], indices_tuple=torch.tensor(mined)) == 0


def test_a_bad_phi_that_cannot_be_looked_at_is_nan_with_gradient_zero(
    batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossmeta.losses.focal_weighted.may_look", lambda tensor: False)
    loss = FocalWeightedLoss(learnable=True)
    loss.phi.data[0] = 0
    result = loss(batch[0], indices_tuple=MINED)
    assert result.isnan()
    assert all(not g.any() for g in torch.autograd.grad(result, (batch[0], loss.phi)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of 'none', 'mean', 'sum', got 'max'"),
        ({"offset": torch.nan}, "offset must be finite, got nan"),
        ({"offset": -torch.inf}, "offset must be finite, got -inf"),
    ],
)
def test_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^FocalWeightedLoss: {re.escape(message)}$"):
        FocalWeightedLoss(**options)
