"""What all losses promise that take the place of cross-entropy and do not adapt, each against its formula."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from contract import (
    assert_close,
    check_gradients,
    check_half,
    check_strides,
    check_transforms,
)
from torch import Tensor, nn

from lossmeta.losses import (
    BootstrappingLoss,
    FocalLoss,
    ForwardCorrectedLoss,
    GeneralizedCrossEntropy,
    LDAMLoss,
    LogitAdjustedLoss,
    SymmetricCrossEntropy,
)

Softmax = Callable[[Tensor], Tensor]


def shares(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(1, keepdim=True)


def counts(classes: int) -> Tensor:
    return torch.tensor([100 // (c + 1) + 1 for c in range(classes)])


def transition(classes: int) -> Tensor:
    """A share of 0.3 goes to the next class; nothing comes back."""
    return 0.7 * torch.eye(classes, dtype=torch.float64) + 0.3 * torch.eye(classes, dtype=torch.float64).roll(
        1, 1
    )


# ---- The losses of rows, one sample after the other, from probabilities.


def each(rows: Tensor, y: Tensor, loss: Callable[[Tensor, int], Tensor]) -> Tensor:
    return torch.stack([loss(row, int(label)) for row, label in zip(rows, y, strict=True)])


def generalized(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    return each(softmax(x), y, lambda p, c: (1 - p[c] ** 0.7) / 0.7)


def absolute(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    def half_the_distance(p: Tensor, c: int) -> Tensor:
        return sum(((1 - p[i]).abs() if i == c else p[i].abs()) for i in range(len(p))) / 2

    return each(softmax(x), y, half_the_distance)


def symmetric(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    def loss(p: Tensor, c: int) -> Tensor:
        logarithms = [0 if i == c else -3.0 for i in range(len(p))]
        return -0.5 * p[c].log() - 2 * sum(p[i] * logarithms[i] for i in range(len(p)))

    return each(softmax(x), y, loss)


def soft(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    def loss(p: Tensor, c: int) -> Tensor:
        return -sum((0.95 * (i == c) + 0.05 * p[i]) * p[i].log() for i in range(len(p)))

    return each(softmax(x), y, loss)


def hard(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    def loss(p: Tensor, c: int) -> Tensor:
        return -sum((0.8 * (i == c) + 0.2 * (i == int(p.argmax()))) * p[i].log() for i in range(len(p)))

    return each(softmax(x), y, loss)


def corrected(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    t = transition(x.shape[1]).to(x.dtype)
    return each(
        softmax(x), y, lambda p, c: -sum((p[i] * t[i, c] for i in range(len(p))), p.new_zeros(())).log()
    )


def adjusted(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    # e^{x + 1.5 log n} is n^1.5 e^x.
    frequency = counts(x.shape[1]).to(x.dtype) ** 1.5
    return each(softmax(x), y, lambda p, c: -(frequency[c] * p[c] / (frequency * p).sum()).log())


def margins(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    raw = 1 / counts(x.shape[1]).to(x.dtype).sqrt().sqrt()
    delta = 0.5 * raw / raw.max()
    moved = torch.stack(
        [
            torch.stack([v - delta[i] if i == int(c) else v for i, v in enumerate(row)])
            for row, c in zip(x, y, strict=True)
        ]
    )
    return each(softmax(3 * moved), y, lambda p, c: -p[c].log())


def focal(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    return each(softmax(x), y, lambda p, c: -((1 - p[c]) ** 2) * p[c].log())


def focal_below_one(x: Tensor, y: Tensor, softmax: Softmax) -> Tensor:
    return each(softmax(x), y, lambda p, c: -((1 - p[c]) ** 0.5) * p[c].log())


@dataclass
class Case:
    make: Callable[..., nn.Module]  # of C and the options that all share
    reference: Callable[[Tensor, Tensor, Softmax], Tensor]


CASES = {
    "generalized": Case(lambda c, **o: GeneralizedCrossEntropy(**o), generalized),
    "absolute": Case(lambda c, **o: GeneralizedCrossEntropy(1, **o), absolute),
    "symmetric": Case(lambda c, **o: SymmetricCrossEntropy(0.5, 2, -3, **o), symmetric),
    "soft": Case(lambda c, **o: BootstrappingLoss(**o), soft),
    "hard": Case(lambda c, **o: BootstrappingLoss(mode="hard", **o), hard),
    "corrected": Case(lambda c, **o: ForwardCorrectedLoss(transition(c), **o), corrected),
    "adjusted": Case(lambda c, **o: LogitAdjustedLoss(counts(c).double(), 1.5, **o), adjusted),
    "margins": Case(lambda c, **o: LDAMLoss(counts(c).double(), 0.5, 3, **o), margins),
    "focal": Case(lambda c, **o: FocalLoss(**o), focal),
    "focal below one": Case(lambda c, **o: FocalLoss(0.5, **o), focal_below_one),
}
every = pytest.mark.parametrize("name", CASES)


def expected(
    name: str,
    x: Tensor,
    y: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    ignored: int = -100,
    softmax: Softmax = shares,
) -> Tensor:
    """By samples that count alone; those that are ignored are not even looked at."""
    rows, labels = x.movedim(1, -1).reshape(-1, x.shape[1]), y.reshape(-1)
    kept = labels != ignored
    losses = CASES[name].reference(rows[kept], labels[kept], softmax)
    w = torch.ones_like(losses) if weight is None else weight.to(losses.dtype)[labels[kept]]
    if reduction == "mean":
        return (w * losses).sum() / w.sum()
    if reduction == "sum":
        return (w * losses).sum()
    return losses.new_zeros(labels.shape).index_put((kept,), w * losses).reshape(y.shape)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def gradient(value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad(value, x, weights)[0]


# ---- Values and gradients.


@every
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 2), (3, 4, 2), (2, 3, 2, 2)], ids=str)
def test_is_its_formula(name: str, reduction: str, shape: tuple[int, ...]) -> None:
    x, y = leaf(*shape), torch.randint(shape[1], (shape[0], *shape[2:]))
    criterion = CASES[name].make(shape[1], reduction=reduction)
    assert criterion(x, y).dtype == torch.float64
    assert_close(
        gradient(criterion(x, y), x),
        gradient(expected(name, x, y, reduction), x),
        rtol=1e-10,
        atol=1e-12,
    )


@every
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_weights_and_ignored_samples(name: str, reduction: str, weighted: bool, ignored: int) -> None:
    x, y = leaf(8, 4, 3), torch.randint(4, (8, 3))
    y[0] = ignored
    y[1, 1] = ignored
    weight = torch.tensor([0.5, 1, 2, 3]) if weighted else None
    options = {"reduction": reduction, "weight": weight, "ignore_index": ignored}
    criterion = CASES[name].make(4, **options)
    wanted = gradient(expected(name, x, y, reduction, weight, ignored), x)
    assert_close(gradient(criterion(x, y), x), wanted, rtol=1e-10, atol=1e-12)
    # What they hold does not matter.
    with torch.no_grad():
        x[0] = torch.nan
        x[1, :, 1] = torch.inf
    assert_close(gradient(criterion(x, y), x), wanted, rtol=1e-10, atol=1e-12)


@every
def test_reductions_agree_in_float32(name: str) -> None:
    x, y = leaf(9, 5, dtype=torch.float32), torch.randint(5, (9,))
    ones = torch.ones(5)  # keeps the mean from the operator
    results = [
        CASES[name].make(5)(x, y),
        CASES[name].make(5, weight=ones)(x, y),
        CASES[name].make(5, reduction="none")(x, y).mean(),
        CASES[name].make(5, reduction="sum")(x, y) / 9,
    ]
    assert all(r.dtype == torch.float32 for r in results)
    first, *others = (gradient(r, x) for r in results)
    for other in others:
        assert_close(other, first, rtol=1e-5, atol=1e-6)


@every
def test_one_sample_alone_and_labels_of_one_byte(name: str) -> None:
    x, y = leaf(5), torch.tensor(3)
    for reduction in ("none", "mean", "sum"):
        criterion = CASES[name].make(5, reduction=reduction)
        value = criterion(x, y)
        assert value.shape == ()
        assert_close(value, criterion(x[None], y[None]).sum())
        assert_close(criterion(x[None], y[None].to(torch.uint8)), criterion(x[None], y[None]))


@every
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_class_has_nothing_to_learn(name: str, reduction: str) -> None:
    x, y = leaf(4, 1), torch.zeros(4, dtype=torch.int64)
    for t in gradient(CASES[name].make(1, reduction=reduction)(x, y), x):
        assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-15)


@every
def test_nothing_to_average(name: str) -> None:
    """As cross-entropy: the mean of no sample is NaN, the sum 0."""
    for x, y in ((leaf(0, 3), torch.zeros(0, dtype=torch.int64)), (leaf(2, 3), torch.tensor([-100, -100]))):
        assert CASES[name].make(3)(x, y).isnan()
        total = CASES[name].make(3, reduction="sum")(x, y)
        assert total == 0 and torch.equal(torch.autograd.grad(total, x)[0], torch.zeros_like(x))
        assert torch.equal(CASES[name].make(3, reduction="none")(x, y), y.new_zeros(len(y)).double())


@every
def test_derivatives(name: str) -> None:
    x, y = leaf(4, 3, 2), torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]])
    for reduction in ("mean", "none"):
        criterion = CASES[name].make(3, reduction=reduction)
        check_gradients(lambda z, c=criterion: c(z, y), x)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision(name: str, dtype: torch.dtype, reduction: str) -> None:
    x, y = (leaf(64, 5) / 2).detach().requires_grad_(), torch.randint(5, (64,))
    criterion = CASES[name].make(5, reduction=reduction)
    assert criterion(x.to(dtype), y).dtype == torch.float32
    check_half(
        lambda z: criterion(z, y),
        lambda z: expected(name, z, y, reduction, softmax=lambda t: t.softmax(1)),
        dtype,
        x,
    )


@every
def test_strides(name: str) -> None:
    y = torch.randint(3, (4, 2))
    for reduction in ("mean", "none"):
        criterion = CASES[name].make(3, reduction=reduction)
        check_strides(lambda z, c=criterion: c(z, y), leaf(4, 3, 2))


# ---- Transforms.


@pytest.mark.parametrize(
    ("name", "weighted"), [*((name, False) for name in CASES), ("generalized", True), ("adjusted", True)]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(name: str, weighted: bool, backend: str) -> None:
    criterion = CASES[name].make(3, weight=torch.tensor([1.0, 2, 3]) if weighted else None)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=backend)
    for samples in (4, 1, 9):
        x, y = leaf(samples, 3, dtype=torch.float32), torch.randint(3, (samples,))
        if samples > 1:
            y[1] = -100
        assert_close(gradient(compiled(x, y), x), gradient(criterion(x, y), x), rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("weighted", [False, True])
def test_functorch(name: str, weighted: bool) -> None:
    weight = torch.tensor([1.0, 2, 3], dtype=torch.float64) if weighted else None
    x, y = leaf(5, 3), torch.tensor([0, 2, -100, 1, 1])
    criterion = CASES[name].make(3, weight=weight)
    kept = y != -100

    def reference(z: Tensor) -> Tensor:
        # Indices without looking: a transformed tensor has no values.
        w = torch.ones(4, dtype=z.dtype) if weight is None else weight[y[kept]]
        return (w * CASES[name].reference(z[kept], y[kept], shares)).sum() / w.sum()

    if name == "hard":  # the formula looks for the largest probability
        check_against_a_loop(criterion, x, y)
    else:
        check_transforms(lambda z: criterion(z, y), reference, x)


def check_against_a_loop(criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    batch = torch.stack([x, 2 * x, -x]).detach()
    slope = torch.func.grad(lambda z: criterion(z, y))
    assert_close(torch.func.vmap(slope)(batch), torch.stack([slope(z) for z in batch]))
    z = batch[0].clone().requires_grad_()
    assert_close(slope(batch[0]), torch.autograd.grad(criterion(z, y), z)[0])


@every
def test_models_with_labels_of_their_own(name: str) -> None:
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(4, (3, 6))
    for reduction in ("mean", "none"):
        criterion = CASES[name].make(4, reduction=reduction)
        actual = torch.func.vmap(criterion)(x, y)
        assert_close(actual, torch.stack([criterion(*pair) for pair in zip(x, y, strict=True)]))


@every
def test_autocast_rounds_nothing(name: str) -> None:
    x, y = leaf(6, 4, dtype=torch.float32), torch.randint(4, (6,))
    for reduction in ("mean", "none"):
        criterion = CASES[name].make(4, reduction=reduction)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(criterion(x, y), criterion(x, y).float())
            inside = criterion(x, y)
        assert torch.equal(inside, criterion(x, y))


# ---- Where numbers end.


@every
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_are_ruled_out(name: str, reduction: str, dtype: torch.dtype) -> None:
    """A logit of -inf is the limit of a very low one."""
    x, y = leaf(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 0])
    low, out = x.detach().clone(), x.detach().clone()
    low[:, 3:], out[:, 3:] = -1e4, -torch.inf
    criterion = CASES[name].make(5, reduction=reduction)
    results = [gradient(criterion(z, y), z) for z in (low.requires_grad_(), out.requires_grad_())]
    assert all(t.isfinite().all() for t in results[1])
    assert_close(results[1], results[0])


@every
@pytest.mark.parametrize("size", [1e3, 1e5, 1e30])
def test_huge_logits(name: str, size: float) -> None:
    for sign in (1, -1):
        x = torch.tensor([[0.0, 0.5, sign], [sign, 0.0, 1.0]]).mul(size).requires_grad_()
        y = torch.tensor([2, 1])
        for reduction in ("mean", "none"):
            value, slope = gradient(CASES[name].make(3, reduction=reduction)(x, y), x)
            assert value.isfinite().all() and slope.isfinite().all()


BOUNDED = {"generalized": 1 / 0.7, "absolute": 1.0}


@every
def test_a_label_that_is_ruled_out(name: str) -> None:
    """Its loss is infinite where cross-entropy's is, or what it is bounded by; the gradient is no NaN."""
    for classes in (2, 3):
        x = torch.zeros(1, classes)
        x[0, 1] = -torch.inf
        x.requires_grad_()
        for reduction in ("mean", "none"):
            value, slope = gradient(CASES[name].make(classes, reduction=reduction)(x, torch.tensor([1])), x)
            if name == "corrected":  # the class before it may carry this label too
                assert value.isfinite().all()
            else:
                assert_close(value.sum(), torch.tensor(BOUNDED.get(name, torch.inf)))
            assert not slope.isnan().any()


