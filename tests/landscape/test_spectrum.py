"""The spectrum of a loss's Hessian, against dense Hessians and spectra that are known."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossmeta.landscape import (
    Eigenpairs,
    SpectralDensity,
    hessian_density,
    hessian_eigenvalues,
    hessian_trace,
)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "hessian_eigenvalues": partial(hessian_eigenvalues, count=1),
    "hessian_trace": partial(hessian_trace, probes=12),
    "hessian_density": partial(hessian_density, steps=6, probes=2, points=50),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)
no_warnings = pytest.mark.filterwarnings("error")
close = partial(torch.testing.assert_close, rtol=0)


class Quadratic(nn.Module):
    """Half of w A w for the spectrum given, in random directions or along the axes; its own loss."""

    def __init__(self, spectrum: list[float] | Tensor, *, axes: bool = False) -> None:
        super().__init__()
        values = torch.as_tensor(spectrum, dtype=torch.float64)
        size = len(values)
        turn = torch.eye(size, dtype=torch.float64)
        if not axes:
            generator = torch.Generator().manual_seed(size)
            turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        self.a = turn @ torch.diag(values) @ turn.T
        self.w = nn.Parameter(torch.randn(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w @ self.a @ self.w / 2 + 0 * x.sum()


def itself(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction


NOTHING = torch.zeros(1, 1), torch.zeros(1)


def mlp(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 3)).double()


def batch(size: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (size,), generator=generator)


def dense(model: nn.Module, loss_fn: Callable[..., Tensor], data: tuple[Any, Tensor]) -> Tensor:
    """The Hessian in the trainable parameters, [P, P], of the model in evaluation mode."""
    model = copy.deepcopy(model).eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        weights = {name: v.view_as(p) for (name, p), v in zip(named.items(), parts, strict=True)}
        return loss_fn(functional_call(model, weights, (data[0],)), data[1])

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


def largest(hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of largest magnitude, descending, and eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(hessian)
    kept = values.abs().argsort(descending=True)[:count]
    kept = kept[values[kept].argsort(descending=True)]
    return values[kept], vectors[:, kept].T


def rows(found: Eigenpairs) -> Tensor:
    return torch.stack([torch.cat([part.flatten() for part in v.values()]) for v in found.vectors])


# ---- Eigenvalues.


@no_warnings
@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_pairs_of_a_dense_hessian(activation: type[nn.Module], count: int) -> None:
    model, data = mlp(activation), batch()
    found = hessian_eigenvalues(model, F.cross_entropy, data, count=count, tolerance=1e-10)
    values, vectors = largest(dense(model, F.cross_entropy, data), count)
    close(found.values, values, atol=1e-12)
    own = rows(found)
    close(own * (own * vectors).sum(1, keepdim=True).sign(), vectors, atol=1e-6)
    close(own.norm(dim=1), torch.ones(count, dtype=torch.float64), atol=1e-12)
    assert [{n: p.shape for n, p in v.items()} for v in found.vectors] == [
        {n: p.shape for n, p in model.named_parameters()}
    ] * count


@no_warnings
def test_residuals_are_those_of_the_pairs() -> None:
    model, data = mlp(nn.ReLU), batch()
    found = hessian_eigenvalues(model, F.cross_entropy, data, count=8, tolerance=1e-2)
    assert found.values[-1] < 0 < found.values[0]  # the order is not that of the search
    hessian, own = dense(model, F.cross_entropy, data), rows(found)
    residuals = (own @ hessian - found.values[:, None] * own).norm(dim=1)
    close(found.residuals, residuals, atol=1e-12)
    assert 1e-8 < float(residuals.max()) <= 1e-2 * float(found.values.max())


SPECTRA = {
    "identity": [1.0] * 30,
    "one parameter": [-3.0],
    "minus identity": [-2.0] * 30,
    "zero": [0.0] * 12,
    "repeated": [5.0] * 3 + [3.0] * 4 + [1.0] * 20,
    "repeated among others": [5.0] * 3 + [4.0] * 2 + [x / 100 for x in range(300)],
    "repeated more often than asked for": [5.0] * 9 + [x / 100 for x in range(100)],
    "negative": [-6.0, -5.0, 4.0, -3.0, 2.0] + [x / 100 for x in range(100)],
    "both signs": [2.0] * 2 + [-2.0] * 2 + [1.5] + [-1.0] * 40,
    "few of many": [2.0, 1.0] + [0.0] * 60,
}


@no_warnings
@pytest.mark.parametrize("axes", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_known_spectra(spectrum: list[float], axes: bool) -> None:
    model, count = Quadratic(spectrum, axes=axes), min(5, len(spectrum))
    found = hessian_eigenvalues(model, itself, NOTHING, count=count, tolerance=1e-8)
    expected = sorted(sorted(spectrum, key=abs, reverse=True)[:count], reverse=True)
    close(found.values, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    own = rows(found)
    close(own @ own.T, torch.eye(count, dtype=torch.float64), atol=1e-12)
    close(own @ model.a, found.values[:, None] * own, atol=1e-7)


@no_warnings
def test_all_eigenvalues() -> None:
    model, data = mlp(), batch()
    hessian = dense(model, F.cross_entropy, data)
    found = hessian_eigenvalues(model, F.cross_entropy, data, count=len(hessian))
    close(found.values, torch.linalg.eigvalsh(hessian).flip(0), atol=1e-12)
    assert found.products == 2 * len(hessian)


@no_warnings
def test_restarts() -> None:
    spectrum = torch.linspace(0, 1, 400, dtype=torch.float64) ** 2
    found = hessian_eigenvalues(Quadratic(spectrum), itself, NOTHING, count=2, max_steps=10_000)
    assert found.products > 2 * (8 * 2 + 40)  # rows of the basis
    close(found.values, spectrum[[399, 398]], atol=1e-10)


@no_warnings
def test_symmetry_between_classes_repeats_eigenvalues() -> None:
    # At zero the Hessian of softmax regression is (I / C - 1 / C²) ⊗ XᵀX / N.
    model, (inputs, _) = nn.Linear(5, 4, bias=False).double(), batch()
    nn.init.zeros_(model.weight)
    found = hessian_eigenvalues(model, F.cross_entropy, (inputs, torch.zeros(40).long()), count=5)
    first, second = torch.linalg.eigvalsh(inputs.T @ inputs / 40 / 4).flip(0)[:2].tolist()
    assert found.values.tolist() == pytest.approx([first] * 3 + [second] * 2, rel=1e-9)


def test_says_which_residuals_were_reached() -> None:
    spectrum = torch.linspace(0, 1, 300, dtype=torch.float64)
    model = Quadratic(spectrum)
    with pytest.warns(RuntimeWarning, match=r"fall to 1e-06 .* got \d.\de-\d+, \d.\de-\d+ after 22 products"):
        found = hessian_eigenvalues(model, itself, NOTHING, count=2, max_steps=20)
    assert found.products == 22
    assert bool((found.values > 0.9).all() and (found.values < 1).all())
    own = rows(found)
    residuals = (own @ model.a - found.values[:, None] * own).norm(dim=1)
    close(found.residuals, residuals, atol=1e-12)
    for value, residual in zip(found.values, residuals, strict=True):
        assert float((spectrum - value).abs().min()) <= residual


# ---- Trace.


@no_warnings
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_trace_of_a_dense_hessian(activation: type[nn.Module]) -> None:
    model, data = mlp(activation), batch()
    trace = float(dense(model, F.cross_entropy, data).trace())
    found = hessian_trace(model, F.cross_entropy, data, probes=200)
    low, high = found.interval
    assert low < trace < high and found.probes == 200
    assert found.value == pytest.approx((low + high) / 2) and high - low < 0.5 * trace


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_covers_the_trace_as_often_as_it_says(confidence: float) -> None:
    model = Quadratic([3.0, -1.0, 2.0, 0.5, 0.25, 1.0])
    seeds, inside = 200, 0
    for seed in range(seeds):
        found = hessian_trace(model, itself, NOTHING, probes=12, confidence=confidence, seed=seed)
        inside += found.interval[0] <= 5.75 <= found.interval[1]
    deviation = (seeds * confidence * (1 - confidence)) ** 0.5
    assert abs(inside - seeds * confidence) < 3 * deviation


def test_the_interval_is_students() -> None:
    # z A z of [[0, 1], [1, 0]] is 2 or -2: the deviation is known from the mean.
    model = Quadratic([1.0, 1.0])
    model.a = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    found = hessian_trace(model, itself, NOTHING, probes=8)
    assert -2 < found.value < 2
    deviation = ((4 - found.value**2) * 8 / 7) ** 0.5
    half = 2.364624251592785 * deviation / 8**0.5  # 0.975 quantile, 7 degrees of freedom
    assert found.interval == pytest.approx((found.value - half, found.value + half))


def test_one_probe_knows_no_interval() -> None:
    found = hessian_trace(Quadratic([1.0, 3.0], axes=True), itself, NOTHING, probes=1)
    assert found.value == pytest.approx(4) and found.interval == (-float("inf"), float("inf"))


@no_warnings
def test_the_trace_ends_where_it_is_known() -> None:
    data = batch()
    found = hessian_trace(mlp(), F.cross_entropy, data, probes=1000, tolerance=0.1)
    low, high = found.interval
    assert (high - low) / 2 <= 0.1 * found.value and 10 < found.probes < 1000
    assert found == hessian_trace(mlp(), F.cross_entropy, data, probes=found.probes)
    diagonal = hessian_trace(Quadratic([1.0, 3.0], axes=True), itself, NOTHING, tolerance=1e-6)
    assert diagonal.probes == 10 and diagonal.value == pytest.approx(4)


def test_warns_of_a_trace_that_is_not_known_well_enough() -> None:
    with pytest.warns(RuntimeWarning, match="must narrow to 0.001 of the value .* after 20 probes"):
        found = hessian_trace(mlp(), F.cross_entropy, batch(), probes=20, tolerance=1e-3)
    assert found.probes == 20


# ---- Density.


def integral(found: SpectralDensity) -> float:
    return float(torch.trapezoid(found.density, found.values))


def test_moments_are_those_of_the_hessian() -> None:
    model, data = mlp(), batch()
    values = torch.linalg.eigvalsh(dense(model, F.cross_entropy, data))
    found = hessian_density(model, F.cross_entropy, data, steps=4, probes=60)
    assert found.nodes.shape == found.weights.shape == (60, 4) and found.size == len(values)
    for k in (1, 2, 3):
        of_probes = (found.weights * found.nodes**k).sum(1)
        error = float(of_probes.std()) / 60**0.5
        assert abs(found.moment(k) - float((values**k).mean())) < 3 * error
        assert error < 0.2 * found.moment(k)
    assert found.moment(0) == pytest.approx(1)


def test_moments_of_each_probe_are_exact() -> None:
    # The first moment is what the trace is of the same signs.
    model, data = mlp(), batch()
    found = hessian_density(model, F.cross_entropy, data, steps=3, probes=7, seed=3)
    trace = hessian_trace(model, F.cross_entropy, data, probes=7, seed=3)
    assert found.moment(1) * found.size == pytest.approx(trace.value, rel=1e-12)
    hessian = dense(model, F.cross_entropy, data)
    generator = torch.Generator().manual_seed(3)
    signs = (2 * torch.randint(0, 2, (7, len(hessian)), generator=generator, dtype=torch.int8) - 1).double()
    for k in range(6):
        powers = torch.linalg.matrix_power(hessian, k)
        expected = float(((signs @ powers) * signs).sum(1).mean() / len(hessian))
        assert found.moment(k) == pytest.approx(expected, rel=1e-9)
    sixth = float(((signs @ torch.linalg.matrix_power(hessian, 6)) * signs).sum(1).mean() / len(hessian))
    assert found.moment(6) != pytest.approx(sixth, rel=1e-6)


def test_nodes_of_all_steps_are_the_eigenvalues() -> None:
    spectrum = [-1.0, 0.5, 0.75, 2.0, 3.0, 3.5, 7.0]
    found = hessian_density(Quadratic(spectrum), itself, NOTHING, probes=3)
    close(found.nodes, torch.tensor(spectrum).double().expand(3, -1), atol=1e-10)
    close(found.weights.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-12)


def test_an_invariant_space_ends_a_probe() -> None:
    # Along the axes every sign weighs the same, and so does every eigenvalue.
    spectrum = [1.0] * 10 + [2.0] * 5 + [-4.0] * 5
    found = hessian_density(Quadratic(spectrum, axes=True), itself, NOTHING)
    close(found.nodes, torch.tensor([-4.0, 1.0, 2.0]).double().expand(10, -1), atol=1e-12)
    close(found.weights, torch.tensor([0.25, 0.5, 0.25]).double().expand(10, -1), atol=1e-12)


def test_probes_of_fewer_nodes() -> None:
    # Signs (z, z) and (z, -z) are eigenvectors of [[a, b], [b, a]]: with 3 or 1, and with 3 or -5.
    model = Quadratic([1.0] * 4)
    model.a = torch.block_diag(torch.tensor([[2.0, 1], [1, 2]]), torch.tensor([[-1.0, 4], [4, -1]])).double()
    found = hessian_density(model, itself, NOTHING, probes=20)
    lonely = found.weights[:, 1] == 0
    assert found.nodes.shape == (20, 2) and 0 < int(lonely.sum()) < 20
    close(found.nodes[lonely], torch.full_like(found.nodes[lonely], 3.0), atol=1e-12)
    close(found.weights.sum(1), torch.ones(20, dtype=torch.float64), atol=1e-12)
    assert integral(found) == pytest.approx(1)


@pytest.mark.parametrize("points", [10, 200, 1024])
@pytest.mark.parametrize("width", [None, 1e-9, 0.02, 3.0])
def test_the_density_integrates_to_one(width: float | None, points: int) -> None:
    found = hessian_density(mlp(), F.cross_entropy, batch(), steps=9, probes=3, points=points, width=width)
    assert found.values.shape == found.density.shape == (points,)
    assert integral(found) == pytest.approx(1, abs=1e-7)
    assert bool((found.density >= 0).all()) and bool((found.values.diff() > 0).all())
    mean = float(torch.trapezoid(found.density * found.values, found.values))
    step = float(found.values[1] - found.values[0])
    assert mean == pytest.approx(found.moment(1), abs=1e-4 + step / 2)


def test_the_density_is_that_of_normal_distributions() -> None:
    found = hessian_density(
        Quadratic([0.0, 0.0, 1.0, 4.0], axes=True), itself, NOTHING, width=0.3, points=4000
    )
    x = found.values[:, None]
    kernels = (-((x - torch.tensor([0.0, 0.0, 1.0, 4.0])) ** 2) / (2 * 0.3**2)).exp() / (
        0.3 * (2 * torch.pi) ** 0.5
    )
    close(found.density, kernels.mean(1), atol=1e-5)


def test_the_default_width_is_a_share_of_the_range_with_zero() -> None:
    for spectrum, span in (([2.0, 4.0], 4.0), ([-1.0, 4.0], 5.0), ([-3.0] * 5, 3.0), ([0.0], 1.0)):
        found = hessian_density(Quadratic(spectrum, axes=True), itself, NOTHING)
        assert found.width == pytest.approx(span / 200)
        assert integral(found) == pytest.approx(1)


def test_draws_a_density() -> None:
    pytest.importorskip("matplotlib")
    found = hessian_density(mlp(), F.cross_entropy, batch(), steps=10, probes=2)
    (panel,) = found.plot().axes
    (line,) = panel.lines
    assert list(line.get_xdata()) == found.values.tolist()
    assert list(line.get_ydata()) == found.density.tolist()
    assert panel.get_yscale() == "log" and panel.get_xlabel() == "eigenvalue"
    low, high = panel.get_ylim()
    peak = 1 / (found.size * found.width * (2 * torch.pi) ** 0.5)
    assert low == pytest.approx(peak / 10) and high > found.density.max()


# ---- Models and data.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    return model


class Fused(nn.Module):
    """Attention by a kernel that has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).unflatten(1, (3, 3)).unbind(1)
        return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


