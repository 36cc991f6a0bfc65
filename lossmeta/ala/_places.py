"""A call of a model with other weights and buffers than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lossmeta._batches import call_model


class Places:
    """Where a model's modules keep their tensors, to put others there for a call.

    As ``torch.func.functional_call``, but cheaper: it costs every step of the children.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        names = {id(t): name for name, t in tensors.items()}
        self.found: list[tuple[dict[str, Any], str, str]] = [
            (kept, key, names[id(t)])
            for module in model.modules()
            for kept in (module._parameters, module._buffers)
            for key, t in kept.items()
            if t is not None and id(t) in names
        ]

    def call(self, tensors: dict[str, Tensor], inputs: Any) -> Any:
        """The model with these tensors; those that it puts in their place come back in ``tensors``."""
        before = [(kept, key, kept[key]) for kept, key, _ in self.found]
        for kept, key, name in self.found:
            kept[key] = tensors[name]
        try:
            return call_model(self.model, inputs)
        finally:
            for kept, key, name in self.found:
                tensors[name] = kept[key]
            for kept, key, t in before:
                kept[key] = t
