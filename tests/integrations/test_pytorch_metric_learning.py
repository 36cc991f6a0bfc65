"""The wrappers, miners, testers and trainers of pytorch-metric-learning with our losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pml = pytest.importorskip("pytorch_metric_learning", reason="needs pytorch-metric-learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu  # noqa: E402

from lossmeta.integrations.pytorch_metric_learning import CrossBatchMemory, SelfSupervisedLoss  # noqa: E402
from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss  # noqa: E402

ROOT = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize("kind", [DistanceMixtureLoss, FocalWeightedLoss])


def distance_matrix(x: Tensor, others: Tensor) -> Tensor:
    """With gradient 0 where the distance is 0."""
    return torch.stack([(row - others).square().sum(1).clamp(min=1e-300).sqrt() for row in x])


def mixture(x: Tensor, others: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """The mean of d+^2 + 0.5 / d- over triplets, by matrices [M, R] that say which pairs there are."""
    d = distance_matrix(x, others)
    total, number = x.new_zeros(()), 0
    for row, near, far in zip(d, positives.bool(), negatives.bool(), strict=True):
        for p in row[near]:
            for n in row[far]:
                total, number = total + p**2 + 0.5 / n.clamp(min=1e-3), number + 1
    return total / max(number, 1)


def focal(x: Tensor, others: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    d = distance_matrix(x, others)
    near = (1 + ((d - 1).exp() * positives).sum(1)).log()
    far = (1 + ((1 - d).exp() * negatives).sum(1)).log()
    return (near + far).mean()


FORMULAS = {DistanceMixtureLoss: mixture, FocalWeightedLoss: focal}


@KINDS
@pytest.mark.parametrize("memory_size", [8, 12, 32])
@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
def test_cross_batch_memory(kind: Any, memory_size: int, label_dtype: torch.dtype) -> None:
    """Its queue wraps around; a batch is in it already, but no embedding is its own positive."""
    memory = CrossBatchMemory(kind(), 4, memory_size=memory_size)
    assert isinstance(memory, losses.CrossBatchMemory)
    queue: list[tuple[Tensor, int, int]] = []
    for step in range(5):
        x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
        y = torch.randint(3, (8,), dtype=label_dtype)
        queue = [
            *queue,
            *((v.detach(), int(label), 8 * step + i) for i, (v, label) in enumerate(zip(x, y, strict=True))),
        ]
        queue = queue[-memory_size:]
        others = torch.stack([v for v, _, _ in queue])
        same = y[:, None] == torch.tensor([label for _, label, _ in queue])
        itself = torch.arange(8 * step, 8 * step + 8)[:, None] == torch.tensor([i for _, _, i in queue])
        expected = FORMULAS[kind](x, others, same & ~itself, ~same)
        actual = memory(x, y)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(expected, x))


@KINDS
def test_cross_batch_memory_with_a_miner(kind: Any) -> None:
    miner = miners.MultiSimilarityMiner()
    memory = CrossBatchMemory(kind(), 4, memory_size=24, miner=miner)
    for _ in range(3):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        value = memory(x, y)
        others, z = memory.embedding_memory, memory.label_memory
        filled = slice(None) if memory.has_been_filled else slice(memory.queue_idx)
        a, p, b, n = lmu.remove_self_comparisons(
            miner(x, y, others[filled], z[filled]), memory.curr_batch_idx, memory.memory_size
        )
        near, far = torch.zeros(2, 8, len(others[filled]))
        near[a, p], far[b, n] = 1, 1
        torch.testing.assert_close(value, FORMULAS[kind](x, others[filled], near, far))


@KINDS
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_loss(kind: Any, symmetric: bool) -> None:
    x, other = torch.randn(2, 5, 4, dtype=torch.float64)
    wrapped = SelfSupervisedLoss(kind(), symmetric=symmetric)
    assert isinstance(wrapped, losses.SelfSupervisedLoss)
    if symmetric:
        both, y = torch.cat([x, other]), torch.arange(5).repeat(2)
        same = y[:, None] == y
        expected = FORMULAS[kind](both, both, same & ~torch.eye(10, dtype=torch.bool), ~same)
    else:
        expected = FORMULAS[kind](x, other, torch.eye(5), 1 - torch.eye(5))
    torch.testing.assert_close(wrapped(x, other), expected)


@KINDS
def test_wrappers_still_take_their_own_losses_and_refuse_others(kind: Any) -> None:
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    ours, theirs = (
        wrapper(losses.ContrastiveLoss(), 4, memory_size=12)(x, y)
        for wrapper in (CrossBatchMemory, losses.CrossBatchMemory)
    )
    assert torch.equal(ours, theirs)
    for wrapper, arguments in ((CrossBatchMemory, (4,)), (SelfSupervisedLoss, ())):
        with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
            wrapper(losses.ArcFaceLoss(2, 4), *arguments)


@KINDS
@pytest.mark.parametrize(
    "miner",
    [
        miners.TripletMarginMiner(margin=10.0),
        miners.BatchHardMiner(),
        miners.MultiSimilarityMiner(),
        miners.PairMarginMiner(),
    ],
)
@pytest.mark.parametrize("references", [True, False])
def test_indices_of_miners(kind: Any, miner: Any, references: bool) -> None:
    x, y, others, z = (
        torch.randn(9, 4).double(),
        torch.arange(9) % 3,
        torch.randn(7, 4).double(),
        torch.arange(7) % 3,
    )
    found = miner(x, y, others, z) if references else miner(x, y)
    given = (others, z) if references else ()
    value = kind()(x, y, found, *given)
    assert torch.equal(value, kind()(x, None, found, *given[:1]))
    table = others if references else x
    if kind is FocalWeightedLoss:
        a, p, b, n = found if len(found) == 4 else (found[0], found[1], found[0], found[2])
        near, far = torch.zeros(2, 9, len(table))
        near[a, p], far[b, n] = 1, 1
        torch.testing.assert_close(value, focal(x, table, near, far))
    else:
        a, p, n = lmu.convert_to_triplets(found, y)
        d = [(x[a] - table[i]).norm(dim=1) for i in (p, n)]
        torch.testing.assert_close(
            value, (d[0] ** 2 + 0.5 / d[1].clamp(min=1e-3)).mean() if len(a) else d[0].sum()
        )


def test_all_triplets_are_those_of_the_library() -> None:
    x, y, others, z = (
        torch.randn(6, 4).double(),
        torch.arange(6) % 3,
        torch.randn(7, 4).double(),
        torch.arange(7) % 3,
    )
    for given, mined in (
        ((y,), lmu.get_all_triplets_indices(y)),
        ((y, None, others, z), lmu.get_all_triplets_indices(y, z)),
        ((y, None, x, y), lmu.get_all_triplets_indices(y, y)),
    ):
        loss = DistanceMixtureLoss()
        loss.phi.uniform_()
        torch.testing.assert_close(loss(x, *given), loss(x, None, mined, *given[2:3]))


@KINDS
def test_multiple_losses(kind: Any) -> None:
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    both = losses.MultipleLosses([kind(), losses.TripletMarginLoss()], weights=[2.0, 0.5])
    torch.testing.assert_close(both(x, y), 2 * kind()(x, y) + 0.5 * losses.TripletMarginLoss()(x, y))


@KINDS
def test_its_options_are_refused_by_name(kind: Any) -> None:
    for option, value in (
        ("reducer", reducers.MeanReducer()),
        ("distance", distances.LpDistance()),
        ("embedding_regularizer", regularizers.LpRegularizer()),
    ):
        with pytest.raises(TypeError, match=f"^{kind.__name__}: {option} is no option, got "):
            kind(**{option: value})


def test_the_remedies_are_true() -> None:
    """LpDistance() normalises; without reduction a value per triplet remains, which a reducer's formula can take."""
    x, y = torch.randn(6, 4), torch.arange(6) // 2
    mined = lmu.get_all_triplets_indices(y)
    d = distances.LpDistance()(x)
    a, p, n = mined
    expected = d[a, p] ** 2 + 0.5 / d[a, n]
    each = DistanceMixtureLoss(reduction="none")(nn.functional.normalize(x), None, mined)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


def test_example(run_example: Callable[[str], str]) -> None:
    printed = run_example("pytorch_metric_learning_losses.py")
    words = printed.split()
    before, after = (float(word) for word in words if word.replace(".", "").isdigit())
    assert after > before
