"""Tensors stay on their own device and keep their dtype, whatever PyTorch's defaults are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lossmeta import landscape, losses, metrics, ops
from lossmeta.adalfl import OnlineLearner, initialize, meta_gradient


class Halved(Optimizer):
    """An optimizer that is tried out, since nothing is known about it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad / (1 + p.grad.abs())


def parts() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(4)]


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A device that computes nothing stands for a GPU, which is what users choose."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["auto", "finite_difference", "jvp", "double_backward"])
@pytest.mark.parametrize("make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.01), Halved])
def test_a_learner_steps_as_without(backend: str, make: Any, request: pytest.FixtureRequest) -> None:
    if make is Halved and backend != "auto":
        pytest.skip("the optimizer's own step is differentiated")
    results = []
    for _ in range(2):
        model, batches = parts()
        loss = losses.LossNetwork(6, residual="cross_entropy")
        if results:
            request.getfixturevalue("elsewhere")
        learner = OnlineLearner(model, make(model.parameters()), loss, F.cross_entropy, backend=backend)
        torch.default_generator.manual_seed(1)
        reports = [learner.step(*pair) for pair in zip(batches, batches[::-1], strict=True)]
        results.append(
            [r.loss for r in reports]
            + [p.detach().clone() for p in (*loss.parameters(), *model.parameters())]
        )
    for one, other in zip(*results, strict=True):
        assert other.device.type == "cpu" and one.dtype == other.dtype
        torch.testing.assert_close(one, other)


def test_a_gradient_and_an_initialization(elsewhere: None) -> None:
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        model, batches = parts()
        loss = losses.LossNetwork(6)
        torch.set_default_dtype(torch.float64)
    result = meta_gradient(model, SGD(model.parameters(), 0.1), loss, F.cross_entropy, *batches[:2])
    assert all(g.device.type == "cpu" and g.dtype == torch.float32 for g in result.gradients)
    for method in ("unrolled", "implicit"):
        history = initialize(
            loss,
            lambda: copy.deepcopy(model),
            batches,
            batches,
            F.cross_entropy,
            steps=2,
            inner_steps=2,
            method=method,
        )
        assert all(math.isfinite(value) for value in history)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", ["AveragePrecision", "ErrorRate"])
def test_metrics(name: str, elsewhere: None) -> None:
    metric = getattr(metrics, name)()
    assert metric.compute().device.type == "cpu" and metric.compute().isnan()
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 2.0]], device="cpu", dtype=torch.float32)
    metric.update(scores, torch.tensor([0, 0, 1], device="cpu"))
    value = metric.compute()
    assert value.device.type == "cpu" and value.dtype == torch.float64 and value.isfinite()


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_losses(link: str, elsewhere: None) -> None:
    with torch.device("cpu"):
        logits = torch.randn(5, 3, dtype=torch.float32)
        target = torch.randint(3, (5,)) if link == "softmax" else torch.randint(2, (5, 3))
        criteria: list[nn.Module] = [losses.LossNetwork(6, link=link), losses.TaylorLoss(link=link)]
        criteria += [losses.ParametricCrossEntropy(3, link=link, label_smoothing=s) for s in (0.0, 0.1)]
        if link == "softmax":
            shape = losses.LossNetwork(6, residual="cross_entropy")
            criteria += [
                losses.LossWeighting(6),
                losses.TransitionLoss(3),
                losses.TransitionLoss(3, shape=shape),
            ]
        for criterion in criteria:
            criterion.float()
        embeddings, labels = F.normalize(torch.randn(8, 4, dtype=torch.float32)), torch.arange(8) // 2
        metric_losses = [losses.DistanceMixtureLoss().float(), losses.FocalWeightedLoss().float()]
    for criterion in criteria:
        x = logits.clone().requires_grad_()
        criterion(x, target).backward()
        assert x.grad is not None and x.grad.isfinite().all()
        criterion.plot()  # type: ignore[operator]
    for criterion in metric_losses:
        x = embeddings.clone().requires_grad_()
        criterion(x, labels).backward()
        assert x.grad is not None and x.grad.isfinite().all()
        criterion.plot()  # type: ignore[operator]


def test_operators_without_gradients(elsewhere: None) -> None:
    with torch.device("cpu"):
        values, labels = torch.randn(6, 3, dtype=torch.float32), torch.randint(3, (6,))
        line, knots = (
            torch.randn(10, dtype=torch.float32),
            torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float32),
        )
        directions, points = torch.randn(2, 10, dtype=torch.float32), torch.zeros(4, 2, dtype=torch.float32)
        surface = torch.randn(5, 5)
    results = [
        *ops.class_confusion(values, labels),
        ops.perturb(line, directions, points),
        *ops.pwl_statistics(line, None, knots),
        ops.pwl_penalty(line, knots, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float32, device="cpu")),
        ops.gaussian_curvature(surface, 0.1, 0.1),
    ]
    assert all(r.device.type == "cpu" for r in results)


def test_a_landscape(request: pytest.FixtureRequest) -> None:
    found = []
    for _ in range(2):
        model, batches = parts()
        if found:
            request.getfixturevalue("elsewhere")
        directions = landscape.random_directions(model)
        options: Any = {"directions": directions, "points": 9}
        surface = landscape.loss_surface(model, F.cross_entropy, batches, refine=0.2, **options)
        moved = [{n: p + d[n] for n, p in model.named_parameters()} for d in directions]
        path = landscape.pca_directions(model, moved)
        exact = landscape.exact_curvature(model, F.cross_entropy, batches, directions)
        spectrum = landscape.hessian_eigenvalues(model, F.cross_entropy, batches, count=2)
        found.append(
            [
                surface.losses,
                surface.x,
                surface.curvature(),
                path.coordinates,
                exact.gaussian,
                spectrum.values,
            ]
        )
    for one, other in zip(*found, strict=True):
        assert other.device.type == "cpu" and one.dtype == other.dtype
        torch.testing.assert_close(one, other)
