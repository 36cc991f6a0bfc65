"""Products with second derivatives against dense ones, and conjugate gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossmeta.tuneloss import L1, AugmentationMixture, DropoutLoss, SquaredL2, TunedLoss, UniformLabelLoss
from lossmeta.tuneloss._hessian import (
    Data,
    Linearised,
    NegativeCurvature,
    TrainingHessian,
    Weights,
    conjugate_gradients,
)

VALUES = {
    "l1": 0.3,
    "l2": torch.tensor([0.1, 0.2]),
    "uniform": 0.1,
    "dropout": 0.4,
    "mixture": [0.2, 0.3],
    "own": 0.5,
}


def own(model: nn.Module, batch: Any) -> Tensor:
    """A user's feature: of the data, not convex."""
    return model(batch[0]).sin().mean()


def tuned() -> TunedLoss:
    return TunedLoss(
        F.cross_entropy,
        {
            "l1": L1(0.1, smoothing=0.05),
            "l2": SquaredL2(by="tensor"),
            "uniform": UniformLabelLoss(),
            "dropout": DropoutLoss(masks=2),
            "mixture": AugmentationMixture([torch.neg, lambda x: 2 * x]),
            "own": own,
        },
        VALUES,
    )


def network(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)]
    if kind == "linear":
        layers = [nn.Linear(3, 3), nn.Linear(3, 4)]
        layers[0].requires_grad_(False)
    return nn.Sequential(*layers).to(dtype)


def batches(sizes: list[int], dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3, dtype=dtype), torch.randint(4, (n,))) for n in sizes]


def nothing() -> None:
    pass


def dense(value: Any, weights: Weights, model: nn.Module) -> Tensor:
    """The Hessian of a number that a function of the model gives, by differentiating twice, entry by entry."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    first = weights.flat(torch.autograd.grad(value(), weights.tensors, create_graph=True, allow_unused=True))
    rows = [
        weights.flat(torch.autograd.grad(g, weights.tensors, retain_graph=True, allow_unused=True))
        for g in first
    ]
    assert len(names) == len(weights.tensors)
    return torch.stack(rows)


@pytest.mark.parametrize("sizes", [[5], [4, 1, 3]])
def test_exact_products(sizes: list[int]) -> None:
    model, data, loss = network("deep"), batches(sizes), tuned()
    weights = Weights(model)
    assert loss.values is not None
    hessian = TrainingHessian(loss, model, loss.values, Data(data, nothing), weights, exact=True)

    def value() -> Tensor:
        return sum(len(y) * loss(model, x, y) for x, y in data) / sum(sizes)  # type: ignore[return-value]

    expected = dense(value, weights, model)
    found = hessian.products(torch.eye(weights.size, dtype=torch.float64))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hessian.products(found[:2]), found[:2] @ expected)  # the graph is used again


@pytest.mark.parametrize("sizes", [[5], [4, 1, 3]])
def test_gauss_newton_products(sizes: list[int]) -> None:
    """Those of the loss with predictions linearised around the weights; a feature of its own is exact."""
    model, data, loss = network("deep"), batches(sizes), tuned()
    weights = Weights(model)
    assert loss.values is not None
    hessian = TrainingHessian(loss, model, loss.values, Data(data, nothing), weights, exact=False)
    found = hessian.products(torch.eye(weights.size, dtype=torch.float64))
    expected = torch.zeros_like(found)
    for x, y in data:
        names = ["uniform", "dropout", "mixture"]
        outputs, places = loss.predictions(model, x, names)
        jacobian = torch.cat(
            [torch.stack([weights.flat(weights.gradient(entry)) for entry in f.reshape(-1)]) for f in outputs]
        )
        sizes_of = [f.numel() for f in outputs]

        def number(flat: Tensor, outputs=outputs, places=places, y=y, sizes_of=sizes_of) -> Tensor:  # type: ignore[no-untyped-def]
            parts = [v.view_as(f) for v, f in zip(flat.split(sizes_of), outputs, strict=True)]
            task, terms = loss.of_predictions(parts, places, y)
            return loss.total(task, terms, loss.values)  # type: ignore[arg-type]

        flat = torch.cat([f.detach().reshape(-1) for f in outputs])
        second = torch.autograd.functional.hessian(number, flat)
        part = jacobian.T @ second @ jacobian + dense(
            lambda x=x, y=y: 0.5 * own(model, (x, y)), weights, model
        )
        expected += len(y) * part / sum(sizes)
    features = loss.features
    expected += dense(lambda: 0.3 * features["l1"](model, data[0]), weights, model)
    two = torch.tensor([0.1, 0.2], dtype=torch.float64)
    expected += dense(lambda: two @ features["l2"](model, data[0]), weights, model)
    torch.testing.assert_close(found, expected)


def test_both_are_one_where_predictions_are_linear() -> None:
    model, data = network("linear"), batches([7])
    loss = tuned()
    values = {**loss.checked(VALUES), "l2": torch.tensor([0.2]).double().numpy()}
    weights = Weights(model)
    assert weights.size == 16  # the first layer is frozen
    eye = torch.eye(16, dtype=torch.float64)
    found = [
        TrainingHessian(loss, model, values, Data(data, nothing), weights, exact=exact).products(eye)
        for exact in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1])
    assert torch.linalg.eigvalsh(found[0])[0] > -1


def test_a_loss_without_curvature() -> None:
    """Predictions of constants, and losses that are linear in them."""
    model, ((x, _),) = network("deep"), batches([4])
    weights = Weights(model)
    rows = torch.randn(2, weights.size, dtype=torch.float64)
    linear = Linearised(weights, [model(x)], lambda f: f[0].sum())
    assert not linear.curve(linear.push(rows[0]))[0].any()
    constant = Linearised(weights, [torch.ones(3)], lambda f: f[0].square().sum())
    assert constant.push(rows[0]) == [] and not constant.pull([]).any()


@pytest.mark.parametrize("sizes", [[60], [25, 35]])
def test_diagonal(sizes: list[int]) -> None:
    """Unbiased: with many probes it is that of the dense matrix. The norms' part is exact."""
    model, data, loss = network("deep"), batches(sizes), tuned()
    weights = Weights(model)
    values = {**loss.checked(VALUES), "own": 0.0}
    hessian = TrainingHessian(loss, model, values, Data(data, nothing), weights, exact=False)
    expected = hessian.products(torch.eye(weights.size, dtype=torch.float64)).diagonal()
    torch.testing.assert_close(hessian.diagonal(300), expected, rtol=0.25, atol=2e-3)
    assert (hessian.diagonal() / expected).log().abs().mean() < 0.5
    norms = TunedLoss(F.cross_entropy, {"l2": SquaredL2()})
    flat = TrainingHessian(norms, model, {"l2": 0.5}, Data(data, nothing), weights, exact=False)
    assert flat.alone is not None
    exact = flat.alone.diagonal(1, torch.Generator().manual_seed(0))
    weight_of = torch.cat([torch.full((p.numel(),), float(p.dim() == 2)) for p in model.parameters()])
    torch.testing.assert_close(exact, weight_of.double())