@every
def test_a_weight_of_zero_leaves_an_infinite_loss_out(name: str) -> None:
    x = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, 2.0]], requires_grad=True)
    y, weight = torch.tensor([1, 2]), torch.tensor([1.0, 0, 1])
    value, slope = gradient(CASES[name].make(3, weight=weight)(x, y), x)
    assert_close(value, CASES[name].make(3)(x[1:], y[1:]).detach())
    assert not slope[0].any() and slope[1].isfinite().all()


# ---- As a module.


@every
def test_state_and_device(name: str) -> None:
    weight = torch.tensor([1.0, 2, 3])
    criterion, other = CASES[name].make(3, weight=weight), CASES[name].make(3, weight=torch.ones(3))
    assert not list(criterion.parameters())
    other.load_state_dict(criterion.state_dict())
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    assert torch.equal(other(x, y), criterion(x, y))
    assert criterion.to("meta")(x.to("meta"), y.to("meta")).is_meta


@every
def test_does_not_depend_on_the_defaults_of_torch(name: str) -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    criteria = [CASES[name].make(3, reduction=r) for r in ("mean", "none")]
    before = [criterion(x, y) for criterion in criteria]
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        after = [criterion(x, y) for criterion in criteria]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# ---- Bad input.

X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
CALLS = {
    "no tensor": (TypeError, ([[0.0]], Y), "logits must be a tensor, got list"),
    "no labels": (TypeError, (X, [0, 1]), "target must be a tensor, got list"),
    "integer logits": (
        ValueError,
        (X.long(), Y),
        "logits must be float32, float64, bfloat16 or float16, got int64",
    ),
    "float labels": (
        ValueError,
        (X, Y.float()),
        "target must be class indices (int64 or uint8), got float32; class indices are int64: target.long()",
    ),
    "probabilities": (ValueError, (X, X), "target must be class indices (int64 or uint8), got float32"),
    "other labels": (ValueError, (X, Y[:1]), "target must be [2] for logits [2, 3], got [1]"),
    "other places": (
        ValueError,
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)),
        "target must be [2, 4] for logits [2, 3, 4], got [2, 5]",
    ),
    "no classes": (
        ValueError,
        (torch.zeros(2, 0), Y),
        "logits must be [C], [N, C] or [N, C, d...] with C at least 1, got [2, 0]",
    ),
    "a number": (
        ValueError,
        (torch.zeros(()), torch.zeros((), dtype=torch.int64)),
        "logits must be [C], [N, C] or [N, C, d...] with C at least 1, got []",
    ),
    "another device": (
        ValueError,
        (X, Y.to("meta")),
        "target and logits must be on the same device, got meta and cpu; move one with .to()",
    ),
}