def normalized() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    model(3 + 2 * batch()[0])  # other running statistics than those of the batch
    return model


MODELS = {"tied": Tied, "frozen": frozen, "fused attention": Fused, "batch norm and dropout": normalized}


@no_warnings
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make: Callable[[], nn.Module]) -> None:
    model, data = make().double(), batch()
    hessian = dense(model, F.cross_entropy, data)
    found = hessian_eigenvalues(model, F.cross_entropy, data, count=3, tolerance=1e-8)
    close(found.values, largest(hessian, 3)[0], atol=1e-10)
    assert list(found.vectors[0]) == [n for n, p in model.named_parameters() if p.requires_grad]
    density = hessian_density(model, F.cross_entropy, data, steps=2, probes=2)
    assert density.size == len(hessian)
    low, high = hessian_trace(model, F.cross_entropy, data, confidence=0.99).interval
    assert low < float(hessian.trace()) < high


def test_batches_of_any_sizes_are_one() -> None:
    model, (x, y) = mlp(), batch()
    parts = list(zip(x.split([7, 20, 1, 12]), y.split([7, 20, 1, 12]), strict=True))
    one = hessian_eigenvalues(model, F.cross_entropy, (x, y))
    several = hessian_eigenvalues(model, F.cross_entropy, parts)
    close(several.values, one.values, atol=1e-12)
    trace = [hessian_trace(model, F.cross_entropy, data).value for data in ((x, y), iter(parts))]
    assert trace[0] == pytest.approx(trace[1], rel=1e-12)
    nodes = [hessian_density(model, F.cross_entropy, data, steps=5).nodes for data in ((x, y), parts)]
    close(nodes[0], nodes[1], atol=1e-10)


