"""The derivative of any elementwise optimizer's step, as its own step in float64 shows."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[Tensor, dict[str, Any]]

# Of a gradient's element: in float64 rounding and curvature then cost about 1e-10 each.
DIFFERENCE = 1e-5


def check_elementwise(optimizer: Optimizer) -> None:
    """Tries the optimizer on a few toy weights, and refuses it where its step is not what a derivative can be taken of.

    Raises:
        TypeError: says what its step does.
    """
    try:
        reason = _why_no_derivative(optimizer)
    except Exception as error:
        reason = f"which cannot be stepped on its own ({type(error).__name__}: {error})"
    if reason:
        raise TypeError(
            "AdaLFL: optimizer must move every weight by its own gradient, and smoothly, got "
            f"{type(optimizer).__name__}, {reason}; take SGD, Adam, AdamW, RMSprop, Adagrad or another elementwise "
            "optimizer, or approximate=True, which takes its step for lr * g"
        )


def _why_no_derivative(optimizer: Optimizer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shapes = ([4, 3], [5])

    def drawn() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    weights, history, last = drawn(), [drawn(), drawn()], drawn()
    changed = [g.clone() for g in last]
    for g in changed:
        g.view(-1)[0] *= 1.1

    def after(gradients: list[Tensor]) -> list[Tensor]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        shadow = _shadow(optimizer, [{**optimizer.param_groups[0], "params": parameters}], {})
        for step in (*history, gradients):
            for p, g in zip(parameters, step, strict=True):
                p.grad = g.clone()
            type(optimizer).step(shadow)
        return [p.detach() for p in parameters]

    with torch.random.fork_rng(devices=[]):
        plain, again, moved = after(last), after(last), after(changed)
    if not all(map(torch.equal, plain, again)):
        return "whose step is random"
    differences = [(a - b).abs().view(-1) for a, b in zip(plain, moved, strict=True)]
    if any(float(d[1:].max()) > 1e-12 for d in differences):
        return "whose step for one weight depends on the gradients of others"
    if not any(float(d[0]) > 0 for d in differences):
        return (
            "whose step does not depend on the size of the gradient, so that nothing could be learned from it"
        )
    return None


class NumericDerivative:
    """The derivative of the next step of an elementwise optimizer in its gradients.

    Args:
        optimizer: before its step.
        parameters: that have gradients.
        saved: a copy of its state.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], saved: State) -> None:
        self.optimizer, self.saved = optimizer, saved
        self.gradients = {p: p.grad.detach().clone() for p in parameters if p.grad is not None}
        self.groups = [dict(group) for group in optimizer.param_groups]

    def __call__(self, before: Sequence[Tensor]) -> Iterator[Tensor]:
        """One tensor per parameter, minus the derivative of the weight after the step; ``before``: the weights."""
        start = dict(zip(self.gradients, before, strict=True))
        difference = {
            p: DIFFERENCE * g.double().abs().clamp_min(_typical(g)) for p, g in self.gradients.items()
        }
        ahead, behind = self._stepped(start, difference, 1.0), self._stepped(start, difference, -1.0)
        for p, g in self.gradients.items():
            slope = (behind[p] - ahead[p]) / (2 * difference[p])
            # Where nothing has been there yet the step is as a sign at 0.
            still = g != 0
            for value in self.saved.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == g.shape:
                    still = still | (value != 0)
            yield slope.where(still, 0).to(g.dtype)

    def _stepped(
        self, start: dict[Tensor, Tensor], difference: dict[Tensor, Tensor], sign: float
    ) -> dict[Tensor, Tensor]:
        """The weights after a step with gradients that far away."""
        copies: dict[Tensor, Tensor] = {
            p: nn.Parameter(start[p].detach().to(torch.float64, copy=True)) for p in self.gradients
        }
        for p, q in copies.items():
            q.grad = self.gradients[p].double() + sign * difference[p]
        groups = [
            {**group, "params": [copies[p] for p in group["params"] if p in copies]} for group in self.groups
        ]
        state = {copies[p]: {k: _in_float64(v, p) for k, v in self.saved.get(p, {}).items()} for p in copies}
        shadow = _shadow(self.optimizer, [g for g in groups if g["params"]], state)
        type(self.optimizer).step(shadow)
        return {p: q.detach() for p, q in copies.items()}


def _shadow(optimizer: Optimizer, groups: list[dict[str, Any]], state: State) -> Optimizer:
    """The same optimizer of other weights."""
    shadow = copy.copy(optimizer)
    plain = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
    shadow.param_groups = [{**g, **{k: v for k, v in plain.items() if k in g}} for g in groups]
    shadow.state = defaultdict(dict, {p: s for p, s in state.items() if s})
    return shadow


def _in_float64(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    return (
        value.double().clone()
        if value.is_floating_point() and value.shape == parameter.shape
        else value.clone()
    )


def _typical(g: Tensor) -> float:
    """A size for elements that are 0."""
    return max(float(g.double().norm()) / max(g.numel(), 1) ** 0.5 * 1e-3, 1e-30)
