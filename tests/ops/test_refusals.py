"""For the same fault the same class of error, whichever door the user came in by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lossmeta
from lossmeta.losses import LossNetwork, ParametricCrossEntropy, TaylorLoss
from lossmeta.ops import (
    adjusted_cross_entropy,
    class_confusion,
    focal_weighting,
    loss_network,
    parametric_cross_entropy,
)
from lossmeta.ops._refusals import refusal
from lossmeta.ops.adjusted_cross_entropy import with_slope
from lossmeta.ops.loss_network import with_mixed_derivative
from lossmeta.ops.parametric_cross_entropy import _operator

LABELS = torch.tensor([0, 1, 7])
WEIGHTS = torch.randn(5, 2), torch.randn(5, 5), torch.randn(1, 5)
Function = Callable[[Tensor], Any]

FUNCTIONS: dict[str, Function] = {
    "operator": lambda x: parametric_cross_entropy(x, LABELS, torch.eye(3)),
    "operator, smoothed": lambda x: parametric_cross_entropy(x, LABELS, torch.eye(3), label_smoothing=0.1),
    "operator of models": lambda x: adjusted_cross_entropy(x, LABELS),
    "statistics": lambda x: class_confusion(x, LABELS)[0],
    "two outputs": lambda x: loss_network(x, LABELS, *WEIGHTS, link="softmax")[0].sum(),
    "module": lambda x: ParametricCrossEntropy(3)(x, LABELS),
    "module of two outputs": lambda x: LossNetwork(5)(x, LABELS),
    "module in plain PyTorch": lambda x: TaylorLoss()(x, LABELS),
}


def called(function: Function, x: Tensor) -> None:
    function(x)


def without_grad(function: Function, x: Tensor) -> None:
    with torch.no_grad():
        function(x)


def with_grad(function: Function, x: Tensor) -> None:
    function(x.requires_grad_())


def mapped(function: Function, x: Tensor) -> None:
    torch.vmap(function)(x[None])


def differentiated(function: Function, x: Tensor) -> None:
    torch.func.grad(function)(x)


def looked_at(function: Function, x: Tensor) -> None:
    with lossmeta.ops.debug():
        function(x)


@pytest.mark.parametrize("door", [called, without_grad, with_grad, looked_at])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_label_out_of_range(name: str, door: Callable[[Function, Tensor], None]) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7 at index 2$"):
        door(FUNCTIONS[name], torch.randn(3, 3))


@pytest.mark.parametrize("door", [mapped, differentiated])
@pytest.mark.parametrize("name", ["operator", "operator of models", "two outputs"])
def test_a_label_out_of_range_under_a_transform(name: str, door: Callable[[Function, Tensor], None]) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7 at index 2$"):
        door(FUNCTIONS[name], torch.randn(3, 3))


def test_without_autograd() -> None:
    with pytest.raises(ValueError, match=r"^loss_network: labels must lie in \[0, 3\), got 7 at index 2$"):
        with_mixed_derivative(torch.randn(3, 3), LABELS, *WEIGHTS, link="softmax")
    with pytest.raises(
        ValueError, match=r"^adjusted_cross_entropy: labels must lie in \[0, 3\), got 7 at index 2$"
    ):
        with_slope(torch.randn(3, 3), LABELS)


def test_devices_that_differ() -> None:
    meta = torch.eye(3, device="meta")
    for call in (
        lambda: parametric_cross_entropy(torch.randn(3, 3), LABELS, meta),
        lambda: parametric_cross_entropy(meta, LABELS, torch.eye(3)),
        lambda: ParametricCrossEntropy(3, device="meta")(torch.randn(3, 3), LABELS),
    ):
        with pytest.raises(ValueError, match="must be on the same device"):
            call()


def test_options_of_another_type() -> None:
    x, y = torch.randn(4, 2), torch.arange(4)
    with pytest.raises(TypeError, match=r"^focal_weighting: offset must be of type float, got str$"):
        focal_weighting(x, y, torch.ones(2), offset="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^focal_weighting: reduction must be one of .*, got None$"):
        focal_weighting(x, y, torch.ones(2), reduction=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ignore_index must be of type int, got float$"):
        parametric_cross_entropy(torch.randn(3, 3), LABELS, torch.eye(3), ignore_index=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ignore_index must fit into 64 bits$"):
        parametric_cross_entropy(torch.randn(3, 3), LABELS, torch.eye(3), ignore_index=2**70)
    with pytest.raises(
        TypeError, match="LossNetwork: link must be one of 'softmax', 'sigmoid', 'identity', got 3"
    ):
        LossNetwork(link=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"num_classes must be an integer, at least 1, got 3\.0"):
        ParametricCrossEntropy(3.0)  # type: ignore[arg-type]


def test_other_failures_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that fails, memory that is lacking, and whatever torch itself raises."""
    for text in ("perturb: CUDA launch failed: no device", "out of memory: could not allocate 3 elements"):
        assert refusal("perturb", RuntimeError(text)) is None

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(_operator, "_eager", Fails)
    with pytest.raises(RuntimeError, match=r"^the device is gone$"):
        parametric_cross_entropy(torch.randn(3, 3), LABELS, torch.eye(3))