def test_what_of_the_output_is_the_prediction() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x, "scores": self.model(x)}

    for function in FUNCTIONS.values():
        found = function(Both(), F.cross_entropy, batch(), output="scores")
        assert_same(found, function(mlp(), F.cross_entropy, batch()))


@no_warnings
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_float32(activation: type[nn.Module]) -> None:
    model, (x, y) = mlp(activation), batch()
    hessian = dense(model, F.cross_entropy, (x, y))
    values = torch.linalg.eigvalsh(hessian)
    model.float()
    data = x.float(), y
    found = hessian_eigenvalues(model, F.cross_entropy, data, count=8)
    close(found.values, largest(hessian, 8)[0], atol=2e-6 * float(values.max()))
    rounded = hessian_eigenvalues(model, F.cross_entropy, data, count=1, tolerance=1e-9)
    assert 1e-9 < float(rounded.residuals / rounded.values) < 4e-6  # which is not warned of
    assert found.values.dtype == found.residuals.dtype == torch.float64
    assert {v.dtype for v in found.vectors[0].values()} == {torch.float32}
    trace = hessian_trace(model, F.cross_entropy, data)
    density = hessian_density(model, F.cross_entropy, data, steps=20)
    assert trace.interval[0] < float(values.sum()) < trace.interval[1]
    assert density.nodes.dtype == density.density.dtype == torch.float64
    close(density.nodes.max(1).values, values.max().expand(10), atol=1e-5)
    of_sampling = float((density.weights * density.nodes).sum(1).std()) / 10**0.5
    assert density.moment(1) == pytest.approx(float(values.mean()), abs=3 * of_sampling)


