"""The calls that Nsight Compute looks at: each made before, then once more between start and stop.

python -m gpu.profiled_calls [--dry]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable

import torch

from gpu.backend import Card, Dry, choose

operators = torch.ops.lossmeta


def calls(backend: Card | Dry) -> list[Callable[[], object]]:
    """Forward and backward of the losses that train, and the validation set's statistics."""
    device, size = backend.device, backend.size
    samples, vocabulary, classes, width = size(8192), size(32000), size(1000), 40

    logits = torch.randn(samples, vocabulary, device=device)
    rows = torch.rand(samples, vocabulary, device=device) / vocabulary
    options = (None, -100, True, 1)
    _, statistics = operators.parametric_cross_entropy(logits, None, rows, *options)
    pull = torch.ones((), device=device)

    pred, pulled = torch.randn(samples, classes, device=device), torch.randn(samples, classes, device=device)
    labels = torch.randint(classes, (samples,), device=device)
    shapes = (width, 2), (width, width), (1, width)
    weights = [torch.randn(shape, device=device) * shape[1] ** -0.5 for shape in shapes]
    network = (pred, labels, *weights, None, True, True, 0.01, 10.0, False, -100, 512)
    table = operators.loss_network(*network)[2]

    return [
        lambda: operators.parametric_cross_entropy(logits, None, rows, *options),
        lambda: operators.parametric_cross_entropy_backward(
            pull, logits, None, rows, *options, statistics, True, False
        ),
        lambda: operators.loss_network(*network),
        lambda: operators.loss_network_backward(None, pulled, *network, table, False, True, True, True),
        lambda: operators.class_confusion(pred, labels, -100),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.profiled_calls")
    parser.add_argument("--dry", action="store_true")
    backend = choose(parser.parse_args().dry)
    if reason := backend.why_not():
        print(reason)
        return 1
    chosen = calls(backend)
    for call in chosen:
        call()
    backend.synchronize()
    with contextlib.nullcontext() if backend.dry else torch.cuda.profiler.profile():
        for call in chosen:
            call()
        backend.synchronize()
    print(f"{len(chosen)} calls made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
