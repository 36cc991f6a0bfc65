"""The parametric cross-entropy with fixed Phi: what a training step pays, forward and backward together and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device import DTYPES
from torch import Tensor

from lossmeta.ops import LowRankPhi, parametric_cross_entropy
from lossmeta.ops._operator import OPERATORS

# With "rows" each sample has its row of Phi, as soft targets come to the operator: at a vocabulary of 128256 the whole
# matrix would be 66 GB.
SIZES = {
    "cpu": [(128, 10), (1024, 100), (1024, 1000), (8192, 1000)],
    "cuda": [(8192, 1000), (8192, 32000, "rows"), (8192, 128256, "rows"), (1024, 1000)],
    "dry": [(8, 10), (8, 12, "rows")],
}
BOTH = "forward + backward"
PASSES = [BOTH, "forward", "backward"]
WHAT = {"cpu": [BOTH], "cuda": PASSES, "dry": PASSES}
COMPILED_FIRST = [{"size": size, "what": BOTH} for size in ((8192, 1000), (8192, 32000, "rows"))]
SMALLEST = (128, 10)

# Samples, classes, form of Phi, label smoothing.
VOCABULARY = [
    *(
        (64, classes, form, e)
        for classes in (50257, 131072)
        for form in ("none", "rank 8")
        for e in (0.0, 0.1)
    ),
    (64, 10000, "matrix", 0.1),
]
VOCABULARIES = {
    "cpu": VOCABULARY,
    "cuda": [(16 * samples, *rest) for samples, *rest in VOCABULARY],
    "dry": [(4, 12, form, 0.1) for form in ("none", "rank 8", "matrix")],
}


def eager(logits: Tensor, target: Tensor | None, phi: Tensor) -> Tensor:
    rows = phi if target is None else phi[target]
    z = (rows * torch.log_softmax(logits, 1, dtype=torch.float32)).sum(1)
    return -torch.sigmoid(z).mean()


def by_rows(logits: Tensor, target: None, rows: Tensor) -> Tensor:
    """Without the product of soft targets and the matrix, next to which nothing else would be seen."""
    loss: Tensor = OPERATORS["parametric_cross_entropy"](logits, target, rows, None, -100, True, 1)
    return loss


@pytest.mark.parametrize("candidate", ["eager", "compile", "lossmeta"])
@pytest.mark.by_device("dtype", DTYPES)
@pytest.mark.by_device("what", WHAT)
@pytest.mark.by_device("size", SIZES)
def test_passes(
    size: tuple[Any, ...], what: str, dtype: torch.dtype, candidate: str, device: Any, measure: Any
) -> None:
    samples, classes, *form = size
    candidates = {
        "eager": eager,
        "compile": device.compile(eager),
        "lossmeta": by_rows if form else parametric_cross_entropy,
    }
    loss = candidates[candidate]

    def inputs() -> tuple[Tensor, Tensor | None, Tensor]:
        logits = torch.randn(samples, classes, dtype=dtype, requires_grad=True)
        if form:
            return logits, None, torch.randn(samples, classes)
        return (
            logits,
            torch.randint(classes, (samples,)),
            torch.eye(classes) + 0.1 * torch.randn(classes, classes),
        )

    def both(logits: Tensor, target: Tensor | None, phi: Tensor) -> None:
        logits.grad = None
        loss(logits, target, phi).backward()

    def graph() -> tuple[Tensor, ...]:
        logits, target, phi = inputs()
        # What is compiled otherwise gives its buffers away in the first backward pass.
        with torch._functorch.config.patch(donated_buffer=False):
            return loss(logits, target, phi), logits, phi

    def backward(value: Tensor, logits: Tensor, phi: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, logits, retain_graph=True)

    # Forward and backward read the logits, and each sample its row of Phi; the backward writes a gradient.
    element, rows = (
        dtype.itemsize * samples * classes,
        4 * (samples if form else min(samples, classes)) * classes,
    )
    measure(
        {BOTH: both, "forward": loss, "backward": backward}[what],
        graph if what == "backward" else inputs,
        operator="parametric_cross_entropy",
        size=f"{samples}×{classes}{', a row of Φ per sample' if form else ''}, {what}",
        candidate=candidate,
        bytes_moved={BOTH: 3 * element + 2 * rows, "forward": element + rows, "backward": 2 * element + rows}[
            what
        ],
        dtype=dtype,
    )


@pytest.mark.parametrize("candidate", ["cross_entropy", "lossmeta"])
@pytest.mark.by_device("size", VOCABULARIES)
def test_vocabulary(size: tuple[Any, ...], candidate: str, measure: Any) -> None:
    """Many classes and few samples, where a matrix would take all the time, beside F.cross_entropy without Phi."""
    samples, classes, form, smoothing = size
    rank = 8 if form == "rank 8" else 0

    def make() -> tuple[Any, ...]:
        logits, target = torch.randn(samples, classes, requires_grad=True), torch.randint(classes, (samples,))
        left, right = torch.zeros(classes, rank), torch.randn(classes, rank)
        phis = {"none": None, "rank 8": LowRankPhi(torch.ones(classes), left, right)}
        return logits, target, phis[form] if form in phis else torch.eye(classes)

    def step(logits: Tensor, target: Tensor, phi: Any) -> None:
        logits.grad = None
        if candidate == "lossmeta":
            loss = parametric_cross_entropy(
                logits, target, phi, activation="identity", label_smoothing=smoothing
            )
        else:
            loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        loss.backward()

    measure(
        step,
        make,
        operator="parametric_cross_entropy",
        size=f"{samples}×{classes}, Φ: {form}{', smoothed' if smoothing else ''}",
        candidate=candidate,
        bytes_moved=4 * (3 * samples * classes + 2 * rank * classes + samples * classes * (form == "matrix")),
    )


@pytest.mark.parametrize("candidate", ["bare operators", "lossmeta"])
def test_python_layer(candidate: str, measure: Any) -> None:
    """What autograd and the Python function add to the two operators that they call, on the smallest size."""
    samples, classes = SMALLEST
    options = (None, -100, True, 1)  # weight, ignore_index, sigmoid, mean
    operators = torch.ops.lossmeta
    forward = operators.parametric_cross_entropy.default
    backward = operators.parametric_cross_entropy_backward.default

    def make() -> tuple[Tensor, ...]:
        logits, target = torch.randn(samples, classes), torch.randint(classes, (samples,))
        return logits.requires_grad_(candidate == "lossmeta"), target, torch.eye(classes), torch.ones(())

    def bare(logits: Tensor, target: Tensor, phi: Tensor, one: Tensor) -> None:
        _, statistics = forward(logits, target, phi, *options)
        backward(one, logits, target, phi, *options, statistics, True, False)

    def step(logits: Tensor, target: Tensor, phi: Tensor, one: Tensor) -> None:
        logits.grad = None
        parametric_cross_entropy(logits, target, phi).backward()

    measure(
        step if candidate == "lossmeta" else bare,
        make,
        operator="parametric_cross_entropy",
        size=f"{samples}×{classes}, Python layer",
        candidate=candidate,
        bytes_moved=4 * (3 * samples * classes + 2 * classes * classes),
    )
