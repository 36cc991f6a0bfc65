"""The learned loss network of AdaLFL with its slope (AdaLFL, Eq. 3 and 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossmeta.ops._arguments import choice
from lossmeta.ops._operator import Operator, accumulation_dtype

LINKS = {"identity": False, "softmax": True}
HIDDEN = {"smooth_leaky_relu": True, "relu": False}
OUTPUTS = {"linear": False, "softplus": True}


def loss_network(
    pred: Tensor,
    target: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    output_weight: Tensor,
    *,
    link: str = "identity",
    leak: float = 0.01,
    smoothness: float = 10.0,
    hidden: str = "smooth_leaky_relu",
    output: str = "linear",
    ignore_index: int = -100,
    exact: bool = False,
    table_size: int = 512,
) -> tuple[Tensor, Tensor]:
    slope_of = "loss_network"
    softmax = choice(slope_of, "link", link, LINKS)
    smooth = choice(slope_of, "hidden", hidden, HIDDEN)
    softplus = choice(slope_of, "output", output, OUTPUTS)
    return _operator(
        pred, target, input_weight, hidden_weight, output_weight,
        softmax, smooth, leak, smoothness, softplus, ignore_index, 0 if exact else table_size,
    )


def _reference(
    pred: Tensor,
    target: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    output_weight: Tensor,
    softmax: bool,
    smooth: bool,
    leak: float,
    smoothness: float,
    softplus: bool,
    ignore_index: int,
    table_size: int,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(pred.dtype)
    pred = pred.to(dtype)
    w1, w2, w3 = (w.to(dtype) for w in (input_weight, hidden_weight, output_weight))
    valid = None
    if not target.dtype.is_floating_point:
        valid = (target >= 0) & (target < pred.shape[-1])
        # An ignored row must not bring its NaN into the gradients of the weights.
        pred = pred.where(valid[:, None], 0.0)
        target = torch.nn.functional.one_hot(target.where(valid, 0), pred.shape[-1])
    f = pred.softmax(-1) if softmax else pred

    def activation(x: Tensor) -> tuple[Tensor, Tensor]:
        if not smooth:
            return x.relu(), (x > 0).to(dtype)
        # Beyond 40 the difference to the line is below the rounding of float64.
        value = torch.nn.functional.softplus(x, smoothness, 40.0) * (1 - leak) + leak * x
        return value, (smoothness * x).sigmoid() * (1 - leak) + leak

    h1, d1 = activation(torch.stack([target.to(dtype), f], -1) @ w1.mT)
    h2, d2 = activation(h1 @ w2.mT)
    value = (h2 @ w3.mT).squeeze(-1)
    slope = ((d2 * ((d1 * w1[:, 1]) @ w2.mT)) @ w3.mT).squeeze(-1)
    if softplus:
        value, slope = torch.nn.functional.softplus(value, 1.0, 40.0), value.sigmoid() * slope
    loss, slope = value.mean(-1), slope / pred.shape[-1]
    if softmax:
        slope = f * (slope - (f * slope).sum(-1, keepdim=True))
    if valid is not None:
        loss, slope = loss.where(valid, 0.0), slope.where(valid[:, None], 0.0)
    return loss, slope


def _fake(
    pred: Tensor,
    target: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    output_weight: Tensor,
    softmax: bool,
    smooth: bool,
    leak: float,
    smoothness: float,
    softplus: bool,
    ignore_index: int,
    table_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(pred.dtype)
    tabulates = table_size > 0 and softmax and smooth and not target.dtype.is_floating_point
    if tabulates and pred.numel() >= 8 * (table_size + 3):
        table = 10 * table_size + 1
    else:
        table = 0
    return (
        pred.new_empty(pred.shape[:1], dtype=dtype),
        pred.new_empty(pred.shape, dtype=dtype),
        pred.new_empty((table,), dtype=dtype),
    )


def _from_slope(slope: Tensor, grads: Any) -> Tensor | None:
    grad_loss, grad_slope = grads
    return grad_loss[:, None] * slope if grad_slope is None else None


_operator = Operator(
    "loss_network",
    reference=_reference,
    fake=_fake,
    differentiable=(0, 2, 3, 4),
    num_tensors=5,
    num_outputs=2,
    shortcut=(1, _from_slope),
)
