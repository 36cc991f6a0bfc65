from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
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

from lossmeta.ops import focal_weighting
from lossmeta.ops.focal_weighting import _operator

REDUCTIONS = ["none", "mean", "sum"]
# One embedding; a pair; primes; whole vectors; unaligned; many dimensions.
SHAPES = [(1, 1), (2, 1), (5, 3), (17, 33), (32, 16), (50, 7), (9, 600)]


def inputs(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = (torch.randn(shape, dtype=dtype) / shape[1] ** 0.5).requires_grad_()
    labels = torch.tensor([7, -3, 2**40, 7])[torch.randint(4, shape[:1])]
    return x, labels, torch.tensor([0.7, 3.0], dtype=dtype).requires_grad_()


def formula(x: Tensor, labels: Tensor, phi: Tensor, how: str, offset: float = 1.0) -> Tensor:
    """ALA Eq. 10, anchor by anchor and pair by pair."""
    y, losses = labels.tolist(), []
    for a in range(len(x)):
        positive = negative = 1 + 0 * x.sum()
        for b in range(len(x)):
            d = (x[a] - x[b]).norm()
            if a != b and y[a] == y[b]:
                positive = positive + (phi[0] * (d - offset)).exp()
            if y[a] != y[b]:
                negative = negative + (-phi[1] * (d - offset)).exp()
        losses.append(positive.log() / phi[0] + negative.log() / phi[1])
    loss = torch.stack(losses)
    return loss if how == "none" else loss.mean() if how == "mean" else loss.sum()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, int], reduction: str) -> None:
    x, labels, phi = inputs(shape)
    for offset in (1.0, 0.2):
        expected = with_gradients(lambda x, p, o=offset: formula(x, labels, p, reduction, o), x, phi)

        def actual(x: Tensor, p: Tensor, o: float = offset) -> Tensor:
            return focal_weighting(x, labels, p, offset=o, reduction=reduction)

        assert_close(with_gradients(actual, x, phi), expected)
        single = with_gradients(
            actual, x.detach().float().requires_grad_(), phi.detach().float().requires_grad_()
        )
        assert_close([s.double() for s in single], expected, rtol=1e-4, atol=1e-5)


def test_anchors_without_pairs() -> None:
    x = torch.randn(4, 3)
    phi = torch.tensor([0.5, 2.0])
    alone = focal_weighting(x, torch.arange(4), phi, reduction="none")  # no positives
    together = focal_weighting(x, torch.zeros(4, dtype=torch.int64), phi, reduction="none")  # no negatives
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    off = ~torch.eye(4, dtype=torch.bool)
    assert_close(alone, ((-2 * (d - 1)).exp() * off).sum(1).log1p() / 2, rtol=1e-5, atol=1e-6)
    assert_close(together, ((0.5 * (d - 1)).exp() * off).sum(1).log1p() / 0.5, rtol=1e-5, atol=1e-6)
    single, _, grad, grad_phi = with_gradients(
        lambda x, p: (focal_weighting(x, torch.tensor([3]), p), p * 0),
        torch.randn(1, 3).requires_grad_(),
        phi.requires_grad_(),
    )
    assert single == 0
    assert not grad.any()
    assert not grad_phi.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_exponents(dtype: torch.dtype) -> None:
    # The exponentials overflow float64; the loss is then the hardest pair's distance beyond the offset.
    x = (1000 * torch.arange(6, dtype=dtype)[:, None]).requires_grad_()
    labels, phi = torch.tensor([0, 0, 0, 1, 1, 1]), torch.full((2,), 10.0, dtype=dtype)
    loss, grad = with_gradients(lambda x: focal_weighting(x, labels, phi, offset=2500.0, reduction="none"), x)
    assert_close(loss, torch.tensor([0.0, 500, 1500, 1500, 500, 0], dtype=dtype), rtol=1e-6, atol=1e-3)
    assert grad.isfinite().all()


