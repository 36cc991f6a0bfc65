"""Optimizers of other weights than their own."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

State = dict[Tensor, dict[str, Any]]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself in the wrappers of Lightning and accelerate."""
    # By all their classes: Lightning's calls itself LightningSGD, as a class of its own and SGD's.
    while {c.__name__ for c in type(optimizer).__mro__} & {"LightningOptimizer", "AcceleratedOptimizer"}:
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def shadow(optimizer: Optimizer, groups: list[dict[str, Any]], state: State) -> Optimizer:
    """The same optimizer of other weights, without its hooks."""
    found = copy.copy(optimizer)
    # A scheduler wraps the step of the instance.
    found.__dict__.pop("step", None)
    found._optimizer_step_pre_hooks = OrderedDict()
    found._optimizer_step_post_hooks = OrderedDict()
    found.param_groups = groups
    found.state = defaultdict(dict, {p: s for p, s in state.items() if s})
    return found


def plainest(group: dict[str, Any]) -> dict[str, Any]:
    """The group's options with the implementation that takes any tensor."""
    plain = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
    return {**group, **{k: v for k, v in plain.items() if k in group}}


def refuse_changed_steps(where: str, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Refuses hooks and replaced methods, which a step of other weights would pass by."""
    hooked = bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
    step = optimizer.__dict__.get("step")  # a scheduler's counts its calls, and is known by this name
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    on_weights = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    if hooked or replaced or on_weights:
        what = (
            "a replaced step"
            if replaced
            else "hooks on its step"
            if hooked
            else "hooks on its weights' gradients"
        )
        raise ValueError(f"{where}: optimizer must step as its class does, whose effect is known, got {what}")
