from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmeta import _checks
from lossmeta.losses import LossNetwork


def formula(loss: LossNetwork, y: Tensor, f: Tensor) -> Tensor:
    """The network as modules of PyTorch would compute it, in float64, averaged over the outputs."""

    def activation(x: Tensor) -> Tensor:
        if loss.activation == "relu":
            return x.relu()
        return (1 - loss.leak) * F.softplus(x, beta=loss.smoothness, threshold=40) + loss.leak * x

    x = torch.stack([y, f], -1).double()
    x = activation(F.linear(x, loss.input_weight.double()))
    x = activation(F.linear(x, loss.hidden_weight.double()))
    x = F.linear(x, loss.output_weight.double()).squeeze(-1)
    return (F.softplus(x) if loss.output == "softplus" else x).mean(1)


def made(**options: Any) -> LossNetwork:
    torch.manual_seed(1)
    return LossNetwork(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"leak": 0.1, "smoothness": 5.0},
        {"hidden": 7},
        {"activation": "relu", "output": "softplus"},
        {"exact": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (4, 3, 2), (500, 20)], ids=str)
def test_is_the_network(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    loss = made(reduction="none", **options)
    logits, labels = torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:]))
    rows = [
        t.movedim(1, -1).reshape(-1, shape[1]) for t in (F.one_hot(labels, shape[1]).movedim(-1, 1), logits)
    ]
    expected = formula(loss, rows[0], rows[1].double().softmax(1)).reshape(labels.shape)
    torch.testing.assert_close(loss(logits, labels).double(), expected, rtol=1e-5, atol=1e-5)
    soft = torch.rand(shape)
    expected = formula(loss, soft.movedim(1, -1).reshape(-1, shape[1]), rows[1].double().softmax(1))
    torch.testing.assert_close(
        loss(logits, soft).double(), expected.reshape(labels.shape), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 3), (5, 2, 2)], ids=str)
def test_regression_compares_raw_values(shape: tuple[int, ...]) -> None:
    loss = made(link="identity")
    pred, target = torch.randn(shape), torch.randn(shape)
    expected = formula(loss, target.reshape(shape[0], -1), pred.reshape(shape[0], -1)).mean()
    torch.testing.assert_close(loss(pred, target).double(), expected, rtol=1e-5, atol=1e-5)


def test_weight_ignore_index_and_smoothing() -> None:
    torch.manual_seed(0)
    weight, labels, logits = torch.tensor([1.0, 3.0]), torch.tensor([0, 1, 1, 7]), torch.randn(4, 2)
    each = made(reduction="none")(logits, labels.clamp(max=1)) * torch.tensor([1.0, 3.0, 3.0, 0.0])
    options: dict[str, Any] = {"weight": weight, "ignore_index": 7}
    torch.testing.assert_close(made(reduction="none", **options)(logits, labels), each)
    torch.testing.assert_close(made(reduction="sum", **options)(logits, labels), each.sum())
    torch.testing.assert_close(made(reduction="mean", **options)(logits, labels), each.sum() / 7)
    smooth = 0.8 * F.one_hot(labels[:3], 2) + 0.1
    torch.testing.assert_close(made(label_smoothing=0.2)(logits[:3], labels[:3]), made()(logits[:3], smooth))


def test_ignored_label_may_be_a_class() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4), torch.arange(9) % 4
    kept = labels != 2
    logits[2] = torch.nan
    results = [made(ignore_index=2)(logits, labels), made()(logits[kept], labels[kept])]
    torch.testing.assert_close(results[0], results[1])
    loss = made(ignore_index=2)
    loss(logits, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())


def test_weights_are_kaiming_normal_parameters() -> None:
    loss = made(hidden=400)
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {
        "input_weight": (400, 2),
        "hidden_weight": (400, 400),
        "output_weight": (1, 400),
    }
    for weight in loss.parameters():
        assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.15)
    assert list(loss.state_dict()) == [*(name for name, _ in loss.named_parameters()), "_extra_state"]
    before = loss.hidden_weight.detach().clone()
    loss.reset_parameters()
    assert not torch.equal(before, loss.hidden_weight)


