from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from contract import (
    assert_close,
    check_compiles,
    check_gradients,
    check_half,
    check_opcheck,
    check_strides,
    check_threads,
    check_transforms,
    with_gradients,
)
from hypothesis import given
from torch import Tensor

from lossmeta.ops import LowRankPhi, parametric_cross_entropy
from lossmeta.ops.parametric_cross_entropy import _operator

# One class; few classes (lanes across samples); one vector and its neighbours; unaligned; several vectors.
SHAPES = [
    (1, 1),
    (5, 2),
    (128, 10),
    (17, 16),
    (16, 17),
    (3, 100),
    (3, 130),
    (2, 5, 3),
    (3, 20, 2, 5),
    (1, 3, 40),
]
REDUCTIONS = ["none", "mean", "sum"]


def formula(
    logits: Tensor, target: Tensor, phi: Tensor, weight: Any, ignore: int, sigmoid: bool, how: str
) -> Tensor:
    """ALA Eq. 6 by loops over samples, from probabilities rather than logits: independent of the operator."""
    classes = logits.shape[1]
    rows = logits.movedim(1, -1).reshape(-1, classes)
    losses, weights = [], []
    for row, label in zip(rows, target.reshape(-1).tolist(), strict=True):
        if label == ignore:
            losses.append(row.sum() * 0)
            weights.append(row.new_zeros(()))
            continue
        p = row.exp() / row.exp().sum()
        z = sum(phi[label, j] * p[j].log() for j in range(classes))
        a = row.new_ones(()) if weight is None else weight[label]
        losses.append(-a * (1 / (1 + torch.exp(-z)) if sigmoid else z))
        weights.append(a)
    loss = torch.stack(losses)
    if how == "none":
        return loss.reshape(target.shape)
    return loss.sum() if how == "sum" else loss.sum() / torch.stack(weights).sum()


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    classes = shape[1]
    logits = (2 * torch.randn(shape, dtype=dtype)).requires_grad_()
    target = torch.randint(classes, (shape[0], *shape[2:]))
    phi = (
        torch.eye(classes, dtype=dtype) + 0.3 * torch.randn(classes, classes, dtype=dtype)
    ).requires_grad_()
    return logits, target, phi, torch.rand(classes, dtype=dtype) + 0.5


def with_zeros(phi: Tensor, zeros: str) -> Tensor:
    """Phi as it is, the identity (where it starts), or with every other element 0."""
    if zeros == "none":
        return phi
    if zeros == "identity":
        return torch.eye(len(phi), dtype=phi.dtype, requires_grad=True)
    return (phi.detach() * (torch.arange(phi.numel()) % 2).view_as(phi)).requires_grad_()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, ...], reduction: str) -> None:
    logits, target, phi, weight = inputs(shape)
    for sigmoid, w, ignored in itertools.product((True, False), (None, weight), (False, True)):
        labels = target.clone()
        if ignored and labels.numel() > 1:
            labels.view(-1)[0] = -100
        activation = "sigmoid" if sigmoid else "identity"
        actual = with_gradients(
            lambda x, p, y=labels, w=w, a=activation: parametric_cross_entropy(
                x, y, p, weight=w, activation=a, reduction=reduction
            ),
            logits,
            phi,
        )
        expected = with_gradients(
            lambda x, p, y=labels, w=w, s=sigmoid: formula(x, y, p, w, -100, s, reduction), logits, phi
        )
        assert_close(actual, expected)
        single = with_gradients(
            lambda x, p, y=labels, w=w, a=activation: parametric_cross_entropy(
                x, y, p, weight=w, activation=a, reduction=reduction
            ),
            logits.detach().float().requires_grad_(),
            phi.detach().float().requires_grad_(),
        )
        assert_close(single, [e.float() for e in expected], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(5,), *SHAPES], ids=str)
def test_is_cross_entropy_for_the_identity(
    shape: tuple[int, ...], kind: str, smoothing: float, reduction: str
) -> None:
    classes = shape[1] if len(shape) > 1 else shape[0]
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if kind == "indices":
        target = torch.randint(classes, (shape[0], *shape[2:]) if len(shape) > 1 else ())
        if target.numel() > 1:
            target.view(-1)[-1] = 1000
    else:
        target = torch.rand(shape, dtype=torch.float64).softmax(0).requires_grad_()
    for weight in (None, torch.rand(classes, dtype=torch.float64) + 0.1):
        options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
        if kind == "indices":
            options["ignore_index"] = 1000
        phi = torch.eye(classes, dtype=torch.float64)
        assert_close(
            with_gradients(
                lambda x, y, o=options, p=phi: parametric_cross_entropy(x, y, p, activation="identity", **o),
                logits,
                target,
            ),
            with_gradients(lambda x, y, o=options: F.cross_entropy(x, y, **o), logits, target),
        )


