"""Optimizers of other weights than their own."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
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
