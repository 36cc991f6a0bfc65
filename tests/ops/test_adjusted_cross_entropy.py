from __future__ import annotations

from collections.abc import Callable
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
from hypothesis import given as drawn
from torch import Tensor

from lossmeta.ops import adjusted_cross_entropy
from lossmeta.ops.adjusted_cross_entropy import _operator, with_slope

CLASSES = [1, 2, 10, 16, 17, 100, 1000, 1001]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("shift", "exponent", "smoothing")


def inputs(
    samples: int, classes: int, models: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits that require a gradient, labels of which some are ignored, and the parameters, which do as well."""
    batch = [] if models is None else [models]
    logits = (2 * torch.randn(*batch, samples, classes, dtype=dtype)).requires_grad_()
    labels = torch.randint(classes, (samples,))
    labels[3::7] = -100
    parameters = {
        "shift": torch.randn(*batch, classes, dtype=dtype),
        "exponent": 0.1 + 0.9 * torch.rand(batch, dtype=dtype),
        "smoothing": 0.05 + 0.4 * torch.rand(batch, dtype=dtype),
    }
    return logits, labels, {name: t.requires_grad_() for name, t in parameters.items()}


def formula(logits: Tensor, labels: Tensor, **parameters: Tensor) -> Tensor:
    """Sample by sample; the exponent above 0 where it is given."""
    if logits.dim() == 3:
        of_each = [{name: t[b] for name, t in parameters.items()} for b in range(len(logits))]
        return torch.stack([formula(x, labels, **p) for x, p in zip(logits, of_each, strict=True)])
    losses = []
    for x, y in zip(logits, labels.tolist(), strict=True):
        if y == -100:
            continue
        p = (x + parameters["shift"] if "shift" in parameters else x).softmax(0)
        loss = -p[y].log()
        if "exponent" in parameters:
            loss = (1 - p[y] ** parameters["exponent"]) / parameters["exponent"]
        if "smoothing" in parameters:
            loss = loss + parameters["smoothing"] * (p[y].log() - p.log().mean())
        losses.append(loss)
    return torch.stack(losses).mean()


def named(
    function: Callable[..., Tensor], labels: Tensor, names: tuple[str, ...] = NAMES
) -> Callable[..., Tensor]:
    return lambda x, *values: function(x, labels, **dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("names", [(), *((name,) for name in NAMES), NAMES], ids=str)
@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize("classes", CLASSES)
def test_formula(classes: int, models: int | None, names: tuple[str, ...]) -> None:
    logits, labels, parameters = inputs(19, classes, models)
    values = [parameters[name] for name in names]
    expected = with_gradients(named(formula, labels, names), logits, *values)
    assert_close(with_gradients(named(adjusted_cross_entropy, labels, names), logits, *values), expected)
    single = [t.detach().float().requires_grad_() for t in (logits, *values)]
    actual = with_gradients(named(adjusted_cross_entropy, labels, names), *single)
    assert_close([a.double() for a in actual], expected, rtol=2e-5, atol=2e-6)


def test_is_the_cross_entropy() -> None:
    logits, labels, _ = inputs(30, 12)
    expected = with_gradients(F.cross_entropy, logits, labels)
    zeros = {"shift": torch.zeros(12), "exponent": torch.tensor(0.0), "smoothing": torch.tensor(0.0)}
    for given in ({}, zeros):
        assert_close(
            with_gradients(lambda x, g=given: adjusted_cross_entropy(x, labels, **g), logits), expected
        )
    smoothed = adjusted_cross_entropy(logits, labels, smoothing=torch.tensor(0.3))
    assert_close(smoothed, F.cross_entropy(logits, labels, label_smoothing=0.3))
    other = labels.where(labels >= 0, 4)
    assert_close(
        adjusted_cross_entropy(logits, other, ignore_index=4), F.cross_entropy(logits, other, ignore_index=4)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [0.0, 1e-30, 1e-12, 1e-7, 1e-4, 0.03, 1.0])
def test_exponents(q: float, dtype: torch.dtype) -> None:
    # Surprises from 0 to 50, for which (1 - e^{-qs}) / q in float64 has no digit left.
    logits = torch.zeros(6, 3, dtype=dtype)
    logits[:, 1] = torch.tensor([-60.0, -1.0, 0.0, 1.0, 5.0, 50.0])
    labels, exponent = torch.zeros(6, dtype=torch.int64), torch.tensor(q, dtype=dtype)

    def exactly(x: Tensor, e: Tensor) -> Tensor:
        s = F.cross_entropy(x, labels, reduction="none")
        if q > 0.01:
            return (-torch.expm1(-e * s) / e).mean()
        return sum(s ** (k + 1) * (-e) ** k / torch.arange(1, k + 2).prod() for k in range(10)).mean()  # type: ignore[union-attr]

    ours = with_gradients(
        lambda x, e: adjusted_cross_entropy(x, labels, exponent=e),
        logits.requires_grad_(),
        exponent.requires_grad_(),
    )
    expected = with_gradients(
        exactly, logits.detach().double().requires_grad_(), exponent.detach().double().requires_grad_()
    )
    relative = 1e-5 if dtype == torch.float32 else 1e-10
    assert_close([o.double() for o in ours], expected, rtol=relative, atol=relative)


@pytest.mark.parametrize("classes", [10, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype, classes: int) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.randn(8, classes, dtype=dtype)
    logits[0, 1], logits[1, 1], logits[2] = 1e4, -1e4, 1e4
    labels = torch.ones(8, dtype=torch.int64)
    for names in ((), ("exponent",), ("smoothing",), ("exponent", "smoothing")):
        given = {name: torch.tensor(0.5, dtype=dtype) for name in names}
        exact = {name: t.double() for name, t in given.items()}
        ours = with_gradients(
            lambda x, g=given: adjusted_cross_entropy(x, labels, **g), logits.detach().requires_grad_()
        )
        expected = with_gradients(
            lambda x, g=exact: _operator.reference(
                x, labels, None, g.get("exponent"), g.get("smoothing"), -100, False
            ),
            logits.detach().double().requires_grad_(),
        )
        assert all(o.isfinite().all() for o in ours)
        # Terms of some thousand are added, which smoothing gives either sign.
        assert_close([o.double() for o in ours], expected, rtol=1e-5, atol=1e-4)

    def row(*values: float) -> tuple[Tensor, Tensor]:
        x = torch.zeros(2, classes, dtype=dtype)
        x[1, : len(values)] = torch.tensor(values)
        return with_slope(x, labels[:2])

    assert row(-inf)[0].isfinite()  # a masked class
    assert row(-inf)[1].isfinite().all()
    assert row(0.0, -inf)[0] == inf  # a masked label
    assert row(0.0, -inf)[1].isfinite().all()
    for bad in (row(inf), row(nan), row(*[-inf] * classes)):
        assert bad[0].isnan()
        assert bad[1][1].isnan().all()
        assert bad[1][0].isfinite().all()


@pytest.mark.parametrize("classes", [10, 33])
def test_masked_classes(classes: int) -> None:
    logits, labels, _ = inputs(9, classes)
    labels = labels.clamp(1, classes - 1)
    with torch.no_grad():
        logits[:, 0] = -float("inf")
    expected = with_gradients(lambda x: F.cross_entropy(x, labels), logits)
    zero = torch.tensor(0.0, dtype=torch.float64)
    for given in ({}, {"exponent": zero}, {"smoothing": zero}):
        assert_close(
            with_gradients(lambda x, g=given: adjusted_cross_entropy(x, labels, **g), logits), expected
        )
    # The absolute error of a masked label is 1, without a slope.
    loss, slope = with_slope(logits[:1], torch.tensor([0]), exponent=torch.tensor(1.0))
    assert loss == 1
    assert not slope.any()


@pytest.mark.parametrize("classes", [10, 33])
def test_ignored_samples(classes: int) -> None:
    logits, labels, parameters = inputs(20, classes)
    ignored = labels == -100
    with torch.no_grad():
        logits[ignored] = float("nan")
    ours = with_gradients(named(adjusted_cross_entropy, labels), logits, *parameters.values())
    assert not ours[1][ignored].any()
    kept = logits.detach()[~ignored].requires_grad_()
    expected = with_gradients(named(adjusted_cross_entropy, labels[~ignored]), kept, *parameters.values())
    assert_close((ours[0], ours[1][~ignored], *ours[2:]), expected)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (2, 0, 3), (2, 4, 3), (0, 4, 3)], ids=str)
def test_nothing_counts(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.full(shape[-2:-1], -100)
    fractions = [torch.full(shape[:-2], 0.3, requires_grad=True) for _ in range(2)]
    shift = torch.zeros(*shape[:-2], 3, requires_grad=True)
    loss, *grads = with_gradients(named(adjusted_cross_entropy, labels), logits, shift, *fractions)
    assert loss.shape == shape[:-2]
    assert loss.isnan().all()
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("classes", [1, 10, 33, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_are_as_alone(dtype: torch.dtype, classes: int) -> None:
    logits, labels, parameters = inputs(37, classes, 4, dtype)
    loss, slope = with_slope(logits, labels, **parameters)
    gradients = with_gradients(named(adjusted_cross_entropy, labels), logits, *parameters.values())
    assert torch.equal(gradients[0], loss)
    for b in range(4):
        alone = {name: t[b] for name, t in parameters.items()}
        own = with_slope(logits[b], labels, **alone)
        assert torch.equal(own[0], loss[b])
        assert torch.equal(own[1], slope[b])
    shared = {name: t[0] for name, t in parameters.items()}
    assert torch.equal(with_slope(logits, labels, **shared)[0][0], loss[0])
    shared_gradients = with_gradients(named(adjusted_cross_entropy, labels), logits, *shared.values())
    expanded = [t[None].expand(4, *t.shape) for t in shared.values()]
    own_gradients = with_gradients(
        named(adjusted_cross_entropy, labels), logits, *(e.detach().requires_grad_() for e in expanded)
    )
    for a, e in zip(shared_gradients[2:], own_gradients[2:], strict=True):
        assert_close(a, e.sum(0).to(a.dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("classes", [10, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_is_the_gradient(dtype: torch.dtype, classes: int) -> None:
    logits, labels, parameters = inputs(30, classes, 2, dtype)
    loss, slope = with_slope(logits, labels, **parameters)
    expected = torch.autograd.grad(adjusted_cross_entropy(logits, labels, **parameters).sum(), logits)[0]
    assert torch.equal(slope.to(dtype), expected)
    assert slope.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not loss.requires_grad
    assert not slope.requires_grad


def test_float16_slopes_do_not_underflow() -> None:
    logits = torch.zeros(4096, 100, dtype=torch.float16)
    logits[:, 1:] = -9
    logits.requires_grad_()
    loss = adjusted_cross_entropy(logits, torch.zeros(4096, dtype=torch.int64))
    (grad,) = torch.autograd.grad(2.0**16 * loss, logits)
    probability = logits.detach().double().softmax(1)[0, 1]
    assert_close(grad[0, 1].double(), 16 * probability, rtol=1e-3, atol=0)


def test_gradients_of_some() -> None:
    logits, labels, parameters = inputs(15, 7, 2)
    everything = with_gradients(named(adjusted_cross_entropy, labels), logits, *parameters.values())[1:]
    tensors = [logits, *parameters.values()]
    for wanted in range(4):
        given = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        (grad,) = with_gradients(named(adjusted_cross_entropy, labels), *given)[1:]
        assert_close(grad, everything[wanted])


def test_first_and_second_derivatives() -> None:
    for models in (None, 2):
        logits, labels, parameters = inputs(5, 3, models)
        check_gradients(named(adjusted_cross_entropy, labels), logits, *parameters.values())
        check_gradients(named(adjusted_cross_entropy, labels, ()), logits)
    # At q = 0 as well, where finite differences would leave [0, 1].
    logits, labels, parameters = inputs(5, 3)
    zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    s = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels >= 0]
    (first,) = torch.autograd.grad(
        adjusted_cross_entropy(logits, labels, exponent=zero), zero, create_graph=True
    )
    assert_close(first, -(s**2).mean() / 2)
    assert_close(torch.autograd.grad(first, zero)[0], (s**3).mean() / 3)


@pytest.mark.parametrize("slope", [False, True])
def test_opcheck(slope: bool) -> None:
    for models in (None, 3):
        logits, labels, parameters = inputs(7, 5, models, torch.float32)
        check_opcheck(_operator, logits, labels, *parameters.values(), -100, slope)
        check_opcheck(_operator, logits, labels, None, parameters["exponent"], None, -100, slope)


def test_compiles() -> None:
    logits, labels, parameters = inputs(8, 5, 2)
    check_compiles(
        lambda x, *p: named(adjusted_cross_entropy, labels)(2 * x, *p).sin(), logits, *parameters.values()
    )
    check_compiles(named(adjusted_cross_entropy, labels, ()), logits)
    check_compiles(named(adjusted_cross_entropy, labels), logits.detach(), *parameters.values())


def test_transforms() -> None:
    logits, labels, parameters = inputs(5, 3)
    values = [t.detach() for t in parameters.values()]
    check_transforms(
        lambda x: adjusted_cross_entropy(x, labels, **dict(zip(NAMES, values, strict=True))),
        lambda x: _operator.reference(x, labels, *values, -100, False),
        logits,
    )
    check_transforms(
        lambda x: adjusted_cross_entropy(x, labels),
        lambda x: _operator.reference(x, labels, None, None, None, -100, False),
        logits,
    )


@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0), (None, 0, 0, 0), (1, None, 0, None), (0, None, None, None)]
)
def test_vmap_over_models(in_dims: tuple[int | None, ...]) -> None:
    logits, labels, parameters = inputs(6, 4, 3)
    tensors = [t.detach() for t in (logits, *parameters.values())]
    arguments = [
        t[0] if d is None else t.movedim(0, d).contiguous() for t, d in zip(tensors, in_dims, strict=True)
    ]
    function = named(adjusted_cross_entropy, labels)
    gradients = torch.func.grad_and_value(function, argnums=(0, 1, 2, 3))
    actual, losses = torch.func.vmap(gradients, in_dims)(*arguments)
    for b in range(3):
        alone = [a if d is None else a.select(d, b).clone() for a, d in zip(arguments, in_dims, strict=True)]
        expected, loss = gradients(*alone)
        assert_close(losses[b], loss)
        assert_close([a[b] for a in actual], expected)


def test_vmap_over_labels() -> None:
    logits, _, parameters = inputs(6, 4)
    x, labels = logits.detach(), torch.randint(4, (3, 6))
    exponent = parameters["exponent"].detach()
    gradient = torch.func.grad(lambda x, y: adjusted_cross_entropy(x, y, exponent=exponent))
    actual = torch.func.vmap(gradient, (None, 0))(x, labels)
    assert_close(actual, torch.stack([gradient(x, y) for y in labels]))


def test_strides() -> None:
    for classes in (5, 33):
        for models in (None, 3):
            logits, labels, parameters = inputs(8, classes, models)
            check_strides(
                lambda x, y, *p: named(adjusted_cross_entropy, y)(x, *p), logits, labels, *parameters.values()
            )


@pytest.mark.parametrize("shape", [(9000, 10, None), (700, 70, 3), (500, 1000, None)], ids=str)
def test_threads(shape: tuple[int, int, int | None]) -> None:
    logits, labels, parameters = inputs(*shape, dtype=torch.float32)
    check_threads(named(adjusted_cross_entropy, labels), logits, *parameters.values())


@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, classes: int) -> None:
    logits, labels, parameters = inputs(64, classes, 2)
    check_half(
        named(adjusted_cross_entropy, labels), named(formula, labels), dtype, logits, *parameters.values()
    )


def test_autocast() -> None:
    x, labels, _ = inputs(8, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = x @ torch.eye(5)
        assert half.dtype == torch.bfloat16
        loss = adjusted_cross_entropy(half, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, adjusted_cross_entropy(half.float(), labels))
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@drawn(data=st.data())
def test_properties(data: st.DataObject) -> None:
    samples, classes = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    models = data.draw(st.sampled_from([None, 1, 3]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    logits, labels, parameters = inputs(samples, classes, models, dtype)
    logits = (data.draw(st.sampled_from([0.01, 1.0, 10.0])) * logits.detach()).requires_grad_()
    names = tuple(name for name in NAMES if data.draw(st.booleans()))
    values = [parameters[name] for name in names]
    actual = with_gradients(named(adjusted_cross_entropy, labels, names), logits, *values)

    def reference(x: Tensor, *p: Tensor) -> Tensor:
        given = dict(zip(names, p, strict=True))
        return _operator.reference(x, labels, *(given.get(name) for name in NAMES), -100, False)  # type: ignore[no-any-return]

    expected = with_gradients(reference, *(t.detach().double().requires_grad_() for t in (logits, *values)))
    relative = 1e-10 if dtype == torch.float64 else 2e-5
    for a, e in zip(actual, expected, strict=True):
        assert_close(
            a.double(), e, rtol=relative, atol=relative * max(1.0, e.nan_to_num().abs().max().item())
        )


BAD: dict[str, Any] = {
    "logits must be [N, C] or [B, N, C], got [6]": lambda x, y, p: (x[0, :, 0], y, p),
    "logits must have at least one class, got [2, 6, 0]": lambda x, y, p: (x[..., :0], y, {}),
    "logits must be float32, float64, bfloat16 or float16, got int64": lambda x, y, p: (x.long(), y, p),
    "labels must be [6], one for each sample, got [5]": lambda x, y, p: (x, y[:5], p),
    "labels must be [6], one for each sample, got [2, 6]": lambda x, y, p: (x, y.expand(2, 6), p),
    "labels must be int64, got int32": lambda x, y, p: (x, y.int(), p),
    "labels must lie in [0, 4), got 4 at index 2": lambda x, y, p: (x, y.index_fill(0, torch.tensor(2), 4), p),
    "labels must lie in [0, 4), got -1 at index 0": lambda x, y, p: (x, y - 1, p),
    "shift must be [2, 4], got [2, 3]": lambda x, y, p: (x, y, {**p, "shift": torch.zeros(2, 3)}),
    "shift must be [4], got [2, 4]": lambda x, y, p: (x[0], y, {"shift": torch.zeros(2, 4)}),
    "shift must be float32, float64, bfloat16 or float16, got int64": lambda x, y, p: (
        x, y, {"shift": torch.zeros(2, 4).long()},
    ),
    "exponent must be [2], got [3]": lambda x, y, p: (x, y, {"exponent": torch.zeros(3)}),
    "exponent must be [], got [2]": lambda x, y, p: (x[0], y, {"exponent": torch.zeros(2)}),
    "exponent must lie in [0, 1], got 1.5 at index 1": lambda x, y, p: (
        x, y, {"exponent": torch.tensor([1.0, 1.5])},
    ),
    "exponent must lie in [0, 1], got nan at index 0": lambda x, y, p: (
        x[0], y, {"exponent": torch.tensor(float("nan"))},
    ),
    "smoothing must lie in [0, 1], got -0.5 at index 0": lambda x, y, p: (
        x, y, {"smoothing": torch.tensor([-0.5, 0.0])},
    ),
    "smoothing must be [2], got [2, 1]": lambda x, y, p: (x, y, {"smoothing": torch.zeros(2, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_arguments(message: str) -> None:
    logits, labels, parameters = BAD[message](
        torch.randn(2, 6, 4),
        torch.zeros(6, dtype=torch.int64),
        {"shift": torch.zeros(2, 4), "exponent": torch.zeros(2), "smoothing": torch.zeros(2)},
    )
    for function in (adjusted_cross_entropy, with_slope):
        with pytest.raises(ValueError, match=r"^adjusted_cross_entropy: ") as caught:
            function(logits, labels, **parameters)
        text = str(caught.value)
        assert text == f"adjusted_cross_entropy: {message}"


def test_bad_types() -> None:
    logits, labels = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(TypeError, match="adjusted_cross_entropy: exponent must be a tensor, got float"):
        adjusted_cross_entropy(logits, labels, exponent=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adjusted_cross_entropy: logits must be a tensor, got list"):
        adjusted_cross_entropy([[0.0]], labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift and logits must be on the same device, got meta and cpu"):
        adjusted_cross_entropy(logits, labels, shift=torch.zeros(4, device="meta"))
