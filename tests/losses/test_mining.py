"""What both metric-learning losses make of the tuples of a miner."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss

KINDS = pytest.mark.parametrize("kind", [DistanceMixtureLoss, FocalWeightedLoss])


def tensors(*lists: Any) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(one) for one in lists)


COUNT = (
    "indices_tuple must hold 3 tensors (anchor, positive, negative) or 4 "
    "(anchor, positive, anchor, negative), got {}"
)
HINT = "; call the loss with (embeddings, labels) or (embeddings, labels, indices_tuple)"
LENGTHS = "indices_tuple must hold tensors [T], [T], [T] or [P], [P], [Q], [Q], got "


@KINDS
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (tensors([0], [1]), COUNT.format(2)),
        ((), COUNT.format(0)),
        (torch.tensor([[0, 1, 0, 2]]), "indices_tuple must be [T, 3] as one tensor, got [1, 4]" + HINT),
        (torch.tensor([0, 1, 2]), "indices_tuple must be [T, 3] as one tensor, got [3]" + HINT),
        (tensors([0.0], [1.0], [2.0]), "indices_tuple[0] must be int64, int32, int16 or int8, got float32"),
        (tensors([0], [True], [2]), "indices_tuple[1] must be int64, int32, int16 or int8, got bool"),
        (
            torch.tensor([[0, 1, 2]], dtype=torch.uint8),
            "indices_tuple[:, 0] must be int64, int32, int16 or int8, got uint8",
        ),
        (tensors([0, 0], [1], [2, 2]), LENGTHS + "[2], [1], [2]"),
        (tensors([0], [1, 1], [0], [2]), LENGTHS + "[1], [2], [1], [1]"),
        (tensors([0], [1], [0, 0], [2]), LENGTHS + "[1], [1], [2], [1]"),
        (tensors([[0]], [[1]], [[2]]), LENGTHS + "[1, 1], [1, 1], [1, 1]"),
        (tensors(0, 1, 2), LENGTHS + "[], [], []"),
        (torch.tensor([[0, 1, 2], [0, 1, 8]]), "indices_tuple[:, 2] must lie in [0, 8), got 8 at index 1"),
        (tensors([0], [-1], [2]), "indices_tuple[1] must lie in [0, 8), got -1 at index 0"),
        (tensors([0], [1], [3, 9], [2, 4]), "indices_tuple[2] must lie in [0, 8), got 9 at index 1"),
        (
            tuple(t.to("meta") for t in tensors([0], [1], [2])),
            "indices_tuple[0] and embeddings must be on the same device, got meta and cpu; move one with .to()",
        ),
    ],
)
def test_refuses_bad_indices(kind: type, indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {re.escape(message)}$"):
        kind()(torch.randn(8, 4), None, indices)


@KINDS
def test_refuses_what_is_not_a_tensor(kind: type) -> None:
    embeddings, mined = torch.randn(8, 4), tensors([0], [1], [2])
    for arguments, message in (
        ((embeddings.numpy(), None, mined), "embeddings must be a tensor, got ndarray"),
        ((embeddings, None, ([0], [1], [2])), "indices_tuple[0] must be a tensor, got list"),
        ((embeddings, None, 3), "indices_tuple must be a tensor [T, 3] or a tuple of tensors, got int"),
    ):
        with pytest.raises(TypeError, match=f"^{kind.__name__}: {re.escape(message)}$"):
            kind()(*arguments)


@KINDS
def test_autocast_does_not_round(kind: type) -> None:
    embeddings, loss = torch.randn(8, 64), kind()
    for indices in (tensors([0, 1], [1, 2], [3, 4]), tensors([0, 1], [1, 2], [0], [4])):
        with torch.autocast("cpu", torch.bfloat16):
            actual = loss(embeddings, None, indices)
        assert torch.equal(actual, loss(embeddings, None, indices))
