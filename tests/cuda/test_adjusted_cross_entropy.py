from __future__ import annotations

import pytest
import torch
from on_device import DRY, captured, check_operator, placed, rows
from torch import Tensor

from lossmeta.ops import adjusted_cross_entropy
from lossmeta.ops.adjusted_cross_entropy import _operator, with_slope

pytestmark = pytest.mark.cuda

# The trials of a population; sums in parts; a warp a row, aligned and not; a block a row.
SHAPES = [
    (8, 64, 10),
    (20_000, 10),
    (2, 9000, 33),
    (300, 1000),
    (rows(8192), 1000),
    (100, 1001),
    (20, 5000),
    (3, 7, 4101),
]


def inputs(shape: tuple[int, ...], requires_grad: bool = True) -> list[Tensor]:
    *batch, samples, classes = shape
    labels = torch.randint(classes, (samples,))
    labels[1::11] = -100
    logits = 2 * torch.randn(shape, dtype=torch.float64)
    values = [
        torch.randn(*batch, classes, dtype=torch.float64),
        torch.rand(batch, dtype=torch.float64),
        torch.rand(batch, dtype=torch.float64) / 2,
    ]
    logits, *values = (t.requires_grad_(requires_grad) for t in (logits, *values))
    return [logits, labels, *values]


@pytest.mark.parametrize("given", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters(shape: tuple[int, ...], given: tuple[int, ...]) -> None:
    logits, labels, *values = inputs(shape)
    parameters = [v if i in given else None for i, v in enumerate(values)]
    check_operator(_operator, logits, labels, *parameters, -100, True)


def test_misaligned() -> None:
    logits, labels, *values = inputs((301, 101))

    class Sliced:
        def __call__(self, x: Tensor, *others: object) -> object:
            return _operator(x[1:], *others)

        @staticmethod
        def reference(x: Tensor, *others: object) -> object:
            return _operator.reference(x[1:], *others)

    check_operator(Sliced(), logits, labels[1:], *values, -100, True)  # type: ignore[arg-type]


def test_nothing_counts() -> None:
    for shape in ((0, 5), (4, 5), (2, 0, 5)):
        logits, _, *values = inputs(shape)
        labels = torch.full(shape[-2:-1], -100)
        check_operator(_operator, logits, labels, *values, -100, True, dtypes=(torch.float32,))


def test_models_are_as_alone() -> None:
    logits, labels, *values = placed(inputs((4, 300, 100), requires_grad=False), torch.float32)
    names = ("shift", "exponent", "smoothing")
    loss, slope = with_slope(logits, labels, **dict(zip(names, values, strict=True)))
    for b in range(4):
        alone = with_slope(logits[b], labels, **dict(zip(names, (v[b] for v in values), strict=True)))
        assert torch.equal(alone[0], loss[b])
        assert torch.equal(alone[1], slope[b])


def test_loss_and_slope_are_captured() -> None:
    logits, labels = placed(inputs((8, 64, 10), requires_grad=False)[:2], torch.float32)
    replay = captured(lambda: with_slope(logits, labels))
    logits.copy_(logits.flip(0))
    for actual, expected in zip(replay(), with_slope(logits, labels), strict=True):
        assert DRY or torch.equal(actual, expected)


@pytest.mark.skipif(DRY, reason="the CPU refuses what is out of range")
def test_bad_values_are_nan() -> None:
    logits, labels, _, exponent, smoothing = placed(inputs((2, 20, 5), requires_grad=False), torch.float32)
    bad = labels.index_fill(0, torch.tensor(3, device=labels.device), 5)
    assert adjusted_cross_entropy(logits, bad).isnan().all()
    for name, value in (("exponent", exponent), ("smoothing", smoothing)):
        loss = adjusted_cross_entropy(logits, labels, **{name: value + torch.tensor([0.0, 2.0]).to(value)})
        assert loss.isnan().tolist() == [False, True]
