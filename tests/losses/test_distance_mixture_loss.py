from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lossmeta.losses import DistanceMixtureLoss


def triplets_of(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every (anchor, positive, negative)."""
    n = range(len(labels))
    found = [
        (a, p, k)
        for a in n
        for p in n
        for k in n
        if a != p and labels[a] == labels[p] and labels[a] != labels[k]
    ]
    return tuple(torch.tensor(found).reshape(-1, 3).unbind(1))  # type: ignore[return-value]


def formula(loss: DistanceMixtureLoss, x: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    a, p, n = (x[i].double() for i in triplets)
    near, far = (a - p).norm(dim=1), (a - n).norm(dim=1)
    terms = [near**2, near**2.5, near**1.5, 0.5 * (0.6 * near**2).exp() - 0.5, 0.5 * (0.6 * near).exp() - 0.5]
    terms += [0.5 / far, 0.2 / far, 0.1 / far**2, -far.log(), -2 * far.log()]
    return loss.phi.double() @ torch.stack(terms)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 4, requires_grad=True), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 3])


def mixed(**options) -> DistanceMixtureLoss:
    loss = DistanceMixtureLoss(**options)
    loss.phi.copy_(torch.linspace(0.1, 1, 10))
    return loss


def test_starts_with_two_functions(batch: tuple[Tensor, Tensor]) -> None:
    loss = DistanceMixtureLoss()
    assert loss.phi.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    a, p, n = triplets_of(batch[1])
    x = batch[0]
    expected = ((x[a] - x[p]).square().sum(1) + 0.5 / (x[a] - x[n]).norm(dim=1)).mean()
    torch.testing.assert_close(loss(*batch), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_labels_mean_all_triplets(batch: tuple[Tensor, Tensor], reduction: str) -> None:
    loss = mixed(reduction=reduction)
    each = formula(loss, batch[0], triplets_of(batch[1]))
    expected = each.mean() if reduction == "mean" else each.sum()
    torch.testing.assert_close(loss(*batch).double(), expected, rtol=1e-5, atol=1e-5)


def test_takes_the_triplets_of_a_miner(batch: tuple[Tensor, Tensor]) -> None:
    loss = mixed(reduction="none")
    mined = tuple(t[::3] for t in triplets_of(batch[1]))
    expected = formula(loss, batch[0], mined)
    torch.testing.assert_close(loss(*batch, mined).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss(*batch, torch.stack(mined, 1)), loss(*batch, mined))
    torch.testing.assert_close(loss(batch[0], indices_tuple=mined), loss(*batch, mined))


def test_takes_the_pairs_of_a_miner(batch: tuple[Tensor, Tensor]) -> None:
    """Anchor 0 has two positives and one negative, anchor 2 one of each, anchors 5 and 6 are half pairs."""
    pairs = tuple(torch.tensor(t) for t in ([0, 0, 2, 5], [1, 7, 3, 6], [2, 0, 6], [0, 2, 1]))
    expected = tuple(torch.tensor(t) for t in ([0, 0, 2], [1, 7, 3], [2, 2, 0]))
    loss = mixed(reduction="none")
    torch.testing.assert_close(loss(*batch, pairs), loss(*batch, expected))


def test_no_triplets_give_a_gradient_of_zero(batch: tuple[Tensor, Tensor]) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for arguments in ((batch[1], (empty, empty, empty)), (torch.arange(9),)):
        loss = DistanceMixtureLoss()(batch[0], *arguments)
        (gradient,) = torch.autograd.grad(loss, batch[0])
        assert loss.item() == 0
        assert not gradient.any()


def test_phi_is_a_buffer_unless_learnable(batch: tuple[Tensor, Tensor]) -> None:
    fixed, learnable = DistanceMixtureLoss(), DistanceMixtureLoss(learnable=True)
    assert list(fixed.parameters()) == []
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == ["phi", "_extra_state"]
    learnable(*batch).backward()
    assert learnable.phi.grad is not None
    assert learnable.phi.grad.abs().min() > 0


def test_representation() -> None:
    assert (
        repr(DistanceMixtureLoss())
        == "DistanceMixtureLoss(learnable=False, min_distance=0.001, reduction='mean')"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (
                {"min_distance": bad},
                "DistanceMixtureLoss: min_distance must be finite and at least 1.1754943508222875e-38 "
                f"(float32's smallest normal number), got {bad}",
            )
            for bad in (0.0, -1.0, 1e-50, torch.inf, torch.nan)
        ),
        (
            {"reduction": "max"},
            "DistanceMixtureLoss: reduction must be one of 'none', 'mean', 'sum', got 'max'",
        ),
    ],
)
def test_refuses_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DistanceMixtureLoss(**options)