def test_trains_the_network_and_what_it_judges() -> None:
    loss = made()
    logits = torch.randn(6, 4, requires_grad=True)
    loss(logits, torch.randint(4, (6,))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*loss.parameters(), logits))


# ---- The network on top of a task loss.

SHAPES = pytest.mark.parametrize("shape", [(5,), (7, 5), (4, 3, 2), (600, 20)], ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def targets(shape: tuple[int, ...], probabilities: bool) -> Tensor:
    if probabilities:
        return torch.rand(shape).softmax(0 if len(shape) == 1 else 1)
    classes = shape[0] if len(shape) == 1 else shape[1]
    labels = torch.randint(classes, (() if len(shape) == 1 else (shape[0], *shape[2:])))
    if labels.dim():
        labels[0] = -1
    return labels


@SHAPES
@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_starts_as_cross_entropy(
    shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float, probabilities: bool
) -> None:
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": -1, "label_smoothing": smoothing}
    options["weight"] = torch.rand(shape[0 if len(shape) == 1 else 1]) + 0.5 if weighted else None
    loss = made(residual="cross_entropy", **options)
    logits, target = torch.randn(shape, requires_grad=True), targets(shape, probabilities)
    actual, expected = loss(logits, target), F.cross_entropy(logits, target, **options)
    assert torch.equal(actual, expected)
    upstream = torch.rand(actual.shape)
    gradients = [torch.autograd.grad(value, logits, upstream)[0] for value in (actual, expected)]
    assert torch.equal(*gradients)
    # Later it is the sum of the two losses.
    network = made(**options)
    for ours, theirs in zip(network.parameters(), loss.parameters(), strict=True):
        ours.data.copy_(theirs)
    with torch.no_grad():
        for module in (loss, network):
            module.output_weight.fill_(0.1)
    assert torch.equal(loss(logits, target), expected + network(logits, target))


@REDUCTIONS
@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 3), (5, 2, 2), (0, 3)], ids=str)
def test_starts_as_squared_error(shape: tuple[int, ...], reduction: str) -> None:
    loss = made(residual="squared_error", link="identity", reduction=reduction)
    pred, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    actual = loss(pred, target)
    each = F.mse_loss(pred, target, reduction="none").reshape(shape[0], -1 if shape[0] else 3).mean(1)
    expected = {"none": each, "mean": F.mse_loss(pred, target), "sum": each.sum()}[reduction]
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=0)
    upstream = torch.rand(actual.shape)
    gradients = [torch.autograd.grad(value, pred, upstream)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("output", ["linear", "softplus"])
@pytest.mark.parametrize("activation", ["smooth_leaky_relu", "relu"])
@pytest.mark.parametrize("shape", [(6, 4), (600, 20)], ids=str)  # by the network and by its table
def test_learns_from_the_task_loss_on(shape: tuple[int, int], activation: str, output: str) -> None:
    loss = made(residual="cross_entropy", output=output, activation=activation)
    logits, labels = torch.randn(shape, requires_grad=True), torch.randint(shape[1], shape[:1])
    (slope,) = torch.autograd.grad(loss(logits, labels), logits, create_graph=True)
    task_slope = torch.autograd.grad(F.cross_entropy(logits, labels), logits)[0]
    torch.testing.assert_close(slope, task_slope, rtol=1e-6, atol=0)
    first, second, third = torch.autograd.grad(slope, tuple(loss.parameters()), torch.randn(shape))
    assert not first.any()
    assert not second.any()
    assert third.count_nonzero() > 30  # a unit of the ReLU network may be dead


def test_a_label_that_cannot_be_looked_at_never_reaches_cross_entropy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would end the CUDA context. The network's operator, which looks here, is taken out."""
    monkeypatch.setattr(_checks, "may_look", lambda tensor: False)
    loss = made(residual="cross_entropy", reduction="none")
    monkeypatch.setattr(loss, "outputwise", lambda pred, target: pred.new_zeros(len(pred)))
    logits, labels = torch.randn(4, 3), torch.tensor([0, 3, -100, 1])
    kept = torch.tensor([0, -100, -100, 1])
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits, kept, reduction="none"))