@no_warnings
def test_float32_with_repeated_eigenvalues() -> None:
    model = Quadratic(SPECTRA["repeated among others"]).float()
    model.a = model.a.float()
    found = hessian_eigenvalues(model, itself, NOTHING, count=6)
    close(found.values, torch.tensor([5.0, 5, 5, 4, 4, 2.99]).double(), atol=1e-5)


@no_warnings
def test_parameters_of_two_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return (self.w.square().sum() + 3 * self.v.square().sum()) + x.sum()

    found = hessian_eigenvalues(Mixed(), itself, NOTHING)
    close(found.values, torch.tensor([6.0, 6, 6, 2, 2]).double(), atol=1e-6)
    close(found.values[:3], torch.full((3,), 6.0).double(), atol=1e-12)  # those of the float64 parameter
    assert {n: v.dtype for n, v in found.vectors[0].items()} == {"w": torch.float32, "v": torch.float64}


@no_warnings
@pytest.mark.parametrize("loss_fn", [lambda p, t: p.sum(), lambda p, t: p.mean() * 3 + t.sum()])
def test_a_linear_function_has_no_curvature(loss_fn: Callable[..., Tensor]) -> None:
    model, (x, _) = nn.Linear(5, 2), batch()
    data = x.float(), torch.zeros(40)
    found = hessian_eigenvalues(model, loss_fn, data)
    assert found.values.tolist() == found.residuals.tolist() == [0.0] * 5
    close(rows(found) @ rows(found).T, torch.eye(5), atol=1e-6)
    for tolerance in (None, 0.1):
        trace = hessian_trace(model, loss_fn, data, tolerance=tolerance)
        assert trace.value == 0 and trace.interval == (0, 0)
    density = hessian_density(model, loss_fn, data)
    assert density.nodes.tolist() == [[0.0]] * 10 and density.moment(1) == 0
    assert integral(density) == pytest.approx(1)


