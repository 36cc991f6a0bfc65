"""Losses with ``link="sigmoid"``: several labels for each sample, each on or off on its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import relative_error
from torch import Tensor, nn
from torch.optim import SGD

from lossmeta import _checks
from lossmeta.adalfl import OnlineLearner, initialize, meta_gradient
from lossmeta.losses import LossNetwork, ParametricCrossEntropy, TaylorLoss

SHAPES = [(7,), (1, 1), (5, 3), (4, 3, 2), (4, 2, 3, 2), (600, 20)]


def drawn(loss: nn.Module) -> Any:
    """The loss with parameters that matter."""
    with torch.no_grad():
        for p in (*loss.parameters(), *(b for n, b in loss.named_buffers() if "phi" in n)):
            p.copy_(torch.randn_like(p) * 0.5)
    return loss


def made(kind: str, classes: int, **options: Any) -> Any:
    if kind == "phi":
        return drawn(ParametricCrossEntropy(classes, link="sigmoid", **options))
    if kind == "taylor":
        return drawn(TaylorLoss(link="sigmoid", **options))
    residual = "binary_cross_entropy" if kind == "residual" else None
    return drawn(LossNetwork(8, link="sigmoid", residual=residual, **options))


KINDS = ["network", "residual", "taylor", "phi"]


def classes_of(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1


def of_label(loss: Any, c: int, x: Tensor, y: Tensor) -> Tensor:
    """What one label adds, in float64, by the formulas of the docstrings."""
    x, y = x.double(), y.double()
    f = 1 / (1 + (-x).exp())
    if isinstance(loss, ParametricCrossEntropy):
        off, on = (1 - f).log(), f.log()
        phi = loss.phi.double()[c]
        row = (1 - y)[..., None] * phi[0] + y[..., None] * phi[1]
        z = row[..., 0] * off + row[..., 1] * on
        return -z.sigmoid() if loss.activation == "sigmoid" else -z
    if isinstance(loss, TaylorLoss):
        a, (c0, c1) = loss.coefficients.double(), loss.center.double()
        g, t = f - c0, y - c1
        return (
            a[0] * t
            + a[1] / 2 * t**2
            + a[2] / 6 * t**3
            + a[3] * g * t
            + a[4] / 2 * g * t**2
            + a[5] / 2 * g**2 * t
        )

    def activation(v: Tensor) -> Tensor:
        return (1 - loss.leak) * F.softplus(v, loss.smoothness, 40) + loss.leak * v

    h = activation(torch.stack([y, f], -1) @ loss.input_weight.double().mT)
    value = (activation(h @ loss.hidden_weight.double().mT) @ loss.output_weight.double().mT).squeeze(-1)
    return value - y * f.log() - (1 - y) * (1 - f).log() if loss.residual else value


def each(loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """All of them, in the shape of the logits."""
    if x.dim() == 1:
        return of_label(loss, 0, x, y)
    return torch.stack([of_label(loss, c, x[:, c], y[:, c]) for c in range(x.shape[1])], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_formula(kind: str, shape: tuple[int, ...]) -> None:
    loss, x = made(kind, classes_of(shape)), torch.randn(shape)
    hard, soft = torch.randint(2, shape), torch.rand(shape)
    for y in (hard, hard.bool(), hard.to(torch.int8), hard.float(), soft, soft.half()):
        expected = each(loss, x, y).mean()
        torch.testing.assert_close(loss(x, y).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2)], ids=str)
def test_reductions_weights_smoothing_and_ignored_labels(kind: str, shape: tuple[int, ...]) -> None:
    classes = classes_of(shape)
    x, y, weight = torch.randn(shape), torch.randint(2, shape), torch.rand(classes) + 0.5
    y.view(-1)[::3] = -1
    x.view(-1)[::3] = torch.nan  # of no effect
    counted = y != -1
    for smoothing in (0.0, 0.2):
        options: Any = {"weight": weight, "ignore_index": -1, "label_smoothing": smoothing}
        loss = made(kind, classes, **options)
        of_weight = weight.reshape(-1, *[1] * (len(shape) - 2)).double()
        smooth = (1 - smoothing) * y.double() + smoothing / 2
        expected = (each(loss, x, smooth) * of_weight).where(counted, 0)
        torch.testing.assert_close(loss(x, y).double(), expected.sum() / counted.sum(), rtol=1e-5, atol=1e-6)
        if kind != "phi":  # samples, not labels
            expected = expected.reshape(shape[0], -1).mean(1)
        for reduction, result in (("none", expected), ("sum", expected.sum())):
            other = copy.copy(loss)
            other.reduction = reduction
            torch.testing.assert_close(other(x, y).double(), result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_float_labels_are_ignored_and_refused_too(kind: str, smoothing: float) -> None:
    x, y = torch.randn(5, 3), torch.rand(5, 3)
    y[0, 1] = y[3, 0] = -100
    x[0, 1] = torch.nan
    loss = made(kind, 3, label_smoothing=smoothing)
    kept = y != -100
    expected = each(loss, x, (1 - smoothing) * y + smoothing / 2)[kept].mean()
    torch.testing.assert_close(loss(x, y).double(), expected, rtol=1e-5, atol=1e-6)
    for bad in (-1.0, 1.5, float("nan")):
        y[2, 2] = bad
        with pytest.raises(
            ValueError, match=r"target must lie in \[0, 1\] or be ignore_index = -100, got .* index 8"
        ):
            loss(x, y)


def test_no_samples_give_a_mean_of_nan_and_a_sum_of_0() -> None:
    for kind in KINDS:
        loss = made(kind, 3)
        x, y = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)
        assert loss(x, y).isnan()
        for reduction, shape in (("sum", ()), ("none", (0, 3) if kind == "phi" else (0,))):
            loss.reduction = reduction
            assert loss(x, y).shape == shape
            assert not loss(x, y).any()


def test_starts_as_binary_cross_entropy() -> None:
    x, y, weight = torch.randn(6, 4, requires_grad=True), torch.randint(2, (6, 4)).float(), torch.rand(4)
    for loss in (
        LossNetwork(link="sigmoid", residual="binary_cross_entropy", weight=weight),
        ParametricCrossEntropy(4, link="sigmoid", activation="identity", weight=weight),
    ):
        ours, theirs = loss(x, y), nn.BCEWithLogitsLoss(weight=weight)(x, y)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_extreme_logit_is_nan(kind: str) -> None:
    x = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    loss = made(kind, 2, **({"activation": "identity"} if kind == "phi" else {}))
    for y in (torch.eye(2).long(), torch.eye(2)):
        value = loss(x, y)
        assert value.isfinite()
        assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ignore_index": -1}], ids=str)
def test_derivatives(kind: str, options: Any) -> None:
    loss = made(kind, 3, dtype=torch.float64, **({"learnable": True} if kind == "phi" else {}), **options)
    x, y = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randint(2, (4, 3))
    if options:
        y[0, 1] = -1
    names = [n for n, _ in loss.named_parameters()]

    def called(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, values, strict=True)), (x, y))

    values = [p.detach().clone().requires_grad_() for p in loss.parameters()]
    assert torch.autograd.gradcheck(called, (x, *values))
    assert torch.autograd.gradgradcheck(called, (x, *values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_accumulated_in_float32(kind: str, dtype: torch.dtype) -> None:
    loss, y = made(kind, 5), torch.randint(2, (64, 5))
    x = (3 * torch.randn(64, 5)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    value, expected = loss(x, y), each(loss, wide, y).mean()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(value, x)[0].double(),
        torch.autograd.grad(expected, wide)[0],
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-7,
    )


# ---- What the learner takes.


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("residual", [None, "binary_cross_entropy"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_mixed_derivative(shape: tuple[int, ...], residual: str | None, normalize: bool, soft: bool) -> None:
    options: Any = {"residual": residual, "normalize_slope": normalize, "ignore_index": -1}
    loss = drawn(LossNetwork(8, link="sigmoid", dtype=torch.float64, **options))
    x, y = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randint(2, shape)
    y.view(-1)[0] = -1
    if soft:
        y = torch.rand(shape, dtype=torch.float64).where(y != -1, -1)
    value = loss(x, y)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    u = torch.randn_like(x)
    expected = torch.autograd.grad(slope, list(loss.parameters()), u)
    found = loss.with_mixed_derivative(x.detach(), y)
    assert found is not None
    torch.testing.assert_close((found[0], found[1]), (value, slope))
    torch.testing.assert_close(tuple(found[2](u)), expected)


def test_normalized_slope_is_as_steep_as_the_task_loss() -> None:
    loss = drawn(LossNetwork(8, link="sigmoid", normalize_slope=True))
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(2, (6, 4))
    (ours,) = torch.autograd.grad(loss(x, y), x)
    (theirs,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(x, y.float()), x)
    torch.testing.assert_close(ours.abs().sum(), theirs.abs().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_meta_gradient_equals_full_unrolling(kind: str) -> None:
    options: Any = {"learnable": True} if kind == "phi" else {}
    loss = made(kind, 3, dtype=torch.float64, **options)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    train, valid = ((torch.randn(8, 4).double(), torch.randint(2, (8, 3)).double()) for _ in range(2))

    phi = list(loss.parameters())
    theta = list(model.parameters())
    grads = torch.autograd.grad(loss(model(train[0]), train[1]), theta, create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(model.named_parameters(), grads, strict=True)}
    after = torch.func.functional_call(model, moved, (valid[0],))
    expected = torch.autograd.grad(F.binary_cross_entropy_with_logits(after, valid[1]), phi)

    task = F.binary_cross_entropy_with_logits
    found = meta_gradient(model, SGD(theta, 0.1), loss, task, train, valid, backend="jvp")
    assert relative_error(found.gradients, expected) < 1e-10


def test_trains_a_model_of_several_labels() -> None:
    directions = torch.randn(6, 3)
    x = torch.randn(256, 6)
    y = (x @ directions > 0.5).float()
    model = nn.Linear(6, 3)
    loss = LossNetwork(link="sigmoid", residual="binary_cross_entropy", normalize_slope=True)
    learner = OnlineLearner(model, SGD(model.parameters(), 1.0), loss, F.binary_cross_entropy_with_logits)
    for _ in range(150):
        at = torch.randperm(len(x))[:64]
        learner.step((x[at], y[at]))
    assert learner.skipped == 0
    assert ((model(x) > 0) == y.bool()).float().mean() > 0.9


def test_can_be_initialised() -> None:
    batches = [(torch.randn(8, 4), torch.randint(2, (8, 3)).float())]
    loss = LossNetwork(8, link="sigmoid")
    task = F.binary_cross_entropy_with_logits
    history = initialize(loss, lambda: nn.Linear(4, 3), batches, batches, steps=2, task_loss=task)
    assert len(history) == 2


# ---- Files, pictures, compilers.


@pytest.mark.parametrize("kind", KINDS)
def test_is_saved(kind: str, tmp_path: Any) -> None:
    loss = made(kind, 3)
    x, y = torch.randn(5, 3), torch.randint(2, (5, 3))
    loss.save(tmp_path / "loss.safetensors")
    assert torch.equal(type(loss).load(tmp_path / "loss.safetensors")(x, y), loss(x, y))
    softmax = (
        ParametricCrossEntropy(3)
        if kind == "phi"
        else type(loss)(**({} if kind == "taylor" else {"hidden": 8}))
    )
    with pytest.raises((RuntimeError, ValueError), match="link='softmax'"):
        softmax.load_state_dict(loss.state_dict())


def test_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    residual = LossNetwork(8, link="sigmoid", residual="binary_cross_entropy")
    line = residual.plot().axes[0].get_lines()[0]
    f = torch.tensor(line.get_xdata()[1:-1])
    torch.testing.assert_close(torch.tensor(line.get_ydata()[1:-1]), -f.log(), rtol=1e-4, atol=1e-5)
    made("phi", 3).plot()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind: str) -> None:
    torch._dynamo.reset()
    loss = made(kind, 3)
    x, y = torch.randn(5, 3, requires_grad=True), torch.randint(2, (5, 3))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(x, y), loss(x, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (value, expected)))


# ---- What is refused.


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_does_not_fit(kind: str) -> None:
    loss = made(kind, 3)
    logits, name = torch.zeros(4, 3), type(loss).__name__
    with pytest.raises(ValueError, match=r"both be .*class indices are for link='softmax'"):
        loss(logits, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{name}: labels must lie in .0, 2., got 2 at index 5"):
        loss(logits, torch.tensor([[0, 1, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match=f"{name}: target must be 0 or 1 .* got complex64"):
        loss(logits, torch.zeros(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="on the same device"):
        loss(logits, torch.zeros(4, 3, device="meta"))
    with pytest.raises(ValueError, match="must not be 0 or 1 with link='sigmoid'"):
        made(kind, 3, ignore_index=1)
    with pytest.raises(ValueError, match=f"{name}: weight must be"):
        made(kind, 3, weight=torch.ones(2))(logits, torch.zeros(4, 3))


def test_refuses_options_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match="residual='cross_entropy' is for link='softmax', got link='sigmoid'"
    ):
        LossNetwork(link="sigmoid", residual="cross_entropy")
    with pytest.raises(ValueError, match="rank must be None with link='sigmoid', got 2"):
        ParametricCrossEntropy(3, rank=2, link="sigmoid")
    with pytest.raises(ValueError, match=r"logits must be \[N, 3\] .* got \[4, 2\]"):
        ParametricCrossEntropy(3, link="sigmoid")(torch.zeros(4, 2), torch.zeros(4, 2))


def test_a_label_that_cannot_be_looked_at_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the losses with an operator it is the operator's to say."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    loss, x = made("taylor", 3), torch.randn(2, 3, requires_grad=True)
    loss.reduction = "none"
    value = loss(x, torch.tensor([[0, 1, 7], [1, 0, 1]]))
    assert value.isnan().tolist() == [True, False]