def test_half_precision_is_accumulated() -> None:
    loss = made(residual="cross_entropy")
    logits, labels = torch.randn(6, 4, dtype=torch.bfloat16), torch.randint(4, (6,))
    assert torch.equal(loss(logits, labels), F.cross_entropy(logits.float(), labels))


# ---- A slope of the task loss's size.


def slope_of(value: Tensor, pred: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(value.sum(), pred, **options)[0]


def random_weights(loss: LossNetwork) -> LossNetwork:
    with torch.no_grad():
        loss.output_weight.normal_()
    return loss


@SHAPES
@REDUCTIONS
@pytest.mark.parametrize("residual", [None, "cross_entropy"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("probabilities", [False, True])
def test_slope_is_as_steep_as_cross_entropy(
    shape: tuple[int, ...],
    reduction: str,
    residual: str | None,
    weighted: bool,
    smoothing: float,
    probabilities: bool,
) -> None:
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": -1, "label_smoothing": smoothing}
    options["weight"] = torch.rand(shape[0 if len(shape) == 1 else 1]) + 0.5 if weighted else None
    loss = random_weights(made(residual=residual, normalize_slope=True, **options))
    logits, target = torch.randn(shape, requires_grad=True), targets(shape, probabilities)
    task = slope_of(F.cross_entropy(logits, target, **options), logits)
    slope = slope_of(loss(logits, target), logits)
    torch.testing.assert_close(slope.abs().mean(), task.abs().mean())
    loss.normalize_slope = False
    plain = slope_of(loss(logits, target), logits)
    torch.testing.assert_close(slope, plain * (task.abs().sum() / plain.abs().sum()), rtol=1e-5, atol=1e-7)


@REDUCTIONS
@pytest.mark.parametrize("residual", [None, "squared_error"])
@pytest.mark.parametrize("shape", [(6,), (5, 3), (5, 2, 2)], ids=str)
def test_slope_is_as_steep_as_squared_error(
    shape: tuple[int, ...], residual: str | None, reduction: str
) -> None:
    loss = random_weights(made(residual=residual, normalize_slope=True, link="identity", reduction=reduction))
    pred, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    size = pred.numel() if reduction == "mean" else pred[0].numel()
    expected = (2 * (pred - target) / size).abs().mean()
    torch.testing.assert_close(slope_of(loss(pred, target), pred).abs().mean(), expected)


@pytest.mark.parametrize("shape", [(6, 4), (600, 20)], ids=str)
def test_the_meta_gradient_does_not_scale(shape: tuple[int, int]) -> None:
    """<d<slope, u>/d w3, w3> is its derivative along a scaling of the output layer."""
    loss = made(dtype=torch.float64)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels, u = torch.randint(shape[1], shape[:1]), torch.randn(shape, dtype=torch.float64)
    along = []
    for loss.normalize_slope in (False, True):
        slope = slope_of(loss(logits, labels), logits, create_graph=True)
        (gradient,) = torch.autograd.grad(slope, loss.output_weight, u)
        along.append((gradient * loss.output_weight).sum().abs() / gradient.norm())
    assert along[0] > 1e-6
    assert along[1] < 1e-12


def test_factor_is_no_function_of_the_prediction() -> None:
    loss = made(normalize_slope=True, dtype=torch.float64)
    logits, labels = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randint(4, (6,))
    scaled = slope_of(loss(logits, labels), logits, create_graph=True)
    again = slope_of(scaled.square().sum(), logits)
    loss.normalize_slope = False
    plain = slope_of(loss(logits, labels), logits, create_graph=True)
    factor = (scaled / plain).detach()
    torch.testing.assert_close(factor, factor[0, 0].expand(6, 4))
    torch.testing.assert_close(again, factor[0, 0] ** 2 * slope_of(plain.square().sum(), logits))


def test_ignored_rows_do_not_steepen() -> None:
    loss = made(normalize_slope=True)
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, -100, 1, -100, 2])
    kept = labels != -100
    expected = slope_of(loss(logits[kept], labels[kept]), logits)
    with torch.no_grad():
        logits[~kept] = torch.nan
    torch.testing.assert_close(slope_of(loss(logits, labels), logits), expected)


def test_a_flat_loss_keeps_a_finite_gradient() -> None:
    loss = made(normalize_slope=True)
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    with torch.no_grad():
        loss.output_weight.zero_()
    slope = slope_of(loss(logits, labels), logits, create_graph=True)
    assert not slope.any()
    gradients = torch.autograd.grad(slope, tuple(loss.parameters()), torch.randn(6, 4))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[2].all()
    # As flat as rounding: the factor would be 1e20.
    with torch.no_grad():
        loss.output_weight.fill_(1e-20)
    assert slope_of(loss(logits, labels), logits).abs().max() < 1e-19


@pytest.mark.parametrize("residual", [None, "cross_entropy"])
def test_transforms_of_a_normalized_loss(residual: str | None) -> None:
    loss = random_weights(made(residual=residual, normalize_slope=True, dtype=torch.float64))
    logits, labels = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(4, (3, 6))
    names = dict(loss.named_parameters())

    def called(x: torch.Tensor, y: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(loss, weights, (x, y))

    expected = []
    for x, y in zip(logits, labels, strict=True):
        x = x.clone().requires_grad_()
        value = loss(x, y)
        expected.append((value, torch.autograd.grad(value, (x, *names.values()))))
    torch.testing.assert_close(torch.vmap(loss)(logits, labels), torch.stack([v for v, _ in expected]))
    ours = torch.vmap(torch.func.grad(called, (0, 2)), (0, 0, None))(logits, labels, names)
    for i, (_, (in_pred, *in_weights)) in enumerate(expected):
        torch.testing.assert_close(ours[0][i], in_pred)
        torch.testing.assert_close([g[i] for g in ours[1].values()], in_weights)


def test_normalized_in_half_precision_and_without_gradients() -> None:
    loss = made(normalize_slope=True)
    logits, labels = torch.randn(6, 4).bfloat16(), torch.randint(4, (6,))
    expected = loss(logits.float(), labels)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(loss(1 * logits, 1 * labels), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(logits.float(), labels), expected)


def test_representation() -> None:
    assert repr(LossNetwork(link="identity")) == (
        "LossNetwork(hidden=40, leak=0.01, smoothness=10.0, activation='smooth_leaky_relu', output='linear', "
        "residual=None, normalize_slope=False, exact=False, link='identity', reduction='mean')"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "LossNetwork: hidden must be at least 1, got 0"),
        ({"leak": 5}, "LossNetwork: leak must lie in [0, 1], got 5"),
        ({"leak": float("nan")}, "LossNetwork: leak must lie in [0, 1], got nan"),
        ({"smoothness": -1}, "LossNetwork: smoothness must be positive and finite, got -1"),
        ({"smoothness": float("inf")}, "LossNetwork: smoothness must be positive and finite, got inf"),
        (
            {"activation": "tanh"},
            "LossNetwork: activation must be one of 'smooth_leaky_relu', 'relu', got 'tanh'",
        ),
        ({"output": "exp"}, "LossNetwork: output must be one of 'linear', 'softplus', got 'exp'"),
        (
            {"residual": "l1"},
            "LossNetwork: residual must be one of 'cross_entropy', 'binary_cross_entropy', 'squared_error', got 'l1'",
        ),
        (
            {"residual": "cross_entropy", "link": "identity"},
            "LossNetwork: residual='cross_entropy' is for link='softmax', got link='identity'",
        ),
        (
            {"residual": "squared_error"},
            "LossNetwork: residual='squared_error' is for link='identity', got link='softmax'",
        ),
        ({"link": "log"}, "LossNetwork: link must be one of 'softmax', 'sigmoid', 'identity', got 'log'"),
    ],
)
def test_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LossNetwork(**options)