# ---- Random numbers, and what stays as it was.


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    for name, value in vars(a).items():
        other = getattr(b, name)
        if name == "vectors":
            assert torch.equal(rows(a), rows(b))
        else:
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


@each_function
def test_the_seed_alone_decides(name: str) -> None:
    torch.manual_seed(1)
    first = FUNCTIONS[name](mlp(), F.cross_entropy, batch(), seed=5)
    torch.manual_seed(2)
    torch.rand(7)
    assert_same(FUNCTIONS[name](mlp(), F.cross_entropy, batch(), seed=5), first)
    with pytest.raises(AssertionError):
        assert_same(FUNCTIONS[name](mlp(), F.cross_entropy, batch(), seed=6), first)


@each_function
def test_modes_of_the_caller_do_not_matter(name: str) -> None:
    model, (x, y) = mlp().float(), batch()
    data = x.float(), y
    call = partial(FUNCTIONS[name], model, F.cross_entropy, data)
    first = call()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(call(), first)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert_same(call(), first)
        assert torch.is_inference_mode_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(call(), first)
    finally:
        torch.set_default_dtype(torch.float32)


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + torch.randn_like(x) + float(np.random.rand()))  # noqa: NPY002


@no_warnings
def test_all_products_see_the_same_noise() -> None:
    found = hessian_eigenvalues(Noisy(), F.cross_entropy, batch(), count=3)
    assert float(found.residuals.max()) <= 1e-6 * float(found.values.max())