@every
@pytest.mark.parametrize("call", CALLS)
def test_refuses_bad_calls(name: str, call: str) -> None:
    kind, arguments, message = CALLS[call]
    criterion = CASES[name].make(3)
    with pytest.raises(kind, match=f"^{re.escape(f'{type(criterion).__name__}: {message}')}$"):
        criterion(*arguments)


@every
@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_refuses_labels_out_of_range(name: str, label: int, reduction: str) -> None:
    criterion = CASES[name].make(3, reduction=reduction)
    # The operator that computes a mean speaks for itself.
    refused = rf"^(\w+): labels must lie in \[0, 3\), got {label} at index 1$"
    with pytest.raises(ValueError, match=refused):
        criterion(X, torch.tensor([0, label]))


@every
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_where_nobody_looks_a_label_out_of_range_is_nan(name: str, reduction: str) -> None:
    """As on a GPU: under a transform labels are not looked at."""
    criterion = CASES[name].make(3, reduction=reduction, weight=torch.ones(3))
    values = torch.func.vmap(lambda z, y: criterion(z, y))(X.expand(2, 2, 3), torch.tensor([[0, 3], [0, 1]]))
    assert values[0].isnan().any() and values[1].isfinite().all()
    if reduction == "none":
        assert values[0].isnan().tolist() == [False, True]


