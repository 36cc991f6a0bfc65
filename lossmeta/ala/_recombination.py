"""Several models, and their optimizers, that become their mean."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._optimizers import unwrapped


def check_alike(models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """Refuses models and optimizers that have no mean.

    Raises:
        TypeError: for what is no optimizer.
        ValueError: for another number of optimizers than of models, a model that is given twice, models of other
            parameters, and an optimizer that is not of its model's.
    """
    for optimizer in optimizers:
        if not isinstance(unwrapped(optimizer), Optimizer):
            raise TypeError(
                f"Controller: optimizers must be torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
    if len(optimizers) != len(models):
        raise ValueError(
            f"Controller: optimizers must be {len(models)}, one of each child, got {len(optimizers)}"
        )
    own = [{id(p): i for i, p in enumerate(model.parameters())} for model in models]
    if len({i for ids in own for i in ids}) < sum(map(len, own)):
        raise ValueError(
            "Controller: models must have weights of their own, got some that share them; copy the first by "
            "copy.deepcopy"
        )
    shapes = [[(t.shape, t.dtype) for t in (*m.parameters(), *m.buffers())] for m in models]
    if any(s != shapes[0] for s in shapes):
        raise ValueError(
            "Controller: models must have parameters and buffers of the same shapes and dtypes, got others; copy the "
            "first by copy.deepcopy"
        )
    held = [[ids.get(id(p)) for p in _parameters(o)] for ids, o in zip(own, optimizers, strict=True)]
    if any(None in h or h != held[0] for h in held):
        raise ValueError(
            "Controller: optimizers must each hold the same parameters of its own model, got others; give them in the "
            "order of the models"
        )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def mean_of(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """With weights ``[B]`` whose sum is 1; what is no floating-point number is the heaviest's.

    One of weight 0 has no part in it, whatever it holds.
    """
    heaviest = tensors[int(weight.argmax())]
    if not heaviest.is_floating_point():
        return heaviest.clone()
    dtype = torch.promote_types(heaviest.dtype, torch.float32)
    total = torch.zeros_like(heaviest, dtype=dtype)
    for t, w in zip(tensors, weight.tolist(), strict=True):
        if w > 0:
            total += w * t.to(total)
    return total.to(heaviest.dtype)


@torch.no_grad()
def recombine(models: Sequence[nn.Module], optimizers: Sequence[Optimizer], weight: Tensor) -> None:
    """All models, and the states of their optimizers, become the mean with these weights ``[B]``, see :func:`mean_of`.

    Of a state, tensors of their weight's shape are averaged. All else is the heaviest's.
    """
    kept = [unwrapped(o) for o in optimizers]
    tensors = [[*m.parameters(), *m.buffers()] for m in models]
    parameters = [_parameters(o) for o in kept]
    # All is there before anything is overwritten.
    means = [mean_of(parts, weight) for parts in zip(*tensors, strict=True)]
    states = [
        _mean_state(ps, [o.state.get(p, {}) for o, p in zip(kept, ps, strict=True)], weight)
        for ps in zip(*parameters, strict=True)
    ]
    for own in tensors:
        for t, mean in zip(own, means, strict=True):
            t.copy_(mean)
    for optimizer, ps in zip(kept, parameters, strict=True):
        for p, state in zip(ps, states, strict=True):
            # A part that stays on the CPU beside weights elsewhere, such as a count of steps, stays there.
            own_state = {
                key: copy.deepcopy(v)
                if not isinstance(v, Tensor)
                else v.to(p.device if v.device.type != "cpu" else v.device, copy=True)
                for key, v in state.items()
            }
            if own_state:
                optimizer.state[p] = own_state
            else:
                optimizer.state.pop(p, None)


def _mean_state(
    parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], weight: Tensor
) -> dict[str, Any]:
    heaviest = int(weight.argmax())
    return {
        key: mean_of([s[key] for s in states], weight)
        if isinstance(value, Tensor)
        and value.shape == parameters[heaviest].shape
        and all(key in s for s in states)
        else value
        for key, value in states[heaviest].items()
    }
