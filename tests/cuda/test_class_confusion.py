from __future__ import annotations

import pytest
import torch
from on_device import captured, check_operator, placed, rows
from torch import Tensor

from lossmeta.ops import class_confusion
from lossmeta.ops.class_confusion import _operator

pytestmark = pytest.mark.cuda

# Few classes in many parts; a warp a row in several parts, in one; few samples of many classes: a block a row.
SHAPES = [(20_000, 10), (3000, 100), (rows(8192), 1000), (300, 1001), (100, 4100), (0, 5)]


def inputs(shape: tuple[int, int], kind: str) -> tuple[Tensor, Tensor]:
    labels = torch.randint(shape[1], shape[:1])
    if kind == "skewed":
        labels = torch.where(torch.rand(shape[0]) < 0.9, 1, labels)
    if kind == "one class":
        labels = torch.full_like(labels, shape[1] - 1)
    labels[::11] = -100
    return 3 * torch.randn(shape, dtype=torch.float64), labels


@pytest.mark.parametrize("kind", ["random", "skewed", "one class"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_labels(shape: tuple[int, int], kind: str) -> None:
    logits, labels = inputs(shape, kind)
    check_operator(_operator, logits, labels, -100)


def test_misaligned() -> None:
    logits, labels = inputs((301, 101), "random")

    class Sliced:
        def __call__(self, x: Tensor, *others: object) -> object:
            return _operator(x[1:], *others)

        @staticmethod
        def reference(x: Tensor, *others: object) -> object:
            return _operator.reference(x[1:], *others)

    check_operator(Sliced(), logits, labels[1:], -100)  # type: ignore[arg-type]


def test_accumulates_when_replayed() -> None:
    logits, labels = placed(inputs((3000, 10), "random"), torch.float32)
    expected = class_confusion(logits, labels)
    sums, counts = (torch.zeros_like(t) for t in expected)
    replay = captured(lambda: class_confusion(logits, labels, sums=sums, counts=counts))
    for t in (sums, counts):
        t.zero_()
    replay()
    replay()
    torch.testing.assert_close(sums, 2 * expected[0], rtol=1e-12, atol=0)
    assert torch.equal(counts, 2 * expected[1])