@pytest.mark.parametrize("classes", [4, 40])
def test_ignored_class_inside_the_range(classes: int) -> None:
    logits = torch.randn(9, classes, dtype=torch.float64, requires_grad=True)
    target = torch.arange(9) % 4
    phi = torch.eye(classes, dtype=torch.float64, requires_grad=True)
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"ignore_index": 2, "reduction": reduction}
        actual = with_gradients(
            lambda x, p, o=options: parametric_cross_entropy(x, target, p, activation="identity", **o),
            logits,
            phi,
        )
        assert_close(actual[:2], with_gradients(lambda x, o=options: F.cross_entropy(x, target, **o), logits))
        assert actual[2][2].abs().max() == 0


def test_smoothed_weights_stay_outside_the_activation() -> None:
    # By hand: targets y_k = w_k ((1-e) y_k + e/C), mean weight a, loss = -a sigmoid(y/a . Phi log f).
    logits, target, phi, weight = inputs((6, 4))
    smooth = weight * (0.8 * F.one_hot(target, 4) + 0.05)
    a = smooth.sum(1)
    z = ((smooth / a[:, None]) @ phi * logits.log_softmax(1)).sum(1)
    expected = -a * z.sigmoid()
    for options, t in (({}, target), ({}, F.one_hot(target, 4).double())):
        actual = parametric_cross_entropy(
            logits, t, phi, weight=weight, label_smoothing=0.2, reduction="none", **options
        )
        assert_close(actual, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batch_of_models(reduction: str) -> None:
    logits = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (3, 7))
    target[1, 2] = -100
    weight = torch.rand(5, dtype=torch.float64)
    assert_close(
        with_gradients(
            lambda x, p: parametric_cross_entropy(x, target, p, weight=weight, reduction=reduction),
            logits,
            phi,
        ),
        with_gradients(
            lambda x, p: torch.stack(
                [formula(x[b], target[b], p[b], weight, -100, True, reduction) for b in range(3)]
            ),
            logits,
            phi,
        ),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 4, 4)], ids=str)