def test_coincident_embeddings_have_gradient_zero() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    loss, grad = with_gradients(lambda x: focal_weighting(x, torch.tensor([0, 0, 1, 1]), torch.ones(2)), x)
    assert loss.isfinite()
    assert torch.equal(grad, torch.zeros_like(x))


def test_infinite_and_nan_embeddings() -> None:
    x, labels, phi = inputs((20, 5))
    labels = torch.arange(20) % 3
    for bad in (float("inf"), float("nan")):
        with torch.no_grad():
            x[1, 2] = bad
        ours = focal_weighting(x, labels, phi, reduction="none")
        assert_close(ours, _operator.reference(x, labels, phi, 1.0, 0))
        same = labels == labels[1]
        if bad == float("inf"):
            assert ours[same].tolist() == [float("inf")] * int(same.sum())
            assert ours[~same].isfinite().all()
        else:
            assert ours.isnan().all()
        # An infinitely distant negative neither weighs nor pulls.
        grad = torch.autograd.grad(focal_weighting(x, labels, phi, reduction="none")[~same].sum(), x)[0]
        assert grad[~same].isfinite().all() == (bad == float("inf"))


def test_nothing_to_do() -> None:
    for shape in ((0, 4), (0, 0), (3, 0)):
        x, phi = torch.randn(shape, requires_grad=True), torch.ones(2, requires_grad=True)
        for reduction in REDUCTIONS:
            loss, grad, grad_phi = with_gradients(
                lambda x, p, n=shape[0], r=reduction: focal_weighting(
                    x, torch.zeros(n).long(), p, reduction=r
                ),
                x,
                phi,
            )
            assert loss.shape == ((shape[0],) if reduction == "none" else ())
            assert loss.isfinite().all()
            assert grad.shape == shape
            if shape[0] == 0:
                assert not loss.any()
                assert torch.equal(grad_phi, torch.zeros(2))


def test_far_from_the_origin() -> None:
    # Distances of a fifth at coordinates around 1000: what a Gram matrix in float32 loses entirely.
    x = (1000 + 0.05 * torch.randn(40, 16)).requires_grad_()
    labels, phi = torch.arange(40) % 5, torch.tensor([1.0, 2.0])
    ours = with_gradients(lambda x: focal_weighting(x, labels, phi), x)
    exact = with_gradients(
        lambda x: focal_weighting(x, labels, phi.double()), x.detach().double().requires_grad_()
    )
    assert_close([o.double() for o in ours], exact, rtol=1e-4, atol=1e-7)


def test_first_and_second_derivatives() -> None:
    x, _, phi = inputs((6, 3))
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    for reduction in ("none", "mean"):
        check_gradients(lambda x, p, r=reduction: focal_weighting(x, labels, p, reduction=r), x, phi)


def test_opcheck() -> None:
    x, labels, phi = inputs((7, 5), torch.float32)
    for reduction in (0, 1):
        check_opcheck(_operator, x, labels, phi, 1.0, reduction)


def test_compiles() -> None:
    x, labels, phi = inputs((8, 5))
    check_compiles(lambda x, p: focal_weighting(2 * x, labels, p, offset=0.5).sin(), x, phi)
    check_compiles(lambda x, p: focal_weighting(x, labels, p, reduction="none"), x, phi)


def test_transforms() -> None:
    x, _, phi = inputs((5, 3))
    phi = phi.detach()
    labels = torch.tensor([0, 1, 0, 1, 1])
    check_transforms(
        lambda x: focal_weighting(x, labels, phi), lambda x: _operator.reference(x, labels, phi, 1.0, 1), x
    )


def test_strides() -> None:
    x, labels, phi = inputs((8, 5))
    for reduction in REDUCTIONS:
        check_strides(lambda x, y, p, r=reduction: focal_weighting(x, y, p, reduction=r), x, labels, phi)