def test_conjugate_gradients() -> None:
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(8)
    rows = torch.randn(4, 8, dtype=torch.float64)
    rows[2] = 0
    found = conjugate_gradients(lambda v: v @ matrix, rows, matrix.diagonal(), 50)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, rows.T).T)
    assert not found[2].any()
    # Each row is solved as if it were alone, and few iterations are an early stop.
    short = conjugate_gradients(lambda v: v @ matrix, rows, torch.ones(8), 2)
    alone = conjugate_gradients(lambda v: v @ matrix, rows[1:2], torch.ones(8), 2)
    torch.testing.assert_close(short[1:2], alone)
    assert (short - found).norm() > 1e-3


def test_negative_curvature_stops_them() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(NegativeCurvature):
        conjugate_gradients(lambda v: v @ matrix, torch.ones(1, 2), torch.ones(2), 5)
    with pytest.raises(NegativeCurvature):
        conjugate_gradients(lambda v: v * torch.nan, torch.ones(1, 2), torch.ones(2), 5)


def test_mixed_dtypes_are_one_vector() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())
    weights = Weights(model)
    assert weights.dtype == torch.float64 and weights.size == 9
    vector = torch.randn(9, dtype=torch.float64)
    parts = weights.parts(vector)
    assert [p.dtype for p in parts] == [torch.float32] * 2 + [torch.float64] * 2
    torch.testing.assert_close(weights.flat(parts), vector, rtol=1e-6, atol=1e-6)


def test_every_pass_over_a_batch_sees_the_same_random_numbers() -> None:
    """However many the pass before it drew, so that gradients and products are of one function."""
    data = Data(batches([2, 3]), lambda: torch.manual_seed(0) and None)
    first = []
    for draws in (1, 5):
        seen = []
        for _ in data:
            seen.append(torch.rand(draws)[0].item())
        first.append(seen)
    assert first[0] == first[1]
