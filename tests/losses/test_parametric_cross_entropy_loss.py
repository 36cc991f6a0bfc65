from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossmeta.losses import ParametricCrossEntropy
from lossmeta.ops.parametric_cross_entropy import parametric_cross_entropy

WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0])


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight": WEIGHT}, {"ignore_index": 2}, {"label_smoothing": 0.1}],
    ids=lambda o: next(iter(o), ""),
)
def test_identity_takes_the_place_of_cross_entropy(options: dict, reduction: str) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, 3, requires_grad=True), torch.randint(4, (6, 3))
    ours = ParametricCrossEntropy(4, activation="identity", reduction=reduction, **options)
    theirs = nn.CrossEntropyLoss(reduction=reduction, **options)
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))
    soft = torch.rand(6, 4, 3).softmax(1)
    options.pop("ignore_index", None)
    torch.testing.assert_close(
        ParametricCrossEntropy(4, activation="identity", reduction=reduction, **options)(logits, soft),
        F.cross_entropy(logits, soft, reduction=reduction, **options),
    )


def test_passes_every_option_on() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 4), torch.randint(4, (8,))
    labels[0] = 9
    options = {"weight": WEIGHT, "ignore_index": 9, "label_smoothing": 0.2, "reduction": "sum"}
    loss = ParametricCrossEntropy(4, **options)
    loss.phi.copy_(torch.randn(4, 4))
    torch.testing.assert_close(
        loss(logits, labels),
        parametric_cross_entropy(logits, labels, loss.phi, activation="sigmoid", **options),
    )


def test_phi_is_a_buffer_unless_learnable() -> None:
    fixed, learnable = ParametricCrossEntropy(3), ParametricCrossEntropy(3, learnable=True)
    assert list(fixed.parameters()) == []
    assert [name for name, _ in learnable.named_parameters()] == ["phi"]
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == ["phi", "_extra_state"]
    learnable(torch.randn(5, 3), torch.randint(3, (5,))).backward()
    assert learnable.phi.grad.abs().sum() > 0


def test_state_moves_between_losses() -> None:
    first, second = (
        ParametricCrossEntropy(3, weight=torch.ones(3)),
        ParametricCrossEntropy(3, weight=torch.zeros(3)),
    )
    first.phi.copy_(torch.randn(3, 3))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.phi, second.phi)
    assert torch.equal(first.weight, second.weight)


def test_dtype_and_device() -> None:
    assert ParametricCrossEntropy(3, dtype=torch.float64).phi.dtype == torch.float64
    assert ParametricCrossEntropy(3, device="meta").phi.is_meta


def test_representation() -> None:
    assert repr(ParametricCrossEntropy(3)) == (
        "ParametricCrossEntropy(num_classes=3, link='softmax', activation='sigmoid', learnable=False, weighted=False, "
        "ignore_index=-100, label_smoothing=0.0, reduction='mean')"
    )


# ---- Without a matrix.


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"label_smoothing": 0.1}], ids=str)
def test_low_rank_starts_as_the_identity(rank: int, options: dict) -> None:
    logits, labels = torch.randn(6, 4, 3), torch.randint(4, (6, 3))
    for target in (labels, torch.rand(6, 4, 3).softmax(1)):
        torch.testing.assert_close(
            ParametricCrossEntropy(4, rank, activation="identity", **options)(logits, target),
            F.cross_entropy(logits, target, **options),
        )
        torch.testing.assert_close(
            ParametricCrossEntropy(4, rank, **options)(logits, target),
            ParametricCrossEntropy(4, **options)(logits, target),
        )


def test_low_rank_is_its_matrix() -> None:
    low = ParametricCrossEntropy(4, rank=2, label_smoothing=0.1, weight=WEIGHT, dtype=torch.float64)
    for buffer in (low.phi_diagonal, low.phi_left):
        buffer.normal_()
    dense = ParametricCrossEntropy(4, label_smoothing=0.1, weight=WEIGHT, dtype=torch.float64)
    dense.phi.copy_(low.phi_diagonal.diag() + low.phi_left @ low.phi_right.T)
    logits, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(4, (8,))
    torch.testing.assert_close(low(logits, labels), dense(logits, labels))