def test_batch_of_models_is_each_model_alone(
    shape: tuple[int, ...], kind: str, weighted: bool, smoothing: float, reduction: str
) -> None:
    models, _, classes = shape
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(models, classes, classes, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, shape[:2])
    labels[1, 2] = -100
    options: dict[str, Any] = {
        "weight": torch.rand(classes, dtype=torch.float64) if weighted else None,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }

    def loss(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return parametric_cross_entropy(x, y, p, **options)

    target = labels if kind == "indices" else soft
    assert_close(
        with_gradients(loss, logits, target, phi),
        with_gradients(
            lambda x, y, p: torch.stack([loss(x[b], y[b], p[b]) for b in range(models)]), logits, target, phi
        ),
    )


@pytest.mark.parametrize("shape", [(0, 5), (0, 40), (4, 5, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(5, (shape[0], *shape[2:]))
    phi = torch.eye(shape[1], requires_grad=True)
    for reduction in REDUCTIONS:
        loss = parametric_cross_entropy(logits, target, phi, reduction=reduction)
        assert_close(loss, F.cross_entropy(logits, target, reduction=reduction))
        g = torch.autograd.grad(loss.sum(), (logits, phi))
        assert g[0].shape == logits.shape
        if reduction != "mean":
            assert torch.equal(g[1], torch.zeros_like(phi))


def test_all_ignored_is_nan_as_in_cross_entropy() -> None:
    loss = parametric_cross_entropy(torch.randn(3, 4), torch.full((3,), -100), torch.eye(4))
    assert loss.isnan()


@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_and_nan_logits(classes: int, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.randn(8, classes, dtype=dtype)
    rows[0, 1] = -inf
    rows[1, 0] = -inf  # the label's own logit
    rows[2, 1] = inf
    rows[3, 0] = inf
    rows[4, 2] = nan
    rows[5] = -inf
    rows[6] = 1e4 * torch.randn(classes, dtype=dtype)
    rows[7] += 1e5
    logits = rows.requires_grad_()
    target = torch.zeros(8, dtype=torch.int64)
    phi = torch.eye(classes, dtype=dtype)
    ours = with_gradients(
        lambda x: parametric_cross_entropy(x, target, phi, activation="identity", reduction="none"), logits
    )
    theirs = with_gradients(lambda x: F.cross_entropy(x, target, reduction="none"), logits)
    assert_close(ours, theirs)


def test_masked_class_without_correlation_contributes_nothing() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    phi = torch.randn(6, 6, dtype=torch.float64)
    phi[:, 2] = 0
    target = torch.tensor([0, 1, 3, 5])
    masked = logits.clone()
    masked[:, 2] = -float("inf")
    keep = [0, 1, 3, 4, 5]
    renumber = torch.tensor([0, 1, -1, 2, 3, 4])
    actual = with_gradients(
        lambda x, p: parametric_cross_entropy(x, target, p), masked.requires_grad_(), phi.requires_grad_()
    )
    expected = with_gradients(
        lambda x, p: parametric_cross_entropy(x, renumber[target], p),
        logits[:, keep].requires_grad_(),
        phi.detach()[keep][:, keep].requires_grad_(),
    )
    assert_close(actual[0], expected[0])
    assert_close(actual[1][:, keep], expected[1])
    assert_close(actual[2][keep][:, keep], expected[2])
    assert actual[1][:, 2].abs().max() == 0
    assert actual[2][:, 2].abs().max() == 0


@pytest.mark.parametrize("zeros", ["none", "identity", "half"])
def test_first_and_second_derivatives(zeros: str) -> None:
    for shape in ((4, 3), (2, 19), (2, 3, 2)):
        logits, target, phi, weight = inputs(shape)
        phi = with_zeros(phi, zeros)
        check_gradients(
            lambda x, p, y=target, w=weight: parametric_cross_entropy(x, y, p, weight=w), logits, phi
        )


@pytest.mark.parametrize("zeros", ["identity", "half"])
def test_reference_differentiates_where_phi_is_zero(zeros: str) -> None:
    logits, target, phi, weight = inputs((6, 5))
    phi = with_zeros(phi, zeros)
    arguments = (target, weight, -100, True, "mean")

    def expected(x: Tensor, p: Tensor) -> Tensor:
        return formula(x, target, p, *arguments[1:])

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return parametric_cross_entropy(x, target, p, weight=weight)

    fallback = _operator._fallback_backward(
        -torch.ones((), dtype=torch.float64), logits.detach(), target, phi.detach(), weight, -100, True, 1,
        torch.zeros(25, dtype=torch.float64), True, True,
    )  # fmt: skip
    assert_close(fallback, with_gradients(expected, logits, phi)[1:])
    x, p = logits.detach(), phi.detach()
    tangents = torch.randn_like(x), torch.randn_like(p)
    assert_close(torch.func.jvp(loss, (x, p), tangents), torch.func.jvp(expected, (x, p), tangents))
    assert_close(
        torch.func.hessian(loss, (0, 1))(x, p)[1][1], torch.func.hessian(expected, (0, 1))(x, p)[1][1]
    )


def test_reference_shows_labels_out_of_range() -> None:
    # As the CUDA kernel does, where raising would wait for the device.
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 7, -100])
    loss = _operator.reference(logits, target, torch.eye(5), None, -100, True, 0)
    assert loss.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(loss.nan_to_num().sum(), logits)
    assert grad.isfinite().all()
    assert not grad[1:].any()


def test_meta_gradient_of_the_identity() -> None:
    # dL_val / dPhi through one SGD step, which is how Phi is learned from where it starts.
    features, target = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))

    def meta_gradient(loss: Any) -> Tensor:
        w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        phi = torch.eye(3, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(loss(features @ w, phi), w, create_graph=True)
        return torch.autograd.grad(F.cross_entropy(features @ (w - 0.5 * g), target), phi)[0]

    expected = meta_gradient(lambda x, p: formula(x, target, p, None, -100, True, "mean"))
    assert_close(meta_gradient(lambda x, p: parametric_cross_entropy(x, target, p)), expected)
    assert expected[0, 1] != 0


def test_third_derivative() -> None:
    logits, target, phi, _ = inputs((3, 4))

    def third(loss: Any) -> Tensor:
        g = torch.autograd.grad(loss(logits), logits, create_graph=True)[0]
        h = torch.autograd.grad((g**2).sum(), logits, create_graph=True)[0]
        return torch.autograd.grad((h**2).sum(), logits)[0]

    assert_close(
        third(lambda x: parametric_cross_entropy(x, target, phi)),
        third(lambda x: formula(x, target, phi, None, -100, True, "mean")),
    )


@pytest.mark.parametrize("shape", [(6, 5), (3, 33), (2, 4, 3)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    logits, target, phi, weight = inputs(shape, torch.float32)
    for reduction in (0, 1):
        check_opcheck(_operator, logits, target, phi, weight, -100, True, reduction)
    rows = torch.randn_like(logits).requires_grad_()
    check_opcheck(_operator, logits, None, rows, None, -100, False, 1)


def test_compiles() -> None:
    logits, target, phi, weight = inputs((6, 5))
    soft = torch.rand(6, 5, dtype=torch.float64)
    check_compiles(lambda x, p: parametric_cross_entropy(2 * x, target, p, weight=weight).sin(), logits, phi)
    check_compiles(lambda x, p: parametric_cross_entropy(x, target, p, label_smoothing=0.1), logits, phi)
    check_compiles(lambda x, p: parametric_cross_entropy(x, soft, p, reduction="sum"), logits, phi)


def test_transforms() -> None:
    _, target, phi, weight = inputs((4, 3))
    for zeros in ("none", "identity", "half"):
        p = with_zeros(phi, zeros).detach()
        check_transforms(
            lambda x, p=p: parametric_cross_entropy(x, target, p, weight=weight),
            lambda x, p=p: formula(x, target, p, weight, -100, True, "mean"),
            torch.randn(4, 3, dtype=torch.float64),
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labels", [True, False])
def test_vmap_over_models(reduction: str, labels: bool) -> None:
    logits = torch.randn(3, 6, 4, dtype=torch.float64)
    phi = torch.randn(3, 4, 4, dtype=torch.float64)
    target = torch.randint(4, (3, 6)) if labels else torch.rand(3, 6, 4, dtype=torch.float64)

    def loss(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return parametric_cross_entropy(x, y, p, reduction=reduction)

    for dims in ((0, 0, 0), (0, 0, None), (0, None, 0), (None, 0, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((logits, target, phi), dims, strict=True)]
        expected = torch.stack(
            [loss(*(a[b] if d == 0 else a for a, d in zip(args, dims, strict=True))) for b in range(3)]
        )
        assert_close(torch.func.vmap(loss, dims)(*args), expected)
        per_model = torch.func.vmap(torch.func.grad(lambda *a: loss(*a).sum(), (0, 2)), dims)(*args)
        for b in range(3):
            one = torch.func.grad(lambda *a: loss(*a).sum(), (0, 2))(
                *(a[b] if d == 0 else a for a, d in zip(args, dims, strict=True))
            )
            assert_close([g[b] for g in per_model], one)


def test_strides() -> None:
    for shape in ((6, 5), (4, 37), (2, 4, 3)):
        logits, target, phi, _ = inputs(shape)
        for reduction in REDUCTIONS:
            check_strides(
                lambda x, p, y=target, r=reduction: parametric_cross_entropy(x, y, p, reduction=r),
                logits,
                phi,
            )


def test_threads() -> None:
    for shape in ((3000, 10), (700, 100), (50, 3, 500)):
        logits, target, phi, weight = inputs(shape, torch.float32)
        for reduction in REDUCTIONS:
            check_threads(
                lambda x, p, y=target, w=weight, r=reduction: parametric_cross_entropy(
                    x, y, p, weight=w, reduction=r
                ),
                logits,
                phi,
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for shape in ((9, 7), (9, 50), (2, 5, 9)):
        logits, target, phi, _ = inputs(shape)

        def composition(x: Tensor, p: Tensor, y: Tensor = target) -> Tensor:
            log_probability = torch.log_softmax(x, 1).movedim(1, -1)
            return -torch.sigmoid((p[y] * log_probability).sum(-1)).mean()

        check_half(lambda x, p, y=target: parametric_cross_entropy(x, y, p), composition, dtype, logits, phi)
        assert parametric_cross_entropy(logits.to(dtype), target, phi).dtype == torch.float32


def test_autocast() -> None:
    logits, target, phi, _ = inputs((6, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits @ torch.eye(5)
        assert half.dtype == torch.bfloat16
        loss = parametric_cross_entropy(half, target, phi)
    assert loss.dtype == torch.float32
    assert_close(loss, parametric_cross_entropy(half.float(), target, phi))
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_autocast_does_not_round_the_products(kind: str, smoothing: float) -> None:
    logits, target, phi, weight = inputs((6, 5), torch.float32)
    y = target if kind == "indices" else torch.rand(6, 5)

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return parametric_cross_entropy(x, y, p, weight=weight, label_smoothing=smoothing)

    x, p = logits.detach(), phi.detach()
    tangents = torch.randn_like(x), torch.randn_like(p)
    expected = loss(x, p), torch.func.jvp(loss, (x, p), tangents)[1]
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(x, p), torch.func.jvp(loss, (x, p), tangents)[1]
    assert_close(actual, expected, rtol=0, atol=0)


@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    samples, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    shape = (samples, classes, *data.draw(st.sampled_from([(), (3,), (2, 9)])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    logits = (scale * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_()
    phi = torch.randn(classes, classes, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randint(-1, classes, (shape[0], *shape[2:]), generator=generator)
    weight = data.draw(st.sampled_from([None, torch.rand(classes, generator=generator, dtype=dtype)]))
    sigmoid, reduction = data.draw(st.booleans()), data.draw(st.sampled_from([0, 1, 2]))
    activation = "sigmoid" if sigmoid else "identity"
    actual = with_gradients(
        lambda x, p: parametric_cross_entropy(
            x,
            target,
            p,
            weight=weight,
            ignore_index=-1,
            activation=activation,
            reduction=REDUCTIONS[reduction],
        ),
        logits,
        phi,
    )
    weight64 = None if weight is None else weight.double()
    expected = with_gradients(
        lambda x, p: _operator.reference(x, target, p, weight64, -1, sigmoid, reduction),
        logits.detach().double().requires_grad_(),
        phi.detach().double().requires_grad_(),
    )
    if dtype == torch.float64:
        assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        return
    # The slope of the sigmoid at z is off by as much, relatively, as z is absolutely: by the rounding of its products.
    log_f = logits.detach().double().log_softmax(1).movedim(1, -1)
    products = (phi.detach().double()[target.clamp_min(0)] * log_f).abs().sum(-1).max().item()
    rounding = torch.finfo(torch.float32).eps * products if sigmoid else 0.0
    for a, e in zip(actual, expected, strict=True):
        size = max(1.0, e.nan_to_num().abs().max().item())
        assert_close(a.double(), e, rtol=1e-4 + rounding, atol=(3e-5 + rounding) * size)


BAD = {
    "phi must be [C, C] with C = 5, got [4, 4]": lambda x, y, p: (x, y, torch.eye(4)),
    "phi must be float32, float64, bfloat16 or float16, got int64": lambda x, y, p: (x, y, p.long()),
    "labels must lie in [0, 5), got 7 at index 1": lambda x, y, p: (x, torch.tensor([0, 7, 1]), p),
    "labels must lie in [0, 5), got -1 at index 2": lambda x, y, p: (x, torch.tensor([0, 0, -1]), p),
    "labels must be int64, got int32": lambda x, y, p: (x, y.int(), p),
    "labels must have the shape of logits without the class dimension, got [2] for logits [3, 5]": lambda x, y, p: (
        x,
        y[:2],
        p,
    ),
    "logits must be float32, float64, bfloat16 or float16, got int64": lambda x, y, p: (x.long(), y, p),
    "probabilities must have the shape of logits, [3, 5], got [3]": lambda x, y, p: (x, y.float(), p),
    "logits must have at least one class": lambda x, y, p: (x[:, :0], y, torch.zeros(0, 0)),
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_arguments(message: str) -> None:
    args = BAD[message](torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.eye(5))
    with pytest.raises(ValueError, match=r"^parametric_cross_entropy: ") as caught:
        parametric_cross_entropy(*args)
    text = str(caught.value)
    assert text.startswith(f"parametric_cross_entropy: {message}")
    assert ".cpp" not in text and ".h:" not in text


# The same, with the target given as a smoothed label or as probabilities.
BAD_ON_EVERY_PATH: dict[str, Any] = {
    "phi must be [C, C] with C = 5, got [4, 4]": {"phi": torch.eye(4)},
    "phi must be [C, C] with C = 5, got [3, 5]": {"phi": torch.ones(3, 5)},
    "phi must be [C, C] with C = 5, got []": {"phi": torch.ones(())},
    "phi must be [C, C] with C = 5, got [5]": {"phi": torch.ones(5)},
    "phi must be ": {"phi": torch.eye(5, dtype=torch.int64)},
    "weight must be [5], got []": {"weight": torch.ones(())},
    "weight must be [5], got [1]": {"weight": torch.ones(1)},
    "weight must be [5], got [5, 5]": {"weight": torch.ones(5, 5)},
    "weight must be ": {"weight": torch.ones(5, dtype=torch.int64)},
    "weight and logits must be on the same device, got meta and cpu": {"weight": torch.ones(5, device="meta")},
    "phi and logits must be on the same device, got meta and cpu": {"phi": torch.ones(5, 5, device="meta")},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("message", BAD_ON_EVERY_PATH, ids=str)
def test_bad_arguments_on_every_path(message: str, kind: str) -> None:
    arguments = {"phi": torch.eye(5), **BAD_ON_EVERY_PATH[message]}
    target = torch.rand(3, 5) if kind == "probabilities" else torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"^parametric_cross_entropy: ") as caught:
        parametric_cross_entropy(
            torch.randn(3, 5), target, label_smoothing=0.1 * (kind == "smoothed"), **arguments
        )
    assert str(caught.value).startswith(f"parametric_cross_entropy: {message}")


def test_arguments_that_are_no_tensors() -> None:
    logits, target, phi = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.eye(5)
    for name, arguments in {
        "logits": (logits.numpy(), target, phi),
        "target": (logits, target.tolist(), phi),
        "phi": (logits, target, phi.numpy()),
        "phi.left": (logits, target, LowRankPhi(phi[0], 0.0, phi)),
    }.items():
        expected = "a tensor, a LowRankPhi or None" if name == "phi" else "a tensor"
        with pytest.raises(TypeError, match=f"parametric_cross_entropy: {name} must be {expected}, got "):
            parametric_cross_entropy(*arguments)  # type: ignore[arg-type]


def test_bad_options() -> None:
    args = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.eye(5)
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', got 'avg'"):
        parametric_cross_entropy(*args, reduction="avg")
    with pytest.raises(ValueError, match="activation must be one of 'sigmoid', 'identity', got 'relu'"):
        parametric_cross_entropy(*args, activation="relu")
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 2"):
        parametric_cross_entropy(*args, label_smoothing=2.0)
    with pytest.raises(ValueError, match=r"weight must be \[5\], got \[4\]"):
        parametric_cross_entropy(*args, weight=torch.ones(4))
    with pytest.raises(ValueError, match="phi and logits must be on the same device"):
        parametric_cross_entropy(args[0], args[1], args[2].to("meta"))


def test_nan_in_phi_is_refused() -> None:
    phi = torch.eye(5)
    phi[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"phi must be finite .*, got nan in row 2, the row of label 2"):
        parametric_cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), phi)
    with pytest.raises(
        ValueError, match="phi, weight and probabilities must be finite, got nan for sample 0"
    ):
        parametric_cross_entropy(torch.randn(3, 5), torch.rand(3, 5), phi)
    # Finite, whatever its sum.
    large = torch.full((2, 2), 2e38)
    parametric_cross_entropy(torch.randn(1, 2), torch.tensor([0]), large)
    # NaN logits are no error: they propagate.
    assert parametric_cross_entropy(
        torch.full((3, 5), float("nan")), torch.tensor([0, 1, 2]), torch.eye(5)
    ).isnan()


def test_the_gradient_keeps_its_digits_where_the_sigmoid_is_nearly_one() -> None:
    """With random Phi z is large, of either sign, and the slope of the sigmoid is e^-|z|: small, but not lost."""
    classes = 1009
    logits, target = torch.randn(64, classes), torch.randint(classes, (64,))
    phi = torch.eye(classes) + 0.1 * torch.randn(classes, classes)

    def gradient(function: Any, dtype: torch.dtype) -> Tensor:
        x = logits.to(dtype, copy=True).requires_grad_()
        function(x, target, phi.to(dtype), None, -100, True, REDUCTIONS.index("sum")).backward()
        assert x.grad is not None
        return x.grad.double()

    expected = gradient(_operator.reference, torch.float64)
    assert (expected.norm(dim=1) < 1e-6).any()
    for function in (_operator, _operator.reference):
        error = (gradient(function, torch.float32) - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 1e-4
