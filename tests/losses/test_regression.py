from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import assert_close, check_gradients, check_half, check_strides, check_transforms
from torch import Tensor, nn

from lossmeta.losses import PinballLoss, TukeyLoss


def tukey(r: Tensor) -> Tensor:
    def one(v: Tensor) -> Tensor:
        return (1 - (1 - (v / 1.5) ** 2) ** 3) * 1.5**2 / 6 if abs(v) <= 1.5 else 0 * v + 1.5**2 / 6

    return torch.stack([one(v) for v in r.reshape(-1)]).reshape(r.shape)


def pinball(r: Tensor) -> Tensor:
    return torch.stack([0.8 * v if v > 0 else -0.2 * v for v in r.reshape(-1)]).reshape(r.shape)


CASES: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor], Tensor]]] = {
    "tukey": (lambda **o: TukeyLoss(1.5, **o), tukey),
    "pinball": (lambda **o: PinballLoss(0.8, **o), pinball),
}
every = pytest.mark.parametrize("name", CASES)
reduced: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda t: t, "mean": torch.mean, "sum": torch.sum}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return x, 2 * torch.randn(shape, dtype=torch.float64)


def gradient(value: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@every
@pytest.mark.parametrize("reduction", reduced)
@pytest.mark.parametrize("shape", [(), (6,), (6, 1), (3, 4, 2)], ids=str)
def test_is_its_formula(name: str, reduction: str, shape: tuple[int, ...]) -> None:
    make, formula = CASES[name]
    x, y = pair(*shape)
    assert_close(
        gradient(make(reduction=reduction)(x, y), x),
        gradient(reduced[reduction](formula(y - x)), x),
        rtol=1e-10,
        atol=1e-12,
    )


@every
def test_derivatives(name: str) -> None:
    x, y = pair(5, 3)
    y.requires_grad_()
    make, formula = CASES[name]
    check_gradients(make(reduction="none"), x, y)
    check_strides(make(reduction="none"), x, y)
    z = y.detach()
    check_transforms(
        lambda v: make()(v, z), lambda v: make(reduction="none")(v, z).sum() / z.numel(), x, hessian=False
    )


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    make, formula = CASES[name]
    x, y = pair(64)
    assert make()(x.to(dtype), y.to(dtype)).dtype == torch.float32
    check_half(make(), lambda a, b: formula(b - a).mean(), dtype, x, y)
    # Of two precisions the finer is kept.
    assert make()(x.detach().to(dtype), y).dtype == torch.float64


@every
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(name: str, backend: str) -> None:
    criterion = CASES[name][0]()
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=backend)
    for size in (4, 1, 9):
        x, y = pair(size, 2)
        assert_close(gradient(compiled(x, y), x), gradient(criterion(x, y), x))


@every
def test_nothing_to_average(name: str) -> None:
    x, y = pair(0, 3)
    assert CASES[name][0]()(x, y).isnan()
    assert CASES[name][0](reduction="sum")(x, y) == 0
    assert CASES[name][0](reduction="none")(x, y).shape == (0, 3)


def test_tukey_of_small_residuals_is_half_the_square() -> None:
    r = torch.tensor([1e-4, 1e-3, 1e-2], requires_grad=True)
    loss = TukeyLoss(reduction="none")(torch.zeros(3), r)
    torch.testing.assert_close(loss, r**2 / 2, rtol=1e-5, atol=0)  # nothing has cancelled
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), r)[0], r, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [5.0, 1e10, 1e30, math.inf])
def test_tukey_ignores_outliers(size: float) -> None:
    for sign in (1, -1):
        x = torch.tensor([sign * size], requires_grad=True)
        loss = TukeyLoss()(x, torch.zeros(1))
        assert loss.item() == pytest.approx(4.685**2 / 6)
        assert torch.autograd.grad(loss, x)[0] == 0