class Fails(Exception):
    pass


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        **{f"value of {name}": v.clone() for name, v in model.state_dict().items()},
        **{f"gradient of {name}": p.grad for name, p in model.named_parameters()},
        **{
            f"gradient in {name}": None if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        },
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "trainable": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
    }


@each_function
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(name: str, fails: bool) -> None:
    model = normalized().train()
    model[2].eval()  # type: ignore[index]
    model[0].bias.requires_grad_(False)  # type: ignore[index,union-attr]
    model[4].weight.grad = torch.ones_like(model[4].weight)  # type: ignore[index,union-attr,arg-type]
    calls = 0

    def loss_fn(prediction: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(1)
        random.random()
        np.random.rand()  # noqa: NPY002
        assert not model.training
        if fails and calls == 3:
            raise Fails
        return F.cross_entropy(prediction, target)

    before = everything(model)
    if fails:
        with pytest.raises(Fails):
            FUNCTIONS[name](model, loss_fn, batch())
    else:
        FUNCTIONS[name](model, loss_fn, batch())
    after = everything(model)
    assert before.keys() == after.keys() and calls >= 3
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name], name


# ---- What is refused.


def test_refuses_options() -> None:
    model, data = mlp(), batch()
    eigenvalues = partial(hessian_eigenvalues, model, F.cross_entropy, data)
    trace = partial(hessian_trace, model, F.cross_entropy, data)
    density = partial(hessian_density, model, F.cross_entropy, data)
    refused: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (eigenvalues, {"count": 0}, "hessian_eigenvalues: count must be at least 1, got 0"),
        (
            eigenvalues,
            {"count": 58},
            "hessian_eigenvalues: count must be at most the number of trainable parameters, 57, got 58",
        ),
        (
            eigenvalues,
            {"tolerance": 0.0},
            "hessian_eigenvalues: tolerance must be positive and finite, got 0.0",
        ),
        (eigenvalues, {"max_steps": 4}, "hessian_eigenvalues: max_steps must be at least count, 5, got 4"),
        (trace, {"probes": 0}, "hessian_trace: probes must be at least 1, got 0"),
        (trace, {"tolerance": -0.1}, "hessian_trace: tolerance must be positive and finite, got -0.1"),
        (trace, {"confidence": 1.0}, r"hessian_trace: confidence must lie in \(0, 1\), got 1.0"),
        (density, {"steps": 0}, "hessian_density: steps must be at least 1, got 0"),
        (density, {"probes": 0}, "hessian_density: probes must be at least 1, got 0"),
        (density, {"points": 9}, "hessian_density: points must be at least 10, got 9"),
        (density, {"width": 0.0}, "hessian_density: width must be positive and finite, got 0.0"),
    ]
    for function, options, message in refused:
        with pytest.raises(ValueError, match=f"^{message}$"):
            function(**options)
    with pytest.raises(ValueError, match=r"^SpectralDensity: k must be at least 0, got -1$"):
        density(steps=1).moment(-1)


