"""The derivative of any elementwise optimizer's step, as its own step in float64 shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._optimizers import State, plainest, shadow

# Of a gradient's element: in float64 rounding and curvature then cost about 1e-10 each.
DIFFERENCE = 1e-5


def check_elementwise(optimizer: Optimizer) -> None:
    """Tries the optimizer on a few toy weights, and refuses it where its step is not what a derivative can be taken of.

    With the options of each of its groups: one may normalise what another leaves alone.

    Raises:
        TypeError: says what its step does.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        alike = [g for g in groups if {**g, "params": 0} == {**group, "params": 0}]
        if alike:
            alike[0]["params"] = [*alike[0]["params"], *group["params"]]
        else:
            groups.append(dict(group))
    for group in groups:
        try:
            reason = _why_no_derivative(optimizer, group)
        except Exception as error:
            reason = f"which cannot be stepped on its own ({type(error).__name__}: {error})"
        if reason:
            raise TypeError(
                "AdaLFL: optimizer must move every weight by its own gradient, and smoothly, got "
                f"{type(optimizer).__name__}, {reason}; take SGD, Adam, AdamW, RMSprop, Adagrad or another elementwise "
                "optimizer, or approximate=True, which takes its step for lr * g"
            )


# Some steps look at the shapes of weights. These are of linear layers, biases and convolutions.
SHAPES = ((8, 6), (5,), (6, 3, 2, 2))
LONGEST = 32  # to which the model's own shapes are cut
HISTORY = 2
AGREES = 1e-3  # two differences, relatively; 1e-6 apart at most where all is float64


def _why_no_derivative(optimizer: Optimizer, group: dict[str, Any]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shapes = list(dict.fromkeys([*SHAPES, *(_toy_shape(p) for p in group["params"])]))

    def drawn(dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
            for shape in shapes
        ]

    def trained(weights: list[Tensor], history: list[list[Tensor]]) -> tuple[Optimizer, list[nn.Parameter]]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        tried = shadow(optimizer, [plainest({**group, "params": parameters})], {})
        for gradients in history:
            _step(tried, parameters, gradients)
        return tried, parameters

    weights, history, last = drawn(), [drawn() for _ in range(HISTORY)], drawn()
    with torch.random.fork_rng(devices=[]):
        # Some steps leave out what is along the weights, if the gradient is nearly at right angles to them.
        for at_right_angles in (False, True):

            def after(change: Callable[[Tensor], Tensor], projects: bool = at_right_angles) -> list[Tensor]:
                tried, parameters = trained(weights, history)
                gradients = (
                    [_across(g, p) for g, p in zip(last, parameters, strict=True)] if projects else last
                )
                _step(tried, parameters, [change(g.clone()) for g in gradients])
                return [p.detach() for p in parameters]

            plain, again = after(_same), after(_same)
            if not all(map(torch.equal, plain, again)):
                return "whose step is random"
            for a, b in zip(plain, after(_first_changed), strict=True):
                if (a - b).abs().view(-1)[1:].gt(1e-12).any():
                    return "whose step for one weight depends on the gradients of others"
            if all(map(torch.equal, plain, after(_all_changed))):
                return "whose step does not depend on the size of the gradient, so that nothing is learned from it"
        # As a step will do it: the state may be of a precision of its own.
        dtype = group["params"][0].dtype if group["params"] else torch.float32
        tried, parameters = trained(drawn(dtype), [drawn(dtype) for _ in range(HISTORY)])
        for p, g in zip(parameters, drawn(dtype), strict=True):
            p.grad = g
        at = [p.detach() for p in parameters]
        one, other = (
            torch.cat(
                [
                    d.double().view(-1)
                    for d in NumericDerivative(tried, parameters, dict(tried.state), size)(at)
                ]
            )
            for size in (DIFFERENCE, 2 * DIFFERENCE)
        )
        if float((one - other).norm()) > AGREES * float(one.norm()):
            return "whose step computes in a lower precision than float64, where its derivative drowns in rounding"
    return None


def _toy_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(max(1, min(size, LONGEST)) for size in parameter.shape) or (1,)


def _step(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    type(optimizer).step(optimizer)


def _same(g: Tensor) -> Tensor:
    return g


def _first_changed(g: Tensor) -> Tensor:
    g.view(-1)[0] *= 1.01
    return g


def _all_changed(g: Tensor) -> Tensor:
    return g * (1 + 1e-4)


def _across(g: Tensor, p: Tensor) -> Tensor:
    """Without what is along the weights of each output."""
    rows = (len(g), -1) if g.dim() > 1 else (1, -1)
    a, b = g.reshape(rows), p.detach().reshape(rows)
    return (a - (a * b).sum(1, keepdim=True) / (b * b).sum(1, keepdim=True) * b).reshape(g.shape)


class NumericDerivative:
    """The derivative of the next step of an elementwise optimizer in its gradients.

    Args:
        optimizer: before its step.
        parameters: that have gradients.
        saved: a copy of its state.
        relative: the difference, of an element of the gradient.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], saved: State, relative: float = DIFFERENCE
    ) -> None:
        self.optimizer, self.saved, self.relative = optimizer, saved, relative
        self.gradients = {p: p.grad.detach().clone() for p in parameters if p.grad is not None}
        self.groups = [dict(group) for group in optimizer.param_groups]

    def __call__(self, before: Sequence[Tensor]) -> Iterator[Tensor]:
        """One tensor per parameter, minus the derivative of the weight after the step; ``before``: the weights."""
        start = dict(zip(self.gradients, before, strict=True))
        difference = {
            p: self.relative * g.double().abs().clamp_min(_typical(g)) for p, g in self.gradients.items()
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
        type(self.optimizer).step(shadow(self.optimizer, [plainest(g) for g in groups if g["params"]], state))
        return {p: q.detach() for p, q in copies.items()}


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
