"""distance_mixture and focal_weighting: sums over pairs of embeddings."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, DRY, check_operator, placed
from torch import Tensor

from lossmeta.ops import distance_mixture, focal_weighting
from lossmeta.ops.distance_mixture import _operator as mixture
from lossmeta.ops.focal_weighting import _operator as focal

pytestmark = pytest.mark.cuda

SHAPES = [(1, 1), (17, 33), (128, 128), (100, 600)]
# Distances are norms of differences: float32 is off by its roundings times the number of pairs that are summed.
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def embeddings(count: int, dims: int) -> tuple[Tensor, Tensor]:
    x = (torch.randn(count, dims, dtype=torch.float64) / dims**0.5).requires_grad_()
    return x, torch.tensor([7, -3, 2**40, 7])[torch.randint(4, (count,))]


def mixture_phi() -> Tensor:
    return torch.tensor([1, 0.3, 0, 0.2, 0.7, 1, 0, 0.4, 0.1, 0.6], dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distance_mixture_by_labels(shape: tuple[int, int], reduction: int) -> None:
    x, labels = embeddings(*shape)
    check_operator(mixture, x, None, mixture_phi(), labels, 1e-3, reduction, bounds=BOUND.__getitem__)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("number", [7, 8192])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_distance_mixture_of_triplets(shape: tuple[int, int], number: int, reduction: int) -> None:
    x, _ = embeddings(*shape)
    triplets = torch.stack([torch.randperm(shape[0])[:3] for _ in range(number)])
    check_operator(mixture, x, triplets, mixture_phi(), None, 1e-3, reduction, bounds=BOUND.__getitem__)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_focal_weighting(shape: tuple[int, int], reduction: int) -> None:
    x, labels = embeddings(*shape)
    phi = torch.tensor([0.7, 3.0], dtype=torch.float64).requires_grad_()
    check_operator(focal, x, labels, phi, 1.0, reduction, bounds=BOUND.__getitem__)


def test_bad_temperature_is_nan() -> None:
    x, labels = placed(embeddings(20, 5), torch.float32)
    if not DRY:
        assert focal_weighting(x.detach(), labels, torch.tensor([1.0, 0.0], device=DEVICE)).isnan()


@pytest.mark.skipif(DRY, reason="the CPU refuses a bad index")
def test_bad_index_is_nan_without_gradient() -> None:
    x, _ = embeddings(33, 20)
    (on_device,) = placed([x], torch.float32)
    phi = mixture_phi().detach().float()
    bad = torch.tensor([[0, 1, 2], [3, 99, 5]])
    loss = distance_mixture(on_device, bad.to(DEVICE), phi.to(DEVICE), reduction="none")[0]
    assert loss.isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(loss.sum(), on_device)
    good = x.detach().float().requires_grad_()
    distance_mixture(good, bad[:1], phi, reduction="sum")[0].backward()
    torch.testing.assert_close(gradient.cpu(), good.grad, rtol=1e-4, atol=1e-4)