@every
def test_refuses_bad_options(name: str) -> None:
    make = CASES[name].make
    of = type(make(3)).__name__
    for options, kind, message in (
        ({"reduction": "max"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'max'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got float"),
        ({"weight": [1.0, 2.0, 3.0]}, TypeError, "weight must be a tensor, got list"),
    ):
        with pytest.raises(kind, match=f"^{re.escape(f'{of}: {message}')}$"):
            make(3, **options)
    with pytest.raises(ValueError, match=rf"^{of}: weight must be \[[3C]\], got \[3, 1\]$"):
        make(3, weight=torch.ones(3, 1))
    with pytest.raises(
        ValueError, match=rf"^{of}: logits must have 3 classes in dimension 1, as \w+ has, got \[2, 4\]$"
    ):
        make(3, weight=torch.ones(3))(torch.zeros(2, 4), Y)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: GeneralizedCrossEntropy(1e-9, **o),
        lambda **o: SymmetricCrossEntropy(1, 0, **o),
        lambda **o: BootstrappingLoss(1, **o),
        lambda **o: BootstrappingLoss(1, "hard", **o),
        lambda **o: ForwardCorrectedLoss(torch.eye(4), **o),
        lambda **o: LogitAdjustedLoss(counts(4), 0, **o),
        lambda **o: LogitAdjustedLoss(torch.full((4,), 0.25), **o),
        lambda **o: LDAMLoss(counts(4), 0, 1, **o),
        lambda **o: FocalLoss(0, **o),
    ],
)
def test_cross_entropy_is_their_limit(make: Callable[..., nn.Module], reduction: str) -> None:
    x, y = leaf(6, 4, 3, dtype=torch.float32), torch.randint(4, (6, 3))
    y[0, 0] = -100
    for weight in (None, torch.tensor([0.5, 1, 2, 3])):
        ours = make(reduction=reduction, weight=weight)(x, y)
        theirs = F.cross_entropy(x, y, weight, reduction=reduction)
        assert_close(gradient(ours, x), gradient(theirs, x), rtol=1e-5, atol=1e-6)