@pytest.mark.parametrize("link", ["softmax", "identity"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_mixed_derivative_is_autograd_s(link: str, normalize: bool, residual: bool) -> None:
    names = {"softmax": "cross_entropy", "identity": "squared_error"}
    loss = LossNetwork(
        6,
        link=link,
        normalize_slope=normalize,
        residual=names[link] if residual else None,
        dtype=torch.float64,
    )
    with torch.no_grad():
        loss.output_weight.normal_()
    pred = torch.randn(7, 5, dtype=torch.float64)
    target = torch.tensor([0, 4, 2, -100, 1, 3, 3]) if link == "softmax" else torch.rand_like(pred)
    if link == "softmax" and not residual:  # cross-entropy's own gradient is NaN there
        pred[3] = torch.nan
    u = torch.randn_like(pred)
    u[3] = 0
    result = loss.with_mixed_derivative(pred, target)
    assert result is not None
    value, slope, mixed = result
    f = pred.clone().requires_grad_()
    expected = loss(f, target)
    (expected_slope,) = torch.autograd.grad(expected, f, create_graph=True)
    gradients = torch.autograd.grad(expected_slope, list(loss.parameters()), u)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, expected_slope.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(mixed(u), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if normalize:
        (along_scale,) = mixed(slope)[2:]
        assert (along_scale * loss.output_weight).sum().abs() < 1e-12 or residual


def test_flat_loss_is_not_scaled_by_its_own_mixed_derivative() -> None:
    loss = LossNetwork(6, link="identity", normalize_slope=True, dtype=torch.float64)
    with torch.no_grad():
        loss.output_weight.zero_()
    pred, target, u = torch.rand(3, 4, 2, dtype=torch.float64)
    value, slope, mixed = loss.with_mixed_derivative(pred, target)  # type: ignore[misc]
    assert value == 0
    assert torch.equal(slope, torch.zeros_like(slope))
    assert all(g.isfinite().all() for g in mixed(u))


@pytest.mark.parametrize(
    "options",
    [{"reduction": "sum"}, {"label_smoothing": 0.1}, {"weight": torch.ones(5)}],
    ids=lambda options: next(iter(options)),
)
def test_mixed_derivative_is_left_to_autograd(options: dict[str, Any]) -> None:
    pred, labels = torch.randn(4, 5), torch.randint(5, (4,))
    assert LossNetwork(6, **options).with_mixed_derivative(pred, labels) is None
    loss = LossNetwork(6)
    assert loss.with_mixed_derivative(pred, labels) is not None
    assert loss.with_mixed_derivative(pred[:, :, None], labels[:, None]) is None
    assert loss.with_mixed_derivative(pred, pred.softmax(1)) is None
    loss.hidden_weight.requires_grad_(False)
    assert loss.with_mixed_derivative(pred, labels) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_derivative_of_half_precision_is_not_rounded_twice(dtype: torch.dtype) -> None:
    """Beside the same numbers in float64; what was rounded is the input alone."""
    torch.manual_seed(0)
    pred, target = torch.randn(16, 5).to(dtype), torch.randint(5, (16,))
    loss = LossNetwork(residual="cross_entropy", normalize_slope=True, dtype=dtype)
    found = loss.with_mixed_derivative(pred, target)
    exact = LossNetwork(residual="cross_entropy", normalize_slope=True, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in loss.state_dict().items()})
    x = pred.double().requires_grad_()
    value = exact(x, target)
    (slope,) = torch.autograd.grad(value, x)
    assert found is not None
    torch.testing.assert_close(found[0].double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), slope, rtol=1e-5, atol=1e-6)