def test_low_rank_state() -> None:
    names = ["phi_diagonal", "phi_left", "phi_right"]
    fixed, learnable = ParametricCrossEntropy(5, rank=2), ParametricCrossEntropy(5, rank=2, learnable=True)
    assert list(fixed.parameters()) == []
    assert [name for name, _ in learnable.named_parameters()] == names
    assert list(fixed.state_dict()) == list(learnable.state_dict()) == [*names, "_extra_state"]
    fixed.load_state_dict(learnable.state_dict())
    assert torch.equal(fixed.phi_right, learnable.phi_right)
    learnable(torch.randn(7, 5), torch.randint(5, (7,))).backward()
    # At the start L R' is 0, but not stationary.
    assert learnable.phi_diagonal.grad.any()
    assert learnable.phi_left.grad.any()
    made = ParametricCrossEntropy(3, rank=1, dtype=torch.float64)
    assert {t.dtype for t in made.buffers()} == {torch.float64}
    assert all(t.is_meta for t in ParametricCrossEntropy(3, rank=1, device="meta").buffers())


def test_low_rank_knows_its_classes_and_its_models() -> None:
    criterion = ParametricCrossEntropy(5, rank=2)
    with pytest.raises(ValueError, match=r"must have num_classes = 5 classes in dimension 1, got \[6, 7\]"):
        criterion(torch.zeros(6, 7), torch.zeros(6, dtype=torch.int64))
    for name in ("phi_diagonal", "phi_left", "phi_right"):
        setattr(criterion, name, torch.stack([getattr(criterion, name)] * 3))
    logits, labels = torch.randn(3, 6, 5), torch.randint(5, (3, 6))
    torch.testing.assert_close(criterion(logits, labels)[1], ParametricCrossEntropy(5)(logits[1], labels[1]))


def test_low_rank_representation() -> None:
    assert repr(ParametricCrossEntropy(3, rank=2, learnable=True)) == (
        "ParametricCrossEntropy(num_classes=3, rank=2, link='softmax', activation='sigmoid', learnable=True, "
        "weighted=False, ignore_index=-100, label_smoothing=0.0, reduction='mean')"
    )


def test_a_vocabulary_fits() -> None:
    logits = torch.randn(2, 131072, requires_grad=True)
    criterion = ParametricCrossEntropy(131072, rank=2, label_smoothing=0.1)
    criterion(logits, torch.tensor([0, 131071])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "ParametricCrossEntropy: num_classes must be an integer, at least 1, got 0"),
        ({"num_classes": 5.0}, "ParametricCrossEntropy: num_classes must be an integer, at least 1, got 5.0"),
        (
            {"activation": "tanh"},
            "ParametricCrossEntropy: activation must be one of 'sigmoid', 'identity', got 'tanh'",
        ),
        (
            {"reduction": "max"},
            "ParametricCrossEntropy: reduction must be one of 'none', 'mean', 'sum', got 'max'",
        ),
        ({"label_smoothing": 1.5}, "ParametricCrossEntropy: label_smoothing must lie in [0, 1], got 1.5"),
        ({"rank": -1}, "ParametricCrossEntropy: rank must be an integer, at least 0, got -1"),
        ({"rank": 1.5}, "ParametricCrossEntropy: rank must be an integer, at least 0, got 1.5"),
        ({"weight": torch.ones(4)}, "ParametricCrossEntropy: weight must be [3], got [4]"),
    ],
)
def test_refuses_bad_options(options: dict, message: str) -> None:
    kind = (
        TypeError if any(isinstance(options.get(o), float) for o in ("num_classes", "rank")) else ValueError
    )
    with pytest.raises(kind, match=exactly(message)):
        ParametricCrossEntropy(**{"num_classes": 3, **options})


def test_refuses_a_weight_that_is_no_tensor() -> None:
    message = "ParametricCrossEntropy: weight must be a tensor, got list"
    with pytest.raises(TypeError, match=exactly(message)):
        ParametricCrossEntropy(2, weight=[1.0, 2.0])


def test_says_how_many_classes_it_was_made_for() -> None:
    criterion = ParametricCrossEntropy(5)
    for shape, dim in (((6, 7), 1), ((7,), 0), ((2, 7, 5), 1)):
        with pytest.raises(
            ValueError, match=rf"must have num_classes = 5 classes in dimension {dim}, got \[.*7"
        ):
            criterion(torch.zeros(shape), torch.zeros(shape[:1] if dim else (), dtype=torch.int64))


def test_float_labels_are_told_how_to_become_labels() -> None:
    with pytest.raises(ValueError, match=r"got \[6\]; class indices are int64: target.long\(\)"):
        ParametricCrossEntropy(5)(torch.zeros(6, 5), torch.zeros(6))