def test_tukey_at_its_default_has_95_percent_efficiency() -> None:
    """E[psi']² / E[psi²] of normal residuals, psi the derivative."""
    r = torch.linspace(-10, 10, 200001, dtype=torch.float64, requires_grad=True)
    (psi,) = torch.autograd.grad(TukeyLoss(reduction="sum")(torch.zeros_like(r), r), r, create_graph=True)
    (slope,) = torch.autograd.grad(psi.sum(), r)
    density = torch.exp(-(r.detach() ** 2) / 2)
    density = density / density.sum()
    efficiency = (density * slope).sum() ** 2 / (density * psi.detach() ** 2).sum()
    assert efficiency.item() == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9])
def test_pinball_is_least_at_the_quantile(quantile: float) -> None:
    y = torch.randn(1001, dtype=torch.float64)
    candidates = y.sort().values
    losses = torch.stack([PinballLoss(quantile)(c.expand(1001), y) for c in candidates])
    assert candidates[losses.argmin()].item() == pytest.approx(
        np.quantile(y.numpy(), quantile, method="inverted_cdf")
    )


def test_pinball_in_the_middle_is_half_the_absolute_error() -> None:
    x, y = pair(7, 2)
    with torch.no_grad():
        x[0] = y[0]
    assert_close(gradient(PinballLoss(0.5)(x, y), x), gradient(F.l1_loss(x, y) / 2, x))


def test_pinball_of_infinite_residuals() -> None:
    for quantile in (0.2, 0.8):
        x = torch.tensor([math.inf, -math.inf], requires_grad=True)
        loss = PinballLoss(quantile, reduction="none")(x, torch.zeros(2))
        assert loss.tolist() == [math.inf, math.inf]
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), x)[0], torch.tensor([1 - quantile, -quantile])
        )


def test_representations() -> None:
    assert repr(TukeyLoss()) == "TukeyLoss(c=4.685, reduction='mean')"
    assert repr(PinballLoss(0.9)) == "PinballLoss(quantile=0.9, reduction='mean')"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: TukeyLoss(0), ValueError, "TukeyLoss: c must be positive and finite, got 0"),
        (lambda: TukeyLoss(math.nan), ValueError, "TukeyLoss: c must be positive and finite, got nan"),
        (lambda: TukeyLoss(math.inf), ValueError, "TukeyLoss: c must be positive and finite, got inf"),
        (lambda: TukeyLoss("c"), TypeError, "TukeyLoss: c must be a number, got str"),
        (
            lambda: TukeyLoss(reduction="max"),
            ValueError,
            "TukeyLoss: reduction must be one of 'none', 'mean', 'sum', got 'max'",
        ),
        (lambda: PinballLoss(0), ValueError, "PinballLoss: quantile must lie in (0, 1), got 0"),
        (lambda: PinballLoss(1), ValueError, "PinballLoss: quantile must lie in (0, 1), got 1"),
        (lambda: PinballLoss(math.nan), ValueError, "PinballLoss: quantile must lie in (0, 1), got nan"),
        (lambda: PinballLoss([0.5]), TypeError, "PinballLoss: quantile must be a number, got list"),
        (
            lambda: TukeyLoss()([1.0], torch.ones(1)),
            TypeError,
            "TukeyLoss: pred must be a tensor, got list",
        ),
        (
            lambda: PinballLoss(0.5)(torch.ones(1), 1.0),
            TypeError,
            "PinballLoss: target must be a tensor, got float",
        ),
        (
            lambda: TukeyLoss()(torch.ones(2), torch.ones(2, dtype=torch.int64)),
            ValueError,
            "TukeyLoss: target must be float32, float64, bfloat16 or float16, got int64",
        ),
        (
            lambda: TukeyLoss()(torch.ones(2, 1), torch.ones(2)),
            ValueError,
            "TukeyLoss: pred and target must have the same shape, got [2, 1] and [2]; nothing is broadcast",
        ),
        (
            lambda: PinballLoss(0.5)(torch.ones(2), torch.ones(2, device="meta")),
            ValueError,
            "PinballLoss: target and pred must be on the same device, got meta and cpu; move one with .to()",
        ),
    ],
)
def test_refuses_bad_input(make, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        make()