def test_threads() -> None:
    x, labels, phi = inputs((700, 70), torch.float32)
    for reduction in ("none", "mean"):
        check_threads(lambda x, p, r=reduction: focal_weighting(x, labels, p, reduction=r), x, phi)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, _, phi = inputs((12, 40))
    labels = torch.arange(12) % 3
    check_half(
        lambda x, p: focal_weighting(x, labels, p), lambda x, p: formula(x, labels, p, "mean"), dtype, x, phi
    )
    assert focal_weighting(x.to(dtype), labels, phi).dtype == torch.float32


def test_autocast() -> None:
    x, labels, phi = inputs((8, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = x @ torch.eye(5)
        assert half.dtype == torch.bfloat16
        loss = focal_weighting(half, labels, phi)
    assert loss.dtype == torch.float32
    assert_close(loss, focal_weighting(half.float(), labels, phi))
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    count, dims = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    scale = data.draw(st.sampled_from([0.01, 1.0, 20.0])) / dims**0.5
    x = (scale * torch.randn(count, dims, generator=generator, dtype=dtype)).requires_grad_()
    phi = (0.1 + 9.9 * torch.rand(2, generator=generator, dtype=dtype) ** 2).requires_grad_()
    labels = torch.randint(-2, data.draw(st.integers(0, 30)), (count,), generator=generator)
    offset, reduction = data.draw(st.sampled_from([-1.0, 0.0, 1.0])), data.draw(st.sampled_from([0, 1, 2]))
    actual = with_gradients(
        lambda x, p: focal_weighting(x, labels, p, offset=offset, reduction=REDUCTIONS[reduction]), x, phi
    )
    expected = with_gradients(
        lambda x, p: _operator.reference(x, labels, p, offset, reduction),
        x.detach().double().requires_grad_(),
        phi.detach().double().requires_grad_(),
    )
    # An exponent of 10 d with d ~ 50 has an error of 500 ulp in float32, and so has its exponential.
    relative = 1e-9 if dtype == torch.float64 else 2e-4
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.double(), e, rtol=relative, atol=relative * max(1.0, e.abs().max().item()))


BAD: dict[str, Any] = {
    "embeddings must be [M, D], got [6]": lambda x, y, p: (x[:, 0], y, p),
    "embeddings must be float32, float64, bfloat16 or float16, got int64": lambda x, y, p: (x.long(), y, p),
    "labels must be [6], one for each embedding, got [5]": lambda x, y, p: (x, y[:5], p),
    "labels must be [6], one for each embedding, got [6, 1]": lambda x, y, p: (x, y[:, None], p),
    "labels must be int64, got int32": lambda x, y, p: (x, y.int(), p),
    "phi must be [2], got [3]": lambda x, y, p: (x, y, torch.ones(3)),
    "phi must be float32, float64, bfloat16 or float16, got int64": lambda x, y, p: (x, y, p.long()),
    "phi must be positive and finite, got 0 at index 1": lambda x, y, p: (x, y, torch.tensor([1.0, 0.0])),
    "phi must be positive and finite, got -1 at index 0": lambda x, y, p: (x, y, -p),
    "phi must be positive and finite, got nan at index 0": lambda x, y, p: (x, y, p * float("nan")),
    "phi must be positive and finite, got inf at index 0": lambda x, y, p: (x, y, p * float("inf")),
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_arguments(message: str) -> None:
    args = BAD[message](torch.randn(6, 4), torch.zeros(6, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match=r"^focal_weighting: ") as caught:
        focal_weighting(*args)
    text = str(caught.value)
    assert text.startswith(f"focal_weighting: {message}")
    assert ".cpp" not in text


def test_bad_options() -> None:
    args = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64), torch.ones(2)
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', got 'avg'"):
        focal_weighting(*args, reduction="avg")
    with pytest.raises(ValueError, match="offset must be finite, got inf"):
        focal_weighting(*args, offset=float("inf"))
    with pytest.raises(ValueError, match="phi and embeddings must be on the same device"):
        focal_weighting(args[0], args[1], args[2].to("meta"))
