"""Both metric-learning losses called as those of pytorch-metric-learning, with references, against Eq. 9 and 10."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd import forward_ad

from lossmeta import _checks
from lossmeta.losses import DistanceMixtureLoss, FocalWeightedLoss

KINDS = pytest.mark.parametrize("kind", [DistanceMixtureLoss, FocalWeightedLoss])
Pairs = list[tuple[int, int]]


def pairs(labels: Tensor, others: Tensor, *, same: bool, own: bool) -> Pairs:
    """With ``own``, the references are the embeddings themselves."""
    every = [(a, r) for a in range(len(labels)) for r in range(len(others)) if not (own and a == r)]
    return [(a, r) for a, r in every if (labels[a] == others[r]) == same]


def mixture(loss: Any, x: Tensor, others: Tensor, positives: Pairs, negatives: Pairs) -> Tensor:
    """Eq. 9 of every triplet, anchor by anchor."""
    found = []
    for a, p in positives:
        for b, n in negatives:
            if a == b:
                near, far = (x[a] - others[p]).norm(), (x[a] - others[n]).norm().clamp(min=loss.min_distance)
                terms = [near**2, near**2.5, near**1.5, ((0.6 * near**2).exp() - 1) / 2]
                terms += [
                    ((0.6 * near).exp() - 1) / 2,
                    0.5 / far,
                    0.2 / far,
                    0.1 / far**2,
                    -far.log(),
                    -2 * far.log(),
                ]
                found.append(loss.phi.double() @ torch.stack(terms))
    return torch.stack(found) if found else x.new_zeros(0)


def focal(loss: Any, x: Tensor, others: Tensor, positives: Pairs, negatives: Pairs) -> Tensor:
    """Eq. 10 of every anchor."""
    first, second = loss.phi.double()
    rows = []
    for anchor in range(len(x)):
        one = x.new_ones(())
        near = [
            (first * ((x[a] - others[p]).norm() - loss.offset)).exp()
            for a, p in set(positives)
            if a == anchor
        ]
        far = [
            (-second * ((x[a] - others[n]).norm() - loss.offset)).exp()
            for a, n in set(negatives)
            if a == anchor
        ]
        rows.append(sum(near, one).log() / first + sum(far, one).log() / second)
    return torch.stack(rows) if rows else x.new_zeros(0)


def expected(loss: Any, *batch: Any) -> Tensor:
    each = (mixture if isinstance(loss, DistanceMixtureLoss) else focal)(loss, *batch)
    return each.sum() if loss.reduction == "sum" else each.sum() / max(len(each), 1)


def tuned(kind: type, **options: Any) -> Any:
    loss = kind(**options).double()
    with torch.no_grad():
        loss.phi.copy_(torch.linspace(0.3, 1.5, len(loss.phi)))
    return loss


@given(
    kind=st.sampled_from([DistanceMixtureLoss, FocalWeightedLoss]),
    reduction=st.sampled_from(["mean", "sum"]),
    form=st.sampled_from(["labels", "pairs", "triplets", "one tensor"]),
    count=st.integers(0, 6),
    references=st.integers(0, 7),
    seed=st.integers(0, 10**6),
)
def test_pairs_are_between_embeddings_and_references(
    kind: type, reduction: str, form: str, count: int, references: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    others = torch.randn(references, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y, z = (torch.randint(3, (n,), generator=generator) for n in (count, references))
    positives, negatives = (pairs(y, z, same=same, own=False) for same in (True, False))
    loss = tuned(kind, reduction=reduction, learnable=True)
    if form == "labels":
        arguments: tuple[Any, ...] = (y, None, others, z)
    else:
        positives, negatives = positives[::2], negatives[1:]
        if form == "pairs":
            negatives = negatives + negatives[:2]  # such as two miners find
            parts = [torch.tensor(p).reshape(-1, 2).long().unbind(1) for p in (positives, negatives)]
            arguments = (None, (*parts[0], *parts[1]), others)
        else:
            triplets = [(a, p, n) for a, p in positives for b, n in negatives if a == b]
            positives, negatives = ([(t[0], t[i]) for t in triplets] for i in (1, 2))
            mined = torch.tensor(triplets).reshape(-1, 3).long()
            arguments = (y, mined if form == "one tensor" else mined.unbind(1), others, z)
            if kind is DistanceMixtureLoss:
                each = [mixture(loss, x, others, [p], [n]) for p, n in zip(positives, negatives, strict=True)]
                result = torch.cat([x.new_zeros(0), *each]).sum() / (
                    max(len(each), 1) if reduction == "mean" else 1
                )
                torch.testing.assert_close(loss(x, *arguments), result)
                return
    actual, right = loss(x, *arguments), expected(loss, x, others, positives, negatives)
    torch.testing.assert_close(actual, right)
    inputs = (x, others, loss.phi)
    for slope, right_slope in zip(
        torch.autograd.grad(actual, inputs, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(right, inputs, allow_unused=True, materialize_grads=True)
        if right.requires_grad
        else [torch.zeros_like(i) for i in inputs],
        strict=True,
    ):
        torch.testing.assert_close(slope, right_slope)


@KINDS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_references_that_are_the_embeddings_are_no_references(kind: type, reduction: str) -> None:
    loss, x, y = tuned(kind, reduction=reduction), torch.randn(7, 3).double(), torch.arange(7) % 3
    for arguments in ((y, None, x, y), (y, None, x, None), (y, None, x, y.clone()), (y, None, None, None)):
        torch.testing.assert_close(loss(x, *arguments), loss(x, y))
    # An equal tensor is another reference: each is its own positive, at distance 0.
    others = x.clone()
    positives, negatives = (pairs(y, y, same=same, own=False) for same in (True, False))
    if reduction != "none":
        torch.testing.assert_close(
            loss(x, y, None, others, y), expected(loss, x, others, positives, negatives)
        )


@KINDS
def test_embeddings_as_references_with_labels_of_their_own(kind: type) -> None:
    loss, x = tuned(kind), torch.randn(6, 3).double()
    y, z = torch.arange(6) // 2, torch.arange(6) % 3
    positives, negatives = (pairs(y, z, same=same, own=True) for same in (True, False))
    torch.testing.assert_close(loss(x, y, None, x, z), expected(loss, x, x, positives, negatives))


@KINDS
def test_without_reduction_an_anchor_has_one_value(kind: type) -> None:
    loss, x, others = tuned(kind, reduction="none"), torch.randn(4, 3).double(), torch.randn(6, 3).double()
    y, z = torch.arange(4) % 2, torch.arange(6) % 3
    each = loss(x, y, None, others, z)
    assert each.shape == (4,)
    loss.reduction = "sum"
    torch.testing.assert_close(each.sum(), loss(x, y, None, others, z))
    for anchor in range(4):
        torch.testing.assert_close(each[anchor], loss(x[anchor][None], y[anchor][None], None, others, z))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pairs_are_not_multiplied_out(reduction: str) -> None:
    """As many pairs as a cross-batch memory gives: their triplets would not fit anywhere."""
    loss, x, others = (
        tuned(DistanceMixtureLoss, reduction=reduction),
        torch.randn(2, 3),
        torch.randn(60_000, 3),
    )
    anchor, other = torch.arange(2).repeat_interleave(30_000), torch.arange(60_000)
    mined = (anchor, other, anchor.flip(0), other)
    near, far = (x[anchor] - others).norm(dim=1).double(), (x[anchor.flip(0)] - others).norm(dim=1).double()
    near_terms = torch.stack(
        [near**2, near**2.5, near**1.5, (0.6 * near**2).expm1() / 2, (0.6 * near).expm1() / 2]
    )
    far = far.clamp(min=1e-3)
    far_terms = torch.stack([0.5 / far, 0.2 / far, 0.1 / far**2, -far.log(), -2 * far.log()])
    each = (loss.phi[:5] @ near_terms).sum() * 30_000 + (loss.phi[5:] @ far_terms).sum() * 30_000
    right = each if reduction == "sum" else each / (2 * 30_000**2)
    torch.testing.assert_close(loss(x, None, mined, others).double(), right, rtol=1e-4, atol=0)


def test_a_pair_in_no_triplet_counts_nowhere() -> None:
    """Even where its functions overflow."""
    x = torch.tensor([[0.0], [1e30], [1.0]], requires_grad=True)
    indices = tuple(torch.tensor(t) for t in ([0, 1], [2, 0], [0], [2]))
    loss = DistanceMixtureLoss()
    loss.phi.fill_(1)
    result = loss(x, None, indices)
    result.backward()
    assert result.isfinite()
    assert x.grad is not None and x.grad.isfinite().all()


@KINDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_integer_dtype(kind: type, dtype: torch.dtype) -> None:
    loss, x, others = kind(), torch.randn(6, 3), torch.randn(5, 3)
    y, z = torch.arange(6) // 2, torch.arange(5) // 2
    assert torch.equal(loss(x, y.to(dtype)), loss(x, y))
    assert torch.equal(loss(x, y.to(dtype), None, others, z.to(dtype)), loss(x, y, None, others, z))
    assert torch.equal(loss(x, y, None, others, z.to(dtype)), loss(x, y, None, others, z))


@KINDS
def test_indices_have_the_dtype_of_labels(kind: type) -> None:
    """As those of pytorch-metric-learning sometimes do."""
    loss, x, mined = kind(), torch.randn(6, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])
    assert torch.equal(loss(x, None, mined.int()), loss(x, None, mined))


@KINDS
def test_half_precision_references(kind: type) -> None:
    loss, x, others = kind(), torch.randn(6, 3), torch.randn(5, 3)
    y, z = torch.arange(6) // 2, torch.arange(5) // 2
    low = loss(x.bfloat16(), y, None, others.bfloat16(), z)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(x.bfloat16().float(), y, None, others.bfloat16().float(), z))
    torch.testing.assert_close(
        loss(x, y, None, others.bfloat16(), z), loss(x, y, None, others.bfloat16().float(), z)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(x, y, None, others, z), loss(x, y, None, others, z.clone()))
        inside = loss(x, y, None, others, z)
    assert torch.equal(inside, loss(x, y, None, others, z))


@KINDS
def test_second_derivatives(kind: type) -> None:
    loss = tuned(kind, learnable=True)
    x, others = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    y, z = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1, 0])

    def f(x: Tensor, others: Tensor, phi: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"phi": phi}, (x, y, None, others, z))

    phi = loss.phi.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(f, (x, others, phi))


X, R = torch.zeros(3, 2), torch.zeros(4, 2)
Y, Z = torch.arange(3), torch.arange(4)
MINED = tuple(torch.tensor([i]) for i in (0, 1, 2))


@KINDS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, None, None, R, Z), "labels or indices_tuple must be given, got neither"),
        ((X, Y, None, R), "ref_labels or indices_tuple must be given with ref_emb, got neither"),
        ((X, Y, None, None, Z), "ref_emb must be given with ref_labels, got none"),
        ((X, Y, None, torch.zeros(4, 3), Z), "ref_emb must be [R, 2] as embeddings are, got [4, 3]"),
        ((X, None, MINED, torch.zeros(4)), "ref_emb must be [R, 2] as embeddings are, got [4]"),
        ((X, Y, None, R.long(), Z), "ref_emb must be float32, float64, bfloat16 or float16, got int64"),
        ((X, Y, None, R, Y), "ref_labels must be [4], got [3]"),
        ((X, Z, None, R, Z), "labels must be [3], got [4]"),
        ((X, Z), "labels must be [3], got [4]"),
        ((X, Y[:, None]), "labels must be [3], got [3, 1]"),
        ((X, Y.float()), "labels must be integers, got float32"),
        ((X, Y, None, R, Z.float()), "ref_labels must be integers, got float32"),
        (
            (X, None, tuple(torch.tensor([i]) for i in (3, 0, 0)), R),
            "indices_tuple[0] must lie in [0, 3), got 3 at index 0",
        ),
        (
            (X, None, tuple(torch.tensor([i]) for i in (0, 4, 0)), R),
            "indices_tuple[1] must lie in [0, 4), got 4 at index 0",
        ),
        (
            (X, Y, None, R.to("meta"), Z),
            "ref_emb and embeddings must be on the same device, got meta and cpu; move one with .to()",
        ),
    ],
)
def test_bad_batches_are_refused(kind: type, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {re.escape(message)}$"):
        kind()(*arguments)


@KINDS
def test_what_is_no_tensor_is_refused(kind: type) -> None:
    for arguments, message in (
        ((X, Y, None, R.numpy(), Z), "ref_emb must be a tensor, got ndarray"),
        ((X, Y, None, R, [0]), "ref_labels must be a tensor, got list"),
        ((X, [0, 1, 2]), "labels must be a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=f"^{kind.__name__}: {re.escape(message)}$"):
            kind()(*arguments)


@KINDS
@pytest.mark.parametrize(
    ("bad", "nan"), [([3, 0, 0], [0, 1, 2]), ([0, 4, 0], [0]), ([0, 0, -1], [0]), ([-1, 0, 0], [0, 1, 2])]
)
def test_a_bad_index_that_cannot_be_looked_at_is_never_another_embedding(
    kind: type, bad: list[int], nan: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, for which the reference formula stands, which is taken where forward derivatives are."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    x, others = torch.randn(3, 2, requires_grad=True), torch.randn(4, 2)
    for indices in (torch.tensor([bad]), tuple(torch.tensor([i]) for i in (bad[0], bad[1], bad[0], bad[2]))):
        for reduction in ("none", "mean", "sum"):
            with forward_ad.dual_level():
                result = kind(reduction=reduction)(x, None, indices, others)
            if reduction == "none" and kind is FocalWeightedLoss:
                assert result.isnan().nonzero().flatten().tolist() == nan
            else:
                assert result.isnan().all()
            (gradient,) = torch.autograd.grad(result.sum(), x)
            assert gradient.isfinite().all()


@KINDS
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "reducer",
            "reducer is no option, got 3; give reduction='none' and reduce the values yourself, or 'mean' or 'sum'",
        ),
        (
            "distance",
            "distance is no option, got 3; it is the Euclidean one of the embeddings as they come, and "
            "torch.nn.functional.normalize(embeddings) gives that of LpDistance()",
        ),
        ("embedding_regularizer", "embedding_regularizer is no option, got 3"),
    ],
)
def test_options_of_other_losses_are_refused_by_name(kind: type, option: str, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{kind.__name__}: {re.escape(message)}$"):
        kind(**{option: 3})