@each_function
def test_refuses_models_and_data(name: str) -> None:
    model, (x, y) = mlp(), batch()
    with pytest.raises(ValueError, match=f"^{name}: data must hold at least one batch, got none$"):
        FUNCTIONS[name](model, F.cross_entropy, [])
    with pytest.raises(TypeError, match=f"^{name}: data must be a pair"):
        FUNCTIONS[name](model, F.cross_entropy, x)
    with pytest.raises(ValueError, match=f"^{name}: loss_fn must reduce to a scalar"):
        FUNCTIONS[name](model, partial(F.cross_entropy, reduction="none"), (x, y))
    with pytest.raises(ValueError, match=f"^{name}: loss_fn must be differentiable .*, got no gradient$"):
        FUNCTIONS[name](model, lambda p, t: (p.argmax(1) != t).double().mean(), (x, y))
    with pytest.raises(ValueError, match=f"^{name}: model must have parameters that require a gradient"):
        FUNCTIONS[name](model.requires_grad_(False), F.cross_entropy, (x, y))


@each_function
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_a_loss_that_is_not_finite(name: str, bad: float) -> None:
    x, y = batch()
    x[3, 1] = bad
    data = [(x[:3], y[:3]), (x[3:9], y[3:9]), (x[9:], y[9:])]
    with pytest.raises(ValueError, match=f"^{name}: loss is not finite at the model's weights, got nan$"):
        FUNCTIONS[name](mlp(nn.ReLU), F.cross_entropy, data)


@each_function
def test_refuses_a_hessian_that_is_not_finite(name: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match=f"^{name}: the Hessian must be finite at the model's weights"):
        FUNCTIONS[name](
            model, lambda p, t: (1e-300 + p.abs()).sqrt().mean(), (torch.ones(3, 2), torch.zeros(3))
        )
