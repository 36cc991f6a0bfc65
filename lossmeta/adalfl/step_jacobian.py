"""The derivative of an optimizer's step with respect to the gradient that it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lossmeta.adalfl.elementwise import NumericDerivative, check_elementwise

# One entry per parameter that takes a step: (parameter, its group, whether the step is its first).
Stepped = tuple[Tensor, dict[str, Any], bool]


def check_has_derivative(optimizer: Optimizer, *, approximate: bool = False) -> None:
    """Refuses, before any step, an optimizer whose step has no derivative that is known or can be found.

    Raises:
        TypeError: for an optimizer that is none, and one whose step for an element depends on other elements, or not on
            the size of the gradient, unless ``approximate``.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"AdaLFL: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if type(optimizer) not in _RULES and not approximate:
        check_elementwise(optimizer)


class StepJacobian:
    r"""The diagonal of :math:`\partial\,\mathrm{step}/\partial g` for ``optimizer``'s next step.

    With :math:`\theta' = \theta - \mathrm{step}(g)`, each element of a step depends on one element of the gradient: of
    SGD, Adam, AdamW, RMSprop and Adagrad in closed form, of any other elementwise optimizer as its own step in float64
    shows. The state from before the step is a constant. Make a StepJacobian before the step; :meth:`products` is for
    after it.

    Where a second moment and the gradient are both 0 the derivative is defined as 0: unrolling gives NaN there.

    Args:
        optimizer: with any of its options; :func:`check_has_derivative` has let it pass.
        approximate: take the step of one without a closed form for ``lr * g``, SGD's.
        saved: a copy of the optimizer's state before the step, for those without a closed form.

    Raises:
        ValueError: for sparse or complex gradients, a parameter in two groups, and hooks on the optimizer's step, which
            may change it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        approximate: bool = False,
        saved: dict[Tensor, dict[str, Any]] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.rule = _RULES.get(type(optimizer), _identity if approximate else None)
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise ValueError("AdaLFL: optimizer must have no step hooks, whose effect is not known, got some")
        self.adaptive = type(optimizer).__name__ in _ADAPTIVE
        self.stepped: list[Stepped] = []
        for parameter, group in parameters_of(optimizer):
            grad = parameter.grad
            if grad is None:
                continue
            if grad.is_sparse or grad.is_complex():
                raise ValueError(
                    f"AdaLFL: gradients must be dense and real, got {'sparse' if grad.is_sparse else 'complex'}"
                )
            self.stepped.append((parameter, group, _is_first(optimizer.state.get(parameter, {}))))
        self.numeric = None
        if self.rule is None:
            self.numeric = NumericDerivative(optimizer, [p for p, *_ in self.stepped], saved or {})

    @property
    def learns_nearly_nothing(self) -> bool:
        """Whether the step hardly depends on the size of the gradient: the first one of an adaptive optimizer."""
        return self.adaptive and any(first for *_, first in self.stepped)

    @property
    def needs_gradients(self) -> bool:
        """Whether :meth:`products` reads the gradients of the step."""
        return self.rule not in (_sgd, _identity, None)

    @torch.no_grad()
    def products(self, vectors: list[Tensor], before: list[Tensor]) -> tuple[list[Tensor], float]:
        """The derivative times ``vectors``, after the step; if it ``needs_gradients`` they must be those of the step.

        Args:
            vectors: in the order of ``stepped``; they are overwritten.
            before: the parameters before the step, in the same order.

        Returns:
            Tensors, and a factor of them all.
        """
        if self.numeric is not None:
            for v, derivative in zip(vectors, self.numeric(before), strict=True):
                v *= derivative
            return vectors, 1.0
        derivatives: Iterator[Any] = (
            self.rule(parameter.grad, old, group, self.optimizer.state.get(parameter, {}), first)  # type: ignore[misc]
            for old, (parameter, group, first) in zip(before, self.stepped, strict=True)
        )
        if self.rule in (_sgd, _identity):
            numbers = list(derivatives)
            if len(set(numbers)) == 1:
                return vectors, numbers[0]
            derivatives = iter(numbers)
        for v, derivative in zip(vectors, derivatives, strict=True):
            v *= derivative
        return vectors, 1.0


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The optimizer's parameters, each with its group."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in seen:
                raise ValueError("AdaLFL: a parameter must be in one group of the optimizer, got one in two")
            seen.add(id(parameter))
            yield parameter, group


def _is_first(state: dict[str, Any]) -> bool:
    # Adagrad makes its state when it is made, the others with their first step.
    return not state or ("sum" in state and float(state["step"]) == 0)


def _count(state: dict[str, Any]) -> Any:
    """The number of steps: exactly, or where it lives on a GPU a tensor, for reading it would wait."""
    step = state["step"]
    return float(step) if step.device.type == "cpu" else step


# ---- One rule per optimizer: the derivative as a number or a tensor, from the gradient g, the parameter before the
# step, the group's options and the state after the step.


def _signed(g: Tensor, before: Tensor, group: dict[str, Any], decays: bool = True) -> tuple[Tensor, float]:
    """The gradient that enters the moments, and its derivative in g."""
    sign = -1.0 if group.get("maximize") else 1.0
    decay = group["weight_decay"] if decays else 0
    total = -g if sign < 0 else g
    return (total.add(before, alpha=decay) if decay else total), sign


def _identity(g: Tensor, before: Tensor, group: dict[str, Any], state: dict[str, Any], first: bool) -> Any:
    return float(group["lr"])


def _sgd(g: Tensor, before: Tensor, group: dict[str, Any], state: dict[str, Any], first: bool) -> Any:
    sign = -1.0 if group["maximize"] else 1.0
    momentum = group["momentum"]
    # The first step puts the gradient into the buffer whole.
    share = 1.0 if not momentum or first else 1.0 - group["dampening"]
    if momentum and group["nesterov"]:
        share = 1.0 + momentum * share
    return float(group["lr"]) * sign * share


def _adam(g: Tensor, before: Tensor, group: dict[str, Any], state: dict[str, Any], first: bool) -> Any:
    decoupled = group.get("decoupled_weight_decay", False)
    total, sign = _signed(g, before, group, decays=not decoupled)
    beta1, beta2 = (float(b) for b in group["betas"])
    step = _count(state)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    moment = state["exp_avg_sq"]
    follows: Tensor | float = 1.0
    if group["amsgrad"]:
        follows = (state["max_exp_avg_sq"] == moment).to(g.dtype)  # the largest so far, or this one
        moment = state["max_exp_avg_sq"]
    root = (moment / correction2).sqrt()
    denominator = root + group["eps"]
    slope = (1 - beta1) / correction1 / denominator
    root_slope = follows * (1 - beta2) / correction2 * total / root
    slope = slope - state["exp_avg"] / correction1 / denominator**2 * root_slope
    return float(group["lr"]) * sign * slope.where(moment > 0, 0)


def _rmsprop(g: Tensor, before: Tensor, group: dict[str, Any], state: dict[str, Any], first: bool) -> Any:
    total, sign = _signed(g, before, group)
    share = 1 - float(group["alpha"])
    variance = state["square_avg"]
    deviation = total
    if group["centered"]:
        variance = variance - state["grad_avg"] ** 2
        deviation = total - state["grad_avg"]
    root = variance.sqrt()
    denominator = root + group["eps"]
    slope = 1 / denominator - total / denominator**2 * (share * deviation / root)
    return float(group["lr"]) * sign * slope.where(variance > 0, 0)


def _adagrad(g: Tensor, before: Tensor, group: dict[str, Any], state: dict[str, Any], first: bool) -> Any:
    total, sign = _signed(g, before, group)
    rate = float(group["lr"]) / (1 + (_count(state) - 1) * group["lr_decay"])
    root = state["sum"].sqrt()
    denominator = root + group["eps"]
    slope = 1 / denominator - total**2 / (root * denominator**2)
    return rate * sign * slope.where(state["sum"] > 0, 0)


_RULES: dict[type, Callable[..., Any]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}

# Whose first step hardly depends on the size of the gradient.
_ADAPTIVE = ("Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "Adadelta", "Rprop")
