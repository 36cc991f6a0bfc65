"""The part of a model that each child has of its own, where they share the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def head_of(model: nn.Module, head: str | nn.Module) -> nn.Module:
    """The module of the model that is meant.

    Raises:
        TypeError: for what is neither a name nor a module.
        ValueError: for one that the model does not have.
    """
    if isinstance(head, str):
        known = dict(model.named_modules())
        if head not in known:
            own = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"Population: head must be a module of the model, whose children are {own}, got {head!r}"
            )
        return known[head]
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"Population: head must be the name of a module, or a module, got {type(head).__name__}"
        )
    if all(module is not head for module in model.modules()):
        raise ValueError(f"Population: head must be a module of the model, got another {type(head).__name__}")
    return head


def shared_names(model: nn.Module, head: nn.Module, trained: Iterable[str]) -> set[str]:
    """The names of trained parameters and of buffers that are not the head's.

    Raises:
        ValueError: for a head without a parameter that is trained, and one that has a tensor in common with the rest.
    """
    own = {id(t) for t in (*head.parameters(), *head.buffers())}
    inside = set(head.modules())
    for module in model.modules():
        if module not in inside:
            for name, t in (*module._parameters.items(), *module._buffers.items()):
                if t is not None and id(t) in own:
                    raise ValueError(
                        f"Population: head must have weights of its own, got one that shares {name} {list(t.shape)} "
                        f"with a {type(module).__name__} outside; leave head out"
                    )
    parameters = dict(model.named_parameters())
    kept = {name for name in trained if id(parameters[name]) in own}
    if not kept:
        raise ValueError(
            f"Population: head must have a parameter that the optimizer trains, got a {type(head).__name__} without "
            "any"
        )
    tensors: dict[str, Tensor] = dict(model.named_buffers())
    return {name for name in trained if name not in kept} | {
        name for name, b in tensors.items() if id(b) not in own
    }


def without_lost(heads: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The weights ``[B, ...]`` with 0 for children who have one that is not finite, and who has not, ``[B]``.

    So the trunk learns from the others alone: what is lost has no gradient, but a product with NaN would.
    """
    alive = torch.stack([w.detach().flatten(1).isfinite().all(1) for w in heads.values()]).all(0)
    return {name: w.where(alive.view(-1, *[1] * (w.dim() - 1)), 0) for name, w in heads.items()}, alive
