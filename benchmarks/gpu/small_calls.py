"""One small call of every kernel that compute-sanitizer is to look at: forward and backward, several parts per sum.

python -m gpu.small_calls [--dry] [--planted]

All that the operators are given is copied from the CPU: kernels of PyTorch are not looked at, so that what they write
would count as uninitialised. ``--planted`` makes a call that reads beyond its input, which must be found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.backend import choose

operators = torch.ops.lossmeta


def tensors(device: str, dtype: torch.dtype) -> Any:
    """A function that draws a tensor of this shape and moves it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)

    return draw


def indices(device: str, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high)).to(device)


def calls(device: str, dtype: torch.dtype) -> Iterator[str]:
    """Makes them one by one, and says which."""
    draw, wide = tensors(device, dtype), torch.float32

    def cross_entropy(
        labels: Tensor | None, logits: Tensor, phi: Tensor, reduction: int, samples: Sequence[int]
    ) -> None:
        options = (None, -100, True, reduction)
        _, statistics = operators.parametric_cross_entropy(logits, labels, phi, *options)
        pull = draw(*samples, dtype=wide)
        operators.parametric_cross_entropy_backward(
            pull, logits, labels, phi, *options, statistics, True, True
        )

    # More than 8192 samples: the losses are summed in parts, and so is the gradient of few classes' Phi.
    cross_entropy(indices(device, 10, 9000), draw(9000, 10), draw(10, 10, dtype=wide), 1, ())
    yield "parametric_cross_entropy, parts"
    cross_entropy(indices(device, 40, 600), draw(600, 40), draw(40, 40, dtype=wide), 1, ())
    cross_entropy(indices(device, 37, 600), draw(600, 37), draw(37, 37, dtype=wide), 0, (600,))
    yield "parametric_cross_entropy, a warp per row"
    cross_entropy(indices(device, 20, 8, 33), draw(8, 20, 33), draw(20, 20, dtype=wide), 1, ())
    yield "parametric_cross_entropy, strided classes"
    cross_entropy(indices(device, 12, 3, 600), draw(3, 600, 12), draw(3, 12, 12, dtype=wide), 1, (3,))
    yield "parametric_cross_entropy, models"
    for classes in (5000, 5001):
        cross_entropy(None, draw(4, classes), draw(4, classes, dtype=wide), 0, (4,))
    yield "parametric_cross_entropy, a block per row"

    def adjusted(models: int, samples: int, classes: int) -> None:
        fractions = (torch.full((models,), 0.3).to(device) for _ in range(2))
        arguments = (
            draw(models, samples, classes),
            indices(device, classes, samples),
            draw(models, classes, dtype=wide),
            *fractions,
            -100,
            True,
        )
        _, slope, derivatives = operators.adjusted_cross_entropy(*arguments)
        needs = True, True, True, True
        pull = draw(models, dtype=wide)
        operators.adjusted_cross_entropy_backward(pull, *arguments, slope, derivatives, *needs)

    # More than 8192 samples are counted, and their losses summed, in parts; many rows' slopes, the shift's gradient.
    for models, samples, classes in ((2, 9000, 10), (3, 600, 40), (1, 600, 37), (1, 4, 5000), (1, 4, 5001)):
        adjusted(models, samples, classes)
    yield "adjusted_cross_entropy"

    for samples, classes in ((3000, 10), (600, 40), (600, 37), (40, 2000)):
        operators.class_confusion(draw(samples, classes), indices(device, classes, samples), -100)
    sums = draw(10, 10, dtype=torch.float64)
    operators.class_confusion_(sums, indices(device, 9, 10), draw(3000, 10), indices(device, 10, 3000), -100)
    yield "class_confusion"

    def network(samples: int, classes: int, width: int, table: int, dense: bool = False) -> None:
        target = draw(samples, classes, dtype=wide) if dense else indices(device, classes, samples)
        shapes = (width, 2), (width, width), (1, width)
        weights = [draw(*shape, dtype=wide, scale=shape[1] ** -0.5) for shape in shapes]
        arguments = (
            draw(samples, classes),
            target,
            *weights,
            None,
            True,
            True,
            0.01,
            10.0,
            False,
            -100,
            table,
        )
        kept = operators.loss_network(*arguments)[2]
        pulls = draw(samples, dtype=wide), draw(samples, classes, dtype=wide)
        operators.loss_network_backward(*pulls, *arguments, kept, True, True, True, True)

    for samples, classes in ((300, 20), (40, 200), (16, 300), (4, 2000)):
        network(samples, classes, 40, 64)
    yield "loss_network, table"
    for samples, classes, width in ((60, 10, 40), (3, 1100, 40), (8, 5, 100), (2, 5, 512)):
        network(samples, classes, width, 0)
    network(20, 7, 33, 0, dense=True)
    yield "loss_network, exact"

    phi = torch.tensor([1.0, 0.3, 0.0, 0.2, 0.7, 1.0, 0.0, 0.4, 0.1, 0.6]).to(device)
    for count, dims in ((70, 33), (40, 160)):
        x, labels = draw(count, dims, scale=dims**-0.5), indices(device, 5, count)
        for arguments in (
            (x, indices(device, count, 300, 3), phi, None, 1e-3, 1),
            (x, None, phi, labels, 1e-3, 1),
        ):
            _, _, kept = operators.distance_mixture(*arguments)
            pulls = draw(dtype=wide), draw(10, dtype=wide)
            operators.distance_mixture_backward(*pulls, *arguments, kept, True, True)
        arguments = (x, labels, torch.tensor([0.7, 3.0]).to(device), 1.0, 1)
        _, kept = operators.focal_weighting(*arguments)
        operators.focal_weighting_backward(draw(dtype=wide), *arguments, kept, True, True)
    yield "distance_mixture, focal_weighting"

    for count in (50, 800):
        knots = torch.linspace(-2, 2, count).to(device)
        operators.pwl_statistics(draw(5001), draw(5, 5001), knots)
    yield "pwl_statistics"
    for count, parameters in ((3, 5001), (50, 2048), (3000, 5001)):
        knots, slopes = torch.linspace(-2, 2, count).to(device), draw(count + 1, dtype=wide)
        arguments = draw(parameters), knots, slopes, True
        _, slope = operators.pwl_penalty(*arguments)
        operators.pwl_penalty_backward(draw(dtype=wide), *arguments, slope, True)
        operators.pwl_penalty_(draw(parameters), *arguments[:3])
    yield "pwl_penalty"
    for parameters in (2048, 1031):
        operators.perturb(draw(parameters), draw(3, parameters), draw(17, 3, dtype=wide))
    yield "perturb"
    operators.gaussian_curvature(draw(40, 50), 0.5, 2.0)
    yield "gaussian_curvature"


def planted(device: str) -> None:
    """A surface nearly all of which is beyond the end of its memory."""
    surface = torch.zeros(1024, 1024).to(device)
    surface.untyped_storage().resize_(surface.nbytes // 64)
    operators.gaussian_curvature(surface, 0.5, 2.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.small_calls")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--planted", action="store_true")
    options = parser.parse_args()
    backend = choose(options.dry)
    if reason := backend.why_not():
        print(reason)
        return 1
    if options.planted:
        planted(backend.device)
        backend.synchronize()
        return 0
    for dtype in (torch.float32, torch.bfloat16):
        for name in calls(backend.device, dtype):
            backend.synchronize()
            print(f"{dtype}: {name}", flush=True)
    print("all calls made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
