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

from lossmeta.ops import distance_mixture
from lossmeta.ops.distance_mixture import _operator

REDUCTIONS = ["none", "mean", "sum"]
# (M, D, T): one of each; primes; all pairs tabulated (T large) and not (T small); unaligned; many dimensions.
SHAPES = [
    (1, 1, 1),
    (2, 1, 3),
    (5, 3, 7),
    (17, 33, 40),
    (16, 32, 300),
    (50, 7, 9),
    (33, 20, 500),
    (9, 600, 12),
]


def phi_for(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([1, 0.3, 0, 0.2, 0.7, 1, 0, 0.4, 0.1, 0.6], dtype=dtype).requires_grad_()


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, dims, number = shape
    x = (torch.randn(count, dims, dtype=dtype) / dims**0.5).requires_grad_()
    labels = torch.tensor([7, -3, 2**40, 7])[torch.randint(4, (count,))]
    return x, torch.randint(count, (number, 3)), phi_for(dtype), labels


def all_triplets(labels: Tensor) -> Tensor:
    y, n = labels.tolist(), range(len(labels))
    rows = [(a, p, q) for a in n for p in n for q in n if p != a and y[p] == y[a] and y[q] != y[a]]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def formula(
    x: Tensor, triplets: Tensor, phi: Tensor, how: str, min_distance: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """ALA Eq. 9 and supplement B, as one would write it in PyTorch."""
    near = (x[triplets[:, 0]] - x[triplets[:, 1]]).norm(dim=1)
    far = (x[triplets[:, 0]] - x[triplets[:, 2]]).norm(dim=1).clamp(min=min_distance)
    # The slope of d^1.5 and e^(0.6 d) at 0 times that of the norm, which PyTorch sets to 0.
    increasing = [
        near**2,
        near**2.5,
        near**1.5,
        0.5 * (0.6 * near**2).exp() - 0.5,
        0.5 * (0.6 * near).exp() - 0.5,
    ]
    decreasing = [0.5 / far, 0.2 / far, 0.1 / far**2, (1 / far).log(), (1 / far**2).log()]
    terms = torch.stack(increasing + decreasing, 1)
    loss = terms @ phi
    if how != "none":
        loss = loss.sum() / (max(len(triplets), 1) if how == "mean" else 1)
    return loss, terms.sum(0) / max(len(triplets), 1)


def per_anchor(x: Tensor, labels: Tensor, phi: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """The formula on all valid triplets, enumerated."""
    triplets = all_triplets(labels)
    loss, terms = formula(x, triplets, phi, how)
    return (loss.new_zeros(len(x)).index_add(0, triplets[:, 0], loss) if how == "none" else loss), terms


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape: tuple[int, int, int], reduction: str) -> None:
    x, triplets, phi, labels = inputs(shape)
    cases = (
        ({"triplets": triplets}, lambda x, p: formula(x, triplets, p, reduction)),
        ({"triplets": None, "labels": labels}, lambda x, p: per_anchor(x, labels, p, reduction)),
    )
    for form, expected_form in cases:

        def actual_form(x: Tensor, p: Tensor, form: dict[str, Any] = form) -> Any:
            return distance_mixture(x, phi=p, reduction=reduction, **form)

        expected = with_gradients(expected_form, x, phi)
        assert_close(with_gradients(actual_form, x, phi), expected)
        single = with_gradients(
            actual_form, x.detach().float().requires_grad_(), phi.detach().float().requires_grad_()
        )
        for s, e in zip(single, expected, strict=True):
            assert_close(
                s.double(), e, rtol=1e-5, atol=3e-5 * max(1.0, e.abs().max().item()) if e.numel() else 0
            )


def test_index_tuples_of_a_miner() -> None:
    x, triplets, phi, _ = inputs((8, 4, 20))
    assert_close(distance_mixture(x, triplets.unbind(1), phi), distance_mixture(x, triplets, phi))


def test_labels_reduce_to_the_mean_over_triplets() -> None:
    x, _, phi, _ = inputs((30, 4, 1))
    labels = torch.arange(30) % 7
    counts = torch.bincount(labels)[labels]
    per_anchor_sum, terms = distance_mixture(x, None, phi, labels=labels, reduction="none")
    mean, _ = distance_mixture(x, None, phi, labels=labels)
    assert_close(per_anchor_sum.sum() / ((counts - 1) * (30 - counts)).sum(), mean)
    assert_close(terms @ phi, mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_embeddings(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, 2], [1, 2], [1, 2.0005], [3, 4]], dtype=dtype).requires_grad_()
    triplets = torch.tensor([[0, 1, 3], [0, 3, 1], [0, 1, 2], [3, 3, 3]])
    phi = torch.ones(10, dtype=dtype)
    loss, _, grad = with_gradients(lambda x: distance_mixture(x, triplets, phi, reduction="none"), x)
    far = 0.5e3 + 0.2e3 + 0.1e6 + 3 * torch.tensor(1e3).log()
    assert_close(
        loss[[2, 3]].double(), far.double().expand(2), rtol=1e-6, atol=0.0
    )  # d+ = 0, d- below the minimum
    assert grad.isfinite().all()
    labels = torch.tensor([0, 0, 1, 0])
    by_label = with_gradients(lambda x: distance_mixture(x, None, phi, labels=labels, reduction="none"), x)
    enumerated = with_gradients(lambda x: distance_mixture(x, all_triplets(labels), phi, reduction="sum"), x)
    assert all(t.isfinite().all() for t in by_label)
    assert_close(by_label[0].sum(), enumerated[0].sum())
    # Exactly 0, not small: the pair (0, 1) and the clamped one.
    grad = with_gradients(lambda x: distance_mixture(x, triplets[[2, 3]], phi, reduction="sum")[0], x)[1]
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("form", ["triplets", "labels"])
def test_zero_coefficient_of_an_overflowing_function(form: str) -> None:
    # e^(0.6 d^2) is infinite in float32 for d = 20.
    x = torch.tensor([[0.0], [20], [1], [2]]).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    args = {"triplets": all_triplets(labels)} if form == "triplets" else {"triplets": None, "labels": labels}
    phi = torch.tensor([1, 0, 0, 0, 0, 1.0, 0, 0, 0, 0]).requires_grad_()
    loss, terms, grad, grad_phi = with_gradients(
        lambda x, p: (
            distance_mixture(x, phi=p, reduction="sum", **args)[0],
            distance_mixture(x, phi=p, **args)[1].detach(),
        ),
        x,
        phi,
    )
    assert terms[3].isinf()
    assert terms[[0, 1, 2, 4]].isfinite().all()
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad_phi.isfinite().all()
    # Triplets without the far pair give the gradient of e^(0.6 d^2); those with it add nothing.
    assert 0 < abs(grad_phi[3]) < 100
    assert distance_mixture(x, phi=phi + 0.1, **args)[0].isinf()


@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_embedding_stays_in_its_triplets(bad: float, count: int) -> None:
    x, _, phi, _ = inputs((count, 5, 1))
    with torch.no_grad():
        x[1, 2] = bad
    triplets = torch.tensor([[0, 2, 3], [1, 2, 3], [3, 0, 2]])
    for number in (1, 500):
        rows = triplets.repeat(number, 1)
        ours = with_gradients(lambda x, t=rows: distance_mixture(x, t, phi.detach(), reduction="none")[0], x)
        touched = torch.zeros(len(rows), dtype=torch.bool)
        touched[1::3] = True
        assert torch.equal(~ours[0].isfinite(), touched)
        # The pull of an infinitely distant negative is 0.
        assert ours[1].isnan().any(1).nonzero().flatten().tolist() == [1, 2] + [3] * (bad != bad)
    # Only embedding 0 is in no triplet with embedding 1: its gradient is that of its own triplets.
    alone = with_gradients(lambda x: distance_mixture(x, triplets[:1], phi.detach())[0], x)[1]
    assert alone[[0, 2, 3]].isfinite().all()


def test_bad_embedding_that_is_in_no_triplet_by_label() -> None:
    x, _, phi, _ = inputs((6, 5, 1))
    with torch.no_grad():
        x[5] = float("nan")
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    loss = distance_mixture(x, None, phi, labels=labels, reduction="none")[0]
    assert loss.isnan().all()  # it is a negative of every other class
    same = torch.zeros(6, dtype=torch.int64)
    for reduction in REDUCTIONS:
        loss, terms, grad = with_gradients(
            lambda x, r=reduction: distance_mixture(x, None, phi.detach(), labels=same, reduction=r), x
        )
        assert not loss.any()
        assert not terms.any()
        assert torch.equal(grad, torch.zeros_like(x))


def test_nothing_to_do() -> None:
    for count, dims, labels in ((0, 4, []), (3, 4, [0, 1, 2]), (3, 0, [0, 0, 1]), (1, 4, [5])):
        x, phi = torch.randn(count, dims, requires_grad=True), phi_for(torch.float32)
        for reduction in REDUCTIONS:
            forms: list[Any] = [{"triplets": torch.zeros(0, 3, dtype=torch.int64)}]
            forms.append({"triplets": None, "labels": torch.tensor(labels, dtype=torch.int64)})
            for form in forms:
                loss, terms, *grads = with_gradients(
                    lambda x, p, f=form, r=reduction: distance_mixture(x, phi=p, reduction=r, **f), x, phi
                )
                if form["triplets"] is not None:
                    assert loss.shape == ((0,) if reduction == "none" else ())
                if dims:
                    assert not loss.any()
                    assert not terms.any()
                    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
                assert grads[0].shape == x.shape


def test_far_from_the_origin() -> None:
    # Distances of a thousandth at coordinates around 1000: what a Gram matrix in float32 loses entirely.
    torch.manual_seed(0)
    x = (1000 + 0.05 * torch.randn(40, 16)).requires_grad_()
    labels = torch.arange(40) % 5
    phi = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    ours = with_gradients(lambda x: distance_mixture(x, None, phi, labels=labels)[0], x)
    exact = with_gradients(
        lambda x: distance_mixture(x, None, phi.double(), labels=labels)[0],
        x.detach().double().requires_grad_(),
    )
    for o, e in zip(ours, exact, strict=True):
        assert_close(o.double(), e, rtol=1e-5, atol=1e-6 * e.abs().max().item())


def test_first_and_second_derivatives() -> None:
    for shape in ((6, 3, 5), (4, 2, 30)):
        x, _, phi, _ = inputs(shape)
        labels = torch.arange(shape[0]) % 2
        # Three embeddings each: at distance 0 a difference quotient sees the kink, and F- of 1e5 beside it.
        triplets = torch.stack([torch.randperm(shape[0])[:3] for _ in range(shape[2])])
        check_gradients(lambda x, p, t=triplets: distance_mixture(x, t, p, reduction="none"), x, phi)
        check_gradients(lambda x, p, y=labels: distance_mixture(x, None, p, labels=y), x, phi)


def test_gradient_of_one_output_alone() -> None:
    x, triplets, phi, labels = inputs((9, 4, 60))
    for form in ({"triplets": triplets}, {"triplets": None, "labels": labels}):
        t = triplets if form["triplets"] is not None else all_triplets(labels)
        for k in (0, 1):
            assert_close(
                with_gradients(lambda x, f=form, k=k: distance_mixture(x, phi=phi.detach(), **f)[k], x),
                with_gradients(lambda x, t=t, k=k: formula(x, t, phi.detach(), "mean")[k], x),
            )
        assert_close(
            with_gradients(lambda p, f=form: distance_mixture(x.detach(), phi=p, **f)[0], phi),
            with_gradients(lambda p, t=t: formula(x.detach(), t, p, "mean")[0], phi),
        )


def test_opcheck() -> None:
    x, triplets, phi, labels = inputs((7, 5, 4), torch.float32)
    check_opcheck(_operator, x, triplets, phi, None, 1e-3, 0)
    check_opcheck(_operator, x, None, phi, labels, 1e-3, 1)


def test_compiles() -> None:
    x, triplets, phi, labels = inputs((8, 5, 6))
    check_compiles(lambda x, p: distance_mixture(2 * x, triplets, p)[0].sin(), x, phi)
    check_compiles(lambda x, p: distance_mixture(x, triplets.unbind(1), p, reduction="none"), x, phi)
    check_compiles(lambda x, p: distance_mixture(x, None, p, labels=labels), x, phi)


def test_transforms() -> None:
    x, triplets, phi, _ = inputs((5, 3, 6))
    phi = phi.detach()
    labels = torch.tensor([0, 1, 0, 1, 1])
    check_transforms(
        lambda x: distance_mixture(x, triplets, phi)[0],
        lambda x: _operator.reference(x, triplets, phi, None, 1e-3, 1)[0],
        x,
    )
    check_transforms(
        lambda x: distance_mixture(x, None, phi, labels=labels)[0],
        lambda x: per_anchor(x, labels, phi, "mean")[0],
        x,
    )


def test_strides() -> None:
    x, triplets, phi, labels = inputs((8, 5, 6))
    for reduction in REDUCTIONS:
        check_strides(lambda x, t, p, r=reduction: distance_mixture(x, t, p, reduction=r), x, triplets, phi)
        check_strides(
            lambda x, y, p, r=reduction: distance_mixture(x, None, p, labels=y, reduction=r), x, labels, phi
        )


def test_threads() -> None:
    for shape in ((300, 40, 20000), (2000, 70, 5000)):
        x, triplets, phi, labels = inputs(shape, torch.float32)
        for reduction in ("none", "mean"):
            check_threads(
                lambda x, p, t=triplets, r=reduction: distance_mixture(x, t, p, reduction=r), x, phi
            )
    x, _, phi, labels = inputs((700, 70, 1), torch.float32)
    check_threads(lambda x, p: distance_mixture(x, None, p, labels=labels, reduction="none"), x, phi)
    with torch.no_grad():
        x[3, 3] = float("inf")
    check_threads(lambda x, p: distance_mixture(x, triplets % 700, p, reduction="none"), x, phi)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for shape in ((9, 7, 8), (16, 40, 500)):
        x, triplets, phi, _ = inputs(shape)
        labels = torch.arange(shape[0]) % 3
        triplets = triplets[triplets[:, 0] != triplets[:, 2]]
        check_half(
            lambda x, p, t=triplets: distance_mixture(x, t, p)[0],
            lambda x, p, t=triplets: formula(x, t, p, "mean")[0],
            dtype,
            x,
            phi,
        )
        check_half(
            lambda x, p, y=labels: distance_mixture(x, None, p, labels=y)[0],
            lambda x, p, y=labels: per_anchor(x, y, p, "mean")[0],
            dtype,
            x,
            phi,
        )
        assert distance_mixture(x.to(dtype), triplets, phi)[0].dtype == torch.float32


def test_autocast() -> None:
    x, triplets, phi, _ = inputs((8, 5, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = x @ torch.eye(5)
        assert half.dtype == torch.bfloat16
        loss, terms = distance_mixture(half, triplets, phi)
    assert loss.dtype == terms.dtype == torch.float32
    assert_close(loss, distance_mixture(half.float(), triplets, phi)[0])
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    count, dims = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    scale = data.draw(st.sampled_from([0.01, 1.0, 2.0])) / dims**0.5
    x = (scale * torch.randn(count, dims, generator=generator, dtype=dtype)).requires_grad_()
    phi = torch.rand(10, generator=generator, dtype=dtype)
    phi = (phi * (torch.rand(10, generator=generator) > 0.3)).requires_grad_()
    reduction = data.draw(st.sampled_from([0, 1, 2]))
    triplets = labels = None
    if data.draw(st.booleans()):
        triplets = torch.randint(count, (data.draw(st.integers(0, 3000)), 3), generator=generator)
    else:
        labels = torch.randint(-2, data.draw(st.integers(1, 30)), (count,), generator=generator)
    actual = with_gradients(
        lambda x, p: distance_mixture(x, triplets, p, labels=labels, reduction=REDUCTIONS[reduction]), x, phi
    )

    def reference(x: Tensor, p: Tensor) -> Any:
        return _operator.reference(x, triplets, p, labels, 1e-3, reduction)

    expected = with_gradients(
        reference, x.detach().double().requires_grad_(), phi.detach().double().requires_grad_()
    )
    # Close pairs with slopes up to 1/d^3 may nearly cancel: PyTorch's own error says how well posed the case is.
    for a, p, e in zip(actual, with_gradients(reference, x, phi), expected, strict=True):
        if e.numel():
            allowed = (1e-9 if dtype == torch.float64 else 2e-5) * max(1.0, e.abs().max().item())
            assert (a - e).abs().max().item() <= allowed + 3 * (p - e).abs().max().item()


BAD: dict[str, Any] = {
    "embeddings must be [M, D], got [6, 4, 1]": lambda x, t, p, y: (x[..., None], t, p, None),
    "embeddings must be float32, float64, bfloat16 or float16, got int64": lambda x, t, p, y: (
        x.long(),
        t,
        p,
        None,
    ),
    "triplets must be [T, 3], got [2, 2]": lambda x, t, p, y: (x, t[:, :2], p, None),
    "triplets must be int64, got int32": lambda x, t, p, y: (x, t.int(), p, None),
    "triplets must lie in [0, 6), got 6 at [1, 2]": lambda x, t, p, y: (
        x,
        torch.tensor([[0, 1, 2], [3, 4, 6]]),
        p,
        None,
    ),
    "triplets must lie in [0, 6), got -1 at [0, 0]": lambda x, t, p, y: (x, t - 1, p, None),
    "triplets must lie in [0, 0), got 0 at [0, 0]": lambda x, t, p, y: (x[:0], t, p, None),
    "triplets or labels must be given, got both": lambda x, t, p, y: (x, t, p, y),
    "triplets or labels must be given, got neither": lambda x, t, p, y: (x, None, p, None),
    "labels must be [6], one for each embedding, got [5]": lambda x, t, p, y: (x, None, p, y[:5]),
    "labels must be int64, got float32": lambda x, t, p, y: (x, None, p, y.float()),
    "phi must be [10], got [9]": lambda x, t, p, y: (x, t, p[:9], None),
    "phi must be float32, float64, bfloat16 or float16, got int64": lambda x, t, p, y: (x, t, p.long(), None),
    "phi must be finite, got nan at index 0": lambda x, t, p, y: (x, t, p * float("nan"), None),
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_arguments(message: str) -> None:
    x, triplets, phi = torch.randn(6, 4), torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.ones(10)
    *args, labels = BAD[message](x, triplets, phi, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^distance_mixture: ") as caught:
        distance_mixture(*args, labels=labels)
    text = str(caught.value)
    assert text.startswith(f"distance_mixture: {message}")
    assert ".cpp" not in text


def test_bad_options() -> None:
    args = torch.randn(6, 4), torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.ones(10)
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum', got 'avg'"):
        distance_mixture(*args, reduction="avg")
    with pytest.raises(ValueError, match="min_distance must be positive, got 0"):
        distance_mixture(*args, min_distance=0.0)
    with pytest.raises(ValueError, match=r"three tensors \[T\], got shapes \[\[2\], \[2\]\]"):
        distance_mixture(args[0], args[1].unbind(1)[:2], args[2])
    with pytest.raises(ValueError, match="phi and embeddings must be on the same device"):
        distance_mixture(args[0], args[1], args[2].to("meta"))
